"""Named tensors in safetensors files, which are written atomically and checked when read."""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import atomic_path
from mopo_fast.utils.machine import check_memory

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_tensors(
    path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors`, from any device, with string `metadata`."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors' own writer makes another temporary file, which would stay if the process is killed.
    content = safetensors.torch.save(stored, metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file to the CPU.

    Raises:
        InputError: the file is missing, truncated or not a safetensors file, or a value is not finite.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist")
    # The check needs a copy of a tensor.
    check_memory(f"{path}", 2 * Path(path).stat().st_size, "cpu", "its size")
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
    # A damaged file may raise any exception.
    except Exception as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); make it again") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if tensor.dtype not in _FLOATS:
            raise InputError(f"{path}: {name} is of {tensor.dtype}, which no file of this package has")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: {name} holds values that are not finite")
    return tensors


def layer_weights(
    path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], ndim: int
) -> list[torch.Tensor]:
    """Return weight_0, weight_1, ... of a file, in order.

    Raises:
        InputError: there is none, one is missing, or one does not have `ndim` dimensions.
    """
    count = sum(name.startswith("weight_") for name in tensors)
    names = [f"weight_{layer}" for layer in range(max(1, count))]
    for name in names:
        if name not in tensors:
            raise InputError(f"{path} lacks {name}")
        if tensors[name].ndim != ndim:
            shape = tuple(tensors[name].shape)
            raise InputError(f"{path}: {name} must have {ndim} dimensions, got shape {shape}")
    return [tensors[name] for name in names]


def check_layers(weights: Sequence[torch.Tensor], ndim: int) -> None:
    """Raise `InputError` unless each layer has as many inputs as the one before has outputs.

    A network made with the sizes of checked weights takes no more memory than the weights do.

    Args:
        weights: weights [..., in, out] of each layer.
        ndim: number of dimensions that they must have.
    """
    if not weights:
        raise InputError("there are no layers")
    for weight in weights:
        if weight.ndim != ndim:
            raise InputError(f"a layer's weights must have {ndim} dimensions, got shape {list(weight.shape)}")
    for before, after in itertools.pairwise(weights):
        if before.shape[:-2] != after.shape[:-2] or before.shape[-1] != after.shape[-2]:
            raise InputError(
                f"a layer's tensor has shape {list(after.shape)}, the one before has {list(before.shape)}"
            )


def check_sizes(
    path: str | os.PathLike[str], weights: Sequence[torch.Tensor], inputs: int, outputs: int
) -> None:
    """Raise `InputError` unless weights [..., in, out] fit each other and the sizes of input and output."""
    try:
        check_layers(weights, weights[0].ndim)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    for layer, axis, size in ((0, -2, inputs), (len(weights) - 1, -1, outputs)):
        if weights[layer].shape[axis] != size:
            kind = "inputs" if axis == -2 else "outputs"
            shape = list(weights[layer].shape)
            raise InputError(f"{path}: weight_{layer} has shape {shape}, expected {size} {kind}")


def as_float32(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert floating tensors to float32; raise `InputError` where a value is not finite then."""
    others = [
        tensor.numel()
        for tensor in tensors.values()
        if tensor.is_floating_point() and tensor.dtype != torch.float32
    ]
    check_memory(f"{path} in float32", 4 * sum(others), "cpu", "its size")
    made = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    for name, tensor in made.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: {name} holds values that are not finite")
    return made


def require_shape(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], name: str, shape: torch.Size
) -> None:
    """Raise `InputError` unless `tensors[name]` exists and has this shape."""
    if name not in tensors:
        raise InputError(f"{path} lacks {name}")
    if tensors[name].shape != shape:
        raise InputError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(shape)}")


@torch.no_grad()
def load_into(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
) -> None:
    """Copy `tensors` into the `targets` of the same names, which may be on another device.

    Args:
        path: the file of the tensors, for error messages.
        tensors: tensors by name.
        targets: tensors to change, by name.

    Raises:
        InputError: a tensor is missing, or has another shape or type.
    """
    for name, target in targets.items():
        require_shape(path, tensors, name, target.shape)
        if tensors[name].dtype != target.dtype:
            raise InputError(f"{path}: {name} is of {tensors[name].dtype}, expected {target.dtype}")
        target.copy_(tensors[name])


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata that `save_tensors` was given.

    Raises:
        InputError: the file is missing, truncated or not a safetensors file.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); make it again") from error


def tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 digest of the tensors' names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of torch's threads during the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
