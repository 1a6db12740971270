"""Networks packed for the Hopper kernel, as images of shared memory in the order of their use.

A layer is its biases, then an image for every 16 inputs: [2][out / 8][8 outputs][8 inputs], the layout that
tensor cores read without a swizzle. A layer is cut into as few chunks of at most `SLOT_BYTES` as possible,
whose numbers of images differ by at most one. Each thread of the kernel holds the dimensions q, 4 + q, 8 + q,
... of its rows, with q = 0 .. 3; inputs and outputs are permuted so that every thread finds its own.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn import functional

from mopo_fast.backends.gpu.pack import storage_dtype
from mopo_fast.backends.interface import DynamicsArrays, PolicyArrays, network_sizes
from mopo_fast.ensemble import round_factor

# The same constants as in csrc/cuda/rollout_sm90.cuh.
SLOT_BYTES = 26880
ACTION_SLOTS = 2
POLICY_WIDTH = 256


class HopperWeights(NamedTuple):
    """The packed weights of a policy and an ensemble.

    Attributes:
        data: uint8, the chunks one after the other.
        chunk_bytes: int32, the size of each chunk.
    """

    data: torch.Tensor
    chunk_bytes: torch.Tensor


class _Part(NamedTuple):
    """The packed layers of networks of the same sizes.

    Attributes:
        data: uint8 [networks, bytes].
        chunks: sizes in bytes of the chunks of one network.
    """

    data: torch.Tensor
    chunks: list[int]


def _padded(indices: list[int], count: int) -> list[int]:
    """Extend `indices` to `count` entries with -1, which stands for a row or column of zeros."""
    return indices + [-1] * (count - len(indices))


def input_order(dims: list[int]) -> list[int]:
    """Return the dimension at each input: thread q has inputs 2 q, 2 q + 1, 2 q + 8, 2 q + 9 of every 16."""
    dims = _padded(dims, len(dims) + -len(dims) % 16)
    return [
        dims[first + 4 * (2 * half + odd) + q]
        for first in range(0, len(dims), 16)
        for half in range(2)
        for q in range(4)
        for odd in range(2)
    ]


def head_order(size: int, slots: int) -> list[int]:
    """Return the output at each column: every dimension's mean, then its log-variance or log std."""
    means = _padded(list(range(size)), 4 * slots)
    return [-1 if mean < 0 else mean + other for mean in means for other in (0, size)]


def _layer(
    weight: torch.Tensor, bias: torch.Tensor, inputs: list[int], outputs: list[int], operands: str
) -> _Part:
    """Pack a layer.

    Args:
        weight: [networks, in, out].
        bias: [networks, out].
        inputs: row of `weight` at every packed input, or -1.
        outputs: column of `weight` at every packed output, or -1.
        operands: type of the factors.
    """
    # The index -1 selects the row or column of zeros that is appended.
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
    # Tensor cores take 16 inputs and 8 outputs at a time.
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
    """Pack the policy, if there is one, then every member.

    Args:
        dynamics: the ensemble.
        policy: the policy or None.
        operands: type of the factors.
        width: width of the kernel's hidden layers.
        slots: number of the kernel's groups of four dimensions of (observation, reward).
    """
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
