"""Test transitions whose rows lie together, and which data a training copies into that layout."""

from pathlib import Path

import pytest
import torch

from mopo_fast.data import Transitions, load_dataset
from mopo_fast.data.table import allocate_table, in_table, table_bytes
from mopo_fast.data.transitions import DATA_ARRAYS, ROLLOUT_ARRAYS
from mopo_fast.errors import InputError
from mopo_fast.run.resolve import place_data


def rollouts(rows: int, obs_dim: int, act_dim: int) -> Transitions:
    """Make transitions that have every array, each with other random numbers."""
    draw = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    def whole(dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(0, 2 if dtype == torch.bool else 1000, (rows,), generator=draw).to(dtype)

    return Transitions(
        observations=floats(rows, obs_dim),
        actions=floats(rows, act_dim),
        rewards=floats(rows),
        next_observations=floats(rows, obs_dim),
        terminals=whole(torch.bool),
        raw_rewards=floats(rows),
        penalties=floats(rows),
        members=whole(torch.int32),
        rollout_index=whole(torch.int64),
        step=whole(torch.int32),
        timeouts=whole(torch.bool),
        name="some",
        info={"rows": rows},
    )


@pytest.mark.parametrize("sizes", [(3, 2), (17, 6), (1, 1), (400, 80), (5, 4)])
@pytest.mark.parametrize("names", [DATA_ARRAYS, ROLLOUT_ARRAYS])
def test_rows_lie_together(names: tuple[str, ...], sizes: tuple[int, int]) -> None:
    """A row begins at a multiple of 64 bytes, the size of a cache line, and no two numbers share a place."""
    arrays = allocate_table(names, 10, *sizes)
    assert list(sorted(arrays)) == sorted(names)
    columns = [array for array in arrays.values() if array.dtype == torch.float32]
    table = columns[0].untyped_storage()
    assert columns[0].stride(0) * 4 % 64 == 0
    assert {array.untyped_storage().data_ptr() for array in columns} == {table.data_ptr()}
    others = sum(array.nbytes for array in arrays.values() if array.dtype != torch.float32)
    assert table.nbytes() + others == 10 * table_bytes(names, *sizes)

    for number, array in enumerate(arrays.values()):
        assert not array.any()
        array.fill_(number % 2 if array.dtype == torch.bool else number)
    for number, (name, array) in enumerate(arrays.items()):
        assert (array == (number % 2 if array.dtype == torch.bool else number)).all(), name


@pytest.mark.parametrize("sizes", [(1, 3, 2), (999, 17, 6), (70_000, 1, 1)])
def test_a_copy_has_the_same_numbers(sizes: tuple[int, int, int]) -> None:
    data = rollouts(*sizes)
    copied = in_table(data)
    assert (copied.name, copied.info) == ("some", {"rows": sizes[0]})
    assert copied.timeouts is data.timeouts
    for name, array in data.arrays().items():
        other = copied.arrays()[name]
        assert other.dtype == array.dtype and torch.equal(other, array), name
        before = array.clone()
        other.zero_()
        assert torch.equal(array, before), f"{name} is not a copy"


def test_data_of_a_training(hopper_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_dataset(hopper_data)
    placed = place_data(data, "cpu")
    assert placed.observations.stride(0) * 4 == table_bytes(DATA_ARRAYS, 11, 3) - 1
    assert all(torch.equal(array, data.arrays()[name]) for name, array in placed.arrays().items())

    monkeypatch.setattr("mopo_fast.utils.machine.available_memory", lambda: 1000)
    mapped = load_dataset(hopper_data, memory_map=True)
    assert place_data(mapped, "cpu").observations is mapped.observations
    with pytest.raises(InputError, match=r"SAC's layout would take .*, cpu has 1,000 bytes; .*--memory-map"):
        place_data(data, "cpu")
