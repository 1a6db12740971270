"""Pickled lists of trajectories, as decision-transformer code keeps D4RL's sets; nothing in them is run."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mopo_fast.errors import InputError

Array = npt.NDArray[Any]


class _Dtype:
    """Stands in for numpy.dtype, whose own __setstate__ trusts what it is given."""

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "fiub":
            raise InputError(f"the pickle holds an array of {self.dtype}; only numbers are read")

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for numpy.ndarray, likewise; `array` is there once its state is."""

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        self.array = _from_buffer(content, kind, shape, "F" if fortran else "C")


def _from_buffer(content: Any, kind: _Dtype, shape: Any, order: Any) -> Array:
    return np.frombuffer(content, kind.dtype).reshape(shape, order=order)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "multiarray._reconstruct": lambda *_: _Array(),
    "multiarray.scalar": lambda kind, content: np.frombuffer(content, kind.dtype)[0],
    "numeric._frombuffer": _from_buffer,
}
# All that a pickle of numpy arrays asks for; numpy 2 has moved some, and old protocols encode bytes.
_ALLOWED: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),
    **{f"numpy.{core}.{name}": what for core in ("core", "_core") for name, what in _FUNCTIONS.items()},
}


class _Unpickler(pickle.Unpickler):
    """Makes numpy arrays, dictionaries, lists, tuples, strings and numbers; anything else is an error."""

    def find_class(self, module: str, name: str) -> Any:
        what = f"{module}.{name}"
        if what not in _ALLOWED:
            raise InputError(
                f"the pickle asks for {what}; only numpy arrays in lists and dictionaries are read"
            )
        # A pickle may set attributes of what it is given: never of ours.
        return lambda *arguments: _ALLOWED[what](*arguments)


def read(path: Path) -> dict[str, Array]:
    """D4RL's arrays of a pickled list of trajectories, one after the other.

    A trajectory is a dictionary of arrays with as many rows each: observations, actions, rewards, terminals
    (or dones) and, if any, next_observations. One whose last row is not terminal ended by time.

    Raises:
        InputError: the pickle asks for anything but numpy arrays, or is not such a list.
    """
    with open(path, "rb") as file:
        try:
            found = _Unpickler(file).load()
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (pickle.UnpicklingError, AttributeError, OverflowError) as error:
            raise ValueError(str(error)) from error
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise InputError(f"{path} must hold a list of trajectories, each a dictionary of arrays")
    keys = [key for key in ("observations", "actions", "rewards", "next_observations") if key in found[0]]
    ends = "terminals" if "terminals" in found[0] else "dones"
    arrays: dict[str, list[Array]] = {key: [] for key in (*keys, "terminals", "timeouts")}
    for number, one in enumerate(found):
        lengths = set()
        for key in (*keys, ends):
            value = one.get(key)
            array = np.asarray(getattr(value, "array", value))
            if array.ndim == 0 or array.dtype.kind not in "fiub":
                raise InputError(f"{path}: {key} of trajectory {number} is not an array of numbers")
            arrays["terminals" if key == ends else key].append(array)
            lengths.add(len(array))
        if len(lengths) != 1 or 0 in lengths:
            raise InputError(f"{path}: the arrays of trajectory {number} have {sorted(lengths)} rows")
        timeouts = np.zeros(lengths.pop(), bool)
        timeouts[-1] = not arrays["terminals"][-1].reshape(len(timeouts), -1)[-1].any()
        arrays["timeouts"].append(timeouts)
    return {key: np.concatenate(parts) for key, parts in arrays.items()}
