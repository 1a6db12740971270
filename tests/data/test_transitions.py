"""Test the layout of the arrays against arrays that are allocated by it."""

import dataclasses

import pytest
import torch

from mopo_fast.data.transitions import ROLLOUT_ARRAYS, Transitions, array_layout, transition_bytes
from mopo_fast.rollout import allocate


def test_arrays_are_named_in_the_order_of_the_fields() -> None:
    fields = [field.name for field in dataclasses.fields(Transitions)]
    assert fields == [*ROLLOUT_ARRAYS, "name", "info"]
    assert tuple(allocate(2, 3, 1, "cpu").arrays()) == ROLLOUT_ARRAYS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bytes_of_a_row_are_those_that_arrays_take(dtype: torch.dtype) -> None:
    arrays = allocate(7, 11, 3, "cpu", dtype).arrays()
    for name, array in arrays.items():
        assert ((*array.shape[1:],), array.dtype) == array_layout(name, 11, 3, dtype)
    size = transition_bytes(ROLLOUT_ARRAYS, 11, 3, dtype)
    assert sum(array.nbytes for array in arrays.values()) == 7 * size
    floats, flag, member, step, rollout_index = 2 * 11 + 3 + 3, 1, 4, 4, 8
    assert size == floats * dtype.itemsize + flag + member + step + rollout_index
