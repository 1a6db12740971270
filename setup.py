"""Builds mopo_fast._cpu, and mopo_fast._cuda where nvcc is found, with CMake; all else is in pyproject.toml.

Environment: MOPO_FAST_SANITIZE=address,undefined (or thread) builds with sanitizers, and without CUDA;
MOPO_FAST_CUDA=1 makes it an error that nvcc is missing, 0 does without it; MOPO_FAST_WATCHDOG=1 builds CUDA
kernels that end after two seconds of waiting and say who waits for what (csrc/cuda/watchdog.cuh).
"""

import os
import subprocess
import sys
from pathlib import Path

import cmake
import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures, builds and installs every extension in one CMake run."""

    def build_extensions(self) -> None:
        sanitize = os.environ.get("MOPO_FAST_SANITIZE", "")
        watchdog = os.environ.get("MOPO_FAST_WATCHDOG", "0")
        kind = sanitize.replace(",", "-") or ("release" if watchdog == "0" else "watchdog")
        build = ROOT / "build" / f"cmake-{kind}-{sys.implementation.cache_tag}"
        prefix = Path(self.get_ext_fullpath("mopo_fast._cpu")).resolve().parent.parent
        # The tools of the build environment by their paths: with build isolation these change every time.
        program = Path(cmake.CMAKE_BIN_DIR, "cmake")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR, "ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "MOPO_FAST_SANITIZE": sanitize,
            "MOPO_FAST_WATCHDOG": watchdog,
            "MOPO_FAST_CUDA": os.environ.get("MOPO_FAST_CUDA", "auto"),
        }
        flags = [f"-D{name}={value}" for name, value in options.items()]
        for arguments in (
            ["-S", ROOT, "-B", build, "-G", "Ninja", *flags],
            ["--build", build],
            ["--install", build, "--prefix", prefix],
        ):
            if subprocess.run([program, *arguments], check=False).returncode != 0:
                sys.exit("the extensions were not built; the messages above say why")


EXTENSIONS = [
    Extension("mopo_fast._cpu", sources=[]),
    Extension("mopo_fast._cuda", sources=[], optional=True),
]
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": CMakeBuild})
