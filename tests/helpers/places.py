"""Paths of folders in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
TESTS = ROOT / "tests"
HELPERS = TESTS / "helpers"
RECORDED = TESTS / "recorded"
