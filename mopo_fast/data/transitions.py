"""`Transitions`, the form in which this package keeps data, and the layout of its arrays."""

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
        name: one of `ROLLOUT_ARRAYS`, or "timeouts", which only files have.
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


@dataclass
class Transitions:
    """A set of transitions. The arrays have D4RL's names and lie on one device.

    The arrays from `raw_rewards` on exist only in model rollouts.

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
        name: name of the data.
        info: further facts about the data, such as source and counts.
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

    def arrays(self) -> dict[str, torch.Tensor]:
        """Return all arrays that exist, by name."""
        return {name: getattr(self, name) for name in ROLLOUT_ARRAYS if getattr(self, name) is not None}

    def _map(self, function: Any) -> "Transitions":
        return dataclasses.replace(self, **{name: function(array) for name, array in self.arrays().items()})

    def __getitem__(self, index: Any) -> "Transitions":
        """Return the transitions at `index`: a slice, a mask or indices, but not a single number."""
        if isinstance(index, int):
            raise TypeError("index Transitions with a slice, a mask or indices; for one row use [i : i + 1]")
        return self._map(lambda array: array[index])

    def to(self, device: torch.device | str) -> "Transitions":
        """Return the transitions on `device`. Arrays that are there already are not copied."""
        return self._map(lambda array: array.to(device))

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
        for name, array in self.arrays().items():
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
        if self.terminals.dtype != torch.bool:
            raise InputError(f"{where}terminals must be bool, got {self.terminals.dtype}")
        return self


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
