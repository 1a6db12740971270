"""A network's parameters as the Triton kernels read them: padded, rounded, one layer after the other."""

import itertools
from dataclasses import dataclass

import torch

from mopo_fast.ensemble import round_factor

# Layers' sizes are rounded up to a multiple of the least that a tensor core multiplies.
MULTIPLE = 16


def round_up(size: int) -> int:
    return size + -size % MULTIPLE


def storage_dtype(operands: str) -> torch.dtype:
    """Give the type to keep factors in, for products in `operands`, one of `config.ROLLOUT_DTYPES`."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(operands, torch.float32)


@dataclass(frozen=True, eq=False)
class PackedNetwork:
    """`sizes` of inputs, hidden layers and outputs, rounded up; what is added is zero, and activates to zero.

    `weights` [networks, sum of in * out] in `storage_dtype`, `biases` [networks, sum of out] in float32.
    """

    sizes: tuple[int, ...]
    weights: torch.Tensor
    biases: torch.Tensor


def pack(weights: list[torch.Tensor], biases: list[torch.Tensor], operands: str) -> PackedNetwork:
    """Pack `weights[i]` [networks, in, out], `biases[i]` [networks, out], or one network's."""
    sizes = [round_up(size) for size in (weights[0].shape[-2], *(weight.shape[-1] for weight in weights))]
    shapes = list(itertools.pairwise(sizes))
    networks, dtype = biases[0].numel() // biases[0].shape[-1], storage_dtype(operands)
    all_weights = weights[0].new_zeros(networks, sum(rows * columns for rows, columns in shapes), dtype=dtype)
    all_biases = biases[0].new_zeros(networks, sum(sizes[1:]))
    places = all_weights.split([rows * columns for rows, columns in shapes], dim=1)
    for place, shape, weight in zip(places, shapes, weights, strict=True):
        # Copying rounds to 16 bits.
        factor = round_factor(weight, operands) if dtype == weight.dtype else weight
        place.unflatten(1, shape)[:, : weight.shape[-2], : weight.shape[-1]] = factor
    for place, bias in zip(all_biases.split(sizes[1:], dim=1), biases, strict=True):
        place[:, : bias.shape[-1]] = bias
    return PackedNetwork(tuple(sizes), all_weights, all_biases)
