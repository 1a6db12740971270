"""Networks packed for the Triton kernels: padded, rounded, one layer after the other."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from mopo_fast.ensemble import Norms, round_factor

# Smallest size that a tensor core multiplies; the sizes of all layers are rounded up to a multiple.
MULTIPLE = 16


def round_up(size: int) -> int:
    """Round a layer's size up to a multiple of `MULTIPLE`."""
    return size + -size % MULTIPLE


def storage_dtype(operands: str) -> torch.dtype:
    """Return the dtype that factors are stored in, for `operands`, one of `config.ROLLOUT_DTYPES`."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(operands, torch.float32)


@dataclass(frozen=True, eq=False)
class PackedNetwork:
    """One or more networks, padded with zeros. Padded units have activation zero.

    Attributes:
        sizes: sizes of inputs, hidden layers and outputs, rounded up.
        weights: [networks, sum of in * out] in `storage_dtype`.
        biases: [networks, sum of out] in float32.
    """

    sizes: tuple[int, ...]
    weights: torch.Tensor
    biases: torch.Tensor


def pack_norms(norms: Norms, sizes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack the scales and the shifts of layer norms, each [networks, sum of hidden sizes], zeros as padding.

    Args:
        norms: the layer norms of all hidden layers.
        sizes: as `PackedNetwork.sizes`.
    """

    def padded(arrays: Sequence[torch.Tensor]) -> torch.Tensor:
        parts = zip(arrays, sizes[1:-1], strict=True)
        return torch.cat([functional.pad(array, (0, size - array.shape[1])) for array, size in parts], dim=1)

    scales, shifts = norms
    return padded(scales), padded(shifts)


def pack(weights: list[torch.Tensor], biases: list[torch.Tensor], operands: str) -> PackedNetwork:
    """Pack the layers of one or more networks.

    Args:
        weights: [networks, in, out] of each layer, or [in, out] of one network.
        biases: [networks, out] of each layer, or [out].
        operands: one of `config.ROLLOUT_DTYPES`.
    """
    sizes = [round_up(size) for size in (weights[0].shape[-2], *(weight.shape[-1] for weight in weights))]
    shapes = list(itertools.pairwise(sizes))
    networks, dtype = biases[0].numel() // biases[0].shape[-1], storage_dtype(operands)
    all_weights = weights[0].new_zeros(networks, sum(rows * columns for rows, columns in shapes), dtype=dtype)
    all_biases = biases[0].new_zeros(networks, sum(sizes[1:]))
    places = all_weights.split([rows * columns for rows, columns in shapes], dim=1)
    for place, shape, weight in zip(places, shapes, weights, strict=True):
        # Copying rounds to 16 bits, so only tfloat32 is rounded here.
        factor = round_factor(weight, operands) if dtype == weight.dtype else weight
        place.unflatten(1, shape)[:, : weight.shape[-2], : weight.shape[-1]] = factor
    for place, bias in zip(all_biases.split(sizes[1:], dim=1), biases, strict=True):
        place[:, : bias.shape[-1]] = bias
    return PackedNetwork(tuple(sizes), all_weights, all_biases)
