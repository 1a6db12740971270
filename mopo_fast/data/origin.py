"""The environment that a data set was made in, as its metadata tell."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mopo_fast.data import d4rl
from mopo_fast.data.local import MINARI_PREFIX
from mopo_fast.errors import InputError


@dataclass(frozen=True)
class Origin:
    """Environment that a data set was made in.

    Attributes:
        env_id: its id in gymnasium, or None where the metadata have none.
        options: arguments of its constructor that differ from the defaults.
        reference_returns: returns that score 0 and 100, or None where the metadata have none.
    """

    env_id: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    reference_returns: tuple[float, float] | None = None


def origin_of(metadata: Mapping[str, Any]) -> Origin:
    """Return what a data set's metadata tell of its environment.

    Args:
        metadata: texts and numbers as in `Transitions.info`. Minari has gymnasium's specification as JSON in
            env_spec, and may have ref_min_score and ref_max_score. `collect` records env_id.
    """
    env_id, options = metadata.get("env_id"), {}
    try:
        spec = json.loads(metadata.get("env_spec", "null"))
    except (TypeError, ValueError, RecursionError):
        spec = None
    if isinstance(spec, dict):
        env_id, kwargs = spec.get("id"), spec.get("kwargs")
        options = kwargs if isinstance(kwargs, dict) else {}
    # A picture on the screen changes no transition.
    options = {name: value for name, value in options.items() if name != "render_mode"}
    low, high = _number(metadata.get("ref_min_score")), _number(metadata.get("ref_max_score"))
    return Origin(
        env_id if isinstance(env_id, str) else None,
        options,
        None if low is None or high is None or low >= high else (low, high),
    )


def _number(value: Any) -> float | None:
    """Return a finite number as float, and None for anything else."""
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def find_origin(dataset: str) -> Origin:
    """Return what a data set's metadata tell of its environment, without reading its arrays.

    A Minari set is downloaded unless it is there. D4RL's sets, trajectories and folders of shards have no
    such metadata. Any other damaged or missing file tells nothing here, for its error is that of loading it.

    Args:
        dataset: name or path of the data set.

    Raises:
        InputError: a Minari set is missing or damaged.
    """
    from mopo_fast.data import find_dataset, minari
    from mopo_fast.data.files import Reader, open_file

    if dataset.startswith(MINARI_PREFIX):
        return origin_of(minari.read_metadata(dataset))
    try:
        path, name = find_dataset(dataset)
        if name in d4rl.LOCATIONS or path.suffix == ".pkl" or path.is_dir():
            return Origin()
        with open_file(path) as file:
            return origin_of(Reader(str(path), file).metadata())
    except InputError:
        return Origin()
