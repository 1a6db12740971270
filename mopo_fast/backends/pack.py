"""A network's parameters as the Triton kernels read them: padded, rounded, one layer after the other."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from mopo_fast.ensemble import round_factor

# Of the sizes of layers: the least that a tensor core multiplies.
MULTIPLE = 16


def round_up(size: int) -> int:
    return size + -size % MULTIPLE


def storage_dtype(operands: str) -> torch.dtype:
    """What factors of products in `operands` (one of `config.ROLLOUT_DTYPES`) are kept in."""
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

    def padded(tensor: torch.Tensor, dims: int) -> torch.Tensor:
        widths = [width for size in reversed(tensor.shape[-dims:]) for width in (0, -size % MULTIPLE)]
        return functional.pad(tensor, widths).flatten(-dims).reshape(-1, _count(tensor.shape[-dims:]))

    factors = [round_factor(weight, operands).to(storage_dtype(operands)) for weight in weights]
    sizes = (weights[0].shape[-2], *(weight.shape[-1] for weight in weights))
    return PackedNetwork(
        tuple(map(round_up, sizes)),
        torch.cat([padded(factor, 2) for factor in factors], dim=1),
        torch.cat([padded(bias, 1) for bias in biases], dim=1),
    )


def _count(shape: torch.Size) -> int:
    count = 1
    for size in shape:
        count *= round_up(size)
    return count
