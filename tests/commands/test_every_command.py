"""Test every command as users run it: without --quiet, in a terminal and in a pipe, to its end."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT
from small_hub import TOKEN, Hub, serving

from mopo_fast.cli import COMMANDS

NETS = ["--dynamics.hidden", "8", "--dynamics.weight-decay", "1e-5", "1e-5", "--dynamics.max-epochs", "2"]
RUN = [
    *NETS,
    *("--sac.hidden", "8", "--steps", "4", "--rollout.interval", "2", "--rollout.batch-size", "20"),
    *("--horizon", "2", "--evaluation.episodes", "1", "--threads", "1"),
]
DATA = "hopper-random.hdf5"
ROLLOUT = ["rollout", "run", "--dataset", DATA, "--count", "50"]
# Command lines, and a text that standard output must have at the end. Later ones use the files of earlier
# ones.
LINES: dict[str, tuple[list[str], str]] = {
    "collect": (["collect", "hopper-random", "--steps", "1e3", "--out", DATA], DATA),
    "collect for relabel": (
        ["collect", "halfcheetah-random", "--steps", "200", "--out", "cheetah.hdf5"],
        "cheetah.hdf5",
    ),
    "relabel": (
        ["relabel", "cheetah.hdf5", "--task", "halfcheetah-jump", "--out", "jump.hdf5"],
        "jump.hdf5",
    ),
    "info": (["info", DATA], "episodes"),
    "convert": (["convert", DATA, "data.npz"], "data.npz: 1000 rows"),
    "fit": (["fit", DATA, "--out", "fit", "--task", "hopper", "--threads", "1", *NETS], "fit: 2 epochs"),
    "train": (["train", DATA, "--out", "run", *RUN], "normalised score"),
    "train seeds": (
        ["train", DATA, "--out", "runs", "--seeds", "0:2", "--dynamics-from", "fit", *RUN],
        "runs/comparison.html",
    ),
    "train again": (["train", DATA, "--out", "run", "--resume", *RUN], "normalised score"),
    "evaluate": (["evaluate", "run", "--episodes", "1"], "normalised score"),
    "select": (
        ["select", "run", "runs", "--starts", "5", "--horizon", "3", "--fqe-updates", "20", "--threads", "1"],
        "Fitted Q evaluation",
    ),
    "report": (["report", "run"], "report.html"),
    "report of runs": (["report", "run", "runs", "--out", "compared"], "compared/comparison.html"),
    "report of a fit": (["report", "fit"], "report.html"),
    "export": (["export", "run", "--to", "torch", "--out", "exported"], "exported/dynamics.pt2: largest"),
    "push": (["push", "run", "--repo", "user/hopper"], "user/hopper/commit/"),
    "pull": (["pull", "user/hopper", "--out", "pulled"], "pulled\n"),
    "evaluate the pulled": (["evaluate", "pulled", "--episodes", "1"], "normalised score"),
    "convert models": (["convert", "run", "models", "--from", "mopo-fast"], "dynamics and policy"),
    "rollout to a file": ([*ROLLOUT, "--out", "rollouts.npz"], "50 transitions"),
    "rollout to shards": ([*ROLLOUT, "--out", "shards", "--shard-rows", "30"], "2 shards"),
    "rollout to one shard": ([*ROLLOUT, "--out", "shard"], "shard: 1 shard\n"),
    "rollout --verify": (["rollout", "--verify", "shards"], "all sound"),
    "bench": (["bench", "fit", "--fit-steps", "1", "--rounds", "1", "--threads", "1"], "reference"),
    "doctor": (["doctor"], "backend reference"),
    "sweep": (
        ["sweep", DATA, "--out", "sweep", "--seeds", "0:1", "--dynamics-from", "fit", *RUN],
        "sweep/comparison.html",
    ),
}
# Commands without anything to show while they run.
SILENT = ("relabel", "info", "convert", "evaluate", "report", "export", "push", "pull", "doctor")
# Runs all command lines in one process, because the imports take longer than the commands.
DRIVER = """
import json, sys
from mopo_fast.bench import measure
from mopo_fast.cli import main
measure._COPY_BYTES = 2**16
codes = {}
for name, line in json.loads(sys.argv[1]).items():
    for stream in (sys.stdout, sys.stderr):
        print(f"@{name}@", file=stream, flush=True)
    try:
        codes[name] = main(line)
    except BaseException as error:
        codes[name] = repr(error)
    sys.stdout.flush()
with open("codes.json", "w") as file:
    json.dump(codes, file)
"""


def split(text: str) -> dict[str, str]:
    """Return what each command line has printed."""
    parts = re.split(r"@([^@\n]+)@\n", text.replace("\r\n", "\n"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """Serve a stand-in of the Hugging Face Hub."""
    with serving() as server:
        yield server


@pytest.fixture(scope="module", params=["terminal", "pipe"])
def printed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, hub: Hub
) -> tuple[str, dict[str, object], dict[str, str], dict[str, str]]:
    """Return the kind of the output, the exit codes, and the texts on standard output and error."""
    pytest.importorskip("ray")
    pytest.importorskip("huggingface_hub")
    folder = tmp_path_factory.mktemp(request.param)
    code, lines = DRIVER, json.dumps({name: line for name, (line, _) in LINES.items()})
    command = [sys.executable, "-c", code, lines]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "TERM": "xterm-256color"}
    variables |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    variables |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "hf")}
    # The server of xet speaks a protocol of its own.
    variables |= {"HF_HUB_DISABLE_XET": "1"}
    if request.param == "pipe":
        result = subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, text=True, check=True, timeout=280
        )
        out, err = result.stdout, result.stderr
    else:
        # Standard output and error have a terminal each, so that the test can tell them apart.
        texts: list[bytearray] = [bytearray(), bytearray()]
        ends = [pty.openpty() for _ in texts]
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=ends[0][1], stderr=ends[1][1])

        def read(number: int) -> None:
            try:
                while block := os.read(ends[number][0], 65536):
                    texts[number].extend(block)
            except OSError:
                pass  # Linux reports the end of a terminal so.

        readers = [threading.Thread(target=read, args=(number,)) for number in range(2)]
        for _, terminal in ends:
            os.close(terminal)
        for reader in readers:
            reader.start()
        assert process.wait(timeout=280) == 0
        for reader in readers:
            reader.join()
        for master, _ in ends:
            os.close(master)
        out, err = (bytes(text).decode() for text in texts)
    codes = json.loads((Path(folder) / "codes.json").read_text())
    return request.param, codes, split(out), split(err)


def test_every_command_is_tried() -> None:
    assert {line[0] for line, _ in LINES.values()} == set(COMMANDS)
    assert not any("--quiet" in line for line, _ in LINES.values())


@pytest.mark.parametrize("name", LINES)
def test_a_command_runs_to_its_end(
    name: str, printed: tuple[str, dict[str, object], dict[str, str], dict[str, str]]
) -> None:
    kind, codes, out, err = printed
    line, words = LINES[name]
    assert codes[name] == 0, err[name]
    assert words in out[name], out[name]
    assert "Traceback" not in err[name] and "Error" not in err[name], err[name]
    # Ray's notice of a new cluster.
    assert "Token authentication is enabled" not in err[name], err[name]
    if kind == "pipe":
        assert "\x1b" not in out[name] + err[name]
    elif line[0] not in SILENT and name not in ("train again", "rollout to a file"):
        assert "\x1b" in err[name], "it shows no progress"
