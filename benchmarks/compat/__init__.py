"""Benchmarks of other code's loops as shipped and with our backend; see `__main__`."""

import functools
from collections.abc import Callable
from typing import Any


def in_every_way(
    calls: dict[str, Callable[[Any], object]], ways: dict[str, Any]
) -> dict[str, Callable[[], object]]:
    """Return the calls "rollout, WAY" and "epoch, WAY" for every way."""
    return {
        f"{what}, {name}": functools.partial(call, way)
        for what, call in calls.items()
        for name, way in ways.items()
    }
