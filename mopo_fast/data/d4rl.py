"""D4RL's Gym-MuJoCo data sets: names, files, download (d4rl/infos.py, d4rl/offline_env.py).

D4RL serves its files by plain HTTP, and publishes no checksums. So the first download of a file records its
SHA-256 beside it, in NAME.hdf5.sha256, and a later download of the same file must have the same. What is in
the cache is taken as it is; `sha256sum -c NAME.hdf5.sha256` in the cache's folder checks it.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import importlib
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mopo_fast.data.hdf5 import open_hdf5
from mopo_fast.data.stored import reading
from mopo_fast.data.transitions import Transitions
from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import atomic_path, sync_folder
from mopo_fast.utils.progress import Bar, progress_bar

BASE_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
TASKS = ("halfcheetah", "hopper", "walker2d", "ant")
TIERS = ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")
BLOCK = 1 << 20
TIMEOUT_S = 30.0


def _locations() -> dict[str, str]:
    """{name: location under `BASE_URL`}."""
    locations = {}
    for task in TASKS:
        for tier in TIERS:
            stem = f"{task}_{tier.replace('-', '_')}"
            if tier != "full-replay":
                locations[f"{task}-{tier}-v0"] = f"gym_mujoco/{stem}.hdf5"
            for version in ("v1", "v2"):
                locations[f"{task}-{tier}-{version}"] = f"gym_mujoco_{version}/{stem}-{version}.hdf5"
        # v0 calls the replay data "mixed", and in that file's name alone walker2d "walker".
        mixed = f"gym_mujoco/{task.removesuffix('2d')}_mixed.hdf5"
        locations[f"{task}-medium-replay-v0"] = locations[f"{task}-mixed-v0"] = mixed
    locations["ant-random-expert-v0"] = "gym_mujoco/ant_random_expert.hdf5"
    return locations


LOCATIONS = _locations()


def url(name: str) -> str:
    """Where D4RL serves the data set `name`, one of `LOCATIONS`."""
    return BASE_URL + LOCATIONS[name]


def cache_path(name: str) -> Path:
    """Where D4RL's own package keeps the data set: in `$D4RL_DATASET_DIR`, else `~/.d4rl/datasets`."""
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    return folder / Path(LOCATIONS[name]).name


def without_contact_forces(data: Transitions) -> Transitions:
    """D4RL's ant without its last 84 dimensions, where these are 0 throughout: the 27 that Ant-v4 observes.

    They stand for contact forces, which MuJoCo 2 left at 0. Any other data are returned as they are.
    """
    observed = 27
    if data.obs_dim != observed + 84 or data.next_observations[:, observed:].any():
        return data
    if data.observations[:, observed:].any():
        return data
    return dataclasses.replace(
        data,
        observations=data.observations[:, :observed].contiguous(),
        next_observations=data.next_observations[:, :observed].contiguous(),
    )


def import_d4rl() -> Any:
    """The `d4rl` package, for its loader and its scores: its import alone asks for the old MuJoCo 2.1.

    Its MuJoCo environments are left out, without its complaints, unless `mujoco_py` is imported already.

    Raises:
        InputError: the package is not installed, or cannot be imported.
    """
    os.environ.setdefault("D4RL_SUPPRESS_IMPORT_ERROR", "1")
    sys.modules.setdefault("mujoco_py", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module("d4rl")
    except ImportError as error:
        raise InputError(
            f"the d4rl package cannot be imported ({error}); install it by `pip install 'mopo_fast[d4rl]'`"
        ) from error


class HostError(InputError):
    """The host cannot be reached, or what it sent is not the file."""


def fetch(name: str, *, quiet: bool = False) -> Path:
    """The data set's file, downloaded to the cache unless it is there.

    Raises:
        HostError: no download; the message says how to go on without.
        InputError: the cache cannot be written.
    """
    path = cache_path(name)
    if not path.exists():
        try:
            download(url(name), path, quiet=quiet)
        except HostError as error:
            raise HostError(
                f"{error}; or fetch {url(name)} by other means and put it at {path};"
                " or make a data set of your own with `mopo-fast collect`"
            ) from error
    return path


def download(source: str, path: Path, *, quiet: bool = False) -> None:
    """Download an HDF5 file; what has come stays in `<path>.part`, and the next call goes on from there.

    Several processes may ask for the same file: one downloads, the others wait for it. Its SHA-256 must be
    the one in `<path>.sha256`, which is written where there is none.

    Raises:
        HostError: no connection, an answer that is not the file, or another file than before.
        InputError: the folder cannot be written.
    """
    part_path = path.with_name(path.name + ".part")
    with _writing(part_path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = open(part_path, "ab+")  # noqa: SIM115 - closed by the next line
    with part:
        fcntl.flock(part, fcntl.LOCK_EX)
        if path.exists():
            return
        with progress_bar(f"download {path.name}", None, quiet=quiet) as bar:
            while not _transfer(source, part, bar):
                pass
        try:
            with open_hdf5(part_path):
                pass
        except InputError as error:
            _empty(part)
            raise HostError(f"what {source} sent is refused: {error}") from error
        _check_sum(source, part, path)
        with _writing(path):
            os.fsync(part.fileno())
            os.replace(part_path, path)
            sync_folder(path.parent)


def _check_sum(source: str, part: IO[bytes], path: Path) -> None:
    """Compare what was downloaded with the first download of `path`, or record it as the first."""
    part.seek(0)
    found = hashlib.file_digest(part, "sha256").hexdigest()  # type: ignore[arg-type]
    record = path.with_name(path.name + ".sha256")
    if not record.exists():
        # The format of `sha256sum -c`.
        with atomic_path(record) as temporary:
            temporary.write_text(f"{found}  {path.name}\n")
        return
    with reading(record, "SHA-256"):
        known = record.read_text().split()[0]
    if found != known:
        _empty(part)
        raise HostError(
            f"{source} sent another file than at the first download: SHA-256 {found}, {record} has {known};"
            " remove that record if the change is known to be right"
        )


def _transfer(source: str, part: IO[bytes], bar: Bar) -> bool:
    """Append what is missing to `part`. True: it is whole; False: the connection broke, but some came."""
    before = part.seek(0, os.SEEK_END)
    request = urllib.request.Request(source, headers={"User-Agent": "mopo-fast"})
    if before:
        request.add_header("Range", f"bytes={before}-")
    total: int | None = None
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            total = _whole_size(reply, part)
            bar.update(completed=part.tell(), total=total)
            while block := reply.read(BLOCK):
                with _writing(Path(part.name)):
                    part.write(block)
                    part.flush()
                bar.advance(len(block))
        if total is None or part.tell() == total:
            return True
        reason = f"sent {part.tell()} of {total} bytes"
    except InputError:
        raise
    except urllib.error.HTTPError as error:
        size = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if error.code != 416 or size is None:
            raise HostError(f"{source} answered {error.code} {error.reason}") from error
        # Nothing lies beyond what is here: it is all of the file, or part of another one.
        if int(size[1]) != before:
            _empty(part)
        return int(size[1]) == before
    except (OSError, http.client.HTTPException) as error:
        detail = getattr(error, "reason", None) or error or type(error).__name__
        reason = f"cannot be reached ({detail})" if part.tell() == before else f"broke off ({detail})"
    if part.tell() <= before:
        raise HostError(f"{source} {reason}; try again later, the download goes on where it stopped")
    return False


def _whole_size(reply: http.client.HTTPResponse, part: IO[bytes]) -> int | None:
    """The file's size, where the server tells; empties `part` where the answer starts from the beginning."""
    if reply.status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range", ""))
        if span is None or int(span[1]) != part.tell():
            raise HostError(f"{reply.url} sent another part of the file than was asked for")
        return int(span[2])
    _empty(part)
    length = reply.headers.get("Content-Length")
    return int(length) if length else None


def _empty(part: IO[bytes]) -> None:
    with _writing(Path(part.name)):
        part.truncate(0)
        part.seek(0)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; free space or choose another folder"
        ) from error
