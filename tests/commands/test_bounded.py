"""Test the steps with time limits, and the steps of `make test-gpu` without a GPU."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.bounded import Outcome, Step, run_steps
from tests.gpu import ROOT, steps


def shell(name: str, command: str, seconds: float = 20.0, **options: Any) -> Step:
    return Step(name, seconds, ["sh", "-c", command], **options)


def states(outcomes: list[Outcome]) -> list[str]:
    return [outcome.state for outcome in outcomes]


def is_running(pid: int) -> bool:
    """Tell whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_end_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = run_steps(
        [
            shell("fine", "echo one; echo 3 passed, 2 skipped in 1.2s"),
            shell("quiet", "echo whatever"),
            shell("skipped", "echo 'SKIPPED [4] test_x.py:3: no nvcc'; echo '== 4 skipped in 0.1s =='"),
            shell("files-skipped", "echo '== 1 skipped in 0.1s =='; exit 5"),
            shell("broken [it says]", "echo x.cu: Error: a bracket; echo Traceback; exit 3"),
            shell("tests", "echo an error in between; echo '=== 2 failed, 1 passed in 3.10s ==='; exit 1"),
            shell("reported", "exit 1", gates=False),
            Step("absent", 5.0, ["no-such-command"]),
            shell("variables", 'test "$KIND" = watched'),
            shell("builds-on-it", "true", needs=("fine", "quiet")),
            shell("builds-on-the-broken", "true", needs=("fine", "broken [it says]", "never mentioned")),
        ],
        tmp_path / "logs",
        60.0,
    )
    assert [(outcome.state, outcome.detail) for outcome in outcomes] == [
        ("passed", "3 passed, 2 skipped in 1.2s"),
        ("passed", ""),
        ("skipped", "no nvcc"),
        ("skipped", "1 skipped in 0.1s"),
        ("failed", "exit status 3; x.cu: Error: a bracket"),
        ("failed", "exit status 1; 2 failed, 1 passed in 3.10s"),
        ("failed", "exit status 1; it wrote nothing"),
        ("absent", outcomes[7].detail),
        ("failed", "exit status 1; it wrote nothing"),
        ("passed", ""),
        ("not run", "broken [it says] did not pass"),
    ]
    bad = ["broken [it says]", "tests", "absent", "variables", "builds-on-the-broken"]
    assert [outcome.step.name for outcome in outcomes if outcome.is_bad] == bad
    assert "no-such-command" in outcomes[7].detail
    assert "no-such-command" in (tmp_path / "logs" / "absent.log").read_text()
    assert (tmp_path / "logs" / "fine.log").read_text() == "one\n3 passed, 2 skipped in 1.2s\n"
    told = capsys.readouterr().out
    assert "== broken [it says]: failed, 0 s" in told and "a bracket" in told
    assert "reported (reported only)" in told


def test_a_hang_costs_its_step_alone(tmp_path: Path) -> None:
    """When a step is killed, so are the processes that it has started, even if they ignore interrupts."""
    hang = f"sleep 1000 & echo $! > {tmp_path}/pid; trap '' TERM INT; echo begun; wait; sleep 1000"
    began = time.monotonic()
    outcomes = run_steps([shell("hang", hang, 2.0), shell("next", "echo here")], tmp_path, 60.0)
    assert time.monotonic() - began < 20.0
    assert states(outcomes) == ["cut", "passed"]
    assert outcomes[0].detail == "ended after 2 s; begun"
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_a_step_may_say_how_far_it_came(tmp_path: Path) -> None:
    script = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    time.sleep(1000)
except KeyboardInterrupt:
    print("two of three tests", flush=True)
"""
    (outcome,) = run_steps([Step("long", 3.0, [sys.executable, "-c", script])], tmp_path, 60.0)
    assert outcome.state == "cut" and outcome.detail == "ended after 3 s; two of three tests"


def test_all_steps_together_are_bounded(tmp_path: Path) -> None:
    some = [shell("first", "sleep 1000", 30.0), shell("second", "sleep 1000"), shell("third", "true")]
    outcomes = run_steps(some, tmp_path, 2.5)
    assert states(outcomes) == ["cut", "not run", "not run"]
    assert outcomes[1].detail == "no time was left" and outcomes[1].is_bad


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_step_and_prints_the_table(tmp_path: Path, number: int) -> None:
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
        process.send_signal(number)
        told, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "fine" in told.split("what it said")[1] and "passed" in told
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_every_test_for_a_gpu_has_a_step() -> None:
    """A step names each file with tests for a GPU, and no file without such tests."""
    marked = {path.name for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()}
    # Such tests use the fixture `device` of conftest.py.
    marked |= {"test_kernel_cuda.py", "test_kernel_cuda_training.py"}
    named = {Path(word).name for step in steps() for word in step.command if str(word).endswith(".py")}
    assert marked - {Path(__file__).name} == named


def go_through(tmp_path: Path, *names: str, pretend: bool = False) -> subprocess.CompletedProcess[str]:
    """Run steps that build nothing, without a GPU or with a PyTorch that reports one."""
    script = "import torch\nfrom tests import gpu\n"
    if pretend:
        script += "torch.cuda.is_available = lambda: True\n"
    script += f"gpu.gpu(only={names!r}, logs=gpu.Path({str(tmp_path)!r}), without_gpu={not pretend})"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_steps_end_without_a_gpu(tmp_path: Path) -> None:
    """The tests are skipped, and the table gives the reason."""
    run = go_through(tmp_path, "doctor", "exact-integers", "triton", "graphs", "memcheck-training")
    assert run.returncode == 0, run.stdout + run.stderr
    ends = re.findall(r"^== ([\w-]+): (\w+), ", run.stdout, re.MULTILINE)
    assert dict(ends) == {
        "doctor": "passed",
        "exact-integers": "skipped",
        "triton": "skipped",
        "graphs": "skipped",
        "memcheck-training": "absent",
    }
    assert "PyTorch sees no GPU" in run.stdout and "'compute-sanitizer'" in run.stdout


def test_where_there_is_a_gpu_all_skipped_is_a_failure(tmp_path: Path) -> None:
    run = go_through(tmp_path, "graphs", pretend=True)
    assert run.returncode == 1 and "all tests were skipped on this GPU in: graphs" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "PyTorch finds no GPU; to try the steps without one"),
        (["--without-gpu", "--only", "tritn"], "unknown step tritn; there are: build, doctor, "),
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
