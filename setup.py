"""Build mopo_fast._cpu, and mopo_fast._cuda for a GPU, with CMake. All else is in pyproject.toml.

Without a C++ compiler neither is built, and the package computes everything in PyTorch.

Environment variables:
    MOPO_FAST_CUDA: auto (default) builds CUDA kernels if this machine has a GPU and nvcc, 1 builds them and
        requires nvcc, 0 builds none.
    MOPO_FAST_SANITIZE: sanitizers to build with, address,undefined or thread; leaves out CUDA.
    MOPO_FAST_WATCHDOG: 1 builds CUDA kernels that end after a wait of two seconds and report the wait
        (csrc/cuda/watchdog.cuh).
"""

import os
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

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


def find_compiler() -> str | None:
    """Return the path of the C++ compiler that CMake takes, or None without one.

    Raises:
        SystemExit: the environment variable CXX names a compiler that is not there.
    """
    if named := shlex.split(os.environ.get("CXX", "")):
        return shutil.which(named[0]) or sys.exit(
            f"CXX={named[0]} is not there; name another compiler, or none"
        )
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def origin(compiler: str) -> int:
    """Return a number that changes with the compiler, its version and this folder: CMake keeps all three."""
    command = shlex.split(os.environ.get("CXX", "")) or [compiler]
    version = subprocess.run([*command, "--version"], capture_output=True, check=False).stdout
    return zlib.crc32("\n".join([*command, compiler, str(ROOT), version.decode(errors="replace")]).encode())


def tool(name: str) -> str:
    """Return the path of a program that the build needs.

    Raises:
        SystemExit: it is not there.
    """
    return shutil.which(name) or sys.exit(
        f"the build needs {name}; install it, or leave out --no-build-isolation"
    )


class CMakeBuild(build_ext):
    """Build of all extensions in one CMake run."""

    def build_extensions(self) -> None:
        compiler = find_compiler()
        if compiler is None:
            print(WITHOUT_COMPILER, file=sys.stderr)
            return
        sanitize = os.environ.get("MOPO_FAST_SANITIZE", "")
        watchdog = os.environ.get("MOPO_FAST_WATCHDOG", "0")
        kind = sanitize.replace(",", "-") or ("release" if watchdog == "0" else "watchdog")
        build = ROOT / "build" / f"cmake-{kind}-{sys.implementation.cache_tag}-{origin(compiler):08x}"
        prefix = Path(self.get_ext_fullpath("mopo_fast._cpu")).resolve().parent.parent
        # Paths of the build environment's tools, which change in each isolated build.
        program = tool("cmake")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
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


WITHOUT_COMPILER = (
    "\n*** mopo_fast: there is no C++ compiler, so the kernels are not built. PyTorch computes everything,"
    " which is several times slower. Install g++ 11 or newer, then mopo_fast again. ***\n"
)
# Optional, so that an installation without a compiler misses no file. A build that fails ends setup.py.
EXTENSIONS = [
    Extension("mopo_fast._cpu", sources=[], optional=True),
    Extension("mopo_fast._cuda", sources=[], optional=True),
]
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": CMakeBuild})
