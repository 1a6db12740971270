"""Pickles of others, read without running anything: arrays, containers, numbers, stand-ins for objects.

Python's own unpickler written in Python reads them. The one in C allocates what a file declares, before it
looks whether the file has as much, and crashes on what is nested deeply.
"""

import errno
import functools
import math
import mmap
import os
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mopo_fast.errors import InputError
from mopo_fast.utils.machine import check_memory

Array = npt.NDArray[Any]

# NumPy has no more.
_MAX_DIMENSIONS = 64
# Beyond this length a dimension is not believed of an array without elements.
_LONGEST_EMPTY = 1 << 20
# Containers and objects of a pickle, and what it remembers: each may take a byte of the file, and a hundred
# of memory.
_MOST_OBJECTS = 1 << 22
# Whole numbers from here on can be chosen to have one hash, which makes a dictionary quadratic.
_LARGEST_KEY = 1 << 60


class Inert:
    """Stands in for an object of a class that is not to be run.

    `state` is what it was given after it was made, usually its attributes. What is put into it, were it a
    container, is dropped.
    """

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return super().__new__(cls)

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
        if not isinstance(code, str):
            raise InputError("the pickle holds an array of no known type; only numbers are read")
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "fiub":
            raise InputError(f"the pickle holds an array of {self.dtype}; only numbers are read")

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for numpy.ndarray, likewise; `array` is there once its state is."""

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        self.array = from_buffer(content, kind, shape, "F" if fortran else "C")


def check_shape(shape: Any) -> tuple[int, ...]:
    """The shape of an array; raise `InputError` where it is no tuple of counts, or absurd."""
    if not isinstance(shape, tuple) or len(shape) > _MAX_DIMENSIONS:
        raise InputError("an array's shape is no tuple of a few numbers")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise InputError("an array's shape holds what is no whole number")
    if math.prod(shape) == 0 and max(shape) > _LONGEST_EMPTY:
        raise InputError("an array without elements claims to be huge")
    return shape


def from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> Array:
    """An array in the memory of `content`; `kind` is a `_Dtype` or the name of one."""
    kind = kind if isinstance(kind, _Dtype) else _Dtype(kind)
    if not isinstance(content, bytes | bytearray) or order not in ("C", "F"):
        raise InputError("an array's content is no bytes")
    return np.frombuffer(content, kind.dtype).reshape(check_shape(shape), order=order)


def _scalar(kind: Any, content: Any) -> Any:
    return from_buffer(content, kind, (1,), "C")[0]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "multiarray._reconstruct": lambda *_: _Array(),
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": from_buffer,
}
# All that a pickle of numpy arrays asks for; numpy 2 has moved some. Old protocols encode bytes as text.
NUMPY: dict[str, Any] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    # No bytes, as protocols before 3 have them.
    **dict.fromkeys(("builtins.bytes", "__builtin__.bytes"), lambda: b""),
    **{f"numpy.{core}.{name}": what for core in ("core", "_core") for name, what in _FUNCTIONS.items()},
}


def as_array(value: Any) -> Array:
    """The array of what was pickled as an array, a number, or a list of numbers or of rows of numbers.

    An array of kind object where it is none of these. A list may hold one row a million times, and its rows
    themselves: nothing is made of a list before its elements are counted.
    """
    value = getattr(value, "array", value) if isinstance(value, _Array) else value
    if isinstance(value, list | tuple):
        rows = value if value and all(isinstance(row, list | tuple) for row in value) else [value]
        numbers = int | float | np.number | np.bool_
        width = len(rows[0])
        check_memory("a list in the pickle", 8 * len(rows) * width, "cpu", "its length")
        if not all(len(row) == width and all(isinstance(x, numbers) for x in row) for row in rows):
            return np.empty((), object)
    elif not isinstance(value, int | float | np.ndarray | np.number | np.bool_):
        return np.empty((), object)
    return np.asarray(value)


def _encoder() -> Callable[[Any, Any], bytes]:
    """`_codecs.encode` for one file: however often that asks for it, a text is encoded once."""
    encode = functools.cache(lambda text: str.encode(text, "latin1"))

    def encode_text(text: Any, _: Any) -> bytes:
        if not isinstance(text, str):
            raise InputError("the pickle encodes what is no text")
        return encode(text)

    return encode_text


def _check_keys(keys: Collection[Any]) -> None:
    # A tuple's hash calls that of what it holds: nested deeply, it overflows the stack.
    if not all(key is None or isinstance(key, str | bytes | int | float | np.number) for key in keys):
        raise InputError("the pickle has keys that are neither texts nor numbers")
    if any(isinstance(key, int | np.integer) and abs(int(key)) >= _LARGEST_KEY for key in keys):
        raise InputError(f"the pickle has keys beyond {_LARGEST_KEY:,}")


def _counted(opcode: Callable[["_Unpickler"], None]) -> Callable[["_Unpickler"], None]:
    """Count what an opcode makes or remembers, which no sound file does endlessly."""

    def opcode_and_count(self: "_Unpickler") -> None:
        self.made += 1
        if max(self.made, len(self.memo)) > _MOST_OBJECTS:
            raise InputError(f"the pickle has more than {_MOST_OBJECTS:,} objects")
        opcode(self)

    return opcode_and_count


# Its methods are declared nowhere.
_PurePython: Any = pickle._Unpickler


class _Unpickler(_PurePython):
    """Does what a pickle says to containers and stand-ins, and to no other object."""

    def __init__(
        self,
        file: Any,
        allowed: Mapping[str, Any],
        inert: Collection[str] | None,
        persistent_load: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(file)
        self._allowed, self._inert, self.made = allowed, inert, 0
        # Classes are large: each name has one.
        self._found: dict[str, Any] = {"_codecs.encode": _encoder()}
        if persistent_load is not None:
            self.persistent_load = persistent_load

    def find_class(self, module: str, name: str) -> Any:
        what = f"{module}.{name}"
        if what not in self._found:
            self._found[what] = self._find(what, name)
        return self._found[what]

    def _find(self, what: str, name: str) -> Any:
        if what in self._allowed:
            return self._allowed[what]
        if self._inert is None or what in self._inert:
            return type(name, (Inert,), {})
        known = "numpy arrays" if self._allowed is NUMPY else "things that such a file holds"
        raise InputError(f"the pickle asks for {what[:100]}; only {known} in lists and dictionaries are read")

    def _require(self, kinds: Any, offset: int = -1) -> None:
        if not isinstance(self.stack[offset], kinds):
            raise InputError(f"the pickle changes a {type(self.stack[offset]).__name__}")

    # --- opcodes

    def load_setitem(self) -> None:
        self._require(dict | Inert, -3)
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        items = self.pop_mark()
        self._require(dict | Inert)
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][key] = value

    def load_dict(self) -> None:
        _check_keys(self.stack[::2])
        super().load_dict()

    def load_append(self) -> None:
        self._require(list | Inert, -2)
        super().load_append()

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._require(list | Inert)
        self.stack[-1].extend(items)

    def load_additems(self) -> None:
        _check_keys(self.stack)
        items = self.pop_mark()
        self._require(set)
        self.stack[-1].update(items)

    def load_frozenset(self) -> None:
        _check_keys(self.stack)
        super().load_frozenset()

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        self._make(kind, arguments)

    def load_newobj_ex(self) -> None:
        _, arguments, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self._make(kind, arguments)

    def _make(self, kind: Any, arguments: Any) -> None:
        if not (isinstance(kind, type) and issubclass(kind, Inert)):
            raise InputError("the pickle makes an object of what is no class")
        self.stack.append(kind())

    def load_build(self) -> None:
        state = self.stack.pop()
        # A state dict's attributes, its versions, are left out.
        self._require(Inert | _Dtype | _Array | OrderedDict)
        if not isinstance(self.stack[-1], OrderedDict):
            self.stack[-1].__setstate__(state)

    def load_bytearray8(self) -> None:
        # The original allocates as much as the file says.
        (length,) = struct.unpack("<Q", self.read(8))
        self.stack.append(bytearray(self.read(min(length, sys.maxsize))))

    def refuse(self) -> None:
        raise InputError("the pickle asks for this process's own extensions or buffers")

    dispatch: ClassVar = {
        **_PurePython.dispatch,
        **dict.fromkeys(
            (ord(op) for op in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER)), refuse
        ),
        ord(pickle.SETITEM): load_setitem,
        ord(pickle.SETITEMS): load_setitems,
        ord(pickle.DICT): load_dict,
        ord(pickle.APPEND): load_append,
        ord(pickle.APPENDS): load_appends,
        ord(pickle.ADDITEMS): load_additems,
        ord(pickle.FROZENSET): load_frozenset,
        ord(pickle.NEWOBJ): load_newobj,
        ord(pickle.NEWOBJ_EX): load_newobj_ex,
        ord(pickle.BUILD): load_build,
        ord(pickle.BYTEARRAY8): load_bytearray8,
    }
    for _op in (
        *(pickle.MARK, pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_DICT, pickle.DICT, pickle.EMPTY_SET),
        *(pickle.FROZENSET, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
        *(pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.INST, pickle.OBJ),
        *(pickle.MEMOIZE, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT),
    ):
        dispatch[ord(_op)] = _counted(dispatch[ord(_op)])


class Pickler(pickle._Pickler):
    """Names classes and functions without importing them, so that they may be stand-ins; NumPy's as NumPy 1
    had them, which NumPy 2 still reads.
    """

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__qualname__}\n".encode())  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]


def unpickle(
    file: Any,
    allowed: Mapping[str, Any] = NUMPY,
    inert: Collection[str] | None = (),
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """The object in a pickle, of which nothing but what is `allowed` is called.

    Containers, texts and numbers need no names. Keys must be texts or numbers.

    Args:
        file: in memory (`io.BytesIO`, `mmap.mmap`): a read beyond its end allocates nothing.
        allowed: functions and values by the "module.name" that the pickle has for them.
        inert: the names of what is made an `Inert`; None: all that is not allowed.
        persistent_load: makes what the pickle keeps elsewhere, as in `pickle.Unpickler`.

    Raises:
        InputError: it asks for something else.
        Exception: any, where the pickle is not sound.
    """
    return _Unpickler(file, allowed, inert, persistent_load).load()


def load(
    path: str | os.PathLike[str],
    allowed: Mapping[str, Any] = NUMPY,
    inert: Collection[str] | None = (),
) -> Any:
    """`unpickle` of a file.

    Raises:
        InputError: the file is missing, is no sound pickle, or asks for something else.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            check_memory("its content", len(content), "cpu", "its size")
            return unpickle(content, allowed, inert)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    # A damaged pickle fails in any way.
    except Exception as error:
        raise InputError(
            f"{path} is not a whole pickle file ({brief(error)}); get or make it again"
        ) from error


def brief(error: Exception) -> str:
    """An error's first line, cut off where it is long: a file's own texts may be in it."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]
