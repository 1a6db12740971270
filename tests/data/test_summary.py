"""Test the summary of a data set, and `mopo-fast info`, which shows it."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mopo_fast.cli import main
from mopo_fast.data import Transitions
from mopo_fast.data.episodes import find_episodes
from mopo_fast.data.summary import summarise
from mopo_fast.errors import InputError
from mopo_fast.info import to_text
from mopo_fast.tasks import Task, get_task, make_box


def hopper(episodes: int = 4, steps: int = 25) -> Transitions:
    """Make episodes of a time limit whose observations obey the rule of hopper."""
    generator = torch.Generator().manual_seed(0)
    states = torch.empty(episodes, steps + 1, 11)
    states.uniform_(-0.1, 0.1, generator=generator)
    states[..., 0] += 1.2
    count = episodes * steps
    return Transitions(
        states[:, :-1].reshape(count, 11),
        torch.empty(count, 3).uniform_(-1, 1, generator=generator),
        torch.arange(count).float() / count,
        states[:, 1:].reshape(count, 11),
        torch.zeros(count, dtype=torch.bool),
        name="hopper-mine",
    )


def oddities(data: Transitions, task: str | None = "hopper") -> str:
    return "\n".join(summarise(data, None if task is None else get_task(task)).oddities)


def save(data: Transitions, path: Path) -> Path:
    np.savez(path, **{name: array.numpy() for name, array in data.arrays().items()})
    return path


# --- numbers


def test_episodes_end_at_terminals_and_at_jumps() -> None:
    data = hopper()
    # This terminal does not show in the observations.
    data.terminals[10] = True
    found = find_episodes(data)
    assert found is not None
    assert found.lengths.tolist() == [11, 14, 25, 25, 25]
    rewards = data.rewards.double().numpy()
    np.testing.assert_allclose(found.returns[:2], [rewards[:11].sum(), rewards[11:25].sum()])
    assert found.returns.sum() == pytest.approx(rewards.sum())


def test_blocks_do_not_end_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = summarise(hopper(), get_task("hopper"))
    monkeypatch.setattr("mopo_fast.data.summary._BLOCK", 77)
    monkeypatch.setattr("mopo_fast.data.transitions._BLOCK", 77)
    assert find_episodes(hopper()).lengths.tolist() == [25] * 4  # type: ignore[union-attr]
    blocks = summarise(hopper(), get_task("hopper"))
    assert blocks.oddities == whole.oddities
    assert blocks.observations[3].std == pytest.approx(whole.observations[3].std)


def test_the_numbers_equal_numpy() -> None:
    data = hopper()
    summary = summarise(data, get_task("hopper"))
    column = data.observations[:, 4].double().numpy()
    one = summary.observations[4]
    quartiles = np.quantile(column, (0.25, 0.5, 0.75))
    expected = [column.mean(), column.std(), column.min(), *quartiles, column.max()]
    np.testing.assert_allclose(dataclasses.astuple(one), expected, rtol=1e-9)
    assert (summary.rows, summary.episodes, summary.terminals) == (100, 4, 0)
    assert summary.lengths is not None and (summary.lengths.min, summary.lengths.max) == (25, 25)
    assert summary.returns is not None and summary.scores is not None
    assert summary.scores.max == pytest.approx(get_task("hopper").normalized_score(summary.returns.max))


def test_shuffled_rows_have_no_episodes() -> None:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    summary = summarise(hopper()[order], get_task("hopper"))
    assert summary.episodes is summary.returns is summary.scores is summary.lengths is None
    assert "do not follow the row before" in summary.oddities[0]
    assert "none, the rows do not follow one another" in to_text(summary)


def test_one_row_is_a_data_set() -> None:
    summary = summarise(hopper()[:1])
    assert (summary.rows, summary.episodes) == (1, 1)


# --- what is unusual


def test_clean_data_have_nothing_unusual() -> None:
    assert oddities(hopper()) == ""
    assert to_text(summarise(hopper(), get_task("hopper"))).endswith("Nothing unusual was found.")


def test_constant_and_badly_scaled_dimensions() -> None:
    data = hopper()
    for array in (data.observations, data.next_observations):
        array[:, [2, 5, 6, 7]] = 0.0
        array[:, 3] *= 1e-4
        array[:, 8] *= 1e5
    data.actions[:, 1] = 0.5
    found = oddities(data, None)
    assert "Observation dimensions 2, 5-7 are constant." in found
    assert "Action dimension 1 is constant." in found
    assert "Observation dimensions 3, 8 have a standard deviation below 0.001 or above 1000." in found


def test_actions_out_of_range() -> None:
    data = hopper()
    data.actions[[3, 7], 0] = torch.tensor([1.5, -2.5])
    assert "2 rows have actions beyond [-1, 1], up to 2.5. `train` refuses them" in oddities(data)
    data.actions.mul_(0.01)
    assert "All actions lie within [-0.025, 0.025]" in oddities(data)


def test_rewards_far_away() -> None:
    data = hopper()
    data.rewards[42] = -1000.0
    found = oddities(data)
    assert "1 reward is more than 10 interquartile ranges" in found and "-1000 in row 42" in found
    data.rewards.fill_(0.5)
    assert "All rewards are 0.5." in oddities(data)
    data.rewards.copy_(torch.arange(100.0) * 50)
    assert "The rewards' standard deviation is 1443." in oddities(data)


def test_repeated_rows_and_rows_without_motion() -> None:
    data = hopper()
    twice = data[torch.cat([torch.arange(100), torch.arange(5)])]
    assert "5 rows (4.8%) repeat another row exactly." in oddities(twice)
    data.next_observations[8] = data.observations[8]
    assert "In 1 row (1.0%) the successor equals the observation." in oddities(data)


def test_far_observations() -> None:
    data = hopper(100, 50)
    data.observations[77, 9] = 50.0
    assert "Observation dimension 9 has values more than 50 standard deviations" in oddities(data)


def test_terminals_that_contradict_the_rule() -> None:
    data = hopper()
    data.terminals[[24, 49]] = True
    data.next_observations[99, 0] = 0.1
    found = oddities(data)
    assert "2 rows are terminal, but the rule of the task hopper does not end an episode" in found
    assert "1 row is not terminal, but the rule of the task hopper ends the episode" in found
    assert "terminal, but" not in oddities(data, None)
    assert "The task walker2d has 17 observation and 6 action dimensions" in oddities(data, "walker2d")


def test_a_rule_may_be_a_function() -> None:
    task = Task("mine", "", 11, 3, lambda observations, actions, successors: successors[:, 0] > 0)
    assert "100 rows are not terminal" in "\n".join(summarise(hopper(), task).oddities)
    wrong = dataclasses.replace(task, box=lambda observations, actions, successors: successors)
    with pytest.raises(InputError, match=r"must return bool \[100\], got torch.float32 \[100, 11\]"):
        summarise(hopper(), wrong)


# --- as text and as a page


@pytest.mark.parametrize("folder", [True, False])
def test_returns_of_rollouts_are_penalised(folder: bool) -> None:
    data = hopper()
    if folder:
        data.info["metadata"] = {"penalty_coef": 1.0}
    text = to_text(summarise(data))
    assert ("return        penalised: mean" in text) is ("rewards       penalised: mean" in text) is folder


def test_the_text_fits_80_columns() -> None:
    data = hopper()
    data.observations *= -1.2345e-30
    data.rewards[0] = -1.23456e30
    text = to_text(summarise(data, get_task("hopper")))
    assert max(map(len, text.splitlines())) <= 80
    assert len(re.findall(r"^observation +\d+ ", text, re.MULTILINE)) == 11


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = save(hopper(), tmp_path / "hopper-mine.npz"), tmp_path / "pages" / "mine.html"
    assert main(["info", str(path), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "task          hopper" in out and "episodes      4; steps: 25" in out and str(page) in out
    text = page.read_text()
    assert text.count("<img ") == 4 and "Data set: hopper-mine" in text and "observation 10" in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert main(["info", str(path), "--json", "--task", "ant"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["rows"] == 100 and values["task"] == "ant" and "task ant has 27" in values["oddities"][0]


def test_the_command_with_unknown_tasks_and_shuffled_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(hopper()[torch.arange(99, -1, -1)], tmp_path / "<b>.npz")
    page = tmp_path / "mine.html"
    assert main(["info", str(path), "--html", str(page)]) == 0
    assert "unknown; name it with --task" in capsys.readouterr().out
    text = page.read_text()
    assert "<b>" not in text and "no episodes" in text
    assert main(["info", str(path), "--task", "hoper"]) == 2
    assert "unknown task 'hoper'" in capsys.readouterr().err
    assert main(["info", str(path), "--html", str(tmp_path)]) == 2
    assert "it is a folder" in capsys.readouterr().err


def test_values_at_the_limits_of_float32_can_be_drawn(tmp_path: Path) -> None:
    data = hopper()
    data.observations[0] = 3e38
    data.rewards[:] = torch.linspace(-1e38, 1e38, 100)
    assert main(["info", str(save(data, tmp_path / "a.npz")), "--html", str(tmp_path / "a.html")]) == 0


def test_a_box_of_any_size() -> None:
    task = Task("mine", "", 11, 3, make_box(11, {0: (0.0, 1.25)}))
    assert "not terminal" in "\n".join(summarise(hopper(), task).oddities)
