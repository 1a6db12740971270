import errno
import gc
import importlib.abc
import io
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from held_folders import held_elsewhere
from rich.console import Console

import mopo_fast as mopo_fast_package
from mopo_fast import Actor, EnsembleDynamics, load_dataset
from mopo_fast import __main__ as entry
from mopo_fast.cli import COMMANDS, _outcome, _whole_number, main
from mopo_fast.config import RunConfig, TrainConfig, to_dict
from mopo_fast.errors import InputError
from mopo_fast.tasks import TASKS
from mopo_fast.utils import progress
from mopo_fast.utils.atomic import write_json

TINY_FIT = [
    *("--dynamics.hidden", "16", "16", "--dynamics.weight-decay", "1e-5", "1e-5", "1e-5"),
    *("--dynamics.max-epochs", "2"),
]
TINY = [
    *TINY_FIT,
    *("--sac.hidden", "16", "16"),
    *("--rollout.batch-size", "50", "--rollout.interval", "10", "--evaluation.episodes", "2"),
]


def mopo_fast(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the installed command, as a user does."""
    command = [sys.executable, "-m", "mopo_fast", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "hopper-random.hdf5"
    assert main(["collect", "hopper-random", "--steps", "2000", "--out", str(path), "--quiet"]) == 0
    return path


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["train", str(dataset), "--steps", "20", "--horizon", "2", "--penalty-coef", "0.25"]
    assert main([*arguments, "--out", str(path), "--quiet", *TINY]) == 0
    return path


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line that a user's mistake prints."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in err and not out
    return last


def test_help_names_every_command() -> None:
    text = mopo_fast("--help").stdout
    assert all(f"• {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: mopo-fast {command}" in capsys.readouterr().out


def test_flags_of_train_are_short_and_the_rest_is_reachable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for flag in ("task", "seed", "steps", "out", "device", "backend", "horizon", "penalty-coef", "penalty"):
        assert f" --{flag} " in text, flag
    for flag in ("dynamics-from", "resume", "quiet", "sac.alpha-max", "rollout.retain-epochs"):
        assert f" --{flag} " in text, flag


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mopo_fast {mopo_fast_package.__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"]])
def test_a_closed_pipe_is_quiet(words: list[str]) -> None:
    receives, sends = os.pipe()
    os.close(receives)
    command = [sys.executable, "-m", "mopo_fast", *words]
    result = subprocess.run(command, stdout=sends, stderr=subprocess.PIPE, text=True, check=False)
    os.close(sends)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-"])
def test_a_closed_stream_is_the_null_device(closed: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m mopo_fast --version {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_behind_standard_output_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mopo_fast", "--version"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "error: no space left for standard output; free some, or write it elsewhere\n"


@pytest.mark.parametrize("words", [["--resume=RUN"], ["--resume", "RUN"], ["RUN", "--resume"]])
def test_the_run_to_resume_gives_the_settings(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "config.json", to_dict(RunConfig("hopper-none.hdf5", task="hopper", steps=123)))
    calls: list[TrainConfig] = []
    monkeypatch.setattr("mopo_fast.cli._check_settings", calls.append)
    monkeypatch.setattr(
        "mopo_fast.train.train", lambda *_, **__: {"return_mean": 0.0, "return_std": 0.0, "score_mean": None}
    )
    assert main(["train", *(word.replace("RUN", str(tmp_path)) for word in words)]) == 0
    assert calls[0].steps == 123


def test_a_folder_of_runs_to_resume_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert f"{tmp_path / 'config.json'} does not exist" in capsys.readouterr().err
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / "config.json").touch()
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert f"give one of them, such as {tmp_path / 'seed0'}" in capsys.readouterr().err


def test_a_broken_pipe_elsewhere_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        """Lose a worker."""
        raise BrokenPipeError

    monkeypatch.setitem(COMMANDS, "doctor", broken)
    monkeypatch.setattr(sys, "argv", ["mopo-fast", "doctor"])
    with open(os.devnull, "w") as output, pytest.raises(BrokenPipeError):
        monkeypatch.setattr(sys, "stdout", output)
        entry.run()


@pytest.mark.parametrize(
    ("text", "number"), [("1e6", 10**6), ("1_000_000", 10**6), ("-3", -3), ("1.5e1", 15), ("2.0", 2)]
)
def test_whole_numbers(text: str, number: int) -> None:
    assert _whole_number(text) == number


@pytest.mark.parametrize("text", ["1.5", "1e-3", "nan", "inf", "1e999999999", "", "x"])
def test_other_numbers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no whole number, such as 1000 or 1e6"):
        _whole_number(text)


def test_a_sweep_takes_seeds_and_no_seed(capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("0", "3"):
        with pytest.raises(SystemExit) as stop:
            main(["sweep", "hopper-random-v2", "--seed", value])
        assert stop.value.code == 2
        assert "--seeds FIRST:END" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    assert "--seed " not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        *(
            ["train", "nothing.hdf5"],
            ["train", "hopper-mediun-v2"],
            ["train", "hopper-random-v2", "--steps", "0"],
        ),
        *(["sweep", "hopper-random-v2", "--task", "x"], ["evaluate", "nowhere"], ["report", "nowhere"]),
        *(["rollout", "nowhere", "--dataset", "a", "--out", "b"], ["rollout", "--verify", "nowhere"]),
        *(["convert", "a.hdf5", "b.npz"], ["convert", "a", "b", "--from", "unifloral"], ["collect", "foo"]),
        *(["fit", "nothing.hdf5", "--out", "a"], ["bench", "sac", "--starts", "3"]),
        ["relabel", "a.hdf5", "--task", "ant-angle", "--out", "b.hdf5"],
    ],
    ids=" ".join,
)
def test_plain_mistakes_do_not_wait_for_torch(words: list[str], tmp_path: Path) -> None:
    check = (
        "import sys; from mopo_fast.cli import main; code = main(sys.argv[1:]);"
        " sys.exit(code if 'torch' not in sys.modules else 'torch was imported')"
    )
    command = [sys.executable, "-c", check, *words]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: "), result.stderr


def test_a_run_goes_on_from_another_directory(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "hopper-random.hdf5").symlink_to(dataset)
    monkeypatch.chdir(tmp_path)
    arguments = ["--steps", "10", "--horizon", "1", "--quiet", "--resume", *TINY]
    capsys.readouterr()
    assert main(["train", "hopper-random.hdf5", "--out", "run", *arguments]) == 0
    assert "no run to resume in run; training from the beginning" in capsys.readouterr().err
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["dataset"]
    assert recorded == str(tmp_path / "hopper-random.hdf5")
    monkeypatch.chdir(tmp_path / "other")
    (tmp_path / "run" / "summary.json").unlink()
    assert main(["train", "../hopper-random.hdf5", "--out", "../run", *arguments]) == 0
    assert "no run to resume" not in capsys.readouterr().err
    (tmp_path / "run" / "summary.json").unlink()
    main(["collect", "hopper-random", "--steps", "900", "--out", "hopper-random.hdf5", "--quiet"])
    assert "data" in error_of(capsys, "train", "hopper-random.hdf5", "--out", "../run", *arguments)


def test_an_unknown_flag_is_told_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "hopper-random-local", "--horizn", "3"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "--horizon" in error and "mopo-fast train --help" in error
    # Other commands have this flag too.
    assert len(error.splitlines()) < 12 and "rollout --help" not in error


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert main([]) == 2
    assert capsys.readouterr().out == text


def test_the_module_of_the_commands_runs_them() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mopo_fast.cli", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"mopo_fast {mopo_fast_package.__version__}\n")


@pytest.mark.parametrize("words", [["--out", ""], ["--out="], ["--dynamics-from", "", "--quiet"]])
def test_an_empty_value_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert f"the value after {words[0].rstrip('=')} is empty" in error_of(capsys, "train", "x.hdf5", *words)


def test_collect_says_where(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(load_dataset(dataset)) == 2000
    other = dataset.with_name("other.hdf5")
    main(["collect", "hopper-random", "--steps", "10", "--out", str(other), "--quiet"])
    assert capsys.readouterr().out.strip() == str(other)
    message = error_of(capsys, "collect", "hopper-random", "--steps", "10", "--out", other)
    assert str(other) in message and "--overwrite" in message
    assert main(["collect", "hopper-random", "--steps", "12", "--out", str(other), "--overwrite"]) == 0
    assert len(load_dataset(other)) == 12


def test_a_run_holds_all_that_it_should(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {
        *("config.json", "progress.csv", "fit.json", "dynamics.safetensors", "dynamics.json"),
        *("policy.safetensors", "policy.json", "checkpoint", "summary.json", "report.html"),
    }
    summary = json.loads((run / "summary.json").read_text())
    assert summary["updates"] == 20 and summary["seed"] == 0
    config = json.loads((run / "config.json").read_text())
    assert config["rollout"]["horizon"] == 2 and config["rollout"]["penalty_coef"] == 0.25
    assert Actor.load(run).hidden == (16, 16)
    assert EnsembleDynamics.load(run).hidden == (16, 16)


def test_fit_then_train_on_that_fit(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = tmp_path / "fit"
    assert main(["fit", str(dataset), "--out", str(fit), "--task", "hopper", "--quiet", *TINY_FIT]) == 0
    assert "2 epochs" in capsys.readouterr().out
    recorded = json.loads((fit / "config.json").read_text())
    assert recorded["dataset"] == str(dataset) and recorded["task"] == "hopper"
    assert recorded["dynamics"]["max_epochs"] == 2 and recorded["seed"] == 0
    (fit / "dynamics.json").unlink()
    again = ["fit", str(dataset), "--out", str(fit), "--quiet", *TINY_FIT]
    message = error_of(capsys, *again)
    assert str(fit / "fit.json") in message and "--overwrite" in message
    assert not (fit / "dynamics.json").exists()
    with held_elsewhere(fit):
        message = error_of(capsys, "fit", dataset, "--out", fit, "--overwrite")
        assert f"another process is at work in {fit}" in message
    assert main([*again, "--overwrite"]) == 0
    out = tmp_path / "run"
    arguments = ["--steps", "10", "--horizon", "1", "--dynamics-from", str(fit), "--out", str(out), "--quiet"]
    assert main(["train", str(dataset), *arguments, *TINY]) == 0
    assert (out / "dynamics.safetensors").read_bytes() == (fit / "dynamics.safetensors").read_bytes()
    assert (out / "fit.json").read_text() == (fit / "fit.json").read_text()


def test_evaluate_prints_a_line_or_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(run), "--episodes", "3", "--seed", "5", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values["returns"]) == len(values["lengths"]) == 3
    assert values["return_mean"] == pytest.approx(np.mean(values["returns"]))
    assert main(["evaluate", str(run), "--episodes", "3", "--seed", "5"]) == 0
    assert f"return {values['return_mean']:.1f} " in capsys.readouterr().out
    assert main(["evaluate", str(run), "--episodes", "3", "--seed", "5", "--stochastic", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["returns"] != values["returns"]


def test_a_converted_policy_is_evaluated(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, ours = str(tmp_path / "other"), str(tmp_path / "ours")
    assert main(["convert", str(run), other, "--from", "mopo-fast", "--to", "offlinerl-kit"]) == 0
    assert main(["convert", other, ours, "--from", "offlinerl-kit"]) == 0
    (tmp_path / "task.py").write_text("from mopo_fast.tasks import TASKS\ntask = TASKS['hopper']\n")
    for task in ("hopper", str(tmp_path / "task.py")):
        capsys.readouterr()
        assert main(["evaluate", ours, "--task", task, "--episodes", "2"]) == 0
        assert capsys.readouterr().out.startswith("return ")


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("minari:walkbot/random-v0", "walkbot-random-v0"),
        ("minari:other/random-v0", "other-random-v0"),
        ("minari:pen-v0.1", "pen-v0.1"),
        ("hopper-medium-v2", "hopper-medium-v2"),
        ("sets/mine.hdf5", "mine"),
    ],
)
def test_runs_are_named_by_the_whole_data_set(
    dataset: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Path] = []

    def note(_: object, out: Path, **__: object) -> dict[str, object]:
        found.append(out)
        return {"return_mean": 0.0, "return_std": 0.0, "score_mean": None}

    monkeypatch.setattr("mopo_fast.cli._check_settings", lambda _: None)
    monkeypatch.setattr("mopo_fast.train.train", note)
    assert main(["train", dataset, "--task", "hopper"]) == 0
    assert found == [Path("runs", f"{name}-seed0")]


def test_report_is_written_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert "<html" in (run / "report.html").read_text()


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_rollouts_come_back_as_a_data_set(run: Path, dataset: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"rollouts{suffix}"
    arguments = ["--dataset", str(dataset), "--count", "100", "--horizon", "3", "--out", str(out)]
    assert main(["rollout", str(run), *arguments, "--backend", "reference"]) == 0
    file = h5py.File(out) if suffix == ".hdf5" else np.load(out)
    with file:
        arrays = {key: file[key][()] for key in file if key != "metadata"}
    data = load_dataset(out)
    assert len(data) == len(arrays["rewards"]) == 100
    assert torch.equal(data.next_observations, torch.from_numpy(arrays["next_observations"]))
    np.testing.assert_allclose(
        arrays["rewards"], arrays["raw_rewards"] - 0.25 * arrays["penalties"], rtol=1e-5, atol=1e-5
    )
    # Every rollout ends once: by a terminal, or by a time-out at its third step. The last one is cut.
    ends = arrays["terminals"] | arrays["timeouts"]
    assert not (arrays["terminals"] & arrays["timeouts"]).any()
    assert ends.sum() == len(np.unique(arrays["rollout_index"])) and ends[-1]
    assert np.array_equal(np.flatnonzero(arrays["step"] == 0)[1:], np.flatnonzero(ends)[:-1] + 1)
    assert (arrays["step"][:-1][arrays["timeouts"][:-1]] == 2).all()
    inside = TASKS["hopper"].box.contains(data.next_observations)
    assert np.array_equal(~inside.numpy(), arrays["terminals"])


def test_rollouts_start_in_the_runs_own_data(run: Path, dataset: Path, tmp_path: Path) -> None:
    settings = ["--count", "40", "--backend", "reference", "--quiet"]
    for name, given in ("own", []), ("named", ["--dataset", str(dataset)]):
        assert main(["rollout", str(run), *given, "--out", str(tmp_path / name), *settings]) == 0
    own, named = (load_dataset(tmp_path / name) for name in ("own", "named"))
    assert torch.equal(own.observations, named.observations)


@pytest.mark.parametrize("kept", ["checkpoint", "fit.json"])
def test_the_runs_own_data_must_be_as_they_were(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: str
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    if kept == "fit.json":
        shutil.rmtree(copy / "checkpoint")
    moved = tmp_path / "moved.hdf5"
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dataset": str(moved)}))
    command = ["rollout", copy, "--count", "4", "--out", tmp_path / "a.npz"]
    found = error_of(capsys, *command)
    assert f"the data set of the run in {copy} is not found" in found and "--dataset" in found
    shutil.copy(dataset, moved)
    with h5py.File(moved, "r+") as file:
        file["rewards"][3] += 1
    found = error_of(capsys, *command)
    assert "has changed since the run was trained; name one with --dataset" in found
    shutil.copy(dataset, moved)
    assert main(list(map(str, command))) == 0


def test_where_rollouts_go_is_asked_first(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output path is checked before the data set is read, which does not exist here."""
    nothing = ["rollout", run, "--dataset", "nothing.hdf5", "--out"]
    assert "must end in" in error_of(capsys, *nothing, tmp_path / "a.csv")
    assert "exists already" in error_of(capsys, *nothing, dataset)
    out = tmp_path / "a.npz"
    out.touch()
    arguments = ["rollout", str(run), "--dataset", str(dataset), "--count", "4", "--out", str(out)]
    assert main([*arguments, "--overwrite"]) == 0
    assert len(load_dataset(out)) > 0


def test_doctor_prints_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "backend reference" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert {"machine", "backends", "packages"} <= json.loads(capsys.readouterr().out).keys()


# FLOP of a transition: 2 x (7 members of 131,800 and a policy of 72,960 multiply-adds). Training adds the
# gradients of weights and inputs, except for the 4600 of the first layer's input.
@pytest.mark.parametrize(
    ("kernel", "sizes", "unit", "flop"),
    [
        ("rollout", {"starts": 20, "horizon": 2}, "transitions/s", 2 * (7 * 131_800 + 72_960)),
        ("rollout", {"starts": 9, "penalty-coef": 0}, "transitions/s", 2 * (131_800 + 72_960)),
        ("fit", {"fit-steps": 1}, "samples*members/s", 2 * (3 * 131_800 - 4600)),
    ],
)
def test_bench_writes_rows(
    kernel: str,
    sizes: dict[str, int],
    unit: str,
    flop: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mopo_fast.bench.measure._COPY_BYTES", 2**16)
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    arguments = ["--rounds", "2", "--threads", "1", "--quiet", "--json", str(out), "--plot", str(picture)]
    assert main(["bench", kernel, *flags, *arguments]) == 0
    ours, reference = json.loads(out.read_text())
    assert (ours["kernel"], reference["backend"]) == (kernel, "reference")
    assert ours["baselines"]["reference"] == pytest.approx(ours["rate"] / reference["rate"])
    shape = {name.removeprefix("fit-").replace("-", "_"): value for name, value in sizes.items()}
    assert ours["shape"].items() >= shape.items() and ours["unit"] == unit
    assert ours["gflops"] * 1e9 / ours["rate"] == pytest.approx(flop)
    assert min(ours["intensity"], ours["peak_gflops"], ours["bandwidth"]) > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert all(word in shown for word in (kernel, "cpu", "reference", "torch.mm"))


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--plot", "a.jpeg"),
        ("--plot", "/proc/nowhere/a.png"),
        ("--plot", "folder.png"),
        ("--json", "/proc/a/b"),
    ],
)
def test_a_bench_that_cannot_be_written_is_not_begun(
    flag: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("mopo_fast.bench.measure", measured)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert name in error_of(capsys, "bench", "rollout", "--starts", "1", flag, name)


MISTAKES = {
    "a task that does not exist": (["train", "DATA", "--task", "cheetah"], ["cheetah", *TASKS]),
    "a task of other sizes": (["train", "DATA", "--task", "halfcheetah"], ["17"]),
    "no such file": (["train", "hopper-none.hdf5"], ["hopper-none.hdf5", "does not exist"]),
    "no such data set": (["train", "hopper-mediun-v2"], ["hopper-mediun-v2", "hopper-medium-v2"]),
    "a name without a task": (["train", "JUNK"], ["junk", "--task", *TASKS]),
    "neither file nor task": (["train", "nothing.hdf5"], ["nothing.hdf5", "does not exist"]),
    "neither set nor task": (["train", "nothing"], ["unknown data set 'nothing'", "hopper"]),
    "not a data set": (["fit", "JUNK", "--out", "OUT"], ["junk.hdf5"]),
    "no such backend": (["train", "DATA", "--backend", "abacus"], ["abacus", "reference"]),
    "no such device": (["train", "DATA", "--device", "abacus"], ["abacus"]),
    "no such ensemble": (["train", "DATA", "--dynamics-from", "nowhere"], ["nowhere"]),
    "no steps": (["train", "DATA", "--steps", "0"], ["steps", "0"]),
    "steps without end": (["train", "DATA", "--steps", "1e30"], ["steps", "1,000,000,000,000", "1e+30"]),
    "a policy without a task": (["evaluate", "POLICY"], ["holds a policy", "give --task"]),
    "a policy of another task": (["evaluate", "POLICY", "--task", "ant"], ["Ant-v4 has 27 and 8"]),
    "evaluate a run that has not begun": (
        ["evaluate", "BEGUN"],
        ["has no policy yet", "`mopo-fast train --resume"],
    ),
    "roll out a run that has not begun": (["rollout", "BEGUN", "--out", "OUT.npz"], ["has no policy yet"]),
    "no horizon": (["train", "DATA", "--horizon", "0"], ["horizon", "0"]),
    "a negative penalty": (["train", "DATA", "--penalty-coef", "-1"], ["penalty_coef", "-1"]),
    "negative workers": (["train", "DATA", "--evaluation.workers", "-1"], ["workers", "-1"]),
    "a negative seed": (["train", "DATA", "--seed", "-1"], ["seed", "-1"]),
    "a thousand million runs": (
        ["train", "DATA", "--seeds", "0:1000000000"],
        ["1,000,000,000 runs", "10,000"],
    ),
    "seeds without end": (["train", "DATA", "--seeds", f"0:{10**40}"], ["runs", "10,000"]),
    "a sweep without end": (["sweep", "DATA", "--seeds", "0:1000000000"], ["1,000,000,000 runs", "10,000"]),
    "too many combinations": (
        ["sweep", "DATA", "--seeds", "0:9000", "--horizons", "1", "2"],
        ["18,000 runs", "10,000"],
    ),
    "negative seeds": (["train", "DATA", "--seeds=-3:2"], ["--seeds", "'-3:2'"]),
    "a negative seed among others": (["train", "DATA", "--seeds=3,-1,5"], ["--seeds", "'3,-1,5'"]),
    "seeds from a later one": (["sweep", "DATA", "--seeds", "5:2"], ["--seeds", "'5:2'"]),
    "seeds that are words": (["train", "DATA", "--seeds", "9" * 5000], ["--seeds"]),
    "a seed twice": (["train", "DATA", "--seeds", "1,1"], ["twice"]),
    "a seed twice in a sweep": (["sweep", "DATA", "--seeds", "1,1"], ["seed1-h", "twice"]),
    "coefficients of one name": (
        ["sweep", "DATA", "--penalty-coefs", "0.5", "0.5000000001"],
        ["coef0.5", "twice"],
    ),
    "a folder that cannot be made": (["train", "DATA", "--out", "/proc/nowhere"], ["/proc/nowhere"]),
    "collect what is not made": (["collect", "humanoid-random"], ["humanoid-random", "hopper"]),
    "collect nothing": (["collect", "hopper-random", "--steps", "0", "--out", "OUT"], ["steps", "0"]),
    "evaluate no run": (["evaluate", "nowhere"], ["nowhere"]),
    "evaluate nothing": (["evaluate", "RUN", "--episodes", "0"], ["episodes", "0"]),
    "report no run": (["report", "nowhere"], ["nowhere"]),
    "roll out no run": (["rollout", "nowhere", "--dataset", "DATA", "--out", "OUT.npz"], ["nowhere"]),
    "roll out to no format": (["rollout", "RUN", "--dataset", "DATA", "--out", "a.csv"], ["a.csv", ".npz"]),
    "roll out nothing": (
        ["rollout", "RUN", "--dataset", "DATA", "--out", "OUT.npz", "--count", "0"],
        ["count", "0"],
    ),
    "roll out over the data": (["rollout", "RUN", "--dataset", "DATA", "--out", "DATA"], ["--overwrite"]),
    "roll out a negative seed": (
        ["rollout", "RUN", "--dataset", "DATA", "--out", "OUT.npz", "--seed", "-1"],
        ["seed", "-1"],
    ),
    "roll out too much": (
        ["rollout", "RUN", "--dataset", "DATA", "--out", "OUT.npz", "--count", str(10**12)],
        ["GiB", "count"],
    ),
    "a CSV as data": (["train", "DATA.csv"], ["data.csv", "no data set", ".npz", "numpy.savez"]),
    "a run's parent as a run": (["evaluate", "PARENT"], ["holds 1 runs", "give one of them", "run"]),
    "one run to compare": (["report", "RUN", "--json"], ["--json", "one run", "give more"]),
    "nothing to report": (["report"], ["RUN"]),
    "a fit to compare": (["report", "FIT", "RUN"], ["holds no run of `mopo-fast train`"]),
    "a parent to roll out": (
        ["rollout", "PARENT", "--dataset", "DATA", "--out", "OUT.npz"],
        ["give one of them"],
    ),
    "a fit as a run": (["evaluate", "FIT"], ["config.json", "mopo-fast train"]),
    "a name that is no UTF-8": (["train", "DATA", "--out", os.fsdecode(b"\xff")], [r"\udcff", "UTF-8"]),
    "no cluster": (
        ["rollout", "RUN", "--dataset", "DATA", "--out", "OUT", "--ray", "auto"],
        ["no Ray cluster", "--ray local", "ray start --head"],
    ),
    "no cluster to sweep on": (
        ["sweep", "DATA", "--out", "OUT", "--ray", "auto"],
        ["no Ray cluster", "--ray local", "ray start --head"],
    ),
    "a command that is none": (["trian", "DATA"], ["trian", "did you mean train?"]),
    "a task of other sizes to fit": (
        ["fit", "DATA", "--out", "OUT", "--task", "halfcheetah"],
        ["17", "--task"],
    ),
    "roll out one file on no device": (
        ["rollout", "RUN", "--dataset", "DATA", "--out", "OUT.npz", "--device", "abacus"],
        ["abacus"],
    ),
    "fit over a run": (["fit", "DATA", "--out", "RUN"], ["config.json", "choose another --out"]),
    "no such termination": (
        ["train", "DATA", "--rollout.termination", "abacus"],
        ["abacus", "hopper-authors"],
    ),
    "bench no rounds": (["bench", "rollout", "--rounds", "0"], ["rounds", "0"]),
    "bench no updates": (["bench", "sac", "--updates", "0"], ["updates", "0"]),
    "bench another's size": (["bench", "fit", "--horizon", "1"], ["horizon", "rollout", "fit"]),
    "bench on no backend": (["bench", "rollout", "--backend", "abacus"], ["abacus"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(
    mistake: str,
    dataset: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    csv, fit = dataset.with_name("data.csv"), dataset.with_name("fit")
    csv.touch()
    fit.mkdir(exist_ok=True)
    (fit / "config.json").write_text('{"dataset": "hopper", "task": null}')
    names = {"DATA": dataset, "RUN": run, "JUNK": "junk.hdf5", "OUT": "out", "OUT.npz": "out.npz"}
    policy, begun = dataset.with_name("policy"), dataset.with_name("begun")
    if not begun.exists():
        Actor.load(run).save(policy)
        begun.mkdir()
        shutil.copy(run / "config.json", begun)
    names |= {"PARENT": run.parent, "DATA.csv": csv, "FIT": fit, "POLICY": policy, "BEGUN": begun}
    arguments, words = MISTAKES[mistake]
    message = error_of(capsys, *(names.get(argument, argument) for argument in arguments))
    assert all(word in message for word in words), message
    assert [path.name for path in tmp_path.rglob("*")] == ["junk.hdf5"]


# The function that each command calls, a command line with no flag at its default, and the arguments that
# must arrive.
CALLS: dict[str, tuple[list[str], list[object], dict[str, object]]] = {
    "collect.collect": (
        [
            "collect",
            "hopper-random",
            "--steps",
            "7",
            "--seed",
            "3",
            "--threads",
            "2",
            "--overwrite",
            "--quiet",
        ],
        ["hopper-random", 7],
        {"seed": 3, "out": None, "threads": 2, "overwrite": True, "quiet": True},
    ),
    "fit.fit_and_save": (
        [
            *("fit", "DATA", "--out", "OUT", "--seed", "3", "--device", "cuda", "--backend", "reference"),
            *("--threads", "2", "--quiet"),
        ],
        [],
        {"seed": 3, "device": "cuda", "backend": "reference", "threads": 2, "quiet": True},
    ),
    "train.train": (
        ["train", "hopper-none.hdf5", "--seed", "3", "--resume", "--quiet"],
        [TrainConfig("hopper-none.hdf5", seed=3), Path("runs/hopper-none-seed3")],
        {"resume": True, "quiet": True},
    ),
    "run.population.train_many": (
        ["train", "hopper-none.hdf5", "--seeds", "3,5", "--resume", "--quiet"],
        [
            [TrainConfig("hopper-none.hdf5", seed=seed) for seed in (3, 5)],
            [Path(f"runs/hopper-none-seed{seed}") for seed in (3, 5)],
        ],
        {"resume": True, "quiet": True},
    ),
    "evaluate.evaluate": (
        ["evaluate", "RUN", "--episodes", "7", "--seed", "3", "--stochastic"],
        [],
        {"episodes": 7, "seed": 3, "deterministic": False},
    ),
    "bulk.generate.generate": (
        [
            *("rollout", "RUN", "--dataset", "DATA", "--out", "OUT.npz", "--count", "7", "--horizon", "3"),
            *("--seed", "3", "--penalty-coef", "0", "--backend", "reference", "--device", "cuda"),
        ],
        [],
        {"device": "cuda", "count": 7, "horizon": 3, "seed": 3, "penalty_coef": 0.0, "backend": "reference"},
    ),
    "bench.measure.bench": (
        [
            *("bench", "sac", "--backend", "reference", "--obs-dim", "3", "--act-dim", "2"),
            *("--updates", "7", "--rounds", "6", "--threads", "2", "--quiet"),
        ],
        ["sac"],
        {
            **{"backend": "reference", "obs_dim": 3, "act_dim": 2, "updates": 7, "rounds": 6},
            **{"threads": 2, "quiet": True},
        },
    ),
}


@pytest.mark.parametrize("function", CALLS)
def test_every_flag_arrives(
    function: str,
    dataset: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def called(*args: object, **kwargs: object) -> None:
        assert [argument for argument in positional if argument not in args] == []
        assert {name: kwargs.get(name) for name in named} == named
        raise InputError("arrived")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"mopo_fast.{function}", called)
    for module in ("utils.machine", "backends.precision"):
        monkeypatch.setattr(f"mopo_fast.{module}.check_device", lambda device: None)
    (tmp_path / "hopper-none.hdf5").touch()
    names = {"DATA": dataset, "RUN": run, "OUT": "out", "OUT.npz": "out.npz"}
    arguments, positional, named = CALLS[function]
    assert error_of(capsys, *(names.get(argument, argument) for argument in arguments)) == "error: arrived"


def test_an_outcome_without_a_score_is_a_return() -> None:
    values = {"return_mean": 1.25, "return_std": 0.5, "score_mean": None, "score_std": None}
    assert _outcome(values) == "return 1.2 +- 0.5"
    assert _outcome(values | {"score_mean": 3.0, "score_std": 4.0}).endswith("score 3.00 +- 4.00")


def test_a_mistake_exits_with_2_and_no_traceback() -> None:
    result = mopo_fast("train", "nothing.hdf5")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_what_is_logged_goes_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def talkative() -> None:
        """Log a word and print another one."""
        logging.getLogger("mopo_fast").info("logged")
        print("printed")

    monkeypatch.setitem(COMMANDS, "doctor", talkative)
    assert main(["doctor"]) == 0
    assert [text.strip() for text in capsys.readouterr()] == ["printed", "logged"]


def test_an_interrupt_without_a_word_says_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        """Stop at once."""
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "doctor", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_an_interrupt_of_an_extension_modules_import_says_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        """Fail as an interrupted import of a pybind11 module does."""
        raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.setitem(COMMANDS, "doctor", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_an_interrupt_of_the_imports_says_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == "mopo_fast.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "mopo_fast.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    frozen: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    assert entry.run() == 130
    assert capsys.readouterr().err == "stopped\n"
    assert frozen == [True]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
        (ValueError("Error: engine error: Could not allocate memory\nand more"), "Error: engine error"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "Cannot allocate memory"),
    ],
)
def test_a_lack_of_memory_is_told_in_a_sentence(
    error: Exception, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def greedy() -> None:
        """Fail for want of memory."""
        raise error

    monkeypatch.setitem(COMMANDS, "doctor", greedy)
    assert main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the system has no more memory or threads (") and said.count("\n") == 1
    assert why in said


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> None:
        """Fail."""
        raise RuntimeError("a fault")

    monkeypatch.setitem(COMMANDS, "doctor", wrong)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["doctor"])


def test_a_bar_without_memory_leaves_the_terminal_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=terminal, force_terminal=True))

    def refused(thread: threading.Thread) -> None:
        raise MemoryError

    monkeypatch.setattr(threading.Thread, "start", refused)
    errors = sys.stderr
    with pytest.raises(MemoryError), progress.progress_bar("bar", 3):
        pass
    assert sys.stderr is errors
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is hidden"


def test_an_interrupt_exits_with_130_and_says_how_to_go_on(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "mopo_fast", "train", dataset, "--out", out, "--quiet", *TINY]
    # A suite run in the background ignores SIGINT, and its children would too.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, handler)
    deadline = time.monotonic() + 60
    while not (out / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert f"`mopo-fast train --resume {out}` goes on" in errors and "Traceback" not in errors
