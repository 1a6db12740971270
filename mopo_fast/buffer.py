"""The model buffer: a preallocated ring of transitions, in which new rows replace the oldest.

The rows of an epoch enter in the order of `RolloutEngine.rollout`: by start state, then by step. The authors'
code appends all rows of a step, then those of the next one (softlearning/algorithms/mopo.py, _rollout_model).
It matters where rollouts end early, as hopper's do. An epoch is then shorter than its share of the buffer,
and of the oldest epoch a part is left. That part is whole rollouts here, and late steps in their code.
"""

import torch

from mopo_fast.data.table import allocate_table, table_bytes
from mopo_fast.data.transitions import DATA_ARRAYS, Transitions
from mopo_fast.errors import InputError


def _arrays(penalties: bool) -> tuple[str, ...]:
    return (*DATA_ARRAYS, "raw_rewards", *(["penalties"] if penalties else []))


def row_bytes(obs_dim: int, act_dim: int, *, penalties: bool = True) -> int:
    """Return the bytes that one row of a `RingBuffer` takes, padding included."""
    return table_bytes(_arrays(penalties), obs_dim, act_dim)


class RingBuffer:
    """The latest model transitions, at most `capacity`. Backends write into `storage` directly.

    Args:
        capacity: number of rows.
        obs_dim: size of an observation.
        act_dim: size of an action.
        device: device of the arrays.
        penalties: store penalties. Rollouts with a penalty_coef of 0 are faster without.

    Attributes:
        storage: `Transitions` of `capacity` rows with raw_rewards and, as asked, penalties, float32. Its
            first `size` rows hold data. All arrays but the terminals are columns of one table.
        capacity: number of rows.
        head: row that is written next.
        size: number of rows that hold data.

    Raises:
        InputError: a size is not positive.
    """

    def __init__(
        self,
        capacity: int,
        obs_dim: int,
        act_dim: int,
        device: torch.device | str = "cpu",
        *,
        penalties: bool = True,
    ) -> None:
        if min(capacity, obs_dim, act_dim) < 1:
            raise InputError(
                f"a buffer needs positive sizes, got capacity {capacity}, obs {obs_dim}, act {act_dim}"
            )

        arrays = allocate_table(_arrays(penalties), capacity, obs_dim, act_dim, device)
        self._use(Transitions(**arrays, name="model"))

    @classmethod
    def over(cls, storage: Transitions) -> "RingBuffer":
        """Make an empty ring that writes into `storage`.

        Raises:
            InputError: the arrays differ in length, are empty, or are mapped from a file.
        """
        if storage.info.get("memory_mapped"):
            raise InputError("a buffer cannot write into data that are mapped from a file; load them instead")
        lengths = {name: len(array) if array.ndim else 0 for name, array in storage.arrays().items()}
        if len(set(lengths.values())) != 1 or not lengths["rewards"]:
            raise InputError(f"a buffer's arrays must all have the same number of rows, got {lengths}")
        ring = cls.__new__(cls)
        ring._use(storage)
        return ring

    def _use(self, storage: Transitions) -> None:
        self.storage = storage
        self.capacity = len(storage)
        self.clear()

    def clear(self) -> None:
        """Forget every row."""
        self.head = 0
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def advance(self, count: int) -> None:
        """Count `count` rows as written, which a backend has written from `head` on.

        Raises:
            InputError: more rows than the buffer holds.
        """
        if not 0 <= count <= self.capacity:
            raise InputError(f"{count} rows do not fit a buffer of {self.capacity}")
        self.head = (self.head + count) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def append(self, rows: Transitions) -> None:
        """Copy `rows` in; in a full buffer they replace the oldest.

        Raises:
            InputError: the rows have other dimensions, are more than the buffer holds, or lack an array.
        """
        if (rows.obs_dim, rows.act_dim) != (self.storage.obs_dim, self.storage.act_dim):
            raise InputError(
                f"the buffer holds observations of {self.storage.obs_dim} and actions of"
                f" {self.storage.act_dim} dimensions, got {rows.obs_dim} and {rows.act_dim}"
            )
        if len(rows) > self.capacity:
            raise InputError(f"{len(rows)} rows do not fit a buffer of {self.capacity}")
        arrays = rows.arrays()
        until_end = min(len(rows), self.capacity - self.head)
        for name, target in self.storage.arrays().items():
            if name not in arrays:
                raise InputError(f"the buffer stores {name}, which the rows lack")
            target[self.head : self.head + until_end] = arrays[name][:until_end]
            target[: len(rows) - until_end] = arrays[name][until_end:]
        self.advance(len(rows))
