"""Examine this machine: hardware, installed packages, and the backends that can run here."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from mopo_fast import __version__, backends
from mopo_fast.backends import cpu
from mopo_fast.backends.precision import dtypes_of
from mopo_fast.data import d4rl
from mopo_fast.data.local import local_folder
from mopo_fast.errors import InputError, printable
from mopo_fast.utils.machine import gl_library, resolve_threads

# Program that renders a picture without a window.
_RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco/>")
with mujoco.Renderer(model, 16, 16) as renderer:
    renderer.update_scene(mujoco.MjData(model))
    renderer.render()
"""
# Most seconds that rendering a picture may take.
_RENDER_SECONDS = 30.0
PACKAGES = ("torch", "triton", "numpy", "gymnasium", "mujoco", "h5py", "safetensors", "tensorboard")
# Flags in /proc/cpuinfo of the instruction sets that the CPU kernels are built for.
ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Machine:
    """The hardware and the system.

    Attributes:
        system: name and version of the operating system.
        cpu: model of the CPU.
        cores: number of cores that this process may use.
        memory_gib: memory in GiB, or None where the system does not tell.
        isa_flags: those of `ISA_FLAGS` that the CPU has.
        isa: instruction set that the CPU kernels chose, or None where the extension is missing.
    """

    system: str
    cpu: str
    cores: int
    memory_gib: float | None
    isa_flags: list[str]
    isa: str | None


@dataclass(frozen=True)
class Folder:
    """A folder of data sets and the files in it."""

    path: str
    files: list[str]


@dataclass(frozen=True)
class Ability:
    """Something that this machine can or cannot do, with the reason."""

    available: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything that `mopo-fast doctor` prints.

    Attributes:
        version: version of this package.
        python: version and path of the interpreter.
        packages: versions of `PACKAGES`, None where one is missing.
        machine: the hardware and the system.
        extension: path of the compiled extension, or None where it is missing.
        torch_threads: number of threads that torch uses.
        backends: every backend, with the reason why it can or cannot run.
        precision: the lowest precision that is faster, as --matmul-precision takes it, and why, by device.
        rendering: rendering without a window, for videos.
        mp4: encoding of MP4 videos.
        folders: the folders of data sets, by the kind of their sets.
    """

    version: str
    python: str
    packages: dict[str, str | None]
    machine: Machine
    extension: str | None
    torch_threads: int
    backends: list[backends.BackendStatus]
    precision: dict[str, str]
    rendering: Ability
    mp4: Ability
    folders: dict[str, Folder]

    def text(self) -> str:
        """Format the report as a table for people."""
        machine = self.machine
        memory = "unknown" if machine.memory_gib is None else f"{machine.memory_gib:.1f} GiB"
        packages = ", ".join(f"{name} {version or 'missing'}" for name, version in self.packages.items())
        lines = [
            ("mopo_fast", f"{self.version}, Python {self.python}"),
            ("packages", packages),
            ("system", machine.system),
            ("CPU", f"{machine.cpu}, {machine.cores} cores, {memory}"),
            ("ISA", f"{machine.isa or 'none'}, of {' '.join(machine.isa_flags) or 'no vector flags'}"),
            ("extension", self.extension or "not built: see backend cpu"),
            ("torch threads", str(self.torch_threads)),
        ]
        abilities: list[tuple[str, Ability | backends.BackendStatus]] = [
            *((f"backend {status.name}", status) for status in self.backends),
            ("rendering", self.rendering),
            ("MP4 videos", self.mp4),
        ]
        for name, ability in abilities:
            lines.append((name, f"{'yes' if ability.available else 'no'}: {ability.reason}"))
        lines += [(f"precision {device}", choice) for device, choice in self.precision.items()]
        for name, folder in self.folders.items():
            lines.append((f"{name} data", f"{folder.path}: {', '.join(folder.files) or 'empty'}"))
        width = max(len(key) for key, _ in lines)
        return "\n".join(f"{key:<{width}}  {value}" for key, value in lines)


def examine() -> Report:
    """Examine this machine and installation. What is missing is reported, and never an error."""
    extension, isa = _extension()
    d4rl_folder = d4rl.cache_path("hopper-medium-v2").parent
    return Report(
        version=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        packages={name: _version(name) for name in PACKAGES},
        machine=Machine(
            system=platform.platform(),
            cpu=_cpuinfo("model name") or platform.processor() or platform.machine(),
            cores=resolve_threads(None),
            memory_gib=_memory_gib(),
            isa_flags=[flag for flag in ISA_FLAGS if flag in _cpuinfo("flags").split()],
            isa=isa,
        ),
        extension=extension,
        torch_threads=torch.get_num_threads(),
        backends=backends.available(),
        precision={device: _precision(device) for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]},
        rendering=_rendering(),
        mp4=_mp4(),
        folders={
            "local": _folder(local_folder()),
            "D4RL": _folder(d4rl_folder),
        },
    )


def _extension() -> tuple[str | None, str | None]:
    """Return the path of the compiled extension and the instruction set it chose."""
    if not cpu.is_built():
        return None, None
    path = cpu.extension().__file__
    try:
        return path, cpu.isa()
    except InputError as error:
        return path, f"none: {error}"


def _precision(device: str) -> str:
    """Name the lowest precision that is faster on a device than float32, and the parts that take it."""
    try:
        dtypes = dtypes_of("medium", device)
        between = dtypes_of("high", device).rollout
    except InputError as error:
        return f"highest: {error}"
    if dtypes.rollout == "float32":
        return f"highest: {dtypes.why}"
    parts = "rollouts" if dtypes.training == "float32" else "the fit, rollouts and SAC"
    gain = (
        f", whose products are {cpu.bfloat16_gain():.0f} times as fast as in float32"
        if device == "cpu"
        else ""
    )
    why = f"; {dtypes.why}" if dtypes.why else ""
    return f"medium: {dtypes.rollout} for {parts}{gain}{why}; high: {between}"


def _rendering() -> Ability:
    """Render a picture in another process, because a broken OpenGL library may end or block it."""
    library = gl_library()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RENDER],
            env={**os.environ, "MUJOCO_GL": library},
            capture_output=True,
            text=True,
            timeout=_RENDER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Ability(False, f"no picture within {_RENDER_SECONDS:.0f} s; set MUJOCO_GL to egl or osmesa")
    if done.returncode == 0:
        return Ability(True, f"MuJoCo without a window, MUJOCO_GL={library}")
    why = printable((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:120])
    return Ability(
        False,
        f"MUJOCO_GL={library} fails ({why}); install libegl1 or libosmesa6, and set MUJOCO_GL to egl or"
        " osmesa",
    )


def _mp4() -> Ability:
    version = _version("imageio-ffmpeg")
    if version is None:
        return Ability(
            False, "install an encoder with `pip install '.[video]'` in the checkout; GIF needs none"
        )
    return Ability(True, f"imageio-ffmpeg {version}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo(key: str) -> str:
    """Return the first core's entry in /proc/cpuinfo, or an empty string where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key), "")


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return None


def _folder(path: Path) -> Folder:
    return Folder(str(path), sorted(file.name for file in path.glob("*.hdf5")))
