"""Fuzz cases in child processes with limits of time, memory and file size, and their outcomes."""

import contextlib
import errno
import faulthandler
import hashlib
import importlib
import itertools
import json
import logging
import os
import random
import re
import resource
import selectors
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np

from mopo_fast.errors import InputError

from .mutations import SECRET, mutate

PACKAGE = str(Path(sys.modules["mopo_fast"].__file__ or "").parent)


@dataclass(frozen=True)
class Entry:
    """A file reader under test.

    Attributes:
        name: name in tables.
        make: function that writes a small valid input to the working directory, a different one for each
            number.
        files: globs of the input's files to mutate.
        read: function that reads the whole input in the working directory through the public reader.
        covers: functions of the package that read files on the way, named as by `scan.readers`.
        cost: a slow reader gets one case for every `cost` cases of others.
    """

    name: str
    make: Callable[[int], None]
    files: tuple[str, ...]
    read: Callable[[], None]
    covers: tuple[str, ...]
    cost: int = 1


@dataclass(frozen=True)
class Limits:
    """Limits of a case."""

    seconds: float = 20.0
    memory: int = 2 << 30
    """Bytes of address space beyond what the imports take."""
    file_size: int = 64 << 20


@dataclass(frozen=True)
class Verdict:
    """The outcome of one case.

    Attributes:
        kind: "read", "refused" (an InputError), or one of `FAILURES`.
        what: the exception's type, or the signal's name.
        where: the innermost place in the package, "file.py:function", or "" if unknown.
        details: the message and the traceback.
        mutation: short description of the mutation.
    """

    entry: str
    number: int
    kind: str
    what: str = ""
    where: str = ""
    details: str = ""
    mutation: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.kind in FAILURES

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.what, self.where


# Description of a failure, beside its files.
VERDICT = "verdict.txt"
FAILURES = ("traceback", "crash", "hang", "memory", "escape", "mutation")


class Escape(BaseException):
    """Raised when a case has done something outside its folder."""


def check_secret(values: Any) -> None:
    """Raise `Escape` if an array has a value that is only in files outside the case's folder."""
    if np.any(np.asarray(values) == SECRET):
        raise Escape("values come from a file outside the input")


class World:
    """A child's folder: the case's folder, and canaries beside it that must not change."""

    def __init__(self, root: Path) -> None:
        self.root, self.case, self.canary = root, root / "case", root / "canary"
        shutil.rmtree(root, ignore_errors=True)
        (self.canary / "folder").mkdir(parents=True)
        (root / "tmp").mkdir()
        self._fill()
        self._before = self._look()

    def _fill(self) -> None:
        for name in ("text", "folder/inside"):
            (self.canary / name).write_text("precious\n" * 10)
        (self.canary / "private").write_text("precious")
        (self.canary / "private").chmod(0o600)
        secret = np.full(4096, SECRET, np.float32)
        (self.canary / "outside.bin").write_bytes(secret.tobytes())
        with h5py.File(self.canary / "outside.hdf5", "w") as file:
            # Values of the shapes that inputs have, and of others.
            file["floats"] = secret
            for rows, columns in itertools.product((4, 8, 24, 30, 40), (None, 2, 3, 6, 8, 11, 17, 27)):
                shape = (rows,) if columns is None else (rows, columns)
                file["x".join(map(str, shape))] = np.full(shape, SECRET, np.float32)

    def _look(self) -> dict[str, Any]:
        """Record content, mode and times of everything but the case's folder, and of temporary files."""
        seen: dict[str, Any] = {}
        for folder in (self.root, self.canary, self.canary / "folder"):
            for entry in os.scandir(folder):
                if entry.name in ("case", "tmp", "trace", "stderr"):
                    continue
                about = entry.stat(follow_symlinks=False)
                # A folder's time changes with its content, which is recorded separately.
                facts = (about.st_mode, about.st_nlink, about.st_uid)
                if stat.S_ISREG(about.st_mode):
                    digest = hashlib.sha256(Path(entry.path).read_bytes()).hexdigest()
                    facts += (about.st_size, about.st_mtime_ns, digest)
                seen[os.path.relpath(entry.path, self.root)] = facts
        return seen

    def changes(self) -> list[str]:
        """Return the files that have changed."""
        after = self._look()
        return sorted(
            name for name in self._before.keys() | after.keys() if self._before.get(name) != after.get(name)
        )

    def prepare(self, entry: Entry, number: int, corpus: Path) -> str:
        """Put the mutated input of a case into place; return a short description of the mutation."""
        sound, donor = corpus / entry.name / "0", corpus / entry.name / "1"
        self.place(sound)
        os.chdir(self.case)
        rng = random.Random(f"{entry.name} {number}")
        files = mutated_files(entry, sound)
        path = rng.choice(files)
        told = mutate(Path(path), donor / path if (donor / path).exists() else sound / path, rng)
        if self.changes():
            # HDF5 may open files that a file refers to, for writing too.
            self._fill()
            self._before = self._look()
        return f"{path}: {told}"

    def place(self, folder: Path) -> None:
        """Replace the case's folder with a copy of `folder`."""
        os.chdir(self.root)
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(folder, self.case, symlinks=True)


def mutated_files(entry: Entry, folder: Path) -> list[str]:
    """Return the files of an entry's valid input that are mutated."""
    found = sorted({str(path.relative_to(folder)) for glob in entry.files for path in folder.glob(glob)})
    if not found:
        raise ValueError(f"{entry.name} makes no files like {', '.join(entry.files)}")
    return found


# --- In a child


def fork(work: Callable[[], None]) -> int:
    """Fork a child that does the work and ends; return its process ID."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def settle(world: World, limits: Limits | None = None) -> None:
    """Prepare this process to read cases: its folders, no network, its limits."""
    os.chdir(world.root)
    world.case.mkdir(exist_ok=True)
    folders = {"HOME": "home", "MOPO_FAST_DATA_DIR": "data", "D4RL_DATASET_DIR": "d4rl"}
    folders |= {"MINARI_DATASETS_PATH": "minari", "XDG_CACHE_HOME": "home/cache", "HF_HOME": "home/hf"}
    os.environ.update({name: str(world.case / folder) for name, folder in folders.items()})
    os.environ.update(
        TMPDIR=str(world.root / "tmp"), http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9"
    )
    os.environ.update(HF_HUB_OFFLINE="1", D4RL_SUPPRESS_IMPORT_ERROR="1")
    tempfile.tempdir = None
    socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = _no_network  # type: ignore[assignment]
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    logging.disable()
    if limits is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limits.memory, used + limits.memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_size, limits.file_size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _no_network(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.ENETUNREACH, "no network in a fuzzed case")


# Audit events, and the indices of the arguments that are paths which they change.
_CHANGES = {
    **dict.fromkeys(
        ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime"), (0,)
    ),
    **dict.fromkeys(("os.rename", "os.link"), (0, 1)),
    **dict.fromkeys(("os.symlink",), (1,)),
    **dict.fromkeys(("shutil.rmtree",), (0,)),
}
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.startfile", "pty.spawn")


class Watch:
    """Record of Python's changes to paths outside the child's folder, and of programs that it starts."""

    def __init__(self, world: World) -> None:
        self._root, self.seen, self.on = os.path.realpath(world.root), [], False
        sys.addaudithook(self._hear)

    seen: list[str]

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _RUNS:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self._check(event, path, follows=not flags & os.O_NOFOLLOW)
        elif event in _CHANGES and not (
            event != "os.rename" and arguments[-1] not in (-1, None) and len(arguments) > 1
        ):
            for place in _CHANGES[event]:
                self._check(event, arguments[place])

    def _check(self, event: str, path: Any, follows: bool = False) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        # Opening follows links; all other events change the link itself.
        full = os.path.join(os.path.realpath(folder), name)
        full = os.path.realpath(full) if follows else full
        inside = os.path.relpath(full, self._root).split(os.sep)[0]
        if inside not in ("case", "tmp", ".") and not full.startswith("/dev/"):
            self.seen.append(f"{event} {full}")


def judge(entry: Entry, number: int, world: World, watch: Watch, mutation: str = "") -> Verdict:
    """Read the case's folder and return the outcome, unless it kills the process."""
    os.chdir(world.case)
    random.seed(0)
    np.random.seed(0)
    watch.seen, watch.on = [], True
    began = time.perf_counter()
    kind, what, where, details = "read", "", "", ""
    try:
        entry.read()
    except InputError as error:
        kind, details = "refused", str(error)[:500]
    except Escape as error:
        kind, what, where, details = "escape", "read", _place(error), str(error)
    except BaseException as error:
        full = isinstance(error, MemoryError) or re.search(
            r"bad_alloc|allocate memory|out of memory", str(error), re.I
        )
        kind, what, where = "memory" if full else "traceback", type(error).__name__, _place(error)
        details = "".join(traceback.format_exception(error, limit=-12))[-4000:]
    finally:
        watch.on = False
    seconds = time.perf_counter() - began
    escaped = [*watch.seen, *(f"changed {name}" for name in world.changes())]
    if escaped:
        place = where or entry.name
        kind, what, where = "escape", escaped[0].split()[0], place
        details = "\n".join([*escaped[:10], details])
    return Verdict(entry.name, number, kind, what, where, details, mutation, seconds)


def _place(error: BaseException) -> str:
    """Return the innermost function of the package in a traceback, or the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    # The function around a comprehension or lambda says more than these.
    named = [frame for frame in frames if not frame.name.startswith("<")]
    own = [frame for frame in named if frame.filename.startswith(PACKAGE)]
    last = (own or named or frames)[-1]
    name = os.path.relpath(last.filename, PACKAGE) if own else os.path.basename(last.filename)
    return f"{name}:{last.name}"


def _read_cases(
    entry: Entry, numbers: Iterable[int], world: World, corpus: Path, pipe: int, limits: Limits
) -> None:
    """Read cases one after the other; write a line of JSON to the pipe before and after each."""
    trace = os.open(world.root / "trace", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    errors = os.open(world.root / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.dup2(errors, 2)
    faulthandler.enable(trace)
    faulthandler.register(signal.SIGUSR1, trace)
    settle(world, limits)
    watch = Watch(world)

    def tell(about: dict[str, Any]) -> None:
        line = json.dumps(about).encode() + b"\n"
        while line:
            line = line[os.write(pipe, line) :]

    for number in numbers:
        os.ftruncate(trace, 0)
        os.ftruncate(errors, 0)
        tell({"mutates": number})
        mutation = world.prepare(entry, number, corpus)
        tell({"reads": number, "mutation": mutation})
        verdict = judge(entry, number, world, watch, mutation)
        tell(vars(verdict))
        if verdict.kind == "escape":
            # A new child sets up new canaries.
            return


# --- In the parent


@dataclass
class _Child:
    process: int
    pipe: int
    entry: Entry
    left: list[int]
    world: World
    deadline: float
    now: int | None = None
    reads: bool = False
    killed: bool = False
    mutation: str = ""
    buffer: bytes = b""


@dataclass
class Fuzzer:
    """Maker of inputs and reader of mutated ones, in forked children: this process must have no threads."""

    entries: Sequence[Entry]
    folder: Path
    jobs: int = 2
    limits: Limits = field(default_factory=Limits)

    def make_corpus(self, numbers: Sequence[int] = (0, 1)) -> list[Verdict]:
        """Make valid inputs of each entry and read the first; return the outcomes.

        Raises:
            RuntimeError: An entry's input cannot be made.
        """
        world, told = World(self.folder / "world-make"), self.folder / "made.json"
        known = set(sys.modules)

        def make() -> None:
            settle(world)
            for entry in self.entries:
                for number in numbers:
                    shutil.rmtree(world.case)
                    world.case.mkdir()
                    os.chdir(world.case)
                    entry.make(number)
                    mutated_files(entry, world.case)
                    for lock in world.case.rglob(".lock"):
                        lock.unlink()
                    shutil.copytree(world.case, self.corpus / entry.name / str(number), symlinks=True)
            watch = Watch(world)
            verdicts = []
            for entry in self.entries:
                world.place(self.corpus / entry.name / "0")
                verdicts.append(vars(judge(entry, -1, world, watch)))
            modules = [name for name in sys.modules if name not in known]
            told.write_text(json.dumps({"verdicts": verdicts, "modules": modules}))

        if os.waitstatus_to_exitcode(os.waitpid(fork(make), 0)[1]) != 0:
            raise RuntimeError("an input cannot be made or ends its reader, see above")
        made = json.loads(told.read_text())
        # Imported here once, not in each child.
        for name in made["modules"]:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        return [Verdict(**verdict) for verdict in made["verdicts"]]

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    def run(self, cases: Sequence[tuple[Entry, Sequence[int]]], batch: int = 50) -> Iterator[Verdict]:
        """Yield the verdicts on cases, given by their numbers for each entry, in order of completion."""
        waiting = [
            (entry, list(numbers[first : first + batch]))
            for entry, numbers in cases
            for first in range(0, len(numbers), batch)
        ]
        waiting.reverse()
        children: dict[int, _Child] = {}
        slots = list(range(self.jobs))
        with selectors.DefaultSelector() as selector:
            try:
                while waiting or children:
                    while waiting and slots:
                        slot = slots.pop()
                        child = self._begin(slot, *waiting.pop())
                        children[slot] = child
                        selector.register(child.pipe, selectors.EVENT_READ, slot)
                    nearest = min(child.deadline for child in children.values())
                    for key, _ in selector.select(max(0.0, nearest - time.monotonic())):
                        slot = key.data
                        child = children[slot]
                        received = os.read(child.pipe, 1 << 16)
                        yield from self._hear(child, received)
                        if not received:
                            selector.unregister(child.pipe)
                            yield from self._end(child)
                            if child.left:
                                waiting.append((child.entry, child.left))
                            del children[slot]
                            slots.append(slot)
                    for child in children.values():
                        if time.monotonic() > child.deadline:
                            self._kill(child)
            finally:
                for child in children.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child.process, signal.SIGKILL)
                    os.waitpid(child.process, 0)
                    os.close(child.pipe)

    def _begin(self, slot: int, entry: Entry, numbers: list[int]) -> _Child:
        world = World(self.folder / f"world-{slot}")
        receives, sends = os.pipe()

        def work() -> None:
            os.close(receives)
            _read_cases(entry, numbers, world, self.corpus, sends, self.limits)

        process = fork(work)
        os.close(sends)
        return _Child(process, receives, entry, list(numbers), world, self._later())

    def _kill(self, child: _Child) -> None:
        """Kill a child, which prints its stack first."""
        os.kill(child.process, signal.SIGUSR1)
        time.sleep(0.2)
        os.kill(child.process, signal.SIGKILL)
        child.killed, child.deadline = True, self._later()

    def _later(self) -> float:
        return time.monotonic() + self.limits.seconds

    def _hear(self, child: _Child, received: bytes) -> Iterator[Verdict]:
        *lines, child.buffer = (child.buffer + received).split(b"\n")
        for line in lines:
            about = json.loads(line)
            child.deadline = self._later()
            if "mutates" in about:
                child.now, child.reads, child.mutation = about["mutates"], False, ""
            elif "reads" in about:
                child.reads, child.mutation = True, about["mutation"]
            else:
                child.left.remove(child.now or 0)
                child.now = None
                yield Verdict(**about)

    def _end(self, child: _Child) -> Iterator[Verdict]:
        os.close(child.pipe)
        code = os.waitstatus_to_exitcode(os.waitpid(child.process, 0)[1])
        if child.now is None:
            if child.left and code != 0:
                raise RuntimeError(
                    f"a child of {child.entry.name} ended with {code}:\n{self._said(child, 'stderr')}"
                )
            return
        child.left.remove(child.now)
        trace, said = self._said(child, "trace"), self._said(child, "stderr")
        what = signal.Signals(-code).name if code < 0 else f"exit {code}"
        kind = "hang" if child.killed else "crash"
        if kind == "crash" and re.search(r"bad_alloc|Cannot allocate memory", said):
            kind = "memory"
        if not child.reads:
            kind = "mutation"
        changed = [f"changed {name}" for name in child.world.changes()]
        if changed:
            kind, what = "escape", "changed"
        frames = re.findall(rf'File "{re.escape(PACKAGE)}/([^"]+)", line \d+ in (\S+)', trace)
        where = ":".join(frames[0]) if frames else ""
        details = "\n".join([*changed, trace[:3000], said[-1000:]])
        yield Verdict(
            child.entry.name, child.now, kind, what, where, details, child.mutation, self.limits.seconds
        )

    @staticmethod
    def _said(child: _Child, name: str) -> str:
        path = child.world.root / name
        return path.read_text(errors="replace")[:20_000] if path.exists() else ""

    def keep(self, verdict: Verdict, target: Path) -> None:
        """Copy the mutated files of a case and its outcome to `target`."""
        entry = next(entry for entry in self.entries if entry.name == verdict.entry)
        world = World(self.folder / "world-keep")
        sound = self.corpus / entry.name / "0"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)

        def copy() -> None:
            settle(world)
            world.prepare(entry, verdict.number, self.corpus)
            for path in world.case.rglob("*"):
                name = path.relative_to(world.case)
                about = path.lstat()
                same = (sound / name).exists() and not path.is_symlink() and path.is_file()
                if path.is_dir() and not path.is_symlink() and (sound / name).is_dir():
                    continue
                if same and path.read_bytes() == (sound / name).read_bytes():
                    continue
                if stat.S_ISREG(about.st_mode) or stat.S_ISLNK(about.st_mode):
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, target / name, follow_symlinks=False)

        os.waitpid(fork(copy), 0)
        told = (
            f"entry: {verdict.entry}\ncase: {verdict.number}\nmutation: {verdict.mutation}\n"
            f"{verdict.kind}: {verdict.what} in {verdict.where}\n\n{verdict.details}\n"
        )
        (target / VERDICT).write_text(told.encode("utf-8", "replace").decode())

    def replay(self, entry: Entry, files: Path) -> Verdict:
        """Return the verdict on an entry's valid input with its files replaced by those of a folder."""
        (verdict,) = self._replay(entry, files)
        return verdict

    def _replay(self, entry: Entry, files: Path) -> Iterator[Verdict]:
        world = World(self.folder / "world-replay")
        receives, sends = os.pipe()

        def work() -> None:
            os.close(receives)
            settle(world, self.limits)
            world.place(self.corpus / entry.name / "0")
            told = shutil.ignore_patterns(VERDICT)
            shutil.copytree(files, world.case, dirs_exist_ok=True, symlinks=True, ignore=told)
            os.write(sends, json.dumps({"reads": 0, "mutation": str(files)}).encode() + b"\n")
            os.write(sends, json.dumps(vars(judge(entry, 0, world, Watch(world)))).encode() + b"\n")

        child = _Child(fork(work), receives, entry, [0], world, self._later(), now=0)
        os.close(sends)
        with selectors.DefaultSelector() as selector:
            selector.register(receives, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, child.deadline - time.monotonic())):
                    self._kill(child)
                    continue
                received = os.read(receives, 1 << 16)
                yield from self._hear(child, received)
                if not received:
                    yield from self._end(child)
                    return
