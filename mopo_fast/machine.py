"""What the machine must have for what is asked, refused before the work begins."""

import os
import tempfile
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mopo_fast.errors import InputError

# A kernel call has no use for more.
MAX_THREADS = 2**15


def check_device(device: torch.device | str) -> None:
    """Raise `InputError` where nothing can be computed on `device`."""
    try:
        # An empty tensor would be had on "meta" too, which holds no values.
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r} cannot be used ({error}); try cpu") from error


def device_name(device: torch.device | str) -> str:
    """ "cpu", or what a GPU is called."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def resolve_threads(threads: int | None) -> int:
    """`threads`, or for None one for each core that this process may use.

    Raises:
        InputError: not a whole number, or out of range.
    """
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads < MAX_THREADS:
        raise InputError(f"threads must be a whole number, 1 <= threads < {MAX_THREADS}, got {threads!r}")
    return threads


def check_memory(what: str, size: int, device: torch.device | str, lower: str) -> None:
    """Raise `InputError` where `what`, of `size` bytes, is more than all the memory of `device`."""
    device = torch.device(device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > total:
        raise InputError(
            f"{what} would take {size / 2**30:,.0f} GiB, {device} has {total / 2**30:,.0f} GiB; lower {lower}"
        )


def file_backed(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Zeros in a nameless temporary file (in `TMPDIR`): memory that the system may write out.

    Raises:
        InputError: there is no room for it.
    """
    try:
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize))
            return np.asarray(np.memmap(file, dtype, "r+", shape=shape))
    except OSError as error:
        raise InputError(
            f"no room in {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a folder with more"
        ) from error
