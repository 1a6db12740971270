"""Safe reader of files saved by `torch.save`, and an atomic writer.

`torch.load` is not used because it runs a scripted module found in the zip file and unpacks tar files. This
reader accepts one layout of the zip file, checks it completely, and then makes tensors from its bytes. It
runs nothing that the file contains.
"""

import io
import math
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import atomic_path
from mopo_fast.utils.machine import check_memory
from mopo_fast.utils.pickles import NUMPY, brief, check_shape, unpickle
from mopo_fast.utils.tensors import as_float32
from mopo_fast.utils.zip_files import open_zip

_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
# Members of an archive besides its storages data/0, data/1, ...
_MEMBERS = {
    "data.pkl",
    "byteorder",
    "version",
    ".format_version",
    ".storage_alignment",
    ".data/serialization_id",
}
_MAX_MEMBERS = 1 << 16
# Bytes of the pickle, which holds names and shapes. Unpickled objects can be 100 times as large.
_MAX_PICKLE = 1 << 24
# Tensors may share a storage, but together they may not hold more than this many times the file's bytes.
_MAX_SHARING = 16


class _Archive:
    """Zip file as `torch.save` writes it: each byte belongs to one stored member or to the directory.

    Raises:
        InputError: the file has another layout.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size = file, os.fstat(file.fileno()).st_size
        if self._at(0, 4) != b"PK\3\4":
            raise InputError(
                "it is no zip file; load one of torch before 1.6 there, and save it with a newer torch"
            )
        # With a directory anywhere else, two readers could find different ones.
        if self._at(self.size - 22, 4) != b"PK\5\6" or self._at(self.size - 2, 2) != b"\0\0":
            raise InputError("it does not end in a zip file's directory")
        self._zip = open_zip(file)
        members = self._zip.infolist()
        prefix = members[0].filename.split("/")[0] + "/" if members else ""
        self._members = {member.filename.removeprefix(prefix): member for member in members}
        if not 0 < len(self._members) == len(members) <= _MAX_MEMBERS:
            raise InputError(f"it has {len(members)} members, or two of one name")
        self._check_layout()
        for name, member in self._members.items():
            if not member.filename.startswith(prefix) or not (name in _MEMBERS or _is_storage(name)):
                raise InputError(
                    f"it holds {member.filename[:100]}, as a scripted module may; save a state dict"
                )
        if self.read("byteorder", 16) not in (b"", b"little"):
            raise InputError("its numbers are not little-endian")

    def _at(self, offset: int, size: int) -> bytes:
        self._file.seek(max(0, offset))
        return self._file.read(size)

    def _check_layout(self) -> None:
        """Raise `InputError` unless uncompressed members fill the file up to its directory."""
        end = 0
        for member in sorted(self._zip.infolist(), key=lambda member: member.header_offset):
            if member.header_offset != end:
                raise InputError("its members overlap, or there is something between them")
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise InputError("its members are compressed or encrypted")
            if member.file_size != member.compress_size:
                raise InputError("its members' sizes do not agree")
            lengths = struct.unpack("<HH", self._at(end + 26, 4))
            end += 30 + sum(lengths) + member.file_size
            if member.flag_bits & 8:
                # A data descriptor repeats the sizes after the member, in 8 bytes each if it is large.
                after = self._at(end, 24)
                forms = ("<4sIQQ", "<4sIII")[: 1 if member.file_size >> 32 else 2]
                known = (struct.pack(form, b"PK\7\10", member.CRC, *[member.file_size] * 2) for form in forms)
                end += next((len(one) for one in known if after.startswith(one)), self.size)
        if end != self._zip.start_dir:
            raise InputError("there is something between its members and its directory")

    def length(self, name: str) -> int:
        """Return a member's size in bytes; raise `InputError` if it does not exist."""
        if name not in self._members:
            raise InputError(f"it lacks {name[:100]}")
        return self._members[name].file_size

    def read(self, name: str, limit: int) -> bytes:
        """Read a member's bytes; a missing member is empty.

        Raises:
            InputError: the member is larger than `limit` bytes.
        """
        if name not in self._members:
            return b""
        if self.length(name) > limit:
            raise InputError(f"its {name} has {self.length(name):,} bytes, more than {limit:,}")
        return self._zip.read(self._members[name])


def _is_storage(name: str) -> bool:
    folder, _, number = name.partition("/")
    return folder == "data" and number.isascii() and number.isdecimal()


class _Tensors:
    """Builder of the tensors that an archive's pickle refers to; each storage is read once."""

    def __init__(self, archive: _Archive) -> None:
        self._archive = archive
        self._storages: dict[str, torch.Tensor] = {}
        self._left = _MAX_SHARING * archive.size

    def storage(self, reference: Any) -> torch.Tensor:
        """Return a storage's values as a one-dimensional tensor."""
        kind, dtype, key, _, count = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise InputError("the pickle refers to something that is no storage of numbers")
        if key not in self._storages:
            size = self._archive.length(f"data/{key}")
            if type(count) is not int or count * dtype.itemsize != size:
                raise InputError(f"its data/{key[:20]} has {size} bytes, the pickle says otherwise")
            self._storages[key] = _numbers(bytearray(self._archive.read(f"data/{key}", size)), dtype)
        storage = self._storages[key]
        if storage.dtype != dtype:
            raise InputError(f"its data/{key[:20]} is used with two types")
        return storage

    def tensor(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any = False,
        hooks: Any = None,
        metadata: Any = None,
    ) -> torch.Tensor:
        """Do what `torch._utils._rebuild_tensor_v2` does, but check every argument first."""
        if not isinstance(storage, torch.Tensor) or metadata:
            raise InputError("the pickle holds a tensor that is not plain")
        check_shape(size)
        steps = [offset, *stride] if isinstance(stride, tuple) and len(stride) == len(size) else [None]
        if not all(type(step) is int and 0 <= step < 1 << 62 for step in steps):
            raise InputError("a tensor's strides are no whole numbers, one for each dimension")
        last, count = 0, math.prod(size)
        # From the innermost dimension outwards, each stride must pass everything inside it.
        for step, length in sorted((s, n) for s, n in zip(stride, size, strict=True) if n > 1):
            if step <= last:
                raise InputError(
                    "a tensor's elements share memory, as an expanded one's do; save a copy of it"
                )
            last += step * (length - 1)
        if offset + last >= len(storage) if count else offset > len(storage):
            raise InputError("a tensor reaches beyond its storage")
        self._left -= count * storage.itemsize
        if self._left < 0:
            raise InputError("its tensors share memory too often; save copies of them")
        return torch.as_strided(storage, size, stride, offset)


def _numbers(content: bytearray, dtype: torch.dtype) -> torch.Tensor:
    if not content:
        return torch.empty(0, dtype=dtype)
    if dtype == torch.bool:
        # A bool whose byte is neither 0 nor 1 is undefined behaviour in torch.
        return torch.frombuffer(content, dtype=torch.uint8) != 0
    return torch.frombuffer(content, dtype=dtype)


def load(path: str | os.PathLike[str], inert: Collection[str] | None = ("torch.device",)) -> Any:
    """Read a checkpoint saved by `torch.save`: dense CPU tensors in containers.

    Parameters are returned as tensors.

    Args:
        path: file of the checkpoint.
        inert: names of classes whose objects become inert stand-ins, as in `pickles.unpickle`. None makes
            stand-ins of all objects that are neither tensors nor containers.

    Raises:
        InputError: the file is missing or damaged, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    # Twice: the bytes as read, and the tensors' copy of them.
    check_memory(f"{path}", 2 * path.stat().st_size, "cpu", "its size")
    try:
        with open(path, "rb") as file:
            archive = _Archive(file)
            tensors = _Tensors(archive)
            allowed = {
                **NUMPY,
                **{f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()},
                "torch._utils._rebuild_tensor_v2": tensors.tensor,
                "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
                "torch.Size": lambda sizes=(): sizes,
                "collections.OrderedDict": lambda: OrderedDict(),
            }
            archive.length("data.pkl")
            content = io.BytesIO(archive.read("data.pkl", _MAX_PICKLE))
            return unpickle(content, allowed, inert, tensors.storage)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    # A damaged file can raise anything.
    except Exception as error:
        raise InputError(
            f"{path} is not a whole file of tensors ({brief(error)}); download or make it again"
        ) from error


def load_state(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read a state dict; floats are converted to float32.

    Raises:
        InputError: see `load`; or the file holds no state dict, or a value is not finite.
    """
    return as_state(path, load(path))


def as_state(path: str | os.PathLike[str], value: Any) -> dict[str, torch.Tensor]:
    """Check that a value from `load` is a state dict, and convert its floats to float32.

    Args:
        path: file that the value is from, for the message.
        value: what `load` returned, or a part of it.

    Raises:
        InputError: it is no state dict, or a value is not finite.
    """
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    ):
        raise InputError(f"{path} is not a state dict: tensors by their names")
    return as_float32(path, value)


def take(path: str | os.PathLike[str], state: dict[str, torch.Tensor], name: str, ndim: int) -> torch.Tensor:
    """Return `state[name]`, which must be a float tensor.

    Args:
        path: file that the state dict is from, for the message.
        state: state dict.
        name: name of the tensor.
        ndim: number of dimensions that the tensor must have.

    Raises:
        InputError: there is no such tensor, or it has another type or number of dimensions.
    """
    if name not in state:
        raise InputError(f"{path} lacks {name}; it has {', '.join(sorted(state))[:500] or 'nothing'}")
    tensor = state[name]
    if not tensor.is_floating_point() or tensor.ndim != ndim:
        raise InputError(
            f"{path}: {name} must be floats of {ndim} dimensions, got {tensor.dtype} of shape"
            f" {list(tensor.shape)}"
        )
    return tensor


def save(path: str | os.PathLike[str], value: Any) -> None:
    """Save `value` with `torch.save`, atomically."""
    content = io.BytesIO()
    torch.save(value, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())
