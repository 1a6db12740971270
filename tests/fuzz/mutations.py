"""Mutations of files: of bytes, of structure by format, and of the kind of file on disk.

Every choice is drawn from the `random.Random` that is passed in, so the same seed gives the same mutation.
"""

import contextlib
import io
import itertools
import json
import os
import pickletools
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mopo_fast.compat import matlab_files

# Places outside a case's folder, relative to it; `children.World` makes them.
CANARY = "../canary"
# A float32 that only files in the canary folder have: a reader that returns it has left the case's folder.
SECRET = 4242.125
# File that malicious pickles write if their code is run.
BOMB = f"touch {CANARY}/bomb"

INTEGERS = (
    *(0, 1, 2, -1, -2, 127, 128, 255, 256, 32767, 65535, 65536, 2**24, 10**6, 10**9, 2**30),
    *(2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, -(2**63)),
    *(2**64 - 1, 2**64, 10**30),
)
TEXTS = (
    *("", " ", "\0", "a\0b", "a" * 100_000, "é", "\ud800", "\U0001f600", "\n", "%s%n", "nan", "inf", "-1"),
    *(
        "1e999",
        "true",
        "null",
        "__class__",
        "../",
        "../../etc/passwd",
        "/etc/passwd",
        "/dev/zero",
        "/dev/null",
    ),
    *(
        "/proc/self/mem",
        f"{CANARY}/text",
        f"{CANARY}/folder",
        ".",
        "..",
        "~",
        "a/b",
        "\\",
        "$HOME",
        "*",
        "|",
        "cuda",
    ),
    *("float64", "reference", "triton", "hopper", "halfcheetah", "hopper-medium-v2", "minari:none/none-v0"),
)


def mutate(path: Path, donor: Path, rng: random.Random) -> str:
    """Mutate the file in place and return a short description.

    Args:
        donor: another valid file of the same reader.
    """
    structure = STRUCTURES.get(path.suffix)
    told: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        chance = rng.random()
        if chance < 0.03:
            told.append(mutate_node(path, rng))
            break
        if structure is not None and chance < 0.65:
            # An earlier mutation may have broken the file, so that it cannot be parsed.
            with contextlib.suppress(Exception):
                told.append(structure(path, donor, rng))
                continue
        content = path.read_bytes()
        made, how = mutate_bytes(content, donor.read_bytes(), rng)
        path.write_bytes(made[: 16 << 20])
        told.append(how)
    return ", ".join(told)


def mutate_node(path: Path, rng: random.Random) -> str:
    """Replace the file with another kind of file, or put one beside it."""
    kinds = "missing,empty,folder,fifo,loop,dangling,zero,canary,unreadable,lock,lock,temporary".split(",")  # noqa: SIM905
    kind = rng.choice(kinds)
    canary = os.path.relpath(Path(CANARY, "text").resolve(), path.parent.resolve())
    match kind:
        case "unreadable":
            path.chmod(0)
            return kind
        case "lock" | "temporary":
            # The temporary file of a killed process.
            beside = path.with_name(".lock" if kind == "lock" else f".{path.name}.abcdefgh.tmp")
            make = rng.choice((beside.mkdir, beside.touch, partial(os.mkfifo, beside)))
            rng.choice((make, partial(beside.symlink_to, canary)))()
            return f"a {kind} file beside it"
    path.unlink()
    match kind:
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path.name)
        case "dangling":
            path.symlink_to("nothing")
        case "zero":
            path.symlink_to("/dev/zero")
        case "canary":
            path.symlink_to(canary)
    return f"{kind} in its place"


# --- Bytes


def mutate_bytes(content: bytes, donor: bytes, rng: random.Random) -> tuple[bytes, str]:
    data, size = bytearray(content), len(content)
    kind = rng.choice(
        ("flip", "flip", "flip", "integer", "integer", "integer", "cut", "extend", "swap", "repeat", "zero")
        + ("insert", "remove", "splice", "graft")
    )

    def span(most: int = 4096) -> tuple[int, int]:
        first = rng.randrange(size) if size else 0
        return first, min(size, first + rng.randint(1, rng.choice((4, 64, most))))

    if not data:
        return rng.randbytes(rng.choice((1, 8, 100))), "bytes where there were none"
    match kind:
        case "flip":
            for _ in range(rng.choice((1, 1, 2, 4, 16))):
                data[_place(size, rng)] ^= 1 << rng.randrange(8)
        case "integer":
            for _ in range(rng.choice((1, 1, 2))):
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice(INTEGERS) % (1 << 8 * width)
                first = _place(size, rng) // width * width if rng.random() < 0.5 else _place(size, rng)
                data[first : first + width] = number.to_bytes(width, rng.choice(("little", "little", "big")))
        case "cut":
            del data[rng.choice((0, 1, 8, size // 2, size - 1, rng.randrange(size), rng.randrange(size))) :]
        case "extend":
            data += rng.choice((b"\0", b"\n", content, rng.randbytes(64), b"\0" * 4096, b"[" * 100_000))
        case "swap":
            (a, b), length = sorted((rng.randrange(size), rng.randrange(size))), rng.randint(1, 64)
            data = (
                data[:a]
                + data[b : b + length]
                + data[a + length : b]
                + data[a : a + length]
                + data[b + length :]
            )
        case "repeat":
            first, last = span()
            data[last:last] = data[first:last] * rng.choice((1, 1, 2, 50))
        case "zero":
            first, last = span()
            data[first:last] = bytes([rng.choice((0, 0, 255))]) * (last - first)
        case "insert":
            first, _ = span()
            data[first:first] = rng.choice(
                (rng.randbytes(rng.randint(1, 16)), b"\0" * 8, b"9" * 30, b'"', b"\xff")
            )
        case "remove":
            first, last = span()
            del data[first:last]
        case "splice":
            data[_place(size, rng) :] = donor[_place(len(donor), rng) if donor else 0 :]
        case "graft":
            first, last = span()
            start = rng.randrange(len(donor)) if donor else 0
            data[first:last] = donor[start : start + last - first]
    return bytes(data), kind


def _place(size: int, rng: random.Random) -> int:
    """Draw an offset, mostly in the file's head or tail, which describe the rest."""
    most = rng.choice((size, size, 16, 128, 1024))
    offset = rng.randrange(min(size, most)) if size else 0
    return size - 1 - offset if most < size and rng.random() < 0.3 else offset


# --- JSON

_RAW = "@@raw@@"
_RAWS = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e308", "1e-999", "-0", "-0.0", "1" * 5000),
    *(
        "1." + "3" * 5000,
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        "[" * 900 + "]" * 900,
    ),
    *("", "]", "'a'", '"\\ud800"', '"\\u0000"', "0x10", "1_000", "truE", "[1,]", "// no", '"\xff"'),
)


def mutate_json_text(text: str, rng: random.Random) -> str:
    """Change one value, key or level of JSON. The result may be invalid JSON."""
    root = json.loads(text)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            # The first elements of a long list are enough.
            if not isinstance(node, list) or key < 20:
                walk(value)

    walk(root)
    raw = ""
    if not places or rng.random() < 0.03:
        root = rng.choice(([], {}, None, 0, "", [root], {"a": root}))
    else:
        node, key = rng.choice(places)
        value = node[key]
        operation = rng.choice(
            ("value",) * 6
            + ("number",) * 5
            + ("drop", "drop", "rename", "twice", "copy", "raw", "raw", "wrap")
        )
        if operation == "number" and not (isinstance(value, (int, float)) and not isinstance(value, bool)):
            operation = "value"
        match operation:
            case "value":
                node[key] = _other_value(value, rng)
            case "number":
                node[key] = rng.choice(
                    (
                        *INTEGERS,
                        0.5,
                        -1.5,
                        1e308,
                        -1e308,
                        1e-320,
                        1e18,
                        value + 1,
                        value - 1,
                        -value,
                        float(value),
                    )
                )
            case "drop":
                del node[key]
            case "rename" if isinstance(node, dict):
                node[rng.choice((*TEXTS[:20], str(key) + "_", str(key).upper()))] = node.pop(key)
            case "twice" if isinstance(node, dict):
                node[f"@@twice@@{key}"] = _other_value(value, rng)
            case "copy":
                node[key] = rng.choice([n[k] for n, k in places])
            case "wrap":
                node[key] = [value] if rng.random() < 0.5 else {str(key): value}
            case _:
                node[key], raw = _RAW, rng.choice(_RAWS)
    made = json.dumps(root, indent=rng.choice((None, 2)), ensure_ascii=rng.random() < 0.5)
    return made.replace(f'"{_RAW}"', raw).replace("@@twice@@", "")


def _other_value(value: Any, rng: random.Random) -> Any:
    if isinstance(value, list) and value and rng.random() < 0.6:
        return rng.choice(
            (
                value[:-1],
                [*value, value[-1]],
                value[::-1],
                value * 3,
                [value[0]] * len(value),
                [[v] for v in value],
            )
        )
    return rng.choice(
        (
            None,
            True,
            False,
            [],
            {},
            [None],
            [[]],
            {"a": 1},
            rng.choice(TEXTS),
            rng.choice(TEXTS),
            rng.choice(INTEGERS),
            rng.random(),
            str(value),
        )
    )


def _mutate_json(path: Path, donor: Path, rng: random.Random) -> str:
    made = mutate_json_text(path.read_text(), rng)
    path.write_bytes(made.encode("utf-8", "surrogatepass"))
    return "JSON"


# --- HDF5


def _mutate_hdf5(path: Path, donor: Path, rng: random.Random) -> str:
    with h5py.File(path, "r+", locking=False) as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        # Every reader reads arrays; most of the metadata no reader reads.
        arrays = [name for name in names if not name.startswith("metadata/")]
        name = rng.choice(arrays if arrays and rng.random() < 0.8 else names)
        kind = rng.choice(HDF5_KINDS)
        value = file[name][()]
        array = np.asarray(value)
        if array.dtype.kind == "f" and (array == SECRET).any():
            # An earlier mutation may have linked a file outside, whose content must not be copied into this
            # one.
            array = np.zeros_like(array)
        outside, same_shape = f"{CANARY}/outside.hdf5", "x".join(map(str, array.shape))

        def replace(**options: Any) -> None:
            del file[name]
            file.create_dataset(name, **options)

        match kind:
            case "delete":
                del file[name]
            case "rename":
                file.move(
                    name,
                    rng.choice((name + "_", "metadata/" + name.split("/")[-1], "a", "next_observations_")),
                )
            case "exchange":
                other = rng.choice(names)
                if other != name:
                    file.move(name, "spare")
                    file.move(other, name)
                    file.move("spare", other)
            case "dtype":
                kinds = (
                    "f2",
                    ">f4",
                    "f8",
                    "i1",
                    "u8",
                    "?",
                    "c8",
                    "S3",
                    "S0" if rng.random() < 0.1 else "S1",
                    "V4",
                    ">i2",
                )
                replace(
                    data=array.astype(np.float64 if array.dtype.kind == "?" else array.dtype).astype(
                        rng.choice(kinds)
                    )
                )
            case "reshape":
                shapes = ((-1,), (1, -1), (-1, 1), (*array.shape, 1), (1, *array.shape))
                replace(data=array.reshape(rng.choice(shapes)))
            case "rows":
                rows = np.atleast_1d(array)
                replace(
                    data=rng.choice(
                        (
                            rows[:-1],
                            rows[:0],
                            rows[:1],
                            np.concatenate([rows, rows]),
                            rows[..., :0],
                            rows[..., :1],
                        )
                    )
                )
            case "scalar":
                replace(data=rng.choice((1, 1.5, np.float32(1), "text", b"bytes", True)))
            case "values":
                bad = rng.choice((np.nan, np.inf, -np.inf, 1e38, -1e38, 1e-40, 0.0, 2.0, -1.0, 3e9))
                with np.errstate(all="ignore"):
                    changed = np.atleast_1d(array).astype(np.float32)
                    changed.reshape(-1)[: rng.choice((1, changed.size))] = bad
                    replace(
                        data=changed.astype(array.dtype)
                        if rng.random() < 0.5 and array.dtype.kind in "fi?"
                        else changed
                    )
            case "group":
                del file[name]
                file.create_group(name)
            case "root group":
                group = name.split("/")[0]
                del file[group]
                file[group] = rng.choice((1, "text", np.zeros(3)))
            case "soft":
                del file[name]
                file[name] = h5py.SoftLink(rng.choice((f"/{name}", "/nothing", "/", rng.choice(names))))
            case "external":
                del file[name]
                target = rng.choice((outside, outside, path.name, "/dev/zero", "nothing.hdf5"))
                file[name] = h5py.ExternalLink(target, rng.choice((same_shape, same_shape, "floats", name)))
            case "external storage":
                shape = rng.choice((array.shape, array.shape, (10**12,)))
                target = rng.choice(
                    (
                        f"{CANARY}/outside.bin",
                        f"{CANARY}/outside.bin",
                        "/dev/zero",
                        "nothing.bin",
                        "/etc/passwd",
                    )
                )
                size = h5py.h5f.UNLIMITED if rng.random() < 0.5 else 10**6
                replace(shape=shape, dtype="f4", external=[(target, 0, size)])
            case "virtual":
                layout = h5py.VirtualLayout(array.shape, "f4")
                target = rng.choice((outside, outside, "nothing.hdf5", "."))
                source = h5py.VirtualSource(target, same_shape, array.shape)
                layout[...] = source
                del file[name]
                file.create_virtual_dataset(name, layout, fillvalue=rng.choice((None, 1.0)))
            case "huge":
                shape = (rng.choice((10**9, 10**12, 2**62)), *array.shape[1:])
                replace(
                    shape=shape,
                    dtype=rng.choice(("f4", "?")),
                    chunks=(2**14, *array.shape[1:]),
                    fillvalue=rng.choice((None, 0)),
                )
            case "early":
                replace(shape=(10**12,), dtype="f4")
            case "wide":
                replace(shape=(len(np.atleast_1d(array)), 10**9), dtype="f4", chunks=(1, 2**14))
            case "null":
                replace(data=h5py.Empty(rng.choice(("f4", "S3"))))
            case "compound":
                replace(data=np.zeros(len(np.atleast_1d(array)), [("a", "f4"), ("b", "i4")]))
            case "variable":
                replace(
                    shape=(len(np.atleast_1d(array)),),
                    dtype=rng.choice((h5py.vlen_dtype(np.float32), h5py.string_dtype())),
                )
            case "reference":
                replace(
                    shape=(len(np.atleast_1d(array)),),
                    dtype=rng.choice((h5py.ref_dtype, h5py.regionref_dtype)),
                )
            case "enum":
                replace(
                    shape=np.atleast_1d(array).shape,
                    dtype=h5py.enum_dtype({"FALSE": 0, "TRUE": rng.choice((1, 2, -1))}, "i1"),
                )
            case "subarray":
                replace(shape=array.shape[:1], dtype=np.dtype((np.float32, (2, 3))))
            case "filter":
                replace(
                    data=np.atleast_1d(array),
                    chunks=True,
                    **rng.choice(
                        (
                            {"compression": "gzip"},
                            {"compression": "lzf", "shuffle": True},
                            {"fletcher32": True},
                            {"maxshape": (None,) * max(1, array.ndim)},
                        )
                    ),
                )
            case "attribute":
                file[name].attrs[rng.choice(TEXTS[5:12] + ("CLASS",))] = rng.choice(
                    (1, "text", np.zeros(1000))
                )
            case "metadata":
                keys = ("plan", "name", "shard", "seed", "new", "relabelled", "a/b", "policy")
                key = f"metadata/{rng.choice(keys)}"
                with contextlib.suppress(KeyError):
                    del file[key]
                file[key] = rng.choice(
                    (
                        1,
                        -1,
                        2**63 - 1,
                        1e300,
                        np.nan,
                        "text",
                        b"\xff\xfe",
                        "a" * 10_000,
                        np.zeros(3),
                        h5py.Empty("f4"),
                        np.array([b"a"]),
                        "hopper-random-local",
                    )
                )
            case "drop metadata":
                if "metadata" in file:
                    del file["metadata"]
            case "more":
                file[
                    rng.choice(
                        (
                            "timeouts",
                            "terminals_",
                            "infos/qpos",
                            "next_observations_",
                            "extra",
                            "obs",
                            "members",
                        )
                    )
                ] = rng.choice((np.zeros(3), np.zeros((2, 2)), 1.0, "text"))
            case "names":
                for number in range(2000):
                    file[f"metadata/{'x' * 50}{number}"] = number
            case "deep":
                file["metadata/" + "/".join("x" * 400)] = 1
    return f"HDF5 {kind} of {name}"


HDF5_KINDS = (  # noqa: SIM905
    "delete,rename,exchange,dtype,reshape,rows,scalar,values,group,root group,soft,external,external,"
    "external storage,external storage,virtual,virtual,huge,early,wide,null,compound,variable,reference,enum,"
    "subarray,filter,attribute,metadata,metadata,drop metadata,more,names,deep"
).split(",")


# --- NumPy's files


def mutate_npy(content: bytes, rng: random.Random) -> bytes:
    """Change the header or the values of a .npy file."""
    width = 2 if content[6:7] == b"\x01" else 4
    length = int.from_bytes(content[8 : 8 + width], "little")
    header = content[8 + width : 8 + width + length].decode("latin1")
    body = content[8 + width + length :]
    version = content[6:8]
    fields = dict(eval(header, {"__builtins__": {}}))
    written: int | None = None
    kind = rng.choice(
        ("shape", "shape", "descr", "descr", "order", "length", "version", "text", "key", "values")
    )
    match kind:
        case "shape":
            shape = list(fields["shape"]) or [1]
            shape[rng.randrange(len(shape))] = rng.choice(INTEGERS)
            fields["shape"] = rng.choice(
                (
                    tuple(shape),
                    tuple(shape),
                    (),
                    (0,),
                    (len(body),),
                    (2**32, 2**32),
                    (0, 2**62),
                    (-1,),
                    [3],
                    (1,) * 40,
                    ("a",),
                    (1.0,),
                    (True,),
                )
            )
        case "descr":
            fields["descr"] = rng.choice(
                (
                    "|O",
                    "<f8",
                    ">f4",
                    "<f2",
                    "|b1",
                    "<i8",
                    "<u8",
                    "<c8",
                    "|S4",
                    "<U1",
                    "|V4",
                    "|V0",
                    "|S0",
                    "<M8[s]",
                    "<f16",
                    "<f3",
                    "f4,f4",
                    "",
                    [("a", "<f4")],
                    [("a", "|O")],
                    [("a", "<f4", (2**31,))],
                    7,
                    None,
                    "<U100000000",
                    "|V2147483647",
                    ["<f4"],
                )
            )
        case "order":
            fields["fortran_order"] = rng.choice((not fields["fortran_order"], 1, None, "True"))
        case "version":
            version = rng.choice((b"\1\0", b"\2\0", b"\3\0", b"\4\0", b"\0\0", b"\xff\xff"))
        case "key":
            fields[rng.choice(("extra", "shape ", "Shape"))] = fields.pop(rng.choice(("shape", "descr")))
        case "values" if body:
            number = rng.choice((np.nan, np.inf, 1e38, -1e38, 0.0, 1e-40, 1e300, -1.0, 2.0))
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                array = np.frombuffer(body, fields["descr"]).copy()
                with np.errstate(all="ignore"):
                    array[: rng.choice((1, len(array)))] = number
                body = array.tobytes()
    text = repr(fields)
    if kind == "text":
        text = rng.choice(
            (
                "{}",
                "",
                "(" * 3000,
                "[" * 9000 + "]" * 9000,
                text.replace("'", '"'),
                text[:-1],
                text + "L",
                "{'a':" * 2000,
                "-" * 9000 + "1",
                text.replace("(", "(0x"),
                "'" + "a" * 9000,
            )
        )
    if kind == "length":
        written = rng.choice((0, 1, 2**16 - 1, length - 1, length + 1, length + 64, 2**31))
    encoded = (text + "\n").encode("latin1", "replace")
    count = (len(encoded) if written is None else written) % (1 << 8 * width)
    return b"\x93NUMPY" + version + count.to_bytes(width, "little") + encoded + body


def _mutate_npy(path: Path, donor: Path, rng: random.Random) -> str:
    path.write_bytes(mutate_npy(path.read_bytes(), rng))
    return ".npy"


def _mutate_npz(path: Path, donor: Path, rng: random.Random) -> str:
    if rng.random() < 0.3:
        return _mutate_zip(path, rng)
    members = _members(path)
    name = rng.choice(list(members))
    kind = rng.choice(("header",) * 5 + ("drop", "rename", "twin", "foreign", "bytes"))
    match kind:
        case "header":
            members[name] = mutate_npy(members[name], rng)
        case "drop":
            del members[name]
        case "rename":
            members[
                rng.choice(
                    (
                        name.upper(),
                        "obs.npy",
                        "index.npy",
                        "observations",
                        "../a.npy",
                        "metadata/a.npy",
                        "next_observations.npy",
                    )
                )
            ] = members.pop(name)
        case "twin":
            other = rng.choice(list(members))
            members[name] = members[other]
        case "foreign":
            members[name] = rng.choice((b"", b"text", b"\x80\x04cos\nsystem\n.", b"PK\3\4", b"\x93NUMPY"))
        case "bytes":
            members[name], _ = mutate_bytes(members[name], members[rng.choice(list(members))], rng)
    _write_zip(path, members, rng)
    return f".npz {kind} of {name}"


# --- Zip archives


def _members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def _write_zip(path: Path, members: dict[str, bytes], rng: random.Random | None = None) -> None:
    deflated = rng is not None and rng.random() < 0.2
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, archive.compression)


def _mutate_zip(path: Path, rng: random.Random) -> str:
    """Change a number or a name in the directory, in a member's header, or in the end record."""
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\5\6")
    directory = int.from_bytes(data[end + 16 : end + 20], "little")
    entries = [directory]
    while (following := data.find(b"PK\1\2", entries[-1] + 4)) > 0:
        entries.append(following)
    kind = rng.choice(("directory",) * 4 + ("local", "local", "end", "end", "name", "bomb"))
    entry = rng.choice(entries)
    # Offset and width in bytes of each number in a header.
    fields = {
        "directory": (
            entry,
            ((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)),
        ),
        "local": (
            int.from_bytes(data[entry + 42 : entry + 46], "little"),
            ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
        ),
        "end": (end, ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2))),
    }
    if kind in fields:
        start, places = fields[kind]
        offset, width = rng.choice(places)
        number = rng.choice((*INTEGERS, 8, 12, 14, 93, 99)) % (1 << 8 * width)
        data[start + offset : start + offset + width] = number.to_bytes(width, "little")
    elif kind == "name":
        length = int.from_bytes(data[entry + 28 : entry + 30], "little")
        data[entry + 46 : entry + 46 + length] = rng.choice(
            (b"../" * 40, b"\0" * 100, b"\xff" * 100, b"/" * 100, b"data.pkl" * 20)
        )[:length]
    else:
        members = _members(path)
        name = rng.choice(list(members))
        members[name] = members[name][:200] + b"\0" * 2**27
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for other, content in members.items():
                archive.writestr(zipfile.ZipInfo(other), content, zipfile.ZIP_DEFLATED, 1)
        return "zip that is small and unpacks to much"
    path.write_bytes(data)
    return f"zip {kind}"


# --- Pickles

_HARMFUL = (
    f"cposix\nsystem\n(V{BOMB}\ntR",
    f"cos\nsystem\n(V{BOMB}\ntR",
    f"c__builtin__\nexec\n(Vimport os; os.system('{BOMB}')\ntR",
    f"csubprocess\nPopen\n((V/bin/sh\nV-c\nV{BOMB}\nltR",
    f"(V{BOMB}\nios\nsystem\n",
    f"cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\nV{BOMB}\ntR",
    f"cbuiltins\ngetattr\n(cos\n__dict__\nV{BOMB}\ntR",
    f"cnumpy\nload\n(V{CANARY}/text\ntR",
    f"ccollections\nOrderedDict\n(]cos\nsystem\nV{BOMB}\n\x86atR",
    f"ctorch._utils\n_rebuild_tensor_v2\n(cos\nsystem\nV{BOMB}\ntR",
)
_OPCODES = (
    *(
        b"0",
        b"1",
        b"2",
        b"(",
        b"t",
        b"l",
        b"d",
        b"}",
        b"]",
        b")",
        b"N",
        b"a",
        b"e",
        b"s",
        b"u",
        b"R",
        b"b",
        b"o",
        b"\x81",
    ),
    *(
        b"\x85",
        b"\x86",
        b"\x87",
        b"\x88",
        b"\x8f",
        b"\x90",
        b"\x91",
        b"\x92",
        b"\x93",
        b"\x94",
        b"Q",
        b".",
        b"\x97",
        b"\x98",
    ),
    *(
        b"K\0",
        b"J\xff\xff\xff\xff",
        b"h\0",
        b"h\xff",
        b"q\xff",
        b"r\xff\xff\xff\x7f",
        b"r\xff\xff\xff\xff",
        b"j\xff\xff\xff\xff",
    ),
    *(
        b"I" + b"9" * 5000 + b"\n",
        b"L9L\n",
        b"F1e999\n",
        b"Fnan\n",
        b"S'a'\n",
        b"S'\n",
        b"V\\ud800\n",
        b"P1\n",
        b"I01\n",
    ),
    *(
        b"\x8b\xff\xff\xff\x7f",
        b"\x8b\xff\xff\xff\xff",
        b"\x8a\xff" + b"\xff" * 255,
        b"B\xff\xff\xff\x7f",
        b"T\xff\xff\xff\xff",
    ),
    *(
        b"\x8e" + b"\xff" * 7 + b"\x7f",
        b"\x8d" + b"\xff" * 8,
        b"\x96" + b"\xff" * 6 + b"\0\0",
        b"\x95" + b"\xff" * 8,
    ),
    *(
        b"\x82\1",
        b"\x83\1\0",
        b"\x80\x05",
        b"\x80\x09",
        b"X\xff\xff\xff\xff",
        b"G" + struct.pack(">d", float("nan")),
    ),
    *(
        b"(" * 100_000,
        b"]" * 20_000 + b"a" * 19_999,
        b"N" + b"\x85" * 100_000,
        b"}N}" * 1000,
        b"}N" * 5000 + b"N" + b"s" * 5000,
    ),
    *(
        b"c__main__\nA\n",
        b"cnumpy\nndarray\n",
        b"cnumpy\ndtype\n",
        b"c\n\n",
        b"c" + b"a" * 5000 + b"\nb\n",
        b"\x8c\1a\x8c\1b\x93",
    ),
    *(text.encode() for text in _HARMFUL),
    *(text.encode() for text in _HARMFUL),
)
_PICKLED_TEXTS = (
    *(
        "f4",
        "f8",
        "<",
        ">",
        "|",
        "=",
        "O8",
        "V8",
        "U100000000",
        "S2147483647",
        "M8[s]",
        "f4,f4",
        "i4",
        "b1",
        "",
        "policy_weights",
    ),
    *(
        "observations",
        "actions",
        "terminals",
        "rewards",
        "mean",
        "system",
        "os",
        "__dict__",
        "__class__",
        "array",
        "state",
    ),
)


def mutate_pickle(content: bytes, rng: random.Random) -> bytes:
    """Remove, insert, repeat or move operations of a pickle, or change their arguments."""
    found = [(op, argument, at) for op, argument, at in pickletools.genops(content) if at is not None]
    starts = [at for _, _, at in found] + [len(content)]
    pieces = [content[a:b] for a, b in itertools.pairwise(starts)]
    for _ in range(rng.choice((1, 1, 2))):
        i = rng.randrange(min(len(found), len(pieces)))
        _, argument, _ = found[i]
        match rng.choice(
            ("argument",) * 5 + ("drop", "insert", "insert", "insert", "twice", "swap", "replace")
        ):
            case "argument" if isinstance(argument, int) and not isinstance(argument, bool):
                candidates = [
                    k
                    for k, (_, a, _) in enumerate(found)
                    if isinstance(a, int) and "PUT" not in found[k][0].name and "GET" not in found[k][0].name
                ]
                pieces[rng.choice(candidates or [i])] = _pickled_integer(rng)
            case "argument":
                texts = [k for k, (o, _, _) in enumerate(found) if "UNICODE" in o.name or "STRING" in o.name]
                numbers = [
                    k
                    for k, (o, _, _) in enumerate(found)
                    if o.name in ("BININT", "BININT1", "BININT2", "LONG1")
                ]
                if texts and rng.random() < 0.6:
                    text = rng.choice((*_PICKLED_TEXTS, *_PICKLED_TEXTS, *TEXTS)).encode(
                        "utf-8", "surrogatepass"
                    )
                    pieces[rng.choice(texts)] = b"X" + struct.pack("<I", len(text)) + text
                elif numbers:
                    pieces[rng.choice(numbers)] = _pickled_integer(rng)
            case "drop":
                del pieces[i : i + rng.choice((1, 1, 2, 5))]
                return b"".join(pieces)
            case "insert":
                pieces[i] += rng.choice(_OPCODES)
            case "twice":
                pieces[i] *= rng.choice((2, 2, 100))
            case "swap":
                j = rng.randrange(len(pieces))
                pieces[i], pieces[j] = pieces[j], pieces[i]
            case "replace":
                pieces[i] = rng.choice((*_OPCODES, *pieces))
    return b"".join(pieces)


def _pickled_integer(rng: random.Random) -> bytes:
    number = rng.choice(INTEGERS)
    encoded = number.to_bytes(17, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def _mutate_pickle(path: Path, donor: Path, rng: random.Random) -> str:
    path.write_bytes(mutate_pickle(path.read_bytes(), rng))
    return "pickle"


# --- Files of torch.save


def _mutate_torch(path: Path, donor: Path, rng: random.Random) -> str:
    import torch

    kind = rng.choice(
        ("pickle",) * 4
        + ("zip", "zip", "tensors", "tensors", "tensors", "script", "storage", "drop", "version", "legacy")
    )
    if kind == "zip":
        return _mutate_zip(path, rng)
    if kind in ("tensors", "legacy"):
        content = torch.load(path, weights_only=True)
        if kind == "legacy":
            torch.save(content, path, _use_new_zipfile_serialization=False)
        else:
            torch.save(_change_tensors(content, rng), path)
        return f"torch {kind}"
    members = _members(path)
    pickled = next(name for name in members if name.endswith("data.pkl"))
    root = pickled.removesuffix("data.pkl")
    storages = [name for name in members if "/data/" in name]
    match kind:
        case "pickle":
            members[pickled] = mutate_pickle(members[pickled], rng)
        case "script":
            members[root + "constants.pkl"] = rng.choice((b"\x80\x02).", b"", members[pickled]))
            if rng.random() < 0.5:
                members[root + "code/__torch__.py"] = b"def forward(self):\n  return 1\n"
        case "storage" if storages:
            name = rng.choice(storages)
            members[name] = rng.choice(
                (
                    b"",
                    members[name][:-4],
                    members[name] * 2,
                    members[rng.choice(storages)],
                    b"\xff" * len(members[name]),
                )
            )
        case "version":
            members[
                root + rng.choice(("version", "byteorder", ".data/serialization_id", ".format_version"))
            ] = rng.choice((b"", b"9999", b"big", b"-1", b"little", b"\xff"))
        case _:
            del members[rng.choice(list(members))]
    _write_zip(path, members)
    return f"torch {kind}"


def _change_tensors(content: Any, rng: random.Random) -> Any:
    """Return the same nested containers with one item changed."""
    import torch

    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in list(items):
            places.append((node, key))
            walk(value)

    walk(content)
    node, key = rng.choice(places)
    value = node[key]
    if rng.random() < 0.2:
        del node[key]
    elif rng.random() < 0.1 and isinstance(node, dict):
        node[rng.choice((*TEXTS[:12], 7, None, (1, 2), f"{key}.0", "_models.9._mu.weight"))] = node.pop(key)
    elif isinstance(value, torch.Tensor) and rng.random() < 0.9:
        node[key] = other_tensor(value, rng)
    else:
        node[key] = rng.choice(
            (
                None,
                1,
                -1,
                2**40,
                0.5,
                "text",
                [],
                {},
                [1, 2],
                torch.zeros(2),
                OrderedDict(),
                True,
                [None],
                [0, 0],
                [99],
                [1.5],
            )
        )
    return content


def other_tensor(tensor: Any, rng: random.Random) -> Any:
    """Return a tensor of another shape or type, or with other numbers."""
    import torch

    kind = rng.choice(
        (
            "cut",
            "longer",
            "transpose",
            "flat",
            "rank",
            "rank",
            "empty",
            "scalar",
            "dtype",
            "dtype",
            "values",
            "values",
            "values",
            "strides",
            "wide",
        )
    )
    match kind:
        case "cut" if tensor.ndim:
            return tensor.narrow(rng.randrange(tensor.ndim), 0, 1).clone()
        case "longer" if tensor.ndim:
            return torch.cat([tensor, tensor], rng.randrange(tensor.ndim))
        case "transpose" if tensor.ndim > 1:
            return tensor.transpose(0, -1).contiguous()
        case "flat":
            return tensor.reshape(-1).clone()
        case "rank":
            return tensor[None].clone() if rng.random() < 0.5 else tensor[..., None].clone()
        case "empty":
            return tensor.new_zeros(rng.choice(((0,), (0, *tensor.shape[1:]), (*tensor.shape[:-1], 0))))
        case "scalar":
            return tensor.new_zeros(())
        case "dtype":
            kinds = (
                torch.float64,
                torch.float16,
                torch.bfloat16,
                torch.int64,
                torch.int8,
                torch.bool,
                torch.uint8,
                torch.complex64,
            )
            return tensor.to(rng.choice(kinds))
        case "strides" if tensor.numel():
            return tensor.reshape(-1)[:1].expand(tensor.shape)
        case "wide" if tensor.numel():
            return tensor.reshape(-1)[:1].expand(2**20).clone()
        case _:
            changed = tensor.clone().reshape(-1)
            if len(changed):
                bad = (float("nan"), float("inf"), 1e38, -1e38, 0.0, -1.0, 1e-40, 3e9, 2.0)
                if not changed.is_floating_point():
                    bad = (
                        (-1, 0, 1, 2, 2**31 - 1, -(2**31), 2**62, -(2**62), 1000)
                        if changed.dtype == torch.int64
                        else (0, 1)
                    )
                changed[: rng.choice((1, len(changed)))] = rng.choice(bad)
            return changed.reshape(tensor.shape)


# --- Safetensors


def _mutate_safetensors(path: Path, donor: Path, rng: random.Random) -> str:
    import safetensors.torch
    import torch

    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length].decode(), content[8 + length :]
    kind = rng.choice(
        ("header", "entry", "length", "metadata", "metadata", "metadata", "tensors", "tensors", "tensors")
    )
    match kind:
        case "header":
            header = mutate_json_text(header, rng)
        case "entry":
            # A nearly valid file: other shapes of the same size, other types, other offsets.
            fields = json.loads(header)
            names = [name for name in fields if name != "__metadata__"]
            entry = fields[rng.choice(names)]
            match rng.choice(("shape", "dtype", "offsets", "same")):
                case "shape":
                    shape = entry["shape"]
                    entry["shape"] = rng.choice(
                        (
                            [1, *shape],
                            [*shape, 1],
                            shape[::-1],
                            [int(np.prod(shape))],
                            [],
                            [0, *shape],
                            [2**63],
                            [2**32, 2**32, 0],
                            [-1],
                        )
                    )
                case "dtype":
                    entry["dtype"] = rng.choice(
                        ("I32", "U32", "F64", "BF16", "BOOL", "I64", "F8_E4M3", "C64", "F4", "", 7)
                    )
                case "offsets":
                    entry["data_offsets"] = rng.choice(
                        ([0, 0], [0, 2**63], [4, 0], [-1, 3], [len(body), len(body)], [2**64, 2**64])
                    )
                case "same":
                    entry["data_offsets"] = fields[rng.choice(names)]["data_offsets"]
            header = json.dumps(fields)
        case "length":
            number = rng.choice(INTEGERS) % 2**64
            path.write_bytes(number.to_bytes(8, "little") + content[8:])
            return "safetensors length"
        case "metadata":
            fields = json.loads(header)
            told = fields.setdefault("__metadata__", {})
            key = rng.choice(list(told) or ["new"])
            try:
                told[key] = mutate_json_text(told[key], rng)
            except (KeyError, ValueError):
                told[rng.choice((key, "new", "state", "record"))] = rng.choice((*TEXTS, "{}", "[]", "null"))
            if rng.random() < 0.05:
                del told[key]
            header = json.dumps(fields)
        case "tensors":
            with safetensors.safe_open(path, "pt") as file:
                told = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            name = rng.choice(sorted(tensors))
            if rng.random() < 0.12:
                del tensors[name]
            elif rng.random() < 0.08:
                tensors[rng.choice((name + "_", "weight_9", "extra", "weight_", "absolute", "members"))] = (
                    tensors.pop(name)
                )
            else:
                changed = other_tensor(tensors[name], rng).contiguous()
                tensors[name] = changed if changed.dtype != torch.complex64 else changed.real.contiguous()
            safetensors.torch.save_file(tensors, path, told)
            return f"safetensors {kind} {name}"
    encoded = header.encode("utf-8", "surrogatepass")
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)
    return f"safetensors {kind}"


# --- Text and tables


def _mutate_csv(path: Path, donor: Path, rng: random.Random) -> str:
    lines = path.read_text().split("\n")
    row = rng.randrange(len(lines))
    cells = lines[row].split(",")
    cell = rng.randrange(len(cells))
    match rng.choice(("cell", "cell", "cell", "less", "more", "drop", "twice", "quote", "swap")):
        case "cell":
            cells[cell] = rng.choice((*TEXTS, *map(str, INTEGERS), "a" * 200_000, "1e400", "0x1", "1_0", "٣"))
        case "less":
            del cells[cell]
        case "more":
            cells += ["1"] * rng.choice((1, 1000))
        case "drop":
            cells = []
        case "twice":
            cells += ["\n", *cells]
        case "quote":
            cells[cell] = '"' + cells[cell]
        case "swap":
            cells = cells[::-1]
    lines[row] = ",".join(cells)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return "CSV"


def _mutate_parquet(path: Path, donor: Path, rng: random.Random) -> str:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(path.read_bytes()), use_threads=False)
    names = table.column_names
    i = rng.randrange(len(names))
    rows = table.num_rows
    kind = rng.choice(
        (
            "drop",
            "rename",
            "cast",
            "nulls",
            "list",
            "ragged",
            "text",
            "constant",
            "values",
            "rows",
            "empty",
            "metadata",
            "metadata",
            "metadata",
            "twin",
            "dictionary",
            "struct",
            "decimal",
        )
    )
    match kind:
        case "drop":
            table = table.drop_columns([names[i]])
        case "rename":
            table = table.rename_columns([*names[:i], names[i] + "_", *names[i + 1 :]])
        case "twin":
            table = table.append_column(names[i], table.column(rng.randrange(len(names))))
        case "rows":
            table = table.slice(0, rng.choice((0, 1, rows - 1)))
        case "empty":
            table = table.select([])
        case "metadata":
            told = dict(table.schema.metadata or {})
            text = told.get(b"mopo_fast", b"{}").decode()
            made = rng.choice(
                (mutate_json_text(text, rng), mutate_json_text(text, rng), rng.choice(TEXTS), "null", "[]")
            )
            told[b"mopo_fast"] = made.encode("utf-8", "surrogatepass")
            table = table.replace_schema_metadata(rng.choice((told, told, told, None)))
        case _:
            flat = np.arange(rows, dtype=np.float32)
            column = {
                "cast": lambda: pyarrow.array(flat.astype(rng.choice(("f8", "i1", "i8", "u4", "?")))),
                "nulls": lambda: pyarrow.array(
                    [None] * rows, rng.choice((pyarrow.float32(), pyarrow.null(), pyarrow.bool_()))
                ),
                "list": lambda: pyarrow.array([[1.0]] * rows, pyarrow.list_(pyarrow.float32(), 1)),
                "ragged": lambda: pyarrow.array(
                    [[1.0] * (k % 3) for k in range(rows)], pyarrow.list_(pyarrow.float32())
                ),
                "text": lambda: pyarrow.array(["text"] * rows),
                "constant": lambda: pyarrow.array(
                    [rng.choice((0, -1, 2**31 - 1, -(2**31)))] * rows, pyarrow.int32()
                ),
                "values": lambda: pyarrow.array(flat * np.float32(rng.choice((np.nan, np.inf, -1e38)))),
                "dictionary": lambda: pyarrow.array(flat % 2).dictionary_encode(),
                "struct": lambda: pyarrow.array([{"a": 1.0}] * rows),
                "decimal": lambda: pyarrow.array([1] * rows, pyarrow.decimal128(5)),
            }[kind]()
            table = table.set_column(i, names[i], column)
    pyarrow.parquet.write_table(
        table, path, compression=rng.choice(("none", "snappy")), row_group_size=rng.choice((None, 3))
    )
    return f"Parquet {kind} of {names[i]}"


def _mutate_matlab(path: Path, donor: Path, rng: random.Random) -> str:
    import scipy.io

    # SciPy's reader may crash on the result of an earlier mutation.
    arrays = dict(matlab_files.load(path))
    name = rng.choice(list(arrays))
    value = arrays[name]
    match rng.choice(("drop", "rename", "kind", "shape", "values", "values", "more", "squeeze")):
        case "drop":
            del arrays[name]
        case "rename":
            arrays[rng.choice(("99", "a", "0", "007", "٣", "²"))] = arrays.pop(name)
        case "kind":
            arrays[name] = rng.choice(
                (
                    "text",
                    np.array([1, "a", None], object),
                    {"a": 1},
                    value.astype(np.int8),
                    value + 1j,
                    value.astype("f8"),
                    value > 0,
                )
            )
        case "shape":
            arrays[name] = rng.choice(
                (
                    value[None],
                    value[..., None],
                    value[:1],
                    value[..., :1],
                    value.reshape(1, -1),
                    value[:0],
                    value.T,
                )
            )
        case "squeeze":
            arrays[name] = value.reshape(-1)
        case "values":
            arrays[name] = np.full_like(value, rng.choice((np.nan, np.inf, 1e38, 0.0, -1.0)))
        case "more":
            arrays[str(len(arrays))] = rng.choice((value, np.zeros((1, 1)), 3.0))
    scipy.io.savemat(path, arrays, do_compression=rng.random() < 0.3)
    return "MATLAB"


STRUCTURES: dict[str, Callable[[Path, Path, random.Random], str]] = {
    ".json": _mutate_json,
    ".hdf5": _mutate_hdf5,
    ".h5": _mutate_hdf5,
    ".npz": _mutate_npz,
    ".npy": _mutate_npy,
    ".pkl": _mutate_pickle,
    ".pickle": _mutate_pickle,
    ".pth": _mutate_torch,
    ".pt": _mutate_torch,
    ".safetensors": _mutate_safetensors,
    ".csv": _mutate_csv,
    ".nns": _mutate_csv,
    ".parquet": _mutate_parquet,
    ".mat": _mutate_matlab,
}
