"""Test the ring buffer against a plain list, and its refusals."""

import dataclasses

import pytest
import torch

from mopo_fast.buffer import RingBuffer, row_bytes
from mopo_fast.data import Transitions
from mopo_fast.errors import InputError


def numbered(first: int, count: int) -> Transitions:
    """Make transitions whose values all encode the row's number."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)
    return Transitions(
        observations=numbers[:, None] + torch.tensor([0.1, 0.2, 0.3]),
        actions=numbers[:, None] + torch.tensor([0.4, 0.5]),
        rewards=numbers + 0.6,
        next_observations=numbers[:, None] + torch.tensor([0.7, 0.8, 0.9]),
        terminals=numbers % 3 == 0,
        raw_rewards=numbers + 0.65,
        penalties=numbers + 0.05,
    )


def poisoned(capacity: int) -> RingBuffer:
    buffer = RingBuffer(capacity, 3, 2)
    for array in buffer.storage.arrays().values():
        array.fill_(True if array.dtype == torch.bool else float("nan"))
    return buffer


def test_holds_the_last_rows_first_in_first_out() -> None:
    buffer, first = poisoned(10), 0
    for count in (3, 4, 0, 5, 10, 1, 9, 9):
        buffer.append(numbered(first, count))
        first += count
        assert buffer.size == len(buffer) == min(first, 10)
        assert buffer.head == first % 10
        kept = torch.arange(max(first - 10, 0), first)
        for name, array in buffer.storage.arrays().items():
            expected = numbered(0, first).arrays()[name][kept]
            assert torch.equal(array[kept % 10], expected), name


def test_storage_is_allocated_once() -> None:
    buffer = RingBuffer(4, 3, 2)
    addresses = {name: array.data_ptr() for name, array in buffer.storage.arrays().items()}
    for first in range(0, 30, 3):
        buffer.append(numbered(first, 3))
    assert addresses == {name: array.data_ptr() for name, array in buffer.storage.arrays().items()}


@pytest.mark.parametrize("penalties", [True, False])
@pytest.mark.parametrize("sizes", [(3, 2), (11, 3), (1, 1), (400, 80), (5, 4)])
def test_the_memory_of_a_row(sizes: tuple[int, int], penalties: bool) -> None:
    """Rows begin at multiples of 64 bytes, the size of a cache line, and each terminal takes one byte."""
    storage = RingBuffer(10, *sizes, penalties=penalties).storage
    assert (storage.penalties is not None) == penalties and storage.raw_rewards is not None
    table = storage.observations.untyped_storage().nbytes()
    assert table + storage.terminals.nbytes == 10 * row_bytes(*sizes, penalties=penalties)
    assert storage.observations.stride(0) * 4 % 64 == 0
    for name, array in storage.arrays().items():
        if name != "terminals":
            assert array.untyped_storage().data_ptr() == storage.observations.data_ptr(), name


def test_rows_written_into_storage_count_after_advance() -> None:
    buffer = RingBuffer(5, 3, 2)
    buffer.storage.rewards[:4] = torch.arange(4.0)
    assert buffer.size == 0
    buffer.advance(4)
    assert (buffer.head, buffer.size) == (4, 4)
    buffer.advance(3)
    assert (buffer.head, buffer.size) == (2, 5)


@pytest.mark.parametrize("sizes", [(0, 3, 2), (5, 0, 2), (5, 3, -1)])
def test_refuses_sizes_that_are_not_positive(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="positive sizes"):
        RingBuffer(*sizes)


def test_refuses_rows_that_do_not_fit() -> None:
    buffer = RingBuffer(5, 3, 2)
    with pytest.raises(InputError, match="6 rows do not fit a buffer of 5"):
        buffer.append(numbered(0, 6))
    with pytest.raises(InputError, match="do not fit"):
        buffer.advance(6)
    with pytest.raises(InputError, match="do not fit"):
        buffer.advance(-1)
    with pytest.raises(InputError, match="observations of 3 and actions of 2 dimensions, got 3 and 1"):
        buffer.append(dataclasses.replace(numbered(0, 2), actions=torch.zeros(2, 1)))
    with pytest.raises(InputError, match="penalties"):
        buffer.append(dataclasses.replace(numbered(0, 2), penalties=None))
    assert (buffer.head, buffer.size) == (0, 0)
