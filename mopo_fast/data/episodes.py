"""Episodes of data whose rows are in the order of time: their returns and lengths."""

from dataclasses import dataclass

import numpy as np

from mopo_fast.data.stored import Array
from mopo_fast.data.transitions import Transitions


@dataclass(frozen=True)
class Episodes:
    """The episodes of a data set, in order.

    Attributes:
        returns: [episodes] float64, sums of the rewards.
        lengths: [episodes] int64, numbers of steps.
    """

    returns: Array
    lengths: Array


def split_episodes(rewards: Array, ends: Array) -> Episodes | None:
    """Split rows into whole episodes.

    Args:
        rewards: [n] float.
        ends: [n] bool, True at the last row of each episode. Rows after the last end are left out.

    Returns:
        The episodes, or None where no row ends one.
    """
    last = np.flatnonzero(ends)
    if not len(last):
        return None
    starts = np.append(0, last[:-1] + 1)
    return Episodes(np.add.reduceat(rewards[: last[-1] + 1], starts, dtype=np.float64), last - starts + 1)


def find_episodes(data: Transitions) -> Episodes | None:
    """Find the episodes of a data set whose rows are in the order of time.

    An episode ends at a terminal, and where a row's successor is not the observation of the next row. Without
    stored successors the last step of each episode is missing, because it has none.

    Returns:
        The episodes; or None where fewer than half of the rows follow the row before, as in shuffled data.
    """
    ends = data.terminals | data.breaks()
    ends[-1] = True
    if len(data) > 1 and int(ends.sum()) > len(data) / 2:
        return None
    return split_episodes(data.rewards.cpu().numpy(), ends.cpu().numpy())
