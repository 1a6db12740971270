"""Test malicious pickles: false sizes, deep nesting, growth, and forbidden calls."""

import copyreg
import pickle
import struct
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_files import opcodes

from mopo_fast import InputError
from mopo_fast.data import trajectories
from mopo_fast.utils import pickles

DEEP = 200_000
DTYPE = b"cnumpy\ndtype\n(" + opcodes("f4") + b"tR"


def load(content: bytes, folder: Path, **options: Any) -> Any:
    (folder / "a.pkl").write_bytes(content)
    return pickles.load(folder / "a.pkl", **options)


def refused(content: bytes, folder: Path, **options: Any) -> str:
    """Return the error about a file, which must be refused without allocating memory for it."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as error:
            load(content, folder, **options)
        assert tracemalloc.get_traced_memory()[1] < 50 * len(content) + (1 << 20)
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize(
    "content",
    [
        b"\x8e" + struct.pack("<Q", 1 << 60) + b"x.",  # BINBYTES8
        b"\x8d" + struct.pack("<Q", 1 << 60) + b"x.",  # BINUNICODE8
        b"\x96" + struct.pack("<Q", 1 << 60) + b"x.",  # BYTEARRAY8
        b"\x96" + struct.pack("<Q", 1 << 33) + b"x.",
        b"\x95" + struct.pack("<Q", 1 << 60) + b"x.",  # FRAME
        b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b"x.",  # LONG4
        b"\x8b" + struct.pack("<i", -1) + b"x.",
        b"B" + struct.pack("<I", (1 << 32) - 1) + b"x.",  # BINBYTES
        b"T" + struct.pack("<i", -1) + b"x.",  # BINSTRING
        b"I" + b"9" * 100_000 + b"\n.",
        b"r" + struct.pack("<I", (1 << 32) - 1) + b".",  # LONG_BINPUT of nothing
        b"j" + struct.pack("<I", (1 << 32) - 1) + b".",  # LONG_BINGET
        b"((((.",
        b"t.",
        b"0.",
        b"\xff.",
        b"]",
    ],
)
def test_claims_of_size(content: bytes, tmp_path: Path) -> None:
    assert "is not a whole pickle file" in refused(b"\x80\x04" + content, tmp_path)


def test_a_memo_of_large_numbers_takes_no_memory(tmp_path: Path) -> None:
    """Python's unpickler in C allocates a table as large as the largest memo number."""
    tracemalloc.start()
    assert load(b"\x80\x02]r" + struct.pack("<I", (1 << 32) - 1) + b".", tmp_path) == []
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


DEEPLY = {
    "tuples": b")" + b"\x85" * DEEP,
    "lists": b"]" * DEEP + b"a" * (DEEP - 1),
    "dictionaries": (b"}" + opcodes("a")) * DEEP + b"N" + b"s" * DEEP,
    "marks": b"(" * DEEP + b"t" * DEEP,
}


@pytest.mark.parametrize("kind", DEEPLY)
def test_depth(kind: str, tmp_path: Path) -> None:
    """Lists are nested in lists, and tuples in tuples."""
    for content in (DEEPLY[kind] + b".", b"]}" + opcodes("observations") + DEEPLY[kind] + b"sa."):
        (tmp_path / "a.pkl").write_bytes(b"\x80\x04" + content)
        with pytest.raises(InputError):
            trajectories.read(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("before", "after"), [(b"}", b"Ns"), (b"}(", b"Nu"), (b"(", b"Nd"), (b"\x8f(", b"\x90"), (b"(", b"\x91")]
)
def test_deep_keys(before: bytes, after: bytes, tmp_path: Path) -> None:
    """Hashing a tuple recurses into its tuples, so deep nesting would crash the process."""
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04" + before + DEEPLY["tuples"] + after + b".")
    with pytest.raises(InputError, match="keys that are neither texts nor numbers"):
        pickles.load(tmp_path / "a.pkl")


def test_keys_of_one_hash(tmp_path: Path) -> None:
    """All multiples of the hash's modulus have the hash 0."""
    scalar = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(" + opcodes("i8") + b"tR"
    for number in (1 << 60, -(1 << 60), 2**61 - 1, 5 * (2**61 - 1)):
        assert "keys beyond" in refused(b"\x80\x02}" + opcodes(number) + b"Ns.", tmp_path)
        assert "keys beyond" in refused(b"\x80\x02}(" + opcodes(number) + b"Nu.", tmp_path)
        assert "keys beyond" in refused(b"\x80\x04\x8f(" + opcodes(number) + b"\x90.", tmp_path)
    large = scalar + opcodes((2**61 - 1).to_bytes(8, "little")) + b"tR"
    assert "keys beyond" in refused(b"\x80\x02}" + large + b"Ns.", tmp_path)
    most = (1 << 60) - 1
    assert load(b"\x80\x02}" + opcodes(most) + b"Ns.", tmp_path) == {most: None}


@pytest.mark.parametrize(
    "flood", [b"]", b"}", b"(", b"N\x85", b"\x8f", b"\x94", b"(l", b"(i_\n_\n", b"c_\n_\n)R"]
)
def test_a_flood_of_objects(flood: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_MOST_OBJECTS", 1000)
    allowed = {"_._": dict}
    assert "more than 1,000 objects" in refused(b"\x80\x04N" + flood * 1001 + b".", tmp_path, allowed=allowed)
    load(b"\x80\x04N" + flood * 400 + b"N.", tmp_path, allowed=allowed)


def test_growth(tmp_path: Path) -> None:
    """Encoding a text again takes a byte of the file, and must not allocate its memory again."""
    text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\0"
    encode = b"c_codecs\nencode\nq\1"
    again = b"h\1(h\0" + opcodes("latin1") + b"tR"
    tracemalloc.start()
    found = load(b"\x80\x02](" + text + encode + again * 200 + b"e.", tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    assert all(item is found[2] for item in found[3:])
    # Each list contains another list many times.
    row = b"](" + b"K\1" * 1000 + b"eq\0"
    many = b"](" + b"h\0" * 1000 + b"eq\0"
    rows = load(b"\x80\x02" + row + many + b".", tmp_path)
    assert pickles.as_array([1, 2.5, np.float32(3)]).tolist() == [1, 2.5, 3]
    assert pickles.as_array(rows[0]).shape == (1000,)
    assert pickles.as_array([[1, 2], [3, 4]]).shape == (2, 2)
    for wrong in ([[1], [2, 3]], [[[1]]], ["a"], None, {}, [None], [[1], 2]):
        assert pickles.as_array(wrong).dtype == object
    million = [[1.0] * 1_000_000] * 1_000_000
    with pytest.raises(InputError, match=r"a list in the pickle would take 7,451 GiB"):
        pickles.as_array(million)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (opcodes((1 << 62, 4)), "whole pickle"),
        (opcodes((-1,)), "other than whole numbers"),
        (opcodes((0, 1 << 62)), "claims to be huge"),
        (opcodes((1 << 32, 1 << 32, 0)), "claims to be huge"),
        (opcodes((3,)), "whole pickle"),
        (opcodes((2.0,)), "other than whole numbers"),
        (opcodes((True,)), "other than whole numbers"),
        (opcodes([2]), "not a tuple"),
        (opcodes(2), "not a tuple"),
        (opcodes((1,) * 70), "not a tuple"),
    ],
)
def test_shapes(array: bytes, message: str, tmp_path: Path) -> None:
    content = b"(" + opcodes(1) + array + DTYPE + b"\x89" + b"C\x08" + bytes(8) + b"tb."
    for make in (b"cnumpy.core.multiarray\n_reconstruct\n(tR", b"cnumpy\nndarray\n(tR"):
        assert message in refused(b"\x80\x03" + make + content, tmp_path)
    function = b"cnumpy._core.numeric\n_frombuffer\n(C\x08" + bytes(8) + DTYPE + array + opcodes("C") + b"tR."
    assert message in refused(b"\x80\x03" + function, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cnumpy\ndtype\n(" + opcodes("O") + b"tR.", "array of object"),
        (b"cnumpy\ndtype\n(" + opcodes("U4") + b"tR.", "array of <U4"),
        (b"cnumpy\ndtype\n(" + opcodes("f4,f4") + b"tR.", "only numbers are read"),
        (b"cnumpy\ndtype\n(" + opcodes({"names": ["a"], "formats": ["O"]}) + b"tR.", "no known type"),
        (b"cnumpy\ndtype\n(" + opcodes(("f4", (1 << 40,))) + b"tR.", "no known type"),
        (b"cnumpy\ndtype\n(cnumpy\ndtype\ntR.", "no known type"),
        (b"cnumpy\ndtype\n(" + opcodes("c8") + b"tR.", "array of complex64"),
        (DTYPE + opcodes((3, "x")) + b"b.", "whole pickle"),
        (b"cnumpy.core.multiarray\nscalar\n(" + DTYPE + b"C\x03abctR.", "whole pickle"),
        (b"cnumpy.core.multiarray\nscalar\n(" + DTYPE + b"KatR.", "not bytes"),
        (
            b"cnumpy._core.numeric\n_frombuffer\n(" + b"C\x04abcd" + DTYPE + opcodes((1,)) + b"KatR.",
            "not bytes",
        ),
        (b"c_codecs\nencode\n(K\1" + opcodes("latin1") + b"tR.", "encodes something that is not text"),
        (b"c_codecs\nencode\n(" + opcodes("€") + opcodes("utf8") + b"tR.", "whole pickle"),
        (b"c_codecs\nencode\n" + opcodes({"__code__": 1}) + b"b.", "the pickle changes a function"),
        (b"cnumpy\ndtype\n" + opcodes({"a": 1}) + b"b.", "the pickle changes a type"),
        (b"cnumpy\ndtype\n)\x81.", "makes an object of something that is not a class"),
        (b"cnumpy\ndtype\n)}\x92.", "makes an object of something that is not a class"),
        (b"]" + opcodes({"a": 1}) + b"b.", "the pickle changes a list"),
        (b"K\1K\2a.", "the pickle changes a int"),
        (b"]K\1K\2s.", "the pickle changes a list"),
        (b"}(K\1e.", "the pickle changes a dict"),
        (b"](K\1\x90.", "the pickle changes a list"),
        (b"K\1Q.", "whole pickle"),
        (b"P1\n.", "whole pickle"),
        (b"\x97.", "own extensions or buffers"),
        (b"\x82\1.", "own extensions or buffers"),
        (b"cos\nsystem\n.", "asks for os.system"),
        (b"(ios\nsystem\n.", "asks for os.system"),
        (b"\x8c\x02os\x8c\x06system\x93.", "asks for os.system"),
        (b"c__main__\n" + b"a" * 100_000 + b"\n.", "asks for __main__.aaa"),
        (
            b"cbuiltins\ngetattr\n(" + b"cnumpy\ndtype\n" + opcodes("mro") + b"tR.",
            "asks for builtins.getattr",
        ),
        (b"cnumpy\ndtype.__init__.__globals__\n.", r"asks for numpy.dtype.__init__.__globals__"),
    ],
)
def test_tricks(content: bytes, message: str, tmp_path: Path) -> None:
    assert message in refused(b"\x80\x04" + content, tmp_path)


def test_a_registered_extension_is_not_had(tmp_path: Path) -> None:
    """Python's unpickler caches the objects of extension codes, which bypasses the check of names."""
    copyreg.add_extension("builtins", "exec", 240)
    try:
        copyreg._extension_cache[240] = exec  # type: ignore[attr-defined]
        assert "own extensions" in refused(b"\x80\x02\x82\xf0(" + opcodes("1") + b"tR.", tmp_path)
    finally:
        copyreg.remove_extension("builtins", "exec", 240)
        copyreg._extension_cache.pop(240, None)  # type: ignore[attr-defined]


def test_stand_ins(tmp_path: Path) -> None:
    """Each name gets one class, and operations on a stand-in have no effect."""
    one = b"cother\nThing\n)R"
    content = b"\x80\x02](" + one * 3 + b"cother\nThing\n)\x81" + one + opcodes({"a": 1}) + b"be."
    found = load(content, tmp_path, inert=None)
    assert len({type(item) for item in found}) == 1 and type(found[0]).__name__ == "Thing"
    assert [item.state for item in found] == [None] * 4 + [{"a": 1}]
    for change in (b"K\1K\2s", b"(K\1K\2u", b"K\1a", b"(K\1e"):
        assert load(b"\x80\x02" + one + change + b".", tmp_path, inert=None).state is None
    assert "changes a type" in refused(b"\x80\x02cother\nThing\nK\1b.", tmp_path, inert=None)
    nested = one + b"cother\nThing\n" + one + b"\x85R"
    assert load(b"\x80\x02" + nested + b"b.", tmp_path, inert=None).state.state is None


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_sound_pickles(protocol: int, tmp_path: Path) -> None:
    arrays = [
        np.arange(6).reshape(2, 3).astype(kind) for kind in ("<f4", ">f8", "f2", "i1", "<i8", ">u2", "?")
    ]
    arrays += [
        np.asfortranarray(arrays[0]),
        arrays[0][:, ::2],
        np.zeros((0, 4)),
        np.array(2.5),
        np.arange(3.0)[::-1],
    ]
    content = {
        "arrays": arrays,
        "scalars": [
            np.float32(1.5),
            np.int64(-3),
            np.bool_(True),
            1,
            2.5,
            None,
            True,
            "é",
            b"\xff",
            1 << 200,
        ],
        3: (1, (2, [3])),
        "twice": [arrays[0], arrays[0]],
        None: {1.5: "a", b"b": {}},
        "sets": [{1, "a"}] if protocol >= 4 else [],
    }
    found = load(pickle.dumps(content, protocol), tmp_path)
    for one, other in zip(content.pop("arrays"), found.pop("arrays"), strict=True):
        array = pickles.as_array(other)
        assert array.dtype == one.dtype and np.array_equal(array, one)
    twice = found.pop("twice")
    assert twice[0] is twice[1] and np.array_equal(pickles.as_array(twice[0]), content.pop("twice")[0])
    assert found == content
    ordered = OrderedDict(a=1)
    assert "asks for collections.OrderedDict" in refused(pickle.dumps(ordered, protocol), tmp_path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"cannot read .*: No such file"):
            pickles.load(path)
    with pytest.raises(InputError, match="is not a whole pickle file"):
        load(b"", tmp_path)
