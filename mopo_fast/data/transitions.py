"""`Transitions`: the one form of data in this package, and the layout of its arrays."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from mopo_fast.errors import InputError

# The arrays that every data set has. SAC learns from them.
DATA_ARRAYS = ("observations", "actions", "rewards", "next_observations", "terminals")
# The arrays of `Transitions` that a rollout fills, in the order of the kernels' interface.
ROLLOUT_ARRAYS = (
    *DATA_ARRAYS,
    "raw_rewards",
    "penalties",
    "members",
    "rollout_index",
    "step",
)


def array_layout(
    name: str, obs_dim: int, act_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[tuple[int, ...], torch.dtype]:
    """Return the shape of one row of an array, and the array's type.

    Args:
        name: one of `ROLLOUT_ARRAYS`, or timeouts, which files have.
        dtype: the type of floats.
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
    """Return the bytes of one row of the named arrays together, see `array_layout`."""
    layouts = (array_layout(name, obs_dim, act_dim, dtype) for name in names)
    return sum(math.prod(shape) * kind.itemsize for shape, kind in layouts)


@dataclass
class Transitions:
    """A set of transitions; arrays carry D4RL's names, all on one device.

    Attributes:
        observations: [n, obs_dim] float.
        actions: [n, act_dim] float in [-1, 1], which stands for the environment's range (as in D4RL).
        rewards: [n] float; in a model rollout raw_rewards - penalty_coef * penalties.
        next_observations: [n, obs_dim] float: the true successor.
        terminals: [n] bool: the episode ended here, time limits not counted.
        raw_rewards, penalties: [n] float, model rollouts only.
        members: [n] int32, the ensemble member drawn; -1 where the mean was taken.
        rollout_index: [n] int64, the row number of the start state.
        step: [n] int32, steps since the start state.
        name: what the data is called.
        info: anything else worth keeping: source, counts, how it was made.
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
    name: str = ""
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.observations.shape[0]

    @property
    def obs_dim(self) -> int:
        return self.observations.shape[1]

    @property
    def act_dim(self) -> int:
        return self.actions.shape[1]

    @property
    def device(self) -> torch.device:
        return self.observations.device

    def arrays(self) -> dict[str, torch.Tensor]:
        """Return every array that is there, by name."""
        return {name: getattr(self, name) for name in ROLLOUT_ARRAYS if getattr(self, name) is not None}

    def _map(self, function: Any) -> "Transitions":
        return dataclasses.replace(self, **{name: function(array) for name, array in self.arrays().items()})

    def __getitem__(self, index: Any) -> "Transitions":
        """The transitions at `index`: a slice, a mask or indices (not a single number)."""
        if isinstance(index, int):
            raise TypeError("index Transitions with a slice, a mask or indices; for one row use [i : i + 1]")
        return self._map(lambda array: array[index])

    def to(self, device: torch.device | str) -> "Transitions":
        """Return the same transitions on `device`; no copy where they are there already."""
        return self._map(lambda array: array.to(device))

    def validate(self) -> "Transitions":
        """Check names, shapes, types and finiteness; return self.

        Raises:
            InputError: names the array and, for a bad value, its row.
        """
        where = f"{self.name}: " if self.name else ""
        for name in ("observations", "actions", "next_observations"):
            array = getattr(self, name)
            if array.ndim != 2 or array.shape[1] == 0:
                raise InputError(f"{where}{name} must be [n, dim], got shape {tuple(array.shape)}")
        if len(self) == 0:
            raise InputError(f"{where}there are no transitions")
        if self.next_observations.shape != self.observations.shape:
            raise InputError(
                f"{where}next_observations has shape {tuple(self.next_observations.shape)},"
                f" observations {tuple(self.observations.shape)}; they must be equal"
            )
        for name, array in self.arrays().items():
            if array.shape[0] != len(self):
                raise InputError(f"{where}{name} has {array.shape[0]} rows, observations {len(self)}")
            if name not in ("observations", "actions", "next_observations") and array.ndim != 1:
                raise InputError(f"{where}{name} must be [n], got shape {tuple(array.shape)}")
            if array.is_floating_point():
                row = first_not_finite(array)
                if row is not None:
                    raise InputError(f"{where}{name} is not finite at row {row}; drop or mend such rows")
        if self.terminals.dtype != torch.bool:
            raise InputError(f"{where}terminals must be bool, got {self.terminals.dtype}")
        return self


def first_not_finite(array: torch.Tensor) -> int | None:
    """Return the first row with a value that is not finite; a block at a time, for arrays in files."""
    size = max(1, 2**20 // max(1, array[:1].numel()))
    for number, block in enumerate(array.split(size)):
        finite = torch.isfinite(block)
        if not finite.all():
            return number * size + int((~finite).nonzero()[0, 0])
    return None
