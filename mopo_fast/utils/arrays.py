"""Arrays of any library in, the same kind out: NumPy's, and what speaks DLPack, such as JAX's and CuPy's."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from mopo_fast.errors import InputError


def to_tensor(name: str, array: Any, device: torch.device) -> torch.Tensor:
    """`array` as a tensor, not copied where its memory can be shared.

    NumPy's arrays, which know the CPU alone, are put on `device`; all others stay where they are.

    Raises:
        InputError: it is no array, or one of a type that tensors do not have.
    """
    if isinstance(array, torch.Tensor):
        return array
    try:
        if isinstance(array, np.ndarray):
            # Tensors have neither negative strides, nor memory that may not be written, nor foreign bytes.
            shared = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
            return torch.from_numpy(shared).to(device)
        if hasattr(array, "__dlpack__"):
            return from_dlpack(array)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise InputError(f"{name} cannot be read as a tensor: {error}") from error
    raise InputError(
        f"{name} must be a tensor, a NumPy array or one that speaks DLPack, got {type(array).__name__}"
    )


def maker_like(name: str, array: Any) -> Callable[[torch.Tensor], Any]:
    """What makes arrays of `array`'s kind from tensors, not copied where their memory can be shared.

    Raises:
        InputError: its library does not say how (`__array_namespace__` of the array API standard).
    """
    if isinstance(array, torch.Tensor):
        return lambda tensor: tensor
    if isinstance(array, np.ndarray):
        return lambda tensor: tensor.cpu().numpy()
    if not hasattr(array, "__array_namespace__"):
        raise InputError(
            f"{name}, a {type(array).__name__}, lacks __array_namespace__ of the array API standard, by which"
            " results become arrays of its kind; pass a tensor or a NumPy array"
        )
    make: Callable[[torch.Tensor], Any] = array.__array_namespace__().from_dlpack
    return make


def map_tensors(function: Callable[[torch.Tensor], Any], record: Any) -> Any:
    """A dataclass like `record` with `function` of each tensor in it."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    changed = {name: function(v) for name, v in values.items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(record, **changed)
