"""Describe a data set in numbers: episodes, returns, ranges, and what is unusual in it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mopo_fast.data.episodes import find_episodes
from mopo_fast.data.stored import Array
from mopo_fast.data.transitions import NEXT_ROW, QLEARNING, Transitions
from mopo_fast.errors import InputError
from mopo_fast.tasks import Box, Task

SAMPLE = 1_000_000
"""Most rows that quartiles are taken from; of a larger set these are equally spaced."""

# Values read at once, because the arrays may be mapped from a file that is larger than the memory.
_BLOCK = 2**22
# A reward is far away if it is this many interquartile ranges beyond the quartiles.
_FAR_RANGES = 10
# An observation is far away if it is this many standard deviations from the mean.
_FAR_STDS = 50
# Standard deviations outside these bounds are far from 1.
_SMALL, _LARGE = 1e-3, 1e3
# Terminals contradict the rule of the task too often if this share of the ends does.
_MANY = 0.1


@dataclass(frozen=True)
class Spread:
    """The distribution of one quantity.

    Attributes:
        mean: mean.
        std: standard deviation.
        min: smallest value.
        q25: first quartile.
        median: median.
        q75: third quartile.
        max: largest value.
    """

    mean: float
    std: float
    min: float
    q25: float
    median: float
    q75: float
    max: float


@dataclass(frozen=True)
class Summary:
    """A data set in numbers.

    Attributes:
        name: name of the data.
        path: file of the data, or None for other sources.
        task: name of the task, or None where it is unknown.
        rows: number of transitions.
        stored_rows: number of rows in the source, of which those without a successor are left out.
        obs_dim: size of an observation.
        act_dim: size of an action.
        successors: rule by which successors were found, or None where the data do not tell.
        terminals: number of transitions that end an episode, except by a time limit.
        terminals_left_out: number of such rows in the source that were left out for lack of a successor.
        penalised: whether the rewards are those of model rollouts, less a penalty.
        episodes: number of episodes, or None where the rows do not follow one another.
        returns: sums of the rewards of each episode, or None.
        scores: these returns on D4RL's scale, or None where the task has no reference returns.
        lengths: numbers of steps of each episode, or None.
        rewards: rewards.
        observations: each dimension of the observations.
        actions: each dimension of the actions.
        oddities: sentences about what is unusual.
    """

    name: str
    path: str | None
    task: str | None
    rows: int
    stored_rows: int
    obs_dim: int
    act_dim: int
    successors: str | None
    terminals: int
    terminals_left_out: int
    penalised: bool
    episodes: int | None
    returns: Spread | None
    scores: Spread | None
    lengths: Spread | None
    rewards: Spread
    observations: tuple[Spread, ...]
    actions: tuple[Spread, ...]
    oddities: tuple[str, ...]


def summarise(data: Transitions, task: Task | None = None) -> Summary:
    """Summarise a data set.

    Args:
        data: transitions on the CPU.
        task: task of the data, for scores and the termination rule.

    Raises:
        InputError: the task's termination function does not return a flag for each row.
    """
    fits = task is not None and (data.obs_dim, data.act_dim) == (task.obs_dim, task.act_dim)
    episodes = find_episodes(data)
    returns = None if episodes is None else _spread(episodes.returns)
    scores = None
    if fits and task is not None and episodes is not None and task.normalized_score(0.0) is not None:
        values = [task.normalized_score(value) for value in episodes.returns.tolist()]
        scores = _spread(np.array(values, dtype=np.float64))
    rewards = _spreads(data.rewards[:, None])[0]
    observations, actions = _spreads(data.observations), _spreads(data.actions)
    oddities = [
        *([] if episodes is not None else _successor_faults(data, _shift(data))),
        *_left_out(data),
        *_lost_terminals(data),
        *_task_oddities(data, task, fits),
        *_dimension_oddities("observation", observations),
        *_dimension_oddities("action", actions),
        *_action_oddities(data, actions),
        *_reward_oddities(data, rewards),
        *_repeat_oddities(data),
    ]
    return Summary(
        name=data.name,
        path=data.info.get("path"),
        task=None if task is None else task.name,
        rows=len(data),
        stored_rows=data.info.get("rows", len(data)),
        obs_dim=data.obs_dim,
        act_dim=data.act_dim,
        successors=data.info.get("successors"),
        terminals=int(data.terminals.sum()),
        terminals_left_out=data.info.get("terminals_left_out", 0),
        penalised=data.penalties is not None or "penalty_coef" in data.info.get("metadata", {}),
        episodes=None if episodes is None else len(episodes.returns),
        returns=returns,
        scores=scores,
        lengths=None if episodes is None else _spread(episodes.lengths.astype(np.float64)),
        rewards=rewards,
        observations=observations,
        actions=actions,
        oddities=tuple(oddities),
    )


def find_faults(data: Transitions, task: Task | None = None) -> tuple[str, ...]:
    """Return sentences about what makes a training on the data wrong or worse; `summarise` has them too.

    These are rows that do not follow one another, terminal rows that were left out, and terminals of which
    many contradict the rule of the task.

    Args:
        data: transitions on the CPU.
        task: task of the data, whose sizes are those of the data.

    Raises:
        InputError: the task's termination function does not return a flag for each row.
    """
    faults: list[str] = []
    shift = None
    if find_episodes(data) is None:
        shift = _shift(data)
        faults += _successor_faults(data, shift)
    faults += _lost_terminals(data)
    # The rule would be compared with the wrong observations.
    if task is not None and shift is None and data.info.get("successors") != QLEARNING:
        early, late, ends = _compare_terminals(data, task)
        if early + late > _MANY * ends:
            faults += _terminal_oddities(task, early, late)
    return tuple(faults)


def sample_rows(array: torch.Tensor, most: int = SAMPLE) -> Array:
    """Return at most `most` rows of an array [n, ...], equally spaced, as float64."""
    step = math.ceil(len(array) / most)
    rows: Array = array[::step].cpu().numpy().astype(np.float64)
    return rows


def _blocks(array: torch.Tensor) -> Iterator[torch.Tensor]:
    return (block.double() for block in array.split(max(1, _BLOCK // array.shape[1])))


def _spread(values: Array) -> Spread:
    return _spreads(torch.from_numpy(values)[:, None])[0]


def _spreads(array: torch.Tensor) -> tuple[Spread, ...]:
    """Return the distribution of each column of an array [n, columns]."""
    mean = sum((block.sum(0) for block in _blocks(array)), torch.zeros(())) / len(array)
    squares = sum(((block - mean).square().sum(0) for block in _blocks(array)), torch.zeros(()))
    ends = [block.aminmax(dim=0) for block in _blocks(array)]
    quartiles = torch.from_numpy(np.quantile(sample_rows(array), (0.25, 0.5, 0.75), axis=0))
    columns = [
        mean,
        (squares / len(array)).sqrt(),
        torch.stack([end.min for end in ends]).amin(0),
        *quartiles,
        torch.stack([end.max for end in ends]).amax(0),
    ]
    return tuple(Spread(*values) for values in torch.stack(columns, 1).tolist())


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _numbered(noun: str, dims: Sequence[int], singular: str, plural: str) -> str:
    """Return a text such as "observation dimensions 2, 5-7 are"; runs of numbers are shortened."""
    groups: list[list[int]] = []
    for dim in dims:
        if groups and groups[-1][-1] == dim - 1:
            groups[-1].append(dim)
        else:
            groups.append([dim])
    texts = [str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups]
    shown = ", ".join(texts[:12]) + (", ..." if len(texts) > 12 else "")
    return f"{noun} dimension{'' if len(dims) == 1 else 's'} {shown} {singular if len(dims) == 1 else plural}"


def _shift(data: Transitions) -> str | None:
    """Say which observation stands in place of the next one, where next_observations are shifted by a row."""
    near = data[: min(len(data), SAMPLE)]
    for shift, name in ((0, "its own observation"), (2, "the observation two rows later")):
        rows = len(near) - shift
        same = (near.next_observations[: max(0, rows)] == near.observations[shift:]).all(dim=1)
        if rows > 1 and int(same.sum()) > rows / 2:
            return name
    return None


def _successor_faults(data: Transitions, shift: str | None) -> Iterator[str]:
    if shift is not None:
        yield (
            f"In most rows the next observation is {shift}: next_observations are shifted by one row."
            " Store in each row the observation that followed its action."
        )
    else:
        yield (
            "Most rows do not follow the row before: the data are shuffled or hold single steps, so there are"
            " no episodes and no returns. Training needs no order, but the next observation of a row must be"
            " the one that followed its action; check that all arrays have the same order."
        )


def _left_out(data: Transitions) -> Iterator[str]:
    left_out = data.info.get("rows", len(data)) - len(data) - data.info.get("earlier_left_out", 0)
    if left_out > 0 and data.info.get("successors") == NEXT_ROW:
        yield (
            f"{_count(left_out, 'row')} without a successor {'was' if left_out == 1 else 'were'} left out,"
            " because the source has no next_observations. The returns lack the last step of each episode."
        )


def _lost_terminals(data: Transitions) -> Iterator[str]:
    terminals = data.info.get("terminals_left_out", 0)
    if terminals and data.info.get("successors") == NEXT_ROW:
        yield (
            f"{_count(terminals, 'terminal row')} {'was' if terminals == 1 else 'were'} left out, because the"
            " source has no next_observations and the next row belongs to another episode. Training on the"
            " data never sees a terminal state; add next_observations to the source."
        )


def _task_oddities(data: Transitions, task: Task | None, fits: bool) -> Iterator[str]:
    if task is None:
        return
    if not fits:
        yield (
            f"The task {task.name} has {task.obs_dim} observation and {task.act_dim} action dimensions, the"
            f" data have {data.obs_dim} and {data.act_dim}. Give the data's own task."
        )
        return
    early, late, _ = _compare_terminals(data, task)
    yield from _terminal_oddities(task, early, late)


def _compare_terminals(data: Transitions, task: Task) -> tuple[int, int, int]:
    """Compare the terminals with the rule of the task.

    Returns:
        The number of rows that are terminal against the rule, of rows that the rule ends and are not
        terminal, and of rows that end an episode by either.
    """
    early = late = ends = 0
    size = max(1, _BLOCK // data.obs_dim)
    for start in range(0, len(data), size):
        rows = data[start : start + size]
        ended = _ended(task, rows)
        early += int((rows.terminals & ~ended).sum())
        late += int((ended & ~rows.terminals).sum())
        ends += int((ended | rows.terminals).sum())
    return early, late, ends


def _terminal_oddities(task: Task, early: int, late: int) -> Iterator[str]:
    if early:
        yield (
            f"{_count(early, 'row')} {'is' if early == 1 else 'are'} terminal, but the rule of the task"
            f" {task.name} does not end an episode there. Time limits must not be stored as terminals."
        )
    if late:
        yield (
            f"{_count(late, 'row')} {'is' if late == 1 else 'are'} not terminal, but the rule of the task"
            f" {task.name} ends the episode there, and so do rollouts in the model. Correct the terminals, or"
            " give the data's own task."
        )


def _ended(task: Task, rows: Transitions) -> torch.Tensor:
    if isinstance(task.box, Box):
        return ~task.box.contains(rows.next_observations)
    ended = torch.as_tensor(task.box(rows.observations, rows.actions, rows.next_observations))
    if ended.dtype != torch.bool or tuple(ended.shape) != (len(rows),):
        raise InputError(
            f"the termination function of the task {task.name} must return bool [{len(rows)}],"
            f" got {ended.dtype} {list(ended.shape)}"
        )
    return ended


def _dimension_oddities(noun: str, spreads: Sequence[Spread]) -> Iterator[str]:
    constant = [dim for dim, one in enumerate(spreads) if one.min == one.max]
    if constant:
        yield _numbered(noun, constant, "is", "are").capitalize() + " constant."
    if noun == "action":
        return
    scaled = [
        dim
        for dim, one in enumerate(spreads)
        if one.min < one.max and not _SMALL <= one.std <= _LARGE and dim not in constant
    ]
    if scaled:
        yield (
            _numbered(noun, scaled, "has", "have").capitalize()
            + f" a standard deviation below {_SMALL:g} or above {_LARGE:g}. The policy and the critics see"
            " observations unscaled; bring them to a scale near 1."
        )
    far = [dim for dim, one in enumerate(spreads) if _farthest(one) > _FAR_STDS * one.std > 0]
    if far:
        yield (
            _numbered(noun, far, "has", "have").capitalize()
            + f" values more than {_FAR_STDS} standard deviations from the mean."
        )


def _farthest(one: Spread) -> float:
    return max(one.max - one.mean, one.mean - one.min)


def _action_oddities(data: Transitions, actions: Sequence[Spread]) -> Iterator[str]:
    largest = max(max(-one.min, one.max) for one in actions)
    if largest > 1.0:
        beyond = sum(int((block.abs() > 1.0).any(dim=1).sum()) for block in _blocks(data.actions))
        # The limit of `train`.
        refused = " `train` refuses them" if largest > 1.001 else " `train` takes so small an excess"
        yield (
            f"{_count(beyond, 'row')} {'has' if beyond == 1 else 'have'} actions beyond [-1, 1], up to"
            f" {largest:.4g}.{refused}; actions must be scaled to [-1, 1]."
        )
    elif 0.0 < largest < 0.1:
        yield (
            f"All actions lie within [-{largest:.3g}, {largest:.3g}]. If the environment's range is that"
            " small, scale them to [-1, 1]."
        )


def _reward_oddities(data: Transitions, rewards: Spread) -> Iterator[str]:
    if rewards.min == rewards.max:
        yield f"All rewards are {rewards.min:.4g}."
        return
    width = rewards.q75 - rewards.q25
    low, high = rewards.q25 - _FAR_RANGES * width, rewards.q75 + _FAR_RANGES * width
    if width > 0.0 and (rewards.min < low or rewards.max > high):
        values = data.rewards.double()
        far = (values < low) | (values > high)
        row = int((values - rewards.median).abs().argmax())
        count = int(far.sum())
        yield (
            f"{_count(count, 'reward')} {'is' if count == 1 else 'are'} more than {_FAR_RANGES} interquartile"
            f" ranges beyond the quartiles. The farthest is {float(values[row]):.4g} in row {row}."
        )
    if not _SMALL <= rewards.std <= 100.0:
        yield (
            f"The rewards' standard deviation is {rewards.std:.4g}. Penalty coefficients are in units of the"
            " reward, and published ones suit rewards near 1."
        )


def _repeat_oddities(data: Transitions) -> Iterator[str]:
    size = max(1, _BLOCK // (2 * data.obs_dim + data.act_dim + 1))
    hashes = np.empty(len(data), np.int64)
    still = 0
    for start in range(0, len(data), size):
        rows = data[start : start + size]
        still += int((rows.observations == rows.next_observations).all(dim=1).sum())
        parts = (rows.observations, rows.actions, rows.rewards[:, None], rows.next_observations)
        joined = torch.cat([part.cpu() for part in parts], 1).numpy()
        texts = joined.view(np.dtype((np.void, joined.shape[1] * joined.itemsize))).ravel().tolist()
        hashes[start : start + len(rows)] = np.fromiter(map(hash, texts), np.int64, len(rows))
    repeated = len(data) - len(np.unique(hashes))
    if repeated:
        yield (
            f"{_count(repeated, 'row')} ({repeated / len(data):.1%})"
            f" {'repeats' if repeated == 1 else 'repeat'} another row exactly."
        )
    if still:
        yield (f"In {_count(still, 'row')} ({still / len(data):.1%}) the successor equals the observation.")
