"""Real packages of others, installed into a folder of a test's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_with(packages: list[str], code: str, folder: Path, **environment: str) -> str:
    """What a program prints that sees `packages` beside ours; the test is skipped where they cannot be had.

    They come without what they depend on: name all of it that is needed.
    """
    target = folder / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *packages]
    # The build tools of their sources are their own, none of ours.
    outside = {key: value for key, value in os.environ.items() if not key.endswith("CONSTRAINT")}
    installed = subprocess.run(pip, capture_output=True, text=True, timeout=300, env=outside)
    if installed.returncode:
        pytest.skip(f"{packages[0]} cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent), str(target)]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
            **environment,
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
