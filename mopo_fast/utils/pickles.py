"""Reading untrusted pickles without running code: arrays, containers, numbers, and stand-ins for objects.

This builds on the unpickler of the standard library that is written in Python. The one in C allocates what a
file declares before it checks that the file is so large, and crashes on deeply nested values.
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

# NumPy's upper limit.
_MAX_DIMENSIONS = 64
# Upper limit of a dimension of an array without elements.
_LONGEST_EMPTY = 1 << 20
# Upper limit of the containers and objects of a pickle, and of its memo. Each may take one byte of the file
# and a hundred bytes of memory.
_MOST_OBJECTS = 1 << 22
# Larger whole numbers can be chosen to have the same hash, which makes a dictionary quadratic.
_LARGEST_KEY = 1 << 60


class Inert:
    """Stand-in for an object of a class that must not be run.

    Items that the pickle puts into it are dropped.

    Attributes:
        state: the state in the pickle, usually the object's attributes.
    """

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        """Take and ignore any arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def _drop(self, *_: Any) -> None:
        pass

    __setitem__ = append = extend = add = _drop


class _Dtype:
    """Stand-in for numpy.dtype, whose own __setstate__ does not check its argument."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str):
            raise InputError("the pickle holds an array of no known type; only numbers are read")
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "fiub":
            raise InputError(f"the pickle holds an array of {self.dtype}; only numbers are read")

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stand-in for numpy.ndarray, for the same reason. Its state sets the attribute `array`."""

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        self.array = from_buffer(content, kind, shape, "F" if fortran else "C")


def check_shape(shape: Any) -> tuple[int, ...]:
    """Return the shape of an array; raise `InputError` where it is not a tuple of plausible sizes."""
    if not isinstance(shape, tuple) or len(shape) > _MAX_DIMENSIONS:
        raise InputError("an array's shape is not a tuple of a few numbers")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise InputError("an array's shape holds something other than whole numbers")
    if math.prod(shape) == 0 and max(shape) > _LONGEST_EMPTY:
        raise InputError("an array without elements claims to be huge")
    return shape


def from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> Array:
    """Make an array in the memory of `content`. Its `kind` is a `_Dtype` or the name of one."""
    kind = kind if isinstance(kind, _Dtype) else _Dtype(kind)
    if not isinstance(content, bytes | bytearray) or order not in ("C", "F"):
        raise InputError("an array's content is not bytes")
    return np.frombuffer(content, kind.dtype).reshape(check_shape(shape), order=order)


def _scalar(kind: Any, content: Any) -> Any:
    return from_buffer(content, kind, (1,), "C")[0]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "multiarray._reconstruct": lambda *_: _Array(),
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": from_buffer,
}
# All names that a pickle of NumPy arrays needs. NumPy 2 has moved some. Old protocols encode bytes as text.
NUMPY: dict[str, Any] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    # Protocols before 3 make empty bytes by this call.
    **dict.fromkeys(("builtins.bytes", "__builtin__.bytes"), lambda: b""),
    **{f"numpy.{core}.{name}": what for core in ("core", "_core") for name, what in _FUNCTIONS.items()},
}


def as_array(value: Any) -> Array:
    """Convert an array, a number, or a list of numbers or of rows of numbers to an array.

    Anything else becomes an empty array of dtype object. The elements of a list are counted before anything
    is allocated, because a list may hold one row a million times.
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
    """Make `_codecs.encode` for one file, which encodes a text once however often the file asks for it."""
    encode = functools.cache(lambda text: str.encode(text, "latin1"))

    def encode_text(text: Any, _: Any) -> bytes:
        if not isinstance(text, str):
            raise InputError("the pickle encodes something that is not text")
        return encode(text)

    return encode_text


def _check_keys(keys: Collection[Any]) -> None:
    # The hash of a deeply nested tuple overflows the stack.
    if not all(key is None or isinstance(key, str | bytes | int | float | np.number) for key in keys):
        raise InputError("the pickle has keys that are neither texts nor numbers")
    if any(isinstance(key, int | np.integer) and abs(int(key)) >= _LARGEST_KEY for key in keys):
        raise InputError(f"the pickle has keys beyond {_LARGEST_KEY:,}")


def _counted(opcode: Callable[["_Unpickler"], None]) -> Callable[["_Unpickler"], None]:
    """Limit how many objects an opcode makes and remembers."""

    def opcode_and_count(self: "_Unpickler") -> None:
        self.made += 1
        if max(self.made, len(self.memo)) > _MOST_OBJECTS:
            raise InputError(f"the pickle has more than {_MOST_OBJECTS:,} objects")
        opcode(self)

    return opcode_and_count


# typeshed does not declare its methods.
_PurePython: Any = pickle._Unpickler


class _Unpickler(_PurePython):
    """Unpickler that changes containers and stand-ins, and no other object."""

    def __init__(
        self,
        file: Any,
        allowed: Mapping[str, Any],
        inert: Collection[str] | None,
        persistent_load: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(file)
        self._allowed, self._inert, self.made = allowed, inert, 0
        # Classes are large, so each name gets one only.
        self._found: dict[str, Any] = {"_codecs.encode": _encoder()}
        if persistent_load is not None:
            self.persistent_load = persistent_load

    def find_class(self, module: str, name: str) -> Any:
        """Return the allowed value or the stand-in for a name; raise `InputError` where there is none."""
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
            raise InputError("the pickle makes an object of something that is not a class")
        self.stack.append(kind())

    def load_build(self) -> None:
        state = self.stack.pop()
        # The attributes of a state dict, which hold version numbers, are left out.
        self._require(Inert | _Dtype | _Array | OrderedDict)
        if not isinstance(self.stack[-1], OrderedDict):
            self.stack[-1].__setstate__(state)

    def load_bytearray8(self) -> None:
        # The original allocates as many bytes as the file declares.
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
    """Pickler that writes names of classes and functions without importing them.

    They may therefore be stand-ins. NumPy's get the names of NumPy 1, which NumPy 2 still reads.
    """

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """Write the name of a class or function."""
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__qualname__}\n".encode())  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]


def unpickle(
    file: Any,
    allowed: Mapping[str, Any] = NUMPY,
    inert: Collection[str] | None = (),
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """Read the object in a pickle, which can call nothing that is not `allowed`.

    Containers, texts and numbers are always allowed. Keys must be texts or numbers.

    Args:
        file: a file in memory (`io.BytesIO`, `mmap.mmap`), of which reads beyond the end allocate nothing.
        allowed: functions and values, by the "module.name" that the pickle has for them.
        inert: names that become an `Inert`. None stands for all names that are not allowed.
        persistent_load: function that returns objects stored outside the pickle, as in `pickle.Unpickler`.

    Raises:
        InputError: the pickle asks for something else.
        Exception: the pickle is damaged, which may raise any exception.
    """
    return _Unpickler(file, allowed, inert, persistent_load).load()


def load(
    path: str | os.PathLike[str],
    allowed: Mapping[str, Any] = NUMPY,
    inert: Collection[str] | None = (),
) -> Any:
    """Read the object in a pickle file, as `unpickle` does.

    Args:
        path: file to read.
        allowed: as in `unpickle`.
        inert: as in `unpickle`.

    Raises:
        InputError: the file is missing, is damaged, or asks for something that is not allowed.
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
    # A damaged pickle may raise any exception.
    except Exception as error:
        raise InputError(
            f"{path} is not a whole pickle file ({brief(error)}); download or make it again"
        ) from error


def brief(error: Exception) -> str:
    """Return the first line of an error, shortened, because it may quote a text of the file."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]
