"""Test the fuzzer of readers (`make fuzz`): it covers every reader and finds faulty ones."""

import contextlib
import io
import multiprocessing
import os
import pickle
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import __main__ as fuzz_main
from fuzz.children import SECRET, Entry, Fuzzer, Limits, Verdict, World, check_secret
from fuzz.mutations import mutate_bytes, mutate_json_text, mutate_pickle
from fuzz.readers import ENTRIES, EXEMPT
from fuzz.scan import readers, readers_in
from places import TESTS

import mopo_fast
from mopo_fast.errors import InputError

REGRESSIONS = TESTS / "fuzz" / "regressions"
# The fuzzer forks its children from a process without threads.
CONTEXT = multiprocessing.get_context("forkserver")


def in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run the function in a separate process and return its result."""
    receives, sends = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_send, args=(sends, work, arguments))
    process.start()
    sends.close()
    try:
        return receives.recv()
    finally:
        process.join()


def _send(sends: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    sends.send(work(*arguments))


# --- the registry


def test_every_reader_of_the_package_has_joined() -> None:
    found = readers(Path(mopo_fast.__file__).parent)
    joined = {cover for entry in ENTRIES for cover in entry.covers}
    assert not found - joined - EXEMPT.keys(), (
        "add these to an entry's `covers`, or to EXEMPT with the reason"
    )
    assert (joined | EXEMPT.keys()) - found == set(), "these no longer read files, or are gone"
    assert not joined & EXEMPT.keys()


@pytest.mark.parametrize(
    "reading",
    [
        "open(path)",
        'open(path, "rb")',
        'path.open("r+b")',
        "open(path, mode)",
        'io.open(path, mode="a+")',
        "path.read_text()",
        "h5py.File(path)",
        "np.load(path)",
        "numpy.memmap(path)",
        "torch.load(path)",
        "torch.jit.load(path)",
        "json.load(file)",
        "pickle.loads(content)",
        "safetensors.torch.load_file(path)",
        "csv.reader(file)",
        "shutil.copyfile(path, target)",
        "read_json(path)",
        "load(path)",
    ],
)
def test_a_new_reader_is_found(reading: str) -> None:
    source = f"class A:\n    def read(self):\n        def inner():\n            return [{reading}]\n"
    assert readers_in(source) == {"A.read"}
    assert readers_in(f"content = {reading}") == {"<module>"}


@pytest.mark.parametrize("writing", ['open(path, "w")', 'path.open("wb")', "model.load(path)", "a.copy()"])
def test_what_does_not_read_is_no_reader(writing: str) -> None:
    assert readers_in(f"def write():\n    {writing}\n") == set()


def _read_sound_inputs(folder: Path) -> tuple[list[Verdict], list[Verdict]]:
    fuzzer = Fuzzer(ENTRIES, folder)
    sound = fuzzer.make_corpus(numbers=(0,))
    by_name = {entry.name.replace(" ", "-"): entry for entry in ENTRIES}
    return sound, [fuzzer.replay(by_name[kept.parent.name], kept) for kept in sorted(REGRESSIONS.glob("*/*"))]


def test_sound_inputs_are_read_and_regressions_stay_mended(tmp_path: Path) -> None:
    """Regressions are folders of files, ENTRY-NAME/FILE, which replace files of a valid input."""
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    sound, replayed = in_process(_read_sound_inputs, tmp_path)
    assert [verdict.entry for verdict in sound] == names
    assert {verdict.entry: verdict.details for verdict in sound if verdict.kind != "read"} == {}
    assert replayed
    assert [verdict for verdict in replayed if verdict.failed] == []


# --- its findings


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _read_outside() -> None:
    check_secret([1.0, SECRET])


def _refuse() -> None:
    raise InputError("no")


def _open_link() -> None:
    """Refuse to open a link in place of the file, as a lock does."""
    Path("link").symlink_to("../canary/text")
    with contextlib.suppress(OSError):
        os.open("link", os.O_RDWR | os.O_NOFOLLOW)


def _allocate() -> None:
    bytes(4 << 30)


def _allocate_a_tensor() -> None:
    torch.zeros(1 << 30)


BROKEN: dict[str, tuple[Callable[[], Any], str, str]] = {
    "sound": (lambda: None, "read", ""),
    "refuses": (_refuse, "refused", ""),
    "key": (lambda: {}["missing"], "traceback", "KeyError"),
    "exits": (lambda: os._exit(3), "crash", "exit 3"),
    "segfault": (_crash, "crash", "SIGSEGV"),
    "sleeps": (lambda: time.sleep(60), "hang", "SIGKILL"),
    "allocates": (_allocate, "memory", "MemoryError"),
    "allocates a tensor": (_allocate_a_tensor, "memory", "RuntimeError"),
    "overwrites": (lambda: Path("../canary/text").write_text("mine"), "escape", "open"),
    "adds": (lambda: Path("../canary/new").touch(), "escape", "os.utime"),
    "adds unseen": (partial(os.mkfifo, "../canary/new"), "escape", "changed"),
    "makes open": (lambda: Path("../canary/private").chmod(0o644), "escape", "os.chmod"),
    "removes": (lambda: Path("../canary/folder/inside").unlink(), "escape", "os.remove"),
    "tries to remove": (lambda: Path("../nothing").unlink(missing_ok=True), "escape", "os.remove"),
    "writes elsewhere": (lambda: Path("../../elsewhere").write_text(""), "escape", "open"),
    "follows no link": (_open_link, "read", ""),
    "runs": (lambda: os.system("true"), "escape", "os.system"),
    "shell": (lambda: pickle.loads(b"cposix\nsystem\n(V: > ../canary/bomb\ntR."), "escape", "os.system"),
    "returns what is outside": (_read_outside, "escape", "read"),
}


def _write_input(number: int) -> None:
    Path("input.json").write_text(f'{{"number": {number}}}')


def _find_broken(folder: Path) -> dict[str, Verdict]:
    entries = [Entry(name, _write_input, ("input.json",), what[0], ()) for name, what in BROKEN.items()]
    fuzzer = Fuzzer(entries, folder, jobs=2, limits=Limits(seconds=2.0))
    _make_corpus(fuzzer)
    found = {}
    for verdict in fuzzer.run([(entry, [7, 8]) for entry in entries]):
        assert (verdict.entry, verdict.number) not in found
        found[verdict.entry, verdict.number] = verdict
    fuzzer.keep(found["key", 7], folder / "kept")
    replayed = fuzzer.replay(entries[list(BROKEN).index("segfault")], folder / "kept")
    assert (replayed.kind, replayed.what) == ("crash", "SIGSEGV")
    assert len(found) == 2 * len(BROKEN)
    return {name: verdict for (name, number), verdict in found.items() if number == 8}


def _make_corpus(fuzzer: Fuzzer) -> None:
    for entry in fuzzer.entries:
        for number in (0, 1):
            folder = fuzzer.corpus / entry.name / str(number)
            folder.mkdir(parents=True)
            (folder / "input.json").write_text(f'{{"number": {number}}}')


def test_broken_readers_are_found(tmp_path: Path) -> None:
    found = in_process(_find_broken, tmp_path)
    assert {name: (v.kind, v.what) for name, v in found.items()} == {n: b[1:] for n, b in BROKEN.items()}
    assert "KeyError: 'missing'" in found["key"].details
    assert "KeyError: 'missing'" in (tmp_path / "kept" / "verdict.txt").read_text()
    assert not (tmp_path / "elsewhere").exists() or found["writes elsewhere"].kind == "escape"


def _run_main(folder: Path) -> list[tuple[int, str]]:
    told = []
    for name in ("refuses", "key"):
        fuzz_main.ENTRIES = (Entry(name, _write_input, ("input.json",), BROKEN[name][0], ()),)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            code = fuzz_main.main(["--cases", "3", "--keep", str(folder / "kept"), "--seed", "5"])
        told.append((code, output.getvalue()))
    return told


def test_the_command(tmp_path: Path) -> None:
    (code, output), (failed, told) = in_process(_run_main, tmp_path)
    # The fuzzer also reports inputs that are never read.
    assert "refuses does not read its own input: no" in output and code == 1
    assert failed == 1 and "3 cases" in told and "--seed 5" in told
    assert "000 traceback: KeyError in children.py:judge, 3 cases of key" in told
    assert "KeyError" in (tmp_path / "kept" / "000-traceback-key" / "verdict.txt").read_text()


# --- mutations


def _mutated(folder: Path, entry: Entry, number: int, corpus: Path) -> dict[str, bytes]:
    world = World(folder)
    before = Path.cwd()
    try:
        world.prepare(entry, number, corpus)
        return {
            str(path.relative_to(world.case)): path.read_bytes()
            for path in sorted(world.case.rglob("*"))
            if path.is_file()
        }
    finally:
        os.chdir(before)


def test_the_same_number_is_the_same_case(tmp_path: Path) -> None:
    entry = Entry("a", _write_input, ("input.json",), lambda: None, ())
    _make_corpus(Fuzzer([entry], tmp_path))
    first, again = (
        [_mutated(tmp_path / name, entry, number, tmp_path / "corpus") for number in range(40)]
        for name in ("one", "two")
    )
    assert first == again
    assert len({tuple(case.items()) for case in first}) > 20


@pytest.mark.parametrize("mutator", ["bytes", "json", "pickle"])
def test_mutations_of_text_and_bytes_depend_on_the_generator_alone(mutator: str) -> None:
    content = pickle.dumps([{"observations": [1, 2, 3], "name": "text"}])
    mutators: dict[str, Callable[[random.Random], Any]] = {
        "bytes": lambda rng: mutate_bytes(content, content[::-1], rng)[0],
        "json": partial(mutate_json_text, '{"a": [1, {"b": "c"}], "d": 1.5}'),
        "pickle": partial(mutate_pickle, content),
    }
    one, two = ([mutators[mutator](random.Random(n)) for n in range(200)] for _ in range(2))
    assert one == two
    assert len({str(made) for made in one}) > 60
