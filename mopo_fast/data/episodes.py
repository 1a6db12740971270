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


def find_episodes(data: Transitions) -> Episodes | None:
    """Find the episodes of a data set whose rows are in the order of time.

    `Transitions.episode_ends` says where one ends. Without stored successors the last step of each episode is
    missing, because it has none.

    Returns:
        The episodes; or None where fewer than half of the rows follow the row before, as in shuffled data.
    """
    ends = data.episode_ends()
    if len(data) > 1 and int(ends.sum()) > len(data) / 2:
        return None
    last = ends.cpu().numpy().nonzero()[0]
    starts = np.append(0, last[:-1] + 1)
    returns = np.add.reduceat(data.rewards.cpu().numpy(), starts, dtype=np.float64)
    return Episodes(returns, last - starts + 1)
