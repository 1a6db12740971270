"""Read pickled lists of trajectories, as decision-transformer code stores them; no pickled code runs."""

from pathlib import Path

import numpy as np

from mopo_fast.data.names import find_names
from mopo_fast.data.stored import check_fits
from mopo_fast.errors import InputError
from mopo_fast.utils import pickles
from mopo_fast.utils.pickles import Array


def read(path: Path) -> dict[str, Array]:
    """Read a pickled list of trajectories, and join them to D4RL's arrays.

    A trajectory is a dictionary of arrays with the same number of rows: observations, actions, rewards,
    terminals and optionally next_observations, by these names or those of `names.ALIASES`. A trajectory whose
    last row is not terminal ends with a time-out.

    Raises:
        InputError: the pickle holds anything but numpy arrays, or is not such a list.
    """
    # Memory holds the trajectories and the joined arrays at once.
    check_fits(path, 2 * path.stat().st_size, "")
    found = pickles.load(path)
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise InputError(f"{path} must hold a list of trajectories, each a dictionary of arrays")
    names = find_names(found[0], str(path))
    names.pop("timeouts", None)
    names.setdefault("terminals", "terminals")
    arrays: dict[str, list[Array]] = {name: [] for name in (*names, "timeouts")}
    for number, one in enumerate(found):
        lengths = set()
        for name, key in names.items():
            array = pickles.as_array(one.get(key))
            if array.ndim == 0 or array.dtype.kind not in "fiub":
                raise InputError(f"{path}: {key} of trajectory {number} is not an array of numbers")
            arrays[name].append(array)
            lengths.add(len(array))
        if len(lengths) != 1 or 0 in lengths:
            raise InputError(
                f"{path}: the arrays of trajectory {number} have {sorted(lengths)} rows; they must be equal"
            )
        timeouts = np.zeros(lengths.pop(), bool)
        timeouts[-1] = not arrays["terminals"][-1].reshape(len(timeouts), -1)[-1].any()
        arrays["timeouts"].append(timeouts)
    return {key: np.concatenate(parts) for key, parts in arrays.items()}
