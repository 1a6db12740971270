"""Test the safe reader of torch.save's files: it returns the same tensors and runs no code of a file."""

import ast
import io
import os
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_files import (
    members_of,
    opcodes,
    saved,
    scripted,
    tar_with_a_link,
    tensor_opcodes,
    torch_file,
    with_two_directories,
    zipped,
)
from places import RECORDED

import mopo_fast
from mopo_fast import InputError
from mopo_fast.cli import main
from mopo_fast.compat import torch_files


def load(content: bytes, folder: Path, **options: Any) -> Any:
    (folder / "a.pt").write_bytes(content)
    return torch_files.load(folder / "a.pt", **options)


def refused(content: bytes, folder: Path, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        load(content, folder, **options)
    return str(error.value)


# --- sound files


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(RECORDED.rglob("*.pt*")) if path.suffix in (".pt", ".pth")],
    ids=lambda p: p.name,
)
def test_recorded_files(path: Path) -> None:
    """A state dict has the tensors that torch reads, and a pickled module can be read completely."""
    found = torch_files.load(path, inert=None)
    if path.suffix == ".pt":
        assert type(found).__name__ in ("EnsembleTransition", "TanhGaussianPolicy")
        return
    expected = torch.load(path, weights_only=True)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].stride() == tensor.stride(), name


def test_types_views_and_containers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    content = OrderedDict(
        [(str(dtype), base.mul(3).to(dtype)) for dtype in floats + integers]
        + [
            ("base", base),
            ("transposed", base.T),
            ("strided", base[1::2, ::3]),
            ("offset", base[3]),
            ("empty", torch.empty(0, 5)),
            ("number", torch.tensor(2.5)),
            ("parameter", torch.nn.Parameter(base * 2)),
            ("nested", {"list": [1, 2.5, "x", None, (True, base.size())]}),
        ]
    )
    content._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    found = load(saved(content), tmp_path)
    assert isinstance(found, OrderedDict) and list(found) == list(content)
    for name, tensor in content.items():
        if isinstance(tensor, torch.Tensor):
            assert found[name].dtype == tensor.dtype and found[name].stride() == tensor.stride(), name
            assert torch.equal(found[name], tensor), name
    assert found["nested"]["list"] == [1, 2.5, "x", None, (True, (6, 8))]
    # Tensors of one storage share memory, as with torch.load.
    found["base"][3, 0] = 77.0
    assert found["offset"][0] == found["transposed"][0, 3] == 77.0


def test_states(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([1.5], dtype=torch.float64), "b": torch.tensor([3])}, tmp_path / "a.pt")
    state = torch_files.load_state(tmp_path / "a.pt")
    assert state["a"].dtype == torch.float32 and state["b"].dtype == torch.int64
    for wrong, message in (
        ({1: torch.zeros(2)}, "is not a state dict"),
        ({"a": 1}, "is not a state dict"),
        ([torch.zeros(2)], "is not a state dict"),
        ({"a": torch.tensor([1e300], dtype=torch.float64)}, "a holds values that are not finite"),
        ({"a": torch.tensor([np.nan])}, "a holds values that are not finite"),
    ):
        torch.save(wrong, tmp_path / "a.pt")
        with pytest.raises(InputError, match=message):
            torch_files.load_state(tmp_path / "a.pt")
    assert torch_files.take("a.pt", state, "a", 1) is state["a"]
    for name, ndim, message in (
        ("c", 1, "lacks c; it has a, b"),
        ("a", 2, "floats of 2"),
        ("b", 1, "torch.int64"),
    ):
        with pytest.raises(InputError, match=message):
            torch_files.take("a.pt", state, name, ndim)


# --- attacks


@pytest.mark.parametrize("name", ["polixir", "d3rlpy", "offlinerl-kit", "mbrl-lib"])
def test_a_scripted_module_does_not_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zip file with two directories shows one to Python's zipfile and another, with code, to torch."""
    target = tmp_path / "written"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = scripted(target)
    for content in (whole, with_two_directories(whole, "constants.pkl")):
        source = tmp_path / "source"
        if name in ("polixir", "d3rlpy"):
            source.write_bytes(content)
        else:
            source.mkdir(exist_ok=True)
            (source / ("model.pth" if name == "mbrl-lib" else "dynamics.pth")).write_bytes(content)
        assert main(["convert", str(source), str(tmp_path / "out"), "--from", name]) == 2
        assert "is not a whole file of tensors" in " ".join(capsys.readouterr().err.split())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_attack_is_one(tmp_path: Path) -> None:
    """torch.load without restrictions runs the file's code, and Python's zipfile does not see that member."""
    target, path = tmp_path / "written", tmp_path / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path.write_bytes(with_two_directories(scripted(target), "constants.pkl"))
        with zipfile.ZipFile(path) as archive:
            assert not any(name.endswith("constants.pkl") for name in archive.namelist())
        torch.load(path, weights_only=False)
    assert target.read_bytes() == b"A" * 8


def test_a_tar_file_is_not_unpacked(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"x")
    victim.chmod(0o600)
    before = victim.stat()
    message = refused(tar_with_a_link(victim), tmp_path, inert=None)
    assert "it is no zip file; load one of torch before 1.6 there" in message
    after = victim.stat()
    assert (after.st_mode, after.st_nlink, after.st_mtime_ns) == (before.st_mode, 1, before.st_mtime_ns)


def test_files_of_old_torch(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "save it with a newer torch" in refused((tmp_path / "old.pt").read_bytes(), tmp_path)


def _with_flag(content: bytes) -> bytes:
    """Mark the first member as encrypted in the zip directory."""
    start = content.index(b"PK\1\2")
    return content[: start + 8] + b"\1\0" + content[start + 10 :]


def _moved(content: bytes, gap: bytes) -> bytes:
    """Insert `gap` between the members and the zip directory, and correct the directory's offset."""
    start = content.index(b"PK\1\2")
    moved = content[:start] + gap + content[start:-22]
    return moved + content[-22:-6] + struct.pack("<IH", start + len(gap), 0)


def _overlapping() -> bytes:
    """Make a zip file in which one member's bytes lie inside another member."""
    inner = zipped({"a/data/0": bytes(16)})
    inner = inner[: inner.index(b"PK\1\2")]
    outer = zipped({"a/data.pkl": b"\x80\x02}.", "a/byteorder": b"little", "a/version": inner})
    entry = zipped({"a/data/0": bytes(16)})
    entry = entry[entry.index(b"PK\1\2") : -22]
    at = outer.index(inner)
    entry = entry[:42] + struct.pack("<I", at) + entry[46:]
    start = outer.index(b"PK\1\2")
    directory = outer[start:-22] + entry
    return (
        outer[:start] + directory + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 4, 4, len(directory), start, 0)
    )


def _duplicates() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for data in (b"\x80\x02}.", b"\x80\x02]."):
                archive.writestr("a/data.pkl", data)
        return content.getvalue()


def test_zip_files_that_torch_does_not_write(tmp_path: Path) -> None:
    sound = saved({"a": torch.arange(4.0)})
    members = members_of(sound)
    name = next(iter(members)).split("/")[0]
    assert torch.equal(load(zipped(members), tmp_path)["a"], torch.arange(4.0))

    def changed(**others: bytes) -> bytes:
        return zipped(members | {f"{name}/{other}": data for other, data in others.items()})

    damaged = bytearray(sound)
    damaged[sound.index(struct.pack("<4f", 0, 1, 2, 3)) + 5] ^= 1
    for content, message in (
        (b"", "it is no zip file"),
        (b"x" + sound, "it is no zip file"),
        (b"PK\3\4" + sound, "its members overlap, or there is something between"),
        (sound + b"\0", "does not end in a zip file's directory"),
        (sound[:-2] + b"\2\0hi", "does not end in a zip file's directory"),
        (sound + sound, "its members overlap, or there is something between"),
        (_moved(zipped(members), b"gap"), "something between its members and its directory"),
        (_overlapping(), "its members overlap"),
        (_duplicates(), "two of one name"),
        (_with_flag(sound), "compressed or encrypted"),
        (zipped(members, zipfile.ZIP_DEFLATED), "compressed or encrypted"),
        (zipped({f"{name}/version": b"3"}), "it lacks data.pkl"),
        (zipped(members | {"other/data/9": b""}), "it holds other/data/9"),
        (bytes(damaged), "Bad CRC-32"),
        (changed(byteorder=b"big"), "not little-endian"),
        (changed(**{"code/a.py": b""}), "it holds .*/code/a.py, as a scripted module may"),
        (changed(**{"constants.pkl": b""}), "constants.pkl"),
        (changed(**{".ts_code": b""}), "ts_code"),
        (changed(**{"data/../x": b""}), "data/../x"),
        (changed(**{"data/0": bytes(15)}), "its data/0 has 15 bytes, the pickle says otherwise"),
        (changed(**{"data.pkl": bytes(1 << 25)}), "its data.pkl has 33,554,432 bytes, more than"),
    ):
        assert re.search(message, refused(content, tmp_path)), message
    for size in range(0, len(sound), 37):
        refused(sound[:size], tmp_path)


def test_claims_about_tensors(tmp_path: Path) -> None:
    """A pickle's claims are compared with the file's content before memory is allocated."""
    good = tensor_opcodes(1, (3,), (1,))
    assert load(torch_file({"a": good}), tmp_path)["a"].tolist() == [0, 0, 0]
    for tensor, message in (
        (tensor_opcodes(0, (5,), (1,)), "reaches beyond its storage"),
        (tensor_opcodes(2, (3,), (1,)), "reaches beyond its storage"),
        (tensor_opcodes(0, (2, 2), (3, 1)), "reaches beyond its storage"),
        (tensor_opcodes(5, (0,), (1,)), "reaches beyond its storage"),
        (tensor_opcodes(0, (2,), (1 << 61,)), "reaches beyond its storage"),
        (tensor_opcodes(-1, (1,), (1,)), "strides are no whole numbers"),
        (tensor_opcodes(0, (2,), (-1,)), "strides are no whole numbers"),
        (tensor_opcodes(0, (2,), (1 << 63,)), "strides are no whole numbers"),
        (tensor_opcodes(True, (1,), (1,)), "strides are no whole numbers"),
        (tensor_opcodes(0, (1, 1), (1,)), "strides are no whole numbers"),
        (tensor_opcodes(0, (1,), [1]), "strides are no whole numbers"),
        (tensor_opcodes(0, (1 << 60,), (0,)), "share memory, as an expanded one's do"),
        (tensor_opcodes(0, (2, 2), (1, 1)), "share memory, as an expanded one's do"),
        (tensor_opcodes(0, (2, 3), (1, 1)), "share memory, as an expanded one's do"),
        (tensor_opcodes(0, (0, 1 << 60), (1, 1)), "claims to be huge"),
        (tensor_opcodes(0, (-1,), (1,)), "other than whole numbers"),
        (tensor_opcodes(0, (1.0,), (1,)), "other than whole numbers"),
        (tensor_opcodes(0, [1], (1,)), "not a tuple"),
        (tensor_opcodes(0, (1,) * 1000, (1,) * 1000), "not a tuple"),
        (tensor_opcodes(0, (4,), (1,), count=1 << 60), "the pickle says otherwise"),
        (tensor_opcodes(0, (4,), (1,), count=4.0), "the pickle says otherwise"),
        (tensor_opcodes(0, (4,), (1,), kind="Double"), "the pickle says otherwise"),
        (tensor_opcodes(0, (4,), (1,), key="1"), "it lacks data/1"),
        (tensor_opcodes(0, (4,), (1,), key="../data.pkl"), "it lacks data/../data.pkl"),
        (tensor_opcodes(0, (4,), (1,), key=0), "no storage of numbers"),
        (tensor_opcodes(0, (4,), (1,), kind="Complex"), "asks for torch.ComplexStorage"),
        (tensor_opcodes(0, (4,), (1,), metadata={"conj": True}), "not plain"),
        (good + opcodes({}) + b"b", "the pickle changes a Tensor"),
        (good + opcodes(0) + opcodes(1) + b"s", "the pickle changes a Tensor"),
        (good + opcodes(0) + b"a", "the pickle changes a Tensor"),
    ):
        assert message in refused(torch_file({"a": tensor}), tmp_path)
    two_types = {"a": good, "b": tensor_opcodes(0, (4,), (1,), kind="Int")}
    assert "is used with two types" in refused(torch_file(two_types), tmp_path)
    one = tensor_opcodes(0, (1 << 14,), (1,), count=1 << 14)
    assert len(load(torch_file({str(i): one for i in range(15)}, bytes(1 << 16)), tmp_path)) == 15
    often = torch_file({str(i): one for i in range(40)}, bytes(1 << 16))
    assert "its tensors share memory too often" in refused(often, tmp_path)
    # Bytes other than 0 and 1 are read as true, which avoids undefined behaviour.
    flags = tensor_opcodes(0, (4,), (1,), kind="Bool")
    assert load(torch_file({"a": flags}, b"\0\1\2\xff"), tmp_path)["a"].int().tolist() == [0, 1, 1, 1]


def test_tensors_that_are_not_dense(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = [
            torch.eye(3).to_sparse(),
            torch.eye(3).to_sparse_csr(),
            torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            torch.empty(3, device="meta"),
            torch.zeros(3, dtype=torch.complex64),
            torch.zeros(3, dtype=torch.float8_e4m3fn),
            torch.zeros(3, dtype=torch.uint16),
            torch.zeros(1).expand(1000),
            torch.zeros(3, dtype=torch.complex64).conj(),
        ]
        files = [saved({"a": tensor}) for tensor in wrong]
    for content in files:
        message = refused(content, tmp_path)
        assert "is not a whole file of tensors" in message and "\n" not in message


def test_damage(tmp_path: Path) -> None:
    random, whole = np.random.default_rng(0), saved({"a": torch.arange(40.0), "b": [torch.ones(2, 3).T]})
    failed = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[random.integers(len(damaged))] = random.integers(256)
        try:
            load(bytes(damaged), tmp_path)
        except InputError:
            failed += 1
    # In the remaining cases the damaged bytes have no effect.
    assert failed > 200


def test_memory_is_asked_for_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"a": torch.zeros(1000, dtype=torch.float16)}
    torch.save(state, tmp_path / "a.pt")
    available = 2 * (tmp_path / "a.pt").stat().st_size
    monkeypatch.setattr("mopo_fast.utils.machine.available_memory", lambda: available)
    assert torch_files.load_state(tmp_path / "a.pt").keys() == {"a"}
    with pytest.raises(InputError, match=r"a\.pt in float32 would take"):
        torch_files.as_state(tmp_path / "a.pt", {"a": torch.zeros(available, dtype=torch.float16)})
    monkeypatch.setattr("mopo_fast.utils.machine.available_memory", lambda: available - 1)
    monkeypatch.setattr(torch_files, "_Archive", lambda file: pytest.fail("it is read"))
    with pytest.raises(
        InputError,
        match=r"a\.pt would take [\d.]+ (bytes|KiB|MiB|GiB), cpu has [\d.]+ (bytes|KiB|MiB); lower its size",
    ):
        torch_files.load(tmp_path / "a.pt")


def test_folders_and_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "missing"):
        with pytest.raises(InputError, match="does not exist"):
            torch_files.load(tmp_path / name)


# --- the rule


def test_the_package_never_calls_what_runs_files() -> None:
    """The package calls no torch.load, torch.jit.load or foreign unpickler, and loads no pickles by NumPy."""
    forbidden = {
        ("torch", "load"),
        ("jit", "load"),
        ("serialization", "load"),
        ("pickle", "load"),
        ("pickle", "loads"),
        ("pickle", "Unpickler"),
        ("joblib", "load"),
    }
    found = []
    root = Path(mopo_fast.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if (owner, node.attr) in forbidden:
                    found.append(where)
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "pickle", "torch.jit"):
                found += [where for name in node.names if (node.module, name.name) in forbidden]
            # These arguments must have their safe values if they are given.
            safe = {"weights_only": True, "allow_pickle": False}
            if isinstance(node, ast.keyword) and node.arg in safe:
                found += [] if getattr(node.value, "value", None) is safe[node.arg] else [where]
    assert found == []
