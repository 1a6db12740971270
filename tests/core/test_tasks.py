import math

import pytest
import torch

from mopo_fast.environments import make_environment
from mopo_fast.errors import InputError
from mopo_fast.tasks import (
    BOXES,
    TASKS,
    UNTUNED,
    Box,
    above,
    below,
    get_task,
    make_box,
    parse_dataset_name,
)


def next_float(value: float, towards: float) -> float:
    x, y = torch.tensor(float(value)), torch.tensor(float(towards))
    return torch.nextafter(x, y).item()


def hopper(height: float = 1.25, angle: float = 0.0, rest: float = 0.0) -> torch.Tensor:
    return torch.tensor([[height, angle, *[rest] * 9]])


def walker(height: float = 1.25, angle: float = 0.0) -> torch.Tensor:
    return torch.tensor([[height, angle, *[0.0] * 15]])


def ends(task: str, observation: torch.Tensor) -> bool:
    return not bool(BOXES[task].contains(observation))


# Rules of the authors' mopo/static/*.py, at the last float32 on either side of each bound.
@pytest.mark.parametrize(
    ("observation", "ended"),
    [
        (hopper(), False),
        (hopper(height=0.7), True),  # the rule is > 0.7
        (hopper(height=next_float(0.7, 1)), False),
        (hopper(height=1e30), False),  # |s'[1:]| < 100 leaves the height out
        (hopper(angle=0.2), True),
        (hopper(angle=-0.2), True),
        (hopper(angle=next_float(0.2, 0)), False),
        (hopper(angle=next_float(-0.2, 0)), False),
        (hopper(rest=100.0), True),
        (hopper(rest=-100.0), True),
        (hopper(rest=next_float(100, 0)), False),
        (hopper(rest=next_float(-100, 0)), False),
        (hopper(rest=math.nan), True),
        (hopper(height=math.inf), True),
    ],
)
def test_hopper_ends_outside_its_open_bounds(observation: torch.Tensor, ended: bool) -> None:
    assert ends("hopper", observation) is ended


def test_the_authors_slip_has_no_lower_bound() -> None:
    assert not ends("hopper-authors", hopper(rest=-1e6))
    assert ends("hopper-authors", hopper(rest=100.0))


@pytest.mark.parametrize(
    ("observation", "ended"),
    [
        (walker(), False),
        (walker(height=0.8), True),
        (walker(height=2.0), True),
        (walker(height=next_float(0.8, 1)), False),
        (walker(height=next_float(2.0, 1)), False),
        (walker(angle=1.0), True),
        (walker(angle=-1.0), True),
        (walker(angle=next_float(-1.0, 0)), False),
    ],
)
def test_walker2d_ends_outside_its_open_bounds(observation: torch.Tensor, ended: bool) -> None:
    assert ends("walker2d", observation) is ended


@pytest.mark.parametrize(("task", "low", "high"), [("ant", 0.2, 1.0), ("humanoid", 1.0, 2.0)])
def test_closed_bounds_belong_to_the_box(task: str, low: float, high: float) -> None:
    state = torch.zeros(1, TASKS[task].obs_dim)
    for height, ended in (
        (low, False),
        (high, False),
        (next_float(low, -1), True),
        (next_float(high, 9), True),
    ):
        state[0, 0] = height
        assert ends(task, state) is ended, height


@pytest.mark.parametrize("task", ["halfcheetah", "pendulum"])
def test_tasks_that_never_end_still_end_when_not_finite(task: str) -> None:
    state = torch.full((1, TASKS[task].obs_dim), 1e30)
    assert not ends(task, state)
    state[0, -1] = math.inf
    assert ends(task, state)


def test_other_codes_boxes_bound_every_dimension() -> None:
    state = torch.zeros(1, 17)
    state[0, 16] = 100.0
    assert ends("halfcheetah-offlinerl-kit", state)
    state[0, 0] = 1.25
    assert ends("walker2d-offlinerl-kit", state)
    assert not ends("walker2d", state)


def test_contains_judges_each_row_for_itself() -> None:
    rows = torch.cat([hopper(), hopper(height=0.1), hopper()])
    assert BOXES["hopper"].contains(rows).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ((0.0,), (1.0, 2.0), "1 and 2"),
        ((1.0,), (0.0,), "dimension 0"),
        ((0.0, math.nan), (1.0, 1.0), "dimension 1"),
    ],
)
def test_a_box_that_holds_nothing_is_refused(low: tuple, high: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Box(low, high)


def test_open_bounds_are_the_neighbouring_float32() -> None:
    assert below(0.2) < torch.tensor(0.2).item() < above(0.2)
    assert next_float(below(0.2), 1) == torch.tensor(0.2).item() == next_float(above(0.2), 0)


def test_make_box_puts_the_rest_everywhere_else() -> None:
    box = make_box(3, {1: (0.0, 1.0)}, rest=(-5.0, 5.0))
    assert box == Box((-5.0, 0.0, -5.0), (5.0, 1.0, 5.0))


@pytest.mark.parametrize("name", TASKS)
def test_sizes_are_those_of_the_environment(name: str) -> None:
    task = TASKS[name]
    environment = make_environment(task.env_id)
    assert environment.observation_space.shape == (task.obs_dim,) == (task.box.obs_dim,)
    assert environment.action_space.shape == (task.act_dim,)
    environment.close()


@pytest.mark.parametrize("name", ["halfcheetah", "hopper", "walker2d", "ant"])
def test_scores_are_0_and_100_at_the_references(name: str) -> None:
    task = TASKS[name]
    assert task.min_return is not None and task.max_return is not None
    assert task.normalized_score(task.min_return) == 0.0
    assert task.normalized_score(task.max_return) == 100.0


def test_a_score_between_the_references() -> None:
    # Computed by hand: 100 * (5000 + 280.178953) / (12135 + 280.178953).
    assert TASKS["halfcheetah"].normalized_score(5000.0) == pytest.approx(42.530027, abs=1e-6)


def test_a_standard_deviation_has_no_offset() -> None:
    assert TASKS["halfcheetah"].normalized_std(0.0) == 0.0
    assert TASKS["hopper"].normalized_std(3234.3 + 20.272305) == pytest.approx(100.0)


def test_no_references_no_score() -> None:
    assert TASKS["humanoid"].normalized_score(1.0) is None
    assert TASKS["humanoid"].normalized_std(1.0) is None


def test_tuned_pairs_and_what_stands_in_for_them() -> None:
    assert TASKS["halfcheetah"].tuned_for("random") == (5, 0.5)
    assert TASKS["walker2d"].tuned_for("medium-replay", "offlinerl-kit") == (1, 2.5)
    assert TASKS["halfcheetah"].tuned_for("random", "offlinerl-kit") == UNTUNED
    assert TASKS["humanoid"].tuned_for(None) == UNTUNED


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("halfcheetah-medium-replay-v2", ("halfcheetah", "medium-replay")),
        ("halfcheetah_medium_replay-v2", ("halfcheetah", "medium-replay")),
        ("hopper-random-local", ("hopper", "random")),
        ("walker_mixed", ("walker2d", "medium-replay")),
        ("Ant-expert-v0", ("ant", "expert")),
        ("pendulum", ("pendulum", None)),
    ],
)
def test_data_set_names(name: str, parsed: tuple[str, str | None]) -> None:
    assert parse_dataset_name(name) == parsed


@pytest.mark.parametrize("find", [get_task, parse_dataset_name])
@pytest.mark.parametrize("name", ["", "cheetah", "halfcheetahs-random"])
def test_an_unknown_task_is_told_which_exist(find, name: str) -> None:
    with pytest.raises(InputError) as error:
        find(name)
    assert all(task in str(error.value) for task in TASKS)
