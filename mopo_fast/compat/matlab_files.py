"""Safe reader of uncompressed MATLAB files, versions 5 to 7; it reads matrices of real floats.

SciPy's reader is not used because it allocates as much as a file claims to hold, and because a damaged file
can crash the process.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mopo_fast.errors import InputError
from mopo_fast.utils.machine import check_memory
from mopo_fast.utils.pickles import brief, check_shape

# Element types of the format (MathWorks, "MAT-File Format").
_INT8, _INT32, _UINT32, _MATRIX, _COMPRESSED = 1, 5, 6, 14, 15
_NUMBERS = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
}  # fmt: skip
# Matrix classes, and the flag of complex matrices.
_DOUBLE, _SINGLE, _COMPLEX = 6, 7, 0x0800


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a MATLAB file's variables.

    Returns:
        Each variable by its name: an array if it is a matrix of real floats, else None.

    Raises:
        InputError: the file is missing, damaged, compressed or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    check_memory(f"{path}", path.stat().st_size, "cpu", "its size")
    try:
        return _matrices(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    # A damaged file can raise anything.
    except Exception as error:
        raise InputError(
            f"{path} is not a whole MATLAB file ({brief(error)}); save it with scipy.io.savemat"
        ) from error


def _matrices(content: bytes) -> dict[str, Any]:
    if content[124:128] not in (b"\0\1IM", b"\1\0MI"):
        raise InputError("its version is not 5, 6 or 7")
    order = "<" if content[126:128] == b"IM" else ">"
    found: dict[str, Any] = {}
    at = 128
    while at < len(content):
        kind, body, at = _element(content, at, order)
        if kind != _MATRIX:
            raise InputError(
                "it is compressed" if kind == _COMPRESSED else f"it has an element of type {kind}"
            )
        name, matrix = _matrix(body, order)
        if name in found:
            raise InputError(f"it has {name[:50]} twice")
        found[name] = matrix
    return found


def _element(content: bytes, at: int, order: str) -> tuple[int, bytes, int]:
    """Return the type and the bytes of the element at `at`, and the offset of the next one."""
    kind, size = struct.unpack_from(f"{order}II", content, at)
    start, end = at + 8, at + 8 + size
    if kind >> 16:
        # A small element: 16-bit size and type, then up to four bytes.
        kind, size = kind & 0xFFFF, kind >> 16
        start, end = at + 4, at + 4 + size
        if size > 4:
            raise InputError("a small element has more than 4 bytes")
    if end > len(content):
        raise InputError("an element ends beyond the file")
    return kind, content[start:end], end + -end % 8


def _matrix(body: bytes, order: str) -> tuple[str, npt.NDArray[Any] | None]:
    """Return a matrix's name, and its values if they are real floats, else None."""
    flags_kind, flags, at = _element(body, 0, order)
    shape_kind, shape_bytes, at = _element(body, at, order)
    name_kind, name_bytes, at = _element(body, at, order)
    if (flags_kind, len(flags), shape_kind, name_kind) != (_UINT32, 8, _INT32, _INT8):
        return "", None
    name = name_bytes.decode("ascii")
    (kind,) = struct.unpack_from(f"{order}I", flags)
    if kind & 0xFF not in (_DOUBLE, _SINGLE) or kind & _COMPLEX:
        return name, None
    shape = check_shape(tuple(np.frombuffer(shape_bytes, f"{order}i4").tolist()))
    number, content, _ = _element(body, at, order)
    numbers = np.frombuffer(content, order + _NUMBERS[number])
    if len(numbers) != math.prod(shape):
        raise InputError(f"{name[:50]} has {len(numbers)} numbers, but its shape holds {math.prod(shape)}")
    dtype = np.float64 if kind & 0xFF == _DOUBLE else np.float32
    return name, numbers.reshape(shape, order="F").astype(dtype)
