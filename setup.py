"""Build mopo_fast._cpu, and mopo_fast._cuda for a GPU, with CMake. All else is in pyproject.toml.

Environment variables:
    MOPO_FAST_CUDA: auto (default) builds CUDA kernels if this machine has a GPU and nvcc, 1 builds them and
        requires nvcc, 0 builds none.
    MOPO_FAST_SANITIZE: sanitizers to build with, address,undefined or thread; leaves out CUDA.
    MOPO_FAST_WATCHDOG: 1 builds CUDA kernels that end after a wait of two seconds and report the wait
        (csrc/cuda/watchdog.cuh).
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


def cuda_option(devices: Path = Path("/dev")) -> str:
    """Return CMake's MOPO_FAST_CUDA. Without a GPU nobody waits for minutes for kernels that cannot run."""
    option = os.environ.get("MOPO_FAST_CUDA", "auto")
    # The second one is a GPU in Windows' subsystem for Linux.
    has_gpu = any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists()
    return "0" if option == "auto" and not has_gpu else option


class CMakeBuild(build_ext):
    """Build of all extensions in one CMake run."""

    def build_extensions(self) -> None:
        sanitize = os.environ.get("MOPO_FAST_SANITIZE", "")
        watchdog = os.environ.get("MOPO_FAST_WATCHDOG", "0")
        kind = sanitize.replace(",", "-") or ("release" if watchdog == "0" else "watchdog")
        build = ROOT / "build" / f"cmake-{kind}-{sys.implementation.cache_tag}"
        prefix = Path(self.get_ext_fullpath("mopo_fast._cpu")).resolve().parent.parent
        # Paths of the build environment's tools, which change in each isolated build.
        program = Path(cmake.CMAKE_BIN_DIR, "cmake")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR, "ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "MOPO_FAST_SANITIZE": sanitize,
            "MOPO_FAST_WATCHDOG": watchdog,
            "MOPO_FAST_CUDA": cuda_option(),
        }
        flags = [f"-D{name}={value}" for name, value in options.items()]
        for arguments in (
            ["-S", ROOT, "-B", build, "-G", "Ninja", *flags],
            ["--build", build],
            ["--install", build, "--prefix", prefix],
        ):
            if subprocess.run([program, *arguments], check=False).returncode != 0:
                sys.exit("the extensions could not be built; see the messages above")


EXTENSIONS = [
    Extension("mopo_fast._cpu", sources=[]),
    Extension("mopo_fast._cuda", sources=[], optional=True),
]
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": CMakeBuild})
