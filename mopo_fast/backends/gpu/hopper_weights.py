"""Networks as the Hopper kernel reads them: images of shared memory, in the order in which a step uses them.

A layer is its biases, then an image for every 16 inputs: [2][out / 8][8 outputs][8 inputs], what the tensor
cores take without a swizzle. It is cut into as few chunks of at most `SLOT_BYTES` as possible, whose numbers
of images differ by one at most. A thread of the kernel holds the dimensions q, 4 + q, 8 + q, ... (q = 0 .. 3)
of its rows; inputs and outputs stand where it finds its own.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn import functional

from mopo_fast.backends.gpu.pack import storage_dtype
from mopo_fast.backends.interface import DynamicsArrays, PolicyArrays, network_sizes
from mopo_fast.ensemble import round_factor

# As in csrc/cuda/rollout_sm90.cuh.
SLOT_BYTES = 26880
ACTION_SLOTS = 2
POLICY_WIDTH = 256


class HopperWeights(NamedTuple):
    """`data` uint8; int32 `chunk_bytes` of the chunks that it is made of."""

    data: torch.Tensor
    chunk_bytes: torch.Tensor


class _Part(NamedTuple):
    """One after the other for every network: `data` uint8 [networks, bytes], and a network's chunks."""

    data: torch.Tensor
    chunks: list[int]


def _padded(indices: list[int], count: int) -> list[int]:
    """-1 stands for nothing, that is zeros."""
    return indices + [-1] * (count - len(indices))


def input_order(dims: list[int]) -> list[int]:
    """Give each input's dimension: of 16 inputs, thread q has numbers 2 q, 2 q + 1, 2 q + 8, 2 q + 9."""
    dims = _padded(dims, len(dims) + -len(dims) % 16)
    return [
        dims[first + 4 * (2 * half + odd) + q]
        for first in range(0, len(dims), 16)
        for half in range(2)
        for q in range(4)
        for odd in range(2)
    ]


def head_order(size: int, slots: int) -> list[int]:
    """Give each column's output: a dimension's two, its mean and what follows the means, side by side."""
    means = _padded(list(range(size)), 4 * slots)
    return [-1 if mean < 0 else mean + other for mean in means for other in (0, size)]


def _layer(
    weight: torch.Tensor, bias: torch.Tensor, inputs: list[int], outputs: list[int], operands: str
) -> _Part:
    """weight [networks, in, out], bias [networks, out]; which of them every padded place is, or -1."""
    # An index of -1 finds the zeros that are appended.
    factors = functional.pad(round_factor(weight, operands).to(storage_dtype(operands)), (0, 1, 0, 1))
    images = factors[:, inputs][:, :, outputs].unflatten(2, (-1, 8)).unflatten(1, (-1, 2, 8)).movedim(3, -1)
    biases = functional.pad(bias, (0, 1))[:, _padded(outputs, len(outputs) + -len(outputs) % 32)]
    data = torch.cat([part.contiguous().view(torch.uint8).flatten(1) for part in (biases, images)], dim=1)
    first, image = 4 * biases.shape[1], 32 * len(outputs)
    steps, most = len(inputs) // 16, (SLOT_BYTES - first) // image
    count = -(-steps // most)
    ends = [-(-chunk * steps // count) for chunk in range(count + 1)]
    chunks = [image * (end - begin) for begin, end in pairwise(ends)]
    chunks[0] += first
    return _Part(data, chunks)


def _network(
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    inputs: list[int],
    width: int,
    heads: list[int],
    operands: str,
) -> _Part:
    hidden = [list(range(size)) for size in network_sizes(weights)[1:-1]]
    # The tensor cores take inputs by 16, outputs by 8.
    orders = [inputs, *(_padded(units, width + -width % 16) for units in hidden), heads]
    layers = [
        _layer(weight, bias, order, following[:width], operands)
        for weight, bias, (order, following) in zip(weights, biases, pairwise(orders), strict=True)
    ]
    chunks = [chunk for layer in layers for chunk in layer.chunks]
    return _Part(torch.cat([layer.data for layer in layers], dim=1), chunks)


def hopper_weights(
    dynamics: DynamicsArrays, policy: PolicyArrays | None, operands: str, width: int, slots: int
) -> HopperWeights:
    """Pack the policy, if any, then every member: layers of `width`, observation and reward in `slots`."""
    dims = dynamics.max_logvar.shape[1]
    observation = _padded(list(range(dims - 1)), 4 * slots)
    action = list(range(dims - 1, len(dynamics.input_mean)))
    heads = head_order(dims, slots)
    inputs = input_order(observation + action)
    parts = [_network(dynamics.weights, dynamics.biases, inputs, width, heads, operands)]
    if policy is not None:
        weights, biases = ([array[None] for array in arrays] for arrays in (policy.weights, policy.biases))
        heads = head_order(len(action), ACTION_SLOTS)
        parts.insert(0, _network(weights, biases, input_order(observation), POLICY_WIDTH, heads, operands))
    chunks = [chunk for part in parts for chunk in part.chunks * len(part.data)]
    data = torch.cat([part.data.flatten() for part in parts])
    return HopperWeights(data, torch.tensor(chunks, dtype=torch.int32, device=data.device))
