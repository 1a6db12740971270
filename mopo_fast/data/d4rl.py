"""D4RL's Gym-MuJoCo data sets: names, files and download (d4rl/infos.py, d4rl/offline_env.py).

D4RL serves its files by plain HTTP and publishes no checksums. The first download of a file therefore records
its SHA-256 beside it, in NAME.hdf5.sha256, and every later download must match it. Files in the cache are not
checked again; `sha256sum -c NAME.hdf5.sha256` in the cache's folder does so.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import importlib
import logging
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import atomic_path, sync_folder
from mopo_fast.utils.progress import Bar, progress_bar

# The command line looks up names before it imports torch, which takes seconds.
if TYPE_CHECKING:
    from mopo_fast.data.transitions import Transitions

logger = logging.getLogger("mopo_fast")

BASE_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
TASKS = ("halfcheetah", "hopper", "walker2d", "ant")
TIERS = ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")
BLOCK = 1 << 20
TIMEOUT_S = 30.0


def _locations() -> dict[str, str]:
    """Return each data set's path under `BASE_URL`, by name."""
    locations = {}
    for task in TASKS:
        for tier in TIERS:
            stem = f"{task}_{tier.replace('-', '_')}"
            if tier != "full-replay":
                locations[f"{task}-{tier}-v0"] = f"gym_mujoco/{stem}.hdf5"
            for version in ("v1", "v2"):
                locations[f"{task}-{tier}-{version}"] = f"gym_mujoco_{version}/{stem}-{version}.hdf5"
        # v0 calls the replay data "mixed". Only that file's name has "walker" for walker2d.
        mixed = f"gym_mujoco/{task.removesuffix('2d')}_mixed.hdf5"
        locations[f"{task}-medium-replay-v0"] = locations[f"{task}-mixed-v0"] = mixed
    locations["ant-random-expert-v0"] = "gym_mujoco/ant_random_expert.hdf5"
    return locations


LOCATIONS = _locations()

COMPLETE_ROWS = {
    "halfcheetah-medium-v2": 1_000_000,
    "halfcheetah-medium-replay-v2": 202_000,
    "halfcheetah-expert-v2": 1_000_000,
    "hopper-medium-v2": 999_906,
    "hopper-medium-replay-v2": 402_000,
    "hopper-expert-v2": 999_494,
    "walker2d-medium-v2": 999_995,
    "walker2d-medium-replay-v2": 302_000,
    "walker2d-expert-v2": 999_214,
}
"""Number of rows up to the last one that is terminal or a time-out, in the files whose number is published.

It is what Decision Transformer's gym/data/download_d4rl_datasets.py prints for D4RL's own files.
"""


def url(name: str) -> str:
    """Return the address of the data set `name`, one of `LOCATIONS`."""
    return BASE_URL + LOCATIONS[name]


def cache_path(name: str) -> Path:
    """Return the path at which D4RL's own package keeps the data set.

    The folder is `$D4RL_DATASET_DIR`, or `~/.d4rl/datasets` without it.
    """
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    return folder / Path(LOCATIONS[name]).name


def check_rows(path: Path, name: str | None, complete_rows: int) -> None:
    """Warn where a file under the name of one of D4RL's has another number of rows than that.

    Args:
        path: the file. Without `name`, its own name may be that of one of D4RL's files.
        name: name of the data set, or None where it was given as a path.
        complete_rows: number of rows up to the last one that is terminal or a time-out.
    """
    names = {Path(LOCATIONS[known]).name: known for known in COMPLETE_ROWS}
    name = names.get(path.name) if name is None else name
    expected = COMPLETE_ROWS.get(name or "", complete_rows)
    if complete_rows != expected:
        logger.warning(
            "%s has %s rows in complete episodes, D4RL's %s has %s; it is damaged or another data set, so get"
            " D4RL's file again, or give this one a name of its own",
            path,
            f"{complete_rows:,}",
            name,
            f"{expected:,}",
        )


def without_contact_forces(data: "Transitions") -> "Transitions":
    """Drop the last 84 observation dimensions of D4RL's ant sets if they are 0 throughout.

    They are contact forces, which MuJoCo 2 left at 0. The remaining 27 are the ones that Ant-v4 observes. Any
    other data are returned as they are.
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
    """Import the `d4rl` package for its loader and its scores.

    By itself the import needs the old MuJoCo 2.1. This function leaves out the package's MuJoCo environments
    and suppresses its warnings about them, unless `mujoco_py` has been imported.

    Raises:
        InputError: the package is not installed, or cannot be imported.
    """
    os.environ.setdefault("D4RL_SUPPRESS_IMPORT_ERROR", "1")
    sys.modules.setdefault("mujoco_py", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module("d4rl")
    except ImportError as error:
        raise InputError(
            f"the d4rl package cannot be imported ({error}); install it with `pip install d4rl==1.1`"
        ) from error


class HostError(InputError):
    """Raised when the host cannot be reached, or did not send the file."""


def fetch(name: str, *, quiet: bool = False) -> Path:
    """Return the path of a data set's file, and download it to the cache unless it is there.

    Raises:
        HostError: the download failed. The message names other ways to get data.
        InputError: the cache cannot be written.
    """
    path = cache_path(name)
    if not path.exists():
        try:
            download(url(name), path, quiet=quiet)
        except HostError as error:
            raise HostError(
                f"{error}; or save a copy of {url(name)} as {path}; or make your own data set with"
                " `mopo-fast collect`"
            ) from error
    return path


def download(source: str, path: Path, *, quiet: bool = False) -> None:
    """Download an HDF5 file.

    An interrupted download stays in `<path>.part`, and the next call continues it. If several processes ask
    for the same file, one downloads and the others wait. The SHA-256 must match the one in `<path>.sha256`,
    which the first download writes.

    Args:
        source: address of the file.
        path: path to save it at.
        quiet: show no progress bar.

    Raises:
        HostError: there is no connection, the answer is not the file, or the file has changed.
        InputError: the folder cannot be written.
    """
    from mopo_fast.data.hdf5 import open_hdf5

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
            with open_hdf5(part_path, locked=True):
                pass
        except InputError as error:
            _empty(part)
            raise HostError(f"{source} did not send a sound file ({error}); try again later") from error
        _check_sum(source, part, path)
        with _writing(path):
            os.fsync(part.fileno())
            os.replace(part_path, path)
            sync_folder(path.parent)


def _check_sum(source: str, part: IO[bytes], path: Path) -> None:
    """Compare the SHA-256 of a download with that of the first one, or record it as the first."""
    from mopo_fast.data.stored import reading

    part.seek(0)
    found = hashlib.file_digest(part, "sha256").hexdigest()  # type: ignore[arg-type]
    record = path.with_name(path.name + ".sha256")
    if not record.exists():
        # `sha256sum -c` reads this format.
        with atomic_path(record) as temporary:
            temporary.write_text(f"{found}  {path.name}\n")
        return
    with reading(record, "SHA-256"):
        known = record.read_text().split()[0]
    if found != known:
        _empty(part)
        raise HostError(
            f"{source} sent a file with SHA-256 {found}, but the first download had {known}; if the change is"
            f" known to be right, remove {record}"
        )


def _transfer(source: str, part: IO[bytes], bar: Bar) -> bool:
    """Append the missing bytes to `part`.

    Returns:
        True where the file is complete; False where the connection broke after some bytes.
    """
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
            raise HostError(f"{source} answered {error.code} {error.reason}; try again later") from error
        # The server has no further bytes: `part` is complete, or belongs to another file.
        if int(size[1]) != before:
            _empty(part)
        return int(size[1]) == before
    except (OSError, http.client.HTTPException) as error:
        detail = getattr(error, "reason", None) or error or type(error).__name__
        reason = f"cannot be reached ({detail})" if part.tell() == before else f"broke off ({detail})"
    if part.tell() <= before:
        raise HostError(f"{source} {reason}; try again later to continue the download")
    return False


def _whole_size(reply: http.client.HTTPResponse, part: IO[bytes]) -> int | None:
    """Return the file's size in bytes, or None where the server does not tell it.

    An answer that starts from the beginning of the file empties `part`.
    """
    if reply.status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range", ""))
        if span is None or int(span[1]) != part.tell():
            raise HostError(f"{reply.url} sent another part of the file than requested; try again later")
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
