"""Files of torch.save, read without running what is in them, written whole or not at all."""

import io
import os
from pathlib import Path
from typing import Any

import torch

from mopo_fast.atomic import atomic_path
from mopo_fast.errors import InputError


def load(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` has written, if it is tensors in containers, on the CPU.

    Raises:
        InputError: the file is missing or damaged, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file fails in any way.
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is not a whole file of tensors ({why}); get or make it again") from error


def load_state(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """A state dict: finite tensors by their names.

    Raises:
        InputError: as `load`; or it is no state dict, or a value is not finite.
    """
    state = load(path)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} is not a state dict: tensors by their names")
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{path}: {name} holds values that are not finite")
    return dict(state)


def take(path: str | os.PathLike[str], state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """`state[name]`; raise `InputError` where there is none."""
    if name not in state:
        raise InputError(f"{path} lacks {name}; it has {', '.join(sorted(state)) or 'nothing'}")
    return state[name]


def save(path: str | os.PathLike[str], value: Any) -> None:
    """`torch.save`, atomically."""
    content = io.BytesIO()
    torch.save(value, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())
