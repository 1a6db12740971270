"""Pickles of others, read without running anything: arrays, containers, numbers, stand-ins for objects."""

import os
import pickle
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mopo_fast.errors import InputError

Array = npt.NDArray[Any]


class Inert:
    """Stands in for an object of a class that is not to be run.

    `arguments` are what it was made of, `state` is what it was given afterwards, usually its attributes. What
    is put into it, were it a container, is dropped.
    """

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any, **_: Any) -> "Inert":
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def _drop(self, *_: Any) -> None:
        pass

    __setitem__ = append = extend = add = _drop


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
NUMPY: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),
    **{f"numpy.{core}.{name}": what for core in ("core", "_core") for name, what in _FUNCTIONS.items()},
}


def as_array(value: Any) -> Array:
    """What was pickled as an array, or the array of a number; of kind object where it is neither."""
    return np.asarray(getattr(value, "array", value))


def unpickler(
    allowed: Mapping[str, Callable[..., Any]] = NUMPY, inert: Collection[str] | None = ()
) -> type[pickle.Unpickler]:
    """An unpickler that calls what is `allowed` by name alone and makes an `Inert` of what is `inert`.

    Both go by "module.name"; `inert` None: all that is not allowed. Containers, strings and numbers need no
    names. Anything else that a pickle asks for raises `InputError`.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            what = f"{module}.{name}"
            # A pickle may set attributes of what it is given: never of ours.
            if what in allowed:
                return lambda *arguments: allowed[what](*arguments)
            if inert is None or what in inert:
                return type(name, (Inert,), {})
            known = "numpy arrays" if allowed is NUMPY else "things that such a file holds"
            raise InputError(f"the pickle asks for {what}; only {known} in lists and dictionaries are read")

    return Unpickler


class Pickler(pickle._Pickler):
    """Names classes and functions without importing them, so that they may be stand-ins; NumPy's as NumPy 1
    had them, which NumPy 2 still reads.
    """

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__qualname__}\n".encode())  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]


def load(
    path: str | os.PathLike[str],
    allowed: Mapping[str, Callable[..., Any]] = NUMPY,
    inert: Collection[str] | None = (),
) -> Any:
    """The object in a pickle file, made by `unpickler(allowed, inert)`.

    Raises:
        InputError: the file is missing, is no sound pickle, or asks for something else.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return unpickler(allowed, inert)(file).load()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    # A damaged pickle fails in any way.
    except Exception as error:
        raise InputError(f"{path} is not a whole pickle file ({error}); get or make it again") from error
