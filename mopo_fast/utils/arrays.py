"""Conversion between tensors and arrays of NumPy or any library with DLPack, such as JAX and CuPy."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from mopo_fast.errors import InputError


def to_tensor(name: str, array: Any, device: torch.device) -> torch.Tensor:
    """Convert `array` to a tensor that shares its memory where possible.

    NumPy arrays, which are always in the CPU's memory, are moved to `device`. All others stay where they are.

    Args:
        name: name of the array, for error messages.
        array: a tensor, a NumPy array, or an array that supports DLPack.
        device: device for NumPy arrays.

    Raises:
        InputError: `array` is not an array, or tensors do not have its type.
    """
    if isinstance(array, torch.Tensor):
        return array
    try:
        if isinstance(array, np.ndarray):
            # Tensors support neither negative strides, nor read-only memory, nor another byte order.
            shared = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
            return torch.from_numpy(shared).to(device)
        if hasattr(array, "__dlpack__"):
            return from_dlpack(array)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise InputError(f"{name} cannot be read as a tensor: {error}") from error
    raise InputError(
        f"{name} must be a tensor, a NumPy array or an array with DLPack, got {type(array).__name__}"
    )


def maker_like(name: str, array: Any) -> Callable[[torch.Tensor], Any]:
    """Return a function that converts tensors to arrays of `array`'s library, which share their memory.

    Args:
        name: name of the array, for error messages.
        array: a tensor, a NumPy array, or an array of a library with the array API standard.

    Raises:
        InputError: `array` lacks `__array_namespace__` of the array API standard.
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
    """Return a copy of the dataclass `record` with `function` applied to each of its tensors."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    changed = {name: function(v) for name, v in values.items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(record, **changed)
