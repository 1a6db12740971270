"""Steps bounded in time, and the steps of `make test-gpu` where there is no GPU."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bounded import Outcome, Step, run_steps
from tests.gpu import ROOT, steps


def shell(name: str, command: str, seconds: float = 20.0, **options: bool) -> Step:
    return Step(name, seconds, ["sh", "-c", command], **options)


def states(outcomes: list[Outcome]) -> list[str]:
    return [outcome.state for outcome in outcomes]


def is_running(pid: int) -> bool:
    """A killed orphan that nobody has waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_end_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = run_steps(
        [
            shell("fine", "echo one; echo 3 passed, 2 skipped in 1.2s"),
            shell("nothing to do", "echo '== 4 skipped in 0.1s =='"),
            shell("broken [it says]", "echo gone wrong >&2; exit 3"),
            shell("reported", "exit 1", gates=False),
            Step("absent", 5.0, ["no-such-command"]),
            shell("variables", 'test "$KIND" = watched'),
        ],
        tmp_path / "logs",
        60.0,
    )
    assert states(outcomes) == ["passed", "skipped", "failed", "failed", "failed", "failed"]
    assert [outcome.is_bad for outcome in outcomes] == [False, False, True, False, True, True]
    assert outcomes[1].detail == "4 skipped in 0.1s"
    assert outcomes[2].detail == "exit status 3; last: gone wrong"
    assert "no-such-command" in outcomes[4].detail
    assert (tmp_path / "logs" / "fine.log").read_text() == "one\n3 passed, 2 skipped in 1.2s\n"
    told = capsys.readouterr().out
    assert "== broken [it says]: failed, 0 s" in told and "gone wrong" in told
    assert "reported (reported only)" in told


def test_a_hang_costs_its_step_alone(tmp_path: Path) -> None:
    """Whoever it has started goes with it, and holding its output helps none."""
    hang = f"sleep 1000 & echo $! > {tmp_path}/pid; trap '' TERM INT; echo begun; wait; sleep 1000"
    began = time.monotonic()
    outcomes = run_steps([shell("hang", hang, 2.0), shell("next", "echo here")], tmp_path, 60.0)
    assert time.monotonic() - began < 15.0
    assert states(outcomes) == ["cut", "passed"]
    assert outcomes[0].detail == "ended after 2 s; last: begun"
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_all_steps_together_are_bounded(tmp_path: Path) -> None:
    some = [shell("first", "sleep 1000", 30.0), shell("second", "sleep 1000"), shell("third", "true")]
    outcomes = run_steps(some, tmp_path, 2.5)
    assert states(outcomes) == ["cut", "not run", "not run"]
    assert outcomes[1].detail == "no time was left" and outcomes[1].is_bad


def test_ctrl_c_ends_the_step_and_prints_the_table(tmp_path: Path) -> None:
    script = f"""
import signal
from pathlib import Path
from tests.bounded import Step, run_steps
signal.signal(signal.SIGINT, signal.default_int_handler)
some = [Step("fine", 9.0, ["true"]), Step("long", 99.0, ["sh", "-c", "echo $$ > {tmp_path}/pid; sleep 99"])]
run_steps(some, Path({str(tmp_path)!r}), 200.0)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60.0
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(2)
        told, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "fine" in told.split("last line")[1] and "passed" in told
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_every_test_for_a_gpu_has_a_step() -> None:
    """The steps name files, for their order; none that has such tests may be missing."""
    marked = {path.name for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()}
    # By the fixture `device` of conftest.py.
    marked |= {"test_kernel_cuda.py", "test_kernel_cuda_training.py"}
    assert marked - {Path(__file__).name} == {
        Path(word).name for step in steps() for word in step.command if str(word).endswith(".py")
    } - {"setup.py"}


def test_the_steps_end_without_a_gpu(tmp_path: Path) -> None:
    """Those that build nothing: their tests are skipped, and what is not there is told."""
    command = [sys.executable, "-m", "tests.gpu", "--logs", tmp_path, "--without-gpu"]
    for name in ("doctor", "exact integers", "memcheck of training", "graphs and whole runs"):
        command += ["--only", name]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    ends = [
        line.partition(": ")[2] for line in run.stdout.splitlines() if line.startswith("== ") and ": " in line
    ]
    assert [end.partition(",")[0] for end in ends] == ["passed", "skipped", "skipped", "failed"]
    assert "compute-sanitizer" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "PyTorch sees no GPU; --without-gpu goes through the steps"),
        (["--without-gpu", "--only", "tritn"], "no step tritn; there are: build, doctor, "),
    ],
)
def test_what_cannot_be_tested_is_told(arguments: list[str], message: str) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-m", "tests.gpu", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1 and message in run.stderr
