"""What the machine must have for what is asked, refused before the work begins."""

import os

import torch

from mopo_fast.errors import InputError


def check_device(device: torch.device | str) -> None:
    """Raise `InputError` where nothing can be computed on `device`."""
    try:
        # An empty tensor would be had on "meta" too, which holds no values.
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r} cannot be used ({error}); try cpu") from error


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
