"""`Transitions`, the form in which this package keeps data, and the layout of its arrays."""

import dataclasses
import functools
import importlib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from mopo_fast.data.formats import check_file
from mopo_fast.data.write import write_arrays
from mopo_fast.errors import InputError

# The arrays that every data set has. SAC learns from them.
DATA_ARRAYS = ("observations", "actions", "rewards", "next_observations", "terminals")
# Rules by which the successor of a row is found, as `Transitions.info` has them under "successors".
NEXT_OBSERVATIONS = "next_observations"
NEXT_ROW = "next row of the episode"
QLEARNING = "next row, as d4rl.qlearning_dataset"
# The arrays of `Transitions` that a rollout fills, in the order of the kernels' interface.
ROLLOUT_ARRAYS = (
    *DATA_ARRAYS,
    "raw_rewards",
    "penalties",
    "members",
    "rollout_index",
    "step",
)


@functools.lru_cache(maxsize=256)
def array_layout(
    name: str, obs_dim: int, act_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[tuple[int, ...], torch.dtype]:
    """Return the shape of one row of an array, and the array's type.

    Args:
        name: one of `ROLLOUT_ARRAYS`, or "timeouts".
        obs_dim: size of an observation.
        act_dim: size of an action.
        dtype: type of floats.
    """
    shapes = {"observations": (obs_dim,), "next_observations": (obs_dim,), "actions": (act_dim,)}
    dtypes = {
        "terminals": torch.bool,
        "timeouts": torch.bool,
        "members": torch.int32,
        "rollout_index": torch.int64,
        "step": torch.int32,
    }
    return shapes.get(name, ()), dtypes.get(name, dtype)


def transition_bytes(
    names: Iterable[str], obs_dim: int, act_dim: int, dtype: torch.dtype = torch.float32
) -> int:
    """Return the size of one row of the named arrays together, in bytes; arguments as in `array_layout`."""
    layouts = (array_layout(name, obs_dim, act_dim, dtype) for name in names)
    return sum(math.prod(shape) * kind.itemsize for shape, kind in layouts)


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation, least and greatest of some numbers."""

    mean: float
    std: float
    min: float
    max: float


@dataclass(frozen=True, repr=False)
class Description:
    """A summary of transitions, which prints as a table.

    Attributes:
        name: name of the data.
        rows: number of transitions.
        obs_dim: size of an observation.
        act_dim: size of an action.
        episodes: number of episodes.
        terminals: number of episodes that ended in a terminal state.
        spreads: spread of "episode return", "episode length", and of the numbers of each array by its name.
        note: what is particular about the episodes, or "".
    """

    name: str
    rows: int
    obs_dim: int
    act_dim: int
    episodes: int
    terminals: int
    spreads: dict[str, Spread]
    note: str = ""

    def __repr__(self) -> str:
        width = max(map(len, self.spreads))
        lines = [
            f"{self.name or 'transitions'}: {self.rows:,} rows, {self.obs_dim} observation and {self.act_dim}"
            f" action dimensions, {self.episodes:,} episodes, {self.terminals:,} of them end in a terminal"
            " state",
            " " * width + "".join(f"{title:>12}" for title in ("mean", "std", "min", "max")),
        ]
        for name, spread in self.spreads.items():
            lines.append(
                f"{name:<{width}}" + "".join(f"{value:>12.5g}" for value in dataclasses.astuple(spread))
            )
        return "\n".join([*lines, self.note] if self.note else lines)


@dataclass(repr=False)
class Transitions:
    """A set of transitions. The arrays have D4RL's names and lie on one device.

    The arrays from `raw_rewards` to `step` exist only in model rollouts.

    Attributes:
        observations: [n, obs_dim] float.
        actions: [n, act_dim] float in [-1, 1], which stands for the environment's range as in D4RL.
        rewards: [n] float; in a model rollout raw_rewards - penalty_coef * penalties.
        next_observations: [n, obs_dim] float, the true successors.
        terminals: [n] bool, True where the episode ended, except by a time limit.
        raw_rewards: [n] float, rewards without the penalty.
        penalties: [n] float.
        members: [n] int32, index of the ensemble member that was drawn, or -1 where the mean was taken.
        rollout_index: [n] int64, row of the start state.
        step: [n] int32, number of steps since the start state.
        timeouts: [n] bool, True at the last row of an episode that did not end in a terminal state; None
            where that is not known. Only the methods about episodes use it.
        name: name of the data.
        info: further facts about the data:
            - path, rows and metadata of the source;
            - successors: the rule that found them;
            - complete_rows: rows of the source up to the last end of an episode;
            - terminals_left_out: terminal rows without a successor;
            - contradicted: rows whose successor by that rule is not the one that the source stores;
            - earlier_left_out: rows before the last `max_transitions`.
    """

    observations: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    next_observations: torch.Tensor
    terminals: torch.Tensor
    raw_rewards: torch.Tensor | None = None
    penalties: torch.Tensor | None = None
    members: torch.Tensor | None = None
    rollout_index: torch.Tensor | None = None
    step: torch.Tensor | None = None
    timeouts: torch.Tensor | None = None
    name: str = ""
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.observations.shape[0]

    @property
    def obs_dim(self) -> int:
        """Size of an observation."""
        return self.observations.shape[1]

    @property
    def act_dim(self) -> int:
        """Size of an action."""
        return self.actions.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the arrays."""
        return self.observations.device

    def __repr__(self) -> str:
        name = f"{self.name!r}, " if self.name else ""
        return (
            f"Transitions({name}{len(self):,} rows, obs_dim={self.obs_dim}, act_dim={self.act_dim},"
            f" arrays: {', '.join(self.arrays())}; device='{self.device}')"
        )

    def arrays(self) -> dict[str, torch.Tensor]:
        """Return those of `ROLLOUT_ARRAYS` that exist, by name."""
        return {name: getattr(self, name) for name in ROLLOUT_ARRAYS if getattr(self, name) is not None}

    def _all_arrays(self) -> dict[str, torch.Tensor]:
        return self.arrays() | ({} if self.timeouts is None else {"timeouts": self.timeouts})

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Transitions":
        changed: dict[str, Any] = {name: function(array) for name, array in self._all_arrays().items()}
        return dataclasses.replace(self, **changed)

    def __getitem__(self, index: Any) -> "Transitions":
        """Return the transitions at `index`: a slice, a mask or indices, but not a single number."""
        if isinstance(index, int):
            raise TypeError("index Transitions with a slice, a mask or indices; for one row use [i : i + 1]")
        picked = self._map(lambda array: array[index])
        if not isinstance(index, slice) or index.step not in (None, 1):
            # Neighbouring rows need not follow one another any more.
            picked.timeouts = None
        return picked

    def to(self, device: torch.device | str) -> "Transitions":
        """Return the transitions on `device`. Arrays that are there already are not copied."""
        return self._map(lambda array: array.to(device))

    def last(self, count: int) -> "Transitions":
        """Return the last `count` transitions, or all if there are no more.

        Raises:
            InputError: `count` is less than 1.
        """
        if count < 1:
            raise InputError(f"max_transitions must be at least 1, got {count}")
        if count >= len(self):
            return self
        kept = self[len(self) - count :]
        kept.info = self.info | {"earlier_left_out": len(self) - count}
        return kept

    def as_data(self) -> "Transitions":
        """Return the transitions as a checked data set: contiguous float32 arrays on the CPU.

        Raises:
            InputError: see `validate`.
        """

        def converted(array: torch.Tensor) -> torch.Tensor:
            kind = torch.float32 if array.is_floating_point() else array.dtype
            return array.detach().to("cpu", kind).contiguous()

        return self._map(converted).validate()

    def validate(self) -> "Transitions":
        """Check shapes, types and finiteness, and return self.

        Raises:
            InputError: an array does not fit. The message names the array and the row of a bad value.
        """
        where = f"{self.name}: " if self.name else ""
        for name in ("observations", "actions", "next_observations"):
            array = getattr(self, name)
            if array.ndim != 2 or array.shape[1] == 0:
                raise InputError(f"{where}{name} must be [n, dim], got shape {tuple(array.shape)}")
        if len(self) == 0:
            raise InputError(f"{where}there are no transitions; give at least one")
        if self.next_observations.shape != self.observations.shape:
            raise InputError(
                f"{where}next_observations has shape {tuple(self.next_observations.shape)},"
                f" observations {tuple(self.observations.shape)}; they must be equal"
            )
        for name, array in self._all_arrays().items():
            if array.shape[0] != len(self):
                raise InputError(
                    f"{where}{name} has {array.shape[0]} rows, observations {len(self)}; they must be equal"
                )
            if name not in ("observations", "actions", "next_observations") and array.ndim != 1:
                raise InputError(f"{where}{name} must be [n], got shape {tuple(array.shape)}")
            if array.is_floating_point():
                row = first_not_finite(array)
                if row is not None:
                    raise InputError(f"{where}{name} is not finite at row {row}; drop or correct such rows")
            if name in ("terminals", "timeouts") and array.dtype != torch.bool:
                raise InputError(f"{where}{name} must be bool, got {array.dtype}")
        return self

    def episode_ends(self) -> torch.Tensor:
        """Return as bool [n] which rows are the last of their episode.

        An episode ends at a terminal state, at a time-out, where the next row's observation is not the
        successor, and at the last row. In a model rollout it ends where the start state changes instead of
        where the next row does not follow.
        """
        ends = self.terminals.clone()
        if self.timeouts is not None:
            ends |= self.timeouts
        if self.rollout_index is not None:
            ends[:-1] |= self.rollout_index[1:] != self.rollout_index[:-1]
        else:
            ends |= self.breaks()
        ends[-1:] = True
        return ends

    def breaks(self) -> torch.Tensor:
        """Return as bool [n] after which rows another observation than the successor follows."""
        found = torch.zeros_like(self.terminals)
        # Block by block, since the arrays may be mapped from a file that is larger than the memory.
        for first in range(0, len(self) - 1, _BLOCK):
            rows = slice(first, min(first + _BLOCK, len(self) - 1))
            following = self.observations[rows.start + 1 : rows.stop + 1]
            found[rows] = (self.next_observations[rows] != following).any(-1)
        return found

    def episode_returns(self) -> torch.Tensor:
        """Return the sum of `rewards` of each episode, float64 [episodes]; see `episode_ends`.

        A data set without `next_observations` is loaded without the last step of each episode, whose reward
        is then missing here too.
        """
        return self._sum_episodes(self.rewards)

    def _sum_episodes(self, values: torch.Tensor) -> torch.Tensor:
        ends = self.episode_ends()
        episode = ends.cumsum(0) - ends.long()
        sums = torch.zeros(int(ends.sum()), dtype=torch.float64, device=self.device)
        return sums.index_add_(0, episode, values.double())

    def describe(self) -> Description:
        """Summarise rows, episodes and the ranges of all numbers; the result prints as a table."""
        ends = self.episode_ends()
        spreads = {
            "episode return": _spread(self.episode_returns()),
            "episode length": _spread(self._sum_episodes(torch.ones_like(self.rewards))),
        }
        for name, array in self.arrays().items():
            if array.is_floating_point():
                spreads[name] = _spread(array)
        note = ""
        if str(self.info.get("successors", "")).startswith("next row"):
            note = "Rows without a successor, such as the last one of an episode, were left out when loading."
        return Description(
            name=self.name,
            rows=len(self),
            obs_dim=self.obs_dim,
            act_dim=self.act_dim,
            episodes=int(ends.sum()),
            terminals=int(self.terminals.sum()),
            spreads=spreads,
            note=note,
        )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the transitions to a file in D4RL's layout, atomically; `load_dataset` reads it.

        The file holds all arrays, `timeouts` by `episode_ends`, and the texts and numbers among the data
        set's metadata, or else of `info`, as metadata/*.

        Args:
            path: file to write; its suffix is .hdf5, .h5 or .npz.
            overwrite: replace the file if it exists.

        Raises:
            InputError: the suffix is another, the file exists and `overwrite` is False, or it cannot be
                written.
        """
        check_file(path, overwrite)
        arrays = self.arrays() | {"timeouts": self.episode_ends() & ~self.terminals}
        contents: dict[str, Any] = {name: array.detach().cpu().numpy() for name, array in arrays.items()}
        facts = self.info.get("metadata", self.info)
        contents |= {
            f"metadata/{name}": fact for name, fact in facts.items() if isinstance(fact, str | int | float)
        }
        write_arrays(path, contents)

    def to_pandas(self) -> Any:
        """Return a pandas data frame with a column for each number of a row, such as observations_0.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise InputError(
                f"pandas cannot be imported ({error}); install it with `pip install pandas`"
            ) from error
        columns: dict[str, Any] = {}
        for name, array in self._all_arrays().items():
            values = array.detach().cpu().numpy()
            if values.ndim == 1:
                columns[name] = values
            else:
                columns |= {f"{name}_{i}": values[:, i] for i in range(values.shape[1])}
        return pandas.DataFrame(columns)


# Rows that are read at a time.
_BLOCK = 2**16


def _spread(array: torch.Tensor) -> Spread:
    """Return the spread of all numbers of an array [n, ...], NaN for none."""
    if array.numel() == 0:
        return Spread(math.nan, math.nan, math.nan, math.nan)
    blocks = array.detach().split(_BLOCK)
    mean = sum(block.double().sum().item() for block in blocks) / array.numel()
    variance = sum((block.double() - mean).square().sum().item() for block in blocks) / array.numel()
    least, greatest = (
        min(block.min().item() for block in blocks),
        max(block.max().item() for block in blocks),
    )
    return Spread(mean, math.sqrt(variance), least, greatest)


def first_not_finite(array: torch.Tensor) -> int | None:
    """Return the first row with a value that is not finite, or None.

    The array is read block by block, since it may be mapped from a file that is larger than the memory.
    """
    size = max(1, 2**20 // max(1, array[:1].numel()))
    for number, block in enumerate(array.split(size)):
        finite = torch.isfinite(block)
        if not finite.all():
            return number * size + int((~finite).nonzero()[0, 0])
    return None
