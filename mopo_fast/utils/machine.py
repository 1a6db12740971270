"""Memory, threads and devices of the machine, and checks that refuse what it cannot do before the work."""

import contextlib
import ctypes
import mmap
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from mopo_fast.errors import InputError

# Upper limit of the threads of a kernel call.
MAX_THREADS = 2**15
# Bytes of a large page, as usual on x86-64 and AArch64.
_LARGE_PAGE = 2 << 20

_ROOT = Path("/")


def check_device(device: torch.device | str) -> None:
    """Raise `InputError` where nothing can be computed on `device`."""
    try:
        # Reading a value also refuses the device "meta", which holds none.
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        # PyTorch lists all its kernels for a device that this build lacks.
        why = str(error).strip().partition("\n")[0][:200]
        raise InputError(f"device {str(device)!r} cannot be used ({why}); try cpu") from error


def device_name(device: torch.device | str) -> str:
    """Return "cpu", or the name of a GPU."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def gl_library() -> str:
    """Return MuJoCo's OpenGL library, as MUJOCO_GL names it, for pictures without a window.

    Without a display MuJoCo would take GLFW, which fails. EGL runs with and without a GPU.
    """
    return os.environ.get("MUJOCO_GL") or ("glfw" if os.environ.get("DISPLAY") else "egl")


def resolve_threads(threads: int | None) -> int:
    """Return `threads`, or for None the number of cores that this process may use.

    Raises:
        InputError: `threads` is not a whole number, or is out of range.
    """
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads < MAX_THREADS:
        raise InputError(f"threads must be a whole number, 1 <= threads < {MAX_THREADS}, got {threads!r}")
    return threads


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of torch's threads during the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_memory() -> int:
    """Return the bytes that this process can still allocate.

    This is the least of what the machine, the process's control groups and its resource limits leave. Cached
    files and swap count as available.
    """
    machine = _kilobytes(_ROOT / "proc/meminfo")
    if "MemAvailable" in machine:
        available = [machine["MemAvailable"] + machine.get("SwapFree", 0)]
    else:
        available = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    used = _kilobytes(_ROOT / "proc/self/status")
    for limit, name in (resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData"):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            available.append(most - used.get(name, 0))
    return max(0, min([*available, *_control_groups()]))


def map_mode() -> Literal["c", "r"]:
    """Return the mode in which `np.memmap` maps a file that is only read.

    The mode is copy on write. If a kernel writes its results to such an array by mistake, it changes this
    process's copy; a write to a read-only mapping would crash the process. The mode is read-only where the
    system reserves memory for all copies in advance, because files larger than the memory could not be
    mapped there.
    """
    counted = resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY
    with contextlib.suppress(OSError):
        counted = counted or (_ROOT / "proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    return "r" if counted else "c"


def _kilobytes(path: Path) -> dict[str, int]:
    """Read the sizes in a file of /proc, in bytes, by name. Without such a file the result is empty."""
    try:
        fields = (line.split() for line in path.read_text().splitlines())
        return {field[0].rstrip(":"): 1024 * int(field[1]) for field in fields if field[-1] == "kB"}
    except OSError:
        return {}


def _control_groups() -> Iterator[int]:
    """Yield the bytes that each control group of this process still allows, in versions 1 and 2."""
    try:
        lines = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, limit, usage, cached = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        mounted = _ROOT / "sys/fs/cgroup" / root
        inside = mounted / name.lstrip("/")
        for folder in [inside, *(parent for parent in inside.parents if parent.is_relative_to(mounted))]:
            # The root group has no such files. A limit of "max" is none.
            with contextlib.suppress(OSError, ValueError):
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / usage).read_text()) - int(statistics.get(cached, 0))
                yield int((folder / limit).read_text()) - used


def check_memory(what: str, size: int, device: torch.device | str, lower: str) -> None:
    """Raise `InputError` where something does not fit into the memory of a device.

    A GPU is taken to be empty, since PyTorch keeps the memory that it has once allocated.

    Args:
        what: name of the thing, for the error message.
        size: its size in bytes.
        device: device that must hold it.
        lower: name of the setting that the user should lower, for the error message.
    """
    device = torch.device(device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = available_memory()
    if size > total:
        raise InputError(
            f"{what} would take {size_text(size)}, {device} has {size_text(total)}; lower {lower}"
        )


def size_text(size: int) -> str:
    """Write a number of bytes in the unit, up to GiB, that leaves it at least 1, such as "1.5 MiB"."""
    value, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    number = f"{value:,.1f}" if value < 10 else f"{value:,.0f}"
    return f"{number.removesuffix('.0')} {unit}"


def large_zeros(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return zeros, on the CPU in Linux's large pages where the system has them.

    Random reads of rows then need fewer walks through page tables. Pages keep the size that they have when
    they are first written to, so the advice comes before the zeros.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    _advise_large_pages(tensor)
    return tensor.zero_()


def _advise_large_pages(tensor: torch.Tensor) -> None:
    """Ask Linux for large pages for a CPU tensor that has not been written to yet; it may refuse."""
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-first // _LARGE_PAGE) * _LARGE_PAGE, last // _LARGE_PAGE * _LARGE_PAGE
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if tensor.device.type == "cpu" and first < last and advice is not None:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


def file_backed(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Return zeros in an unnamed temporary file in `TMPDIR`, which the system may write to disk.

    Raises:
        InputError: there is no room for the file.
    """
    try:
        with tempfile.TemporaryFile() as file:
            size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
            # macOS has no such call; there the file takes its room as it is written.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return np.asarray(np.memmap(file, dtype, "r+", shape=shape))
    except OSError as error:
        raise InputError(
            f"no room in {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a folder with more"
        ) from error
