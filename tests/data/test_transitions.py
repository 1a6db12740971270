"""Test the layout of the arrays against arrays that are allocated by it."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import inputs, make_ensemble, make_policy

from mopo_fast.data import load_dataset
from mopo_fast.data.files import open_file
from mopo_fast.data.transitions import ROLLOUT_ARRAYS, Transitions, array_layout, transition_bytes
from mopo_fast.errors import InputError
from mopo_fast.rollout import RolloutEngine, allocate


def test_arrays_are_named_in_the_order_of_the_fields() -> None:
    fields = [field.name for field in dataclasses.fields(Transitions)]
    assert fields == [*ROLLOUT_ARRAYS, "timeouts", "name", "info"]
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


def arrays_of(ends: str, successors: bool = True) -> dict[str, np.ndarray]:
    """Make a data set: one letter for each row, t for a terminal, o for a time-out, - for neither."""
    n = len(ends)
    observations = np.arange(2 * n, dtype=np.float32).reshape(n, 2)
    arrays = {
        "observations": observations,
        "actions": np.zeros((n, 1), np.float32),
        "rewards": 2.0 ** np.arange(n, dtype=np.float32),
        "terminals": np.array([end == "t" for end in ends]),
        "timeouts": np.array([end == "o" for end in ends]),
    }
    return arrays | ({"next_observations": observations + 2} if successors else {})


class TestEpisodes:
    def test_flags_end_them(self) -> None:
        data = load_dataset(arrays_of("--t-o--"))
        assert data.episode_ends().tolist() == [False, False, True, False, True, False, True]
        assert data.episode_returns().tolist() == [1 + 2 + 4, 8 + 16, 32 + 64]
        assert data.episode_returns().dtype == torch.float64

    @pytest.mark.parametrize("compat", [None, "d4rl"])
    def test_they_end_where_rows_without_a_successor_were(self, compat: str | None) -> None:
        data = load_dataset(arrays_of("--t-o---", successors=False), compat=compat)
        # By the rules of `load_file`, the last row of each episode is dropped, in D4RL's only after a
        # time-out.
        expected = [1 + 2 + (4 if compat else 0), 8, 32 + 64]
        assert data.episode_returns().tolist() == expected
        assert not (data.timeouts & data.terminals).any()

    def test_without_time_outs_they_end_where_the_next_row_does_not_follow(self) -> None:
        arrays = arrays_of("-------")
        arrays["next_observations"][3] += 1
        del arrays["timeouts"]
        assert load_dataset(arrays).episode_returns().tolist() == [1 + 2 + 4 + 8, 16 + 32 + 64]

    def test_of_some_rows(self) -> None:
        data = load_dataset(arrays_of("--t-o--"))
        assert data[1:4].episode_returns().tolist() == [2 + 4, 8]
        picked = data[torch.tensor([0, 1, 5, 6])]
        assert picked.episode_returns().tolist() == [1 + 2, 32 + 64]
        assert data[::2].episode_returns().tolist() == [1, 4, 16, 64]
        assert data.to("cpu").timeouts is not None

    def test_of_model_rollouts(self) -> None:
        engine = RolloutEngine(make_ensemble(5, 2), penalty_coef=0.0)
        rows = engine.rollout(make_policy(5, 2), inputs(4, 5, 2)[0], 3, seed=0)
        assert rows.rollout_index is not None
        expected = [rows.rewards[rows.rollout_index == i].double().sum().item() for i in range(4)]
        assert rows.episode_returns().tolist() == pytest.approx(expected)

    def test_of_a_collected_data_set(self, hopper_data: Path) -> None:
        data = load_dataset(hopper_data)
        with open_file(hopper_data) as file:
            ends = np.asarray(file["terminals"]).astype(bool) | np.asarray(file["timeouts"]).astype(bool)
            returns = [part.sum() for part in np.split(np.asarray(file["rewards"]), np.flatnonzero(ends) + 1)]
        assert data.episode_returns().numpy() == pytest.approx([r for r in returns if r != 0], rel=1e-5)


class TestDescribe:
    def test_counts_and_spreads(self) -> None:
        data = load_dataset(arrays_of("--t-o--"))
        data.name = "mine"
        found = data.describe()
        assert (found.rows, found.obs_dim, found.act_dim, found.episodes, found.terminals) == (7, 2, 1, 3, 1)
        returns = np.array([7.0, 24.0, 96.0])
        spread = found.spreads["episode return"]
        assert dataclasses.astuple(spread) == pytest.approx((returns.mean(), returns.std(), 7, 96))
        assert found.spreads["episode length"].max == 3
        assert dataclasses.astuple(found.spreads["observations"])[2:] == (0, 13)

    def test_prints_as_a_table(self) -> None:
        data = load_dataset(arrays_of("--t-o--"))
        data.name = "mine"
        lines = repr(data.describe()).splitlines()
        assert lines[0] == (
            "mine: 7 rows, 2 observation and 1 action dimensions, 3 episodes,"
            " 1 of them end in a terminal state"
        )
        assert lines[1].split() == ["mean", "std", "min", "max"]
        assert lines[2].split()[:2] == ["episode", "return"]
        assert len({len(line) for line in lines[1:]}) == 1

    def test_says_that_last_steps_are_missing(self) -> None:
        data = load_dataset(arrays_of("--t-o---", successors=False))
        assert "last one of an episode, were left out" in repr(data.describe()).splitlines()[-1]

    def test_no_rows(self) -> None:
        assert "0 rows" in repr(load_dataset(arrays_of("--t"))[:0].describe())


class TestSave:
    @pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
    def test_loads_as_it_was(self, hopper_data: Path, tmp_path: Path, suffix: str) -> None:
        data = load_dataset(hopper_data)
        data.save(tmp_path / f"copy{suffix}")
        again = load_dataset(tmp_path / f"copy{suffix}")
        for name, array in data.arrays().items():
            assert getattr(again, name).equal(array)
        assert again.episode_ends().equal(data.episode_ends())
        assert again.info["metadata"] == data.info["metadata"]

    def test_the_ends_of_episodes_are_kept(self, tmp_path: Path) -> None:
        data = load_dataset(arrays_of("--t-o---", successors=False))
        data.save(tmp_path / "a.npz")
        assert load_dataset(tmp_path / "a.npz").episode_returns().equal(data.episode_returns())

    def test_refusals(self, tmp_path: Path) -> None:
        data = load_dataset(arrays_of("--t"))
        with pytest.raises(InputError, match=r"must end in \.hdf5, \.h5 or \.npz"):
            data.save(tmp_path / "a.csv")
        data.save(tmp_path / "a.npz")
        with pytest.raises(InputError, match="exists already"):
            data.save(tmp_path / "a.npz")
        data.save(tmp_path / "a.npz", overwrite=True)


def test_to_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    frame = load_dataset(arrays_of("--t-o--")).to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame) == [
        *("observations_0", "observations_1", "actions_0", "rewards"),
        *("next_observations_0", "next_observations_1", "terminals", "timeouts"),
    ]
    assert frame["observations_1"].tolist() == list(range(1, 14, 2))
    assert frame["timeouts"].sum() == 1


def test_to_pandas_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        InputError, match=r"pandas cannot be imported .* install it with `pip install pandas`"
    ):
        load_dataset(arrays_of("--t")).to_pandas()


class TestLoadingTransitions:
    def test_they_are_converted_to_a_data_set(self) -> None:
        data = load_dataset(arrays_of("--t-o--"))
        other = dataclasses.replace(data, rewards=data.rewards.double(), actions=data.actions.expand(7, 1))[
            ::2
        ]
        loaded = load_dataset(other)
        assert loaded.rewards.dtype == torch.float32 and loaded.observations.is_contiguous()
        assert loaded.observations.equal(data.observations[::2])
        assert load_dataset(data).observations.data_ptr() == data.observations.data_ptr()

    def test_refusals(self) -> None:
        data = load_dataset(arrays_of("--t"))
        with pytest.raises(InputError, match="compat must be None, got 'd4rl'"):
            load_dataset(data, compat="d4rl")
        data.rewards[1] = float("nan")
        with pytest.raises(InputError, match="rewards is not finite at row 1"):
            load_dataset(data)
        with pytest.raises(InputError, match="timeouts must be bool"):
            dataclasses.replace(load_dataset(arrays_of("--t")), timeouts=torch.zeros(3)).validate()


def test_repr_is_short(hopper_data: Path) -> None:
    assert repr(load_dataset(hopper_data)) == (
        "Transitions('hopper-random-local', 600 rows, obs_dim=11, act_dim=3, arrays: observations, actions,"
        " rewards, next_observations, terminals; device='cpu')"
    )
