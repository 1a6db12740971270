"""Build of CUDA sources for the emulator (machine.h), with g++ 12 or newer."""

import importlib.util
import subprocess
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
from places import CSRC

HERE = Path(__file__).parent
SEED, MULTIPROCESSORS = "MOPO_EMULATOR_SEED", "MOPO_EMULATOR_MULTIPROCESSORS"


def build(target: Path, sources: Iterable[Path], includes: Iterable[str | Path] = ()) -> Path:
    """Compile the sources and the emulator to the shared library `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++20", "-O3", "-march=native", "-fPIC", "-fvisibility=hidden", "-Wall"]
    flags += ["-Wno-unknown-pragmas", "-ftrivial-auto-var-init=pattern", "-ffp-contract=off"]
    flags += [f"-I{folder}" for folder in (HERE, CSRC, *includes)]
    # nvcc does this on its own.
    cuda = ["-x", "c++", "-D__CUDACC__", "-include", "cuda_runtime.h"]
    objects, commands = [], []
    for source in [*sources, *sorted(HERE.glob("*.cpp"))]:
        objects.append(str(target.parent / f"{target.name}.{source.name}.o"))
        language = cuda if source.suffix == ".cu" else []
        commands.append(["g++", *flags, *language, "-c", str(source), "-o", objects[-1]])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_compile, commands))
    _compile(["g++", "-shared", *objects, "-o", str(target)])
    return target


def _compile(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0 or run.stderr:
        raise RuntimeError(run.stderr)


def build_extension(folder: Path) -> ModuleType:
    """Load the package's CUDA extension for CPU tensors, built in `folder` unless it is there."""
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [CSRC / "bind_cuda.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]
    if not target.exists():
        build(target, sources, [pybind11.get_include(), sysconfig.get_paths()["include"]])
    # Under another name, since the extension for a GPU may be loaded too.
    spec = importlib.util.spec_from_file_location("cuda_emulator._cuda", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
