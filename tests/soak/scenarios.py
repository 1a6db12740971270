"""Command lines that take seconds, and the arguments to continue each after it was stopped."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOPO_FAST = [sys.executable, "-m", "mopo_fast"]
ONLINE = [sys.executable, str(Path(__file__).with_name("collect_online.py"))]

# The path that a command writes to, relative to its working directory.
DISK = "disk"

_FIT = (
    *("--dynamics.members", "3", "--dynamics.elites", "2", "--dynamics.hidden", "16", "16"),
    *("--dynamics.weight-decay", "1e-5", "1e-5", "1e-5", "--dynamics.max-epochs", "40"),
    *("--dynamics.batch-size", "64", "--threads", "1"),
)
_SAC = (
    *("--steps", "45", "--horizon", "5", "--rollout.batch-size", "60", "--rollout.interval", "10"),
    *("--rollout.retain-epochs", "1", "--sac.hidden", "16", "16", "--sac.batch-size", "32"),
    *("--evaluation.episodes", "2", "--evaluation.interval", "2"),
)
# Networks of full size, on which rollouts spend their time, fitted in few steps.
_WIDE = (
    *("--dynamics.max-epochs", "1", "--steps", "20", "--horizon", "5", "--rollout.batch-size", "60"),
    *("--rollout.interval", "10", "--sac.hidden", "16", "16", "--threads", "1"),
    *("--evaluation.episodes", "1"),
)


@dataclass(frozen=True)
class Scenario:
    """A command.

    Attributes:
        arguments: command-line arguments; {inputs} is the folder of its inputs.
        resume: arguments added when the command is run again.
        old: an existing file that the command replaces.
        exclusive: True if its folder takes one process at a time.
        rare: True for a slow command, which is drawn seldom.
        quiet: True to run always with --quiet.
    """

    name: str
    arguments: tuple[str, ...]
    program: tuple[str, ...] = tuple(MOPO_FAST)
    resume: tuple[str, ...] = ()
    old: str | None = None
    exclusive: bool = True
    rare: bool = False
    quiet: bool = False

    def argv(self, inputs: Path, *, again: bool = False, quiet: bool = False) -> list[str]:
        words = [word.replace("{inputs}", str(inputs)) for word in (*self.program, *self.arguments)]
        return words + list(self.resume if again else ()) + ["--quiet"] * (quiet or self.quiet)


_DATA = "{inputs}/hopper-random-local.hdf5"
_ROLLOUT = ("rollout", "{inputs}/run", "--dataset", _DATA, "--threads", "1")
_SHARDS = ("--count", "24000", "--shard-rows", "3000")

SCENARIOS = [
    Scenario(
        "collect",
        (
            *("collect", "hopper-random", "--steps", "3000", "--threads", "1"),
            *("--out", f"{DISK}/hopper.hdf5", "--overwrite"),
        ),
        old="hopper.hdf5",
        exclusive=False,
    ),
    Scenario(
        "collect-online",
        (
            *("collect", "hopper-medium-expert", "--steps", "1000", "--threads", "1"),
            *("--out", f"{DISK}/hopper.hdf5", "--overwrite"),
        ),
        program=tuple(ONLINE),
        old="hopper.hdf5",
    ),
    Scenario("fit", ("fit", _DATA, "--out", f"{DISK}/fit", *_FIT, "--overwrite")),
    Scenario("train", ("train", _DATA, "--out", f"{DISK}/run", *_FIT, *_SAC), resume=("--resume",)),
    Scenario(
        "train-seeds",
        ("train", _DATA, "--out", f"{DISK}/runs", "--seeds", "0:2", *_FIT, *_SAC),
        resume=("--resume",),
    ),
    Scenario(
        "rollout-file",
        (*_ROLLOUT, "--count", "40000", "--out", f"{DISK}/rollouts.hdf5", "--overwrite"),
        old="rollouts.hdf5",
        exclusive=False,
    ),
    Scenario("rollout-gzip", (*_ROLLOUT, *_SHARDS, "--out", f"{DISK}/shards", "--compression", "gzip")),
    Scenario("rollout-parquet", (*_ROLLOUT, *_SHARDS, "--out", f"{DISK}/shards", "--format", "parquet")),
    Scenario(
        "sweep",
        ("sweep", _DATA, "--out", f"{DISK}/sweep", "--seeds", "0:2", *_FIT, *_SAC),
        rare=True,
        quiet=True,
    ),
]


def input_commands(inputs: Path) -> list[list[str]]:
    """Return the commands that make the scenarios' inputs."""
    data = str(inputs / "hopper-random-local.hdf5")
    return [
        [*MOPO_FAST, "collect", "hopper-random", "--steps", "600", "--threads", "1", "--out", data],
        [*MOPO_FAST, "train", data, "--out", str(inputs / "run"), *_WIDE],
    ]


def environment(temporary: Path) -> dict[str, str]:
    """Return a user's environment with this checkout first in the path and one thread for each library."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": "1",
        "MOPO_FAST_DATA_DIR": f"{DISK}/data",
        "TMPDIR": str(temporary),
        "TERM": "xterm",
        "COLUMNS": "110",
    }
