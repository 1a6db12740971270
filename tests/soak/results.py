"""Compare the files that two runs of a command have left in their folders."""

import csv
import hashlib
import io
import json
import struct
from pathlib import Path
from typing import Any

# Files that contain times: TensorBoard's logs, and plots of the time spent.
_OF_CLOCKS = ("*tfevents*", "report.html", "time.png")


def leftovers(folder: Path) -> list[str]:
    """Return the relative paths of temporary files. Locks are left on purpose and do not count."""
    hidden = (path for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".lock")
    endings = (path for path in folder.rglob("*") if path.suffix in (".tmp", ".part"))
    return sorted({str(path.relative_to(folder)) for path in (*hidden, *endings)})


def contents(folder: Path) -> dict[str, str]:
    """Return {relative path: digest} of all files and folders, without fields that depend on a clock."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == ".lock" or any(path.match(pattern) for pattern in _OF_CLOCKS):
            continue
        if path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(_lasting(path, str(folder))).hexdigest()
    return found


def difference(ours: dict[str, str], theirs: dict[str, str]) -> str:
    """Return a sentence on the differences, or an empty string."""
    parts = []
    for what, names in (
        ("missing", sorted(theirs.keys() - ours.keys())),
        ("new", sorted(ours.keys() - theirs.keys())),
        ("different", sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name])),
    ):
        if names:
            parts.append(f"{what}: {', '.join(names)}")
    return "; ".join(parts)


def _lasting(path: Path, folder: str) -> bytes:
    """Return a file's content without what depends on a clock; in JSON, paths are relative to `folder`."""
    content = path.read_bytes()
    if path.suffix == ".json":
        return json.dumps(
            _without_times(json.loads(content.replace(folder.encode(), b""))), sort_keys=True
        ).encode()
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(content.decode()))
        return json.dumps([_without_times(row) for row in rows]).encode()
    if path.suffix == ".safetensors":
        return _tensors(content)
    return content


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if not k.startswith("seconds")}
    return [_without_times(one) for one in value] if isinstance(value, list) else value


def _tensors(content: bytes) -> bytes:
    """Return tensors and metadata, without times and without policies that wait for their evaluation."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    lines = []
    for name in sorted(header):
        if name.startswith("evaluated."):
            continue
        if name == "__metadata__":
            texts = {key: _as_json(text) for key, text in header[name].items()}
            lines.append(json.dumps(_without_times(texts), sort_keys=True))
            continue
        first, end = header[name]["data_offsets"]
        digest = hashlib.sha256(data[first:end]).hexdigest()
        lines.append(f"{name} {header[name]['dtype']} {header[name]['shape']} {digest}")
    return "\n".join(lines).encode()


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
