"""Transitions whose rows lie together in memory.

A kernel that draws rows at random then touches the fewest cache lines and pages. The numbers of a row are
neighbours in one table, whose columns are the arrays. It lies in large pages where Linux grants them.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch

from mopo_fast.data.transitions import Transitions, array_layout, transition_bytes
from mopo_fast.utils.machine import large_zeros

# Arrays that are columns of the table, in this order.
_COLUMNS = ("observations", "actions", "rewards", "next_observations", "raw_rewards", "penalties")
_CACHE_LINE = 64


def table_bytes(names: Iterable[str], obs_dim: int, act_dim: int) -> int:
    """Return the bytes that a row of the named arrays takes in `allocate_table`, padding included."""
    columns, others = _split(names)
    size = transition_bytes(columns, obs_dim, act_dim)
    return size + -size % _CACHE_LINE + transition_bytes(others, obs_dim, act_dim)


def allocate_table(
    names: Iterable[str], rows: int, obs_dim: int, act_dim: int, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Return zeros for the named arrays.

    Args:
        names: some of `ROLLOUT_ARRAYS`, observations among them. Those from observations to penalties are
            float32 columns of one table, the others are arrays of their own.
        rows: number of rows.
        obs_dim: size of an observation.
        act_dim: size of an action.
        device: device of the arrays.

    Returns:
        The arrays by name, [rows, ...] each.
    """
    columns, others = _split(names)
    table_row = table_bytes(columns, obs_dim, act_dim)
    table = large_zeros((rows, table_row // torch.float32.itemsize), device=device)
    arrays: dict[str, Any] = {}
    first = 0
    for name in columns:
        shape, _ = array_layout(name, obs_dim, act_dim)
        arrays[name] = table[:, first : first + math.prod(shape)].view(rows, *shape)
        first += math.prod(shape)
    for name in others:
        shape, dtype = array_layout(name, obs_dim, act_dim)
        arrays[name] = large_zeros((rows, *shape), dtype, device)
    return arrays


def in_table(data: Transitions) -> Transitions:
    """Return a copy of `data` whose rows lie together, on the same device.

    The arrays of floats are float32 columns of one table, so they are not contiguous. `SAC.update_many` on a
    CPU draws rows from such data faster.
    """
    arrays = data.arrays()
    copied = allocate_table(arrays, len(data), data.obs_dim, data.act_dim, data.device)
    for name, array in arrays.items():
        copied[name].copy_(array)
    return dataclasses.replace(data, **copied)


def _split(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split names into those of columns, in the columns' order, and the others."""
    given = list(names)
    return [name for name in _COLUMNS if name in given], [name for name in given if name not in _COLUMNS]
