"""The model buffer: a preallocated ring of transitions, first in, first out, on one device."""

import torch

from mopo_fast.backends import cpu
from mopo_fast.data.transitions import Transitions
from mopo_fast.errors import InputError

# In words of float32.
_CACHE_LINE = 16
_SCALARS = ("rewards", "raw_rewards", "penalties")


def _widths(obs_dim: int, act_dim: int) -> dict[str, int]:
    return {
        "observations": obs_dim,
        "actions": act_dim,
        "rewards": 1,
        "next_observations": obs_dim,
        "raw_rewards": 1,
        "penalties": 1,
    }


def row_bytes(obs_dim: int, act_dim: int) -> int:
    """Memory of one row of a `RingBuffer`."""
    words = sum(_widths(obs_dim, act_dim).values())
    return 4 * (words + -words % _CACHE_LINE) + 1


class RingBuffer:
    """The last `capacity` model transitions; backends write straight into `storage`.

    Attributes:
        storage: `Transitions` of `capacity` rows with raw_rewards and penalties, float32; only its first
            `size` rows hold data. All but the terminals are columns of one table.
        capacity: rows at most.
        head: the row that is written next.
        size: rows that hold data.

    Raises:
        InputError: a size is not positive.
    """

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device | str = "cpu") -> None:
        if min(capacity, obs_dim, act_dim) < 1:
            raise InputError(
                f"a buffer needs positive sizes, got capacity {capacity}, obs {obs_dim}, act {act_dim}"
            )

        widths = _widths(obs_dim, act_dim)
        padding = -sum(widths.values()) % _CACHE_LINE
        # Side by side: a row that is drawn at random lies in one page and as few cache lines as it can.
        table = torch.empty(capacity, sum(widths.values()) + padding, dtype=torch.float32, device=device)
        columns = cpu.use_large_pages(table).zero_().split([*widths.values(), padding], dim=1)
        arrays = dict(zip(widths, columns, strict=False))
        terminals = torch.empty(capacity, dtype=torch.bool, device=device)
        self._use(
            Transitions(
                **{name: array.squeeze(1) if name in _SCALARS else array for name, array in arrays.items()},
                terminals=cpu.use_large_pages(terminals).zero_(),
                name="model",
            )
        )

    @classmethod
    def over(cls, storage: Transitions) -> "RingBuffer":
        """An empty ring whose rows are those of `storage`, with the arrays that it has.

        Raises:
            InputError: its arrays are not of as many rows each, or are mapped from a file.
        """
        if storage.info.get("memory_mapped"):
            raise InputError("a buffer cannot be over data that are mapped from their file")
        lengths = {name: len(array) if array.ndim else 0 for name, array in storage.arrays().items()}
        if len(set(lengths.values())) != 1 or not lengths["rewards"]:
            raise InputError(f"a buffer's arrays need as many rows each, got {lengths}")
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
        """Take over `count` rows that were written from `head` on, wrapping around at the end.

        Raises:
            InputError: more rows than the buffer holds.
        """
        if not 0 <= count <= self.capacity:
            raise InputError(f"{count} rows do not fit a buffer of {self.capacity}")
        self.head = (self.head + count) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def append(self, rows: Transitions) -> None:
        """Copy `rows` in, over the oldest where the buffer is full.

        Raises:
            InputError: other dimensions than the buffer's, more rows than it holds, or an array missing.
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
