"""Real packages of others, installed into a folder of one test."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from places import HELPERS, ROOT


def run_with(
    packages: list[str], code: str, folder: Path, *, built_with: Sequence[str] = (), **environment: str
) -> str:
    """Run a program with `packages` installed and return its output.

    The test is skipped if the packages cannot be installed. They are installed without their dependencies,
    so `packages` must include these.

    Args:
        built_with: build tools of source packages that do not declare them themselves.
    """
    target = folder / "packages"
    # Our constraints do not apply to the build tools of their sources.
    outside = {key: value for key, value in os.environ.items() if not key.endswith("CONSTRAINT")}
    if built_with:
        tools = folder / "tools"
        _install(list(built_with), tools, outside)
        outside["PYTHONPATH"] = str(tools)
    _install([*(["--no-build-isolation"] if built_with else []), *packages], target, outside)
    paths = [str(ROOT), str(HELPERS), str(target)]
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


def _install(what: list[str], target: Path, environment: dict[str, str]) -> None:
    # --no-compile: few of the modules are ever imported.
    options = ["--quiet", "--no-deps", "--no-compile", "--target", str(target)]
    pip = [sys.executable, "-m", "pip", "install", *options, *what]
    installed = subprocess.run(pip, capture_output=True, text=True, timeout=600, env=environment)
    if installed.returncode:
        pytest.skip(f"{what[-1]} cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
