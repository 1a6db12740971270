"""Test that the soak finds the fault of each faulty program, and none in a sound one.

`make soak` runs the soak on the package.
"""

import ctypes
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import mopo_fast._cpu
import pytest
from places import TESTS

SOAK = TESTS / "soak"

PROGRAM = """
import fcntl, os, signal, sys, time

mode, out = sys.argv[1], "disk/out"


def work():
    if mode == "flaky" and os.path.exists(__file__ + ".ran"):
        sys.exit("error: no")
    open(__file__ + ".ran", "w").close()
    os.makedirs(out, exist_ok=True)
    lock = open(out + "/.lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit("error: busy" if mode == "curt" else "error: another process is at work")
    result, temporary = out + "/result", out + "/.result.tmp"
    if mode == "torn":
        temporary = result
        if os.path.exists(result):
            return
    if mode == "deaf":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with open(temporary, "wb") as file:
            for _ in range(20):
                file.write(os.urandom(100) if mode == "random" else bytes(100))
                file.flush()
                time.sleep(0.02)
            bytearray(200 << 20)
        os.replace(temporary, result)
    finally:
        if mode not in ("litter", "torn") and os.path.exists(temporary):
            os.remove(temporary)


def main():
    try:
        work()
        print("done")
    except KeyboardInterrupt:
        if mode == "traceback":
            raise
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except MemoryError:
        if mode == "traceback":
            raise
        if mode == "rust":
            print("memory allocation of 209715200 bytes failed", file=sys.stderr, flush=True)
            os.abort()
        print("error: out of memory", file=sys.stderr)
        sys.exit(2)
    except SystemExit as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(2)


main()
"""


class Middle(random.Random):
    """Random numbers by which a program is stopped once, while it writes."""

    def random(self) -> float:
        return 0.4

    def uniform(self, a: float, b: float) -> float:
        return a + 0.4 * (b - a)

    def choice(self, seq: Any) -> Any:
        return seq[0]


@pytest.fixture(scope="module")
def soak() -> dict[str, Any]:
    """Return the global names of tests/soak/__main__.py."""
    sys.path.insert(0, str(SOAK))
    try:
        return runpy.run_path(str(SOAK / "__main__.py"), run_name="soak")
    finally:
        sys.path.remove(str(SOAK))


@pytest.mark.parametrize(
    ("mode", "fault", "finding"),
    [
        ("sound", "SIGKILL", None),
        ("sound", "SIGTERM", None),
        ("sound", "SIGINT", None),
        ("sound", "memory", None),
        ("rust", "memory", None),
        ("sound", "two", None),
        ("curt", "two", "the second process is refused otherwise"),
        ("torn", "SIGKILL", "the result differs from an undisturbed run's: different: out/result"),
        ("random", "SIGTERM", "the result differs from an undisturbed run's: different: out/result"),
        ("litter", "SIGINT", "after SIGINT, temporary files are left: out/.result.tmp"),
        ("traceback", "SIGINT", "'Traceback"),
        ("deaf", "SIGINT", "the command hangs"),
        ("flaky", "SIGTERM", "the command ends before the signal with exit code 2: error: no"),
        ("traceback", "memory", "in place of exit code 2, exit code 1: MemoryError"),
    ],
)
def test_finds_faults(
    soak: dict[str, Any],
    mode: str,
    fault: str,
    finding: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    scenario = soak["Scenario"]("program", (mode,), program=(sys.executable, str(program)))
    if mode == "deaf":
        # Lower the limit for a hang, since the program ends by itself within the usual one. A Ctrl-C without
        # effect must not count as the cause of that end.
        monkeypatch.setitem(sys.modules["cases"].__dict__, "_HANG", 0.05)

    def case(name: str) -> Any:
        return soak["Case"](scenario, fault, Middle(), tmp_path / name, tmp_path, f"test-{tmp_path}")

    found = None
    # The moment of the fault is a share of an undisturbed run's time, which another process may stretch.
    for number in range(1 if finding is None else 3):
        calm, disturbed = case(f"undisturbed{number}"), case(f"case{number}")
        try:
            reference = soak["undisturbed"](calm)
            soak["FAULTS"][fault](disturbed, reference)
        except soak["Failure"] as failure:
            found = str(failure)
            break
        finally:
            calm.close()
            disturbed.close()
    assert found is None if finding is None else found is not None and found.startswith(finding), found


def test_contents_leave_out_clocks_alone(soak: dict[str, Any], tmp_path: Path) -> None:
    results = sys.modules["results"]
    folders = [tmp_path / name for name in ("one", "other", "third")]
    for folder, seconds, score in zip(folders, (1.5, 2.5, 1.5), (3, 3, 4), strict=True):
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"seconds_fit": seconds, "score": score}))
        (folder / "progress.csv").write_text(f"epoch,seconds_total\n1,{seconds}\n")
        (folder / "time.png").write_text(str(seconds))
        (folder / ".lock").touch()
    one, other, third = map(results.contents, folders)
    assert results.difference(one, other) == ""
    assert results.difference(third, one) == "different: summary.json"
    (folders[1] / "checkpoint" / ".a.12345678.tmp").touch()
    assert results.leftovers(folders[1]) == ["checkpoint/.a.12345678.tmp"]
    assert results.difference(results.contents(folders[1]), one) == "new: checkpoint/.a.12345678.tmp"


def test_counts_shared_libraries(soak: dict[str, Any], tmp_path: Path) -> None:
    count = sys.modules["processes"].count_libraries
    library = tmp_path / "library.so"
    shutil.copy(mopo_fast._cpu.__file__, library)
    before = count(os.getpid())
    ctypes.CDLL(str(library))
    assert count(os.getpid()) == before + 1
    assert count(2**30) == 0


def test_every_pair_is_drawn(soak: dict[str, Any]) -> None:
    scenarios, faults = soak["SCENARIOS"], list(soak["FAULTS"])
    usual = [scenario for scenario in scenarios if not scenario.rare]
    first = soak["pairs"](5, 0, scenarios, faults)
    assert first == soak["pairs"](5, 0, scenarios, faults) != soak["pairs"](6, 0, scenarios, faults)
    assert Counter((scenario.name, fault) for scenario, fault in first) == Counter(
        (scenario.name, fault) for scenario in usual for fault in faults
    )
    rare = {scenario.name for scenario in scenarios} - {scenario.name for scenario in usual}
    assert rare <= {scenario.name for scenario, _ in soak["pairs"](5, 1, scenarios, faults)}


def test_disks_fill_and_refuse(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(SOAK)!r})\n"
        "import disks, errno, pathlib\n"
        "disks.enter_namespace()\n"
        "if disks.why_not(): print(disks.why_not()); sys.exit()\n"
        f"folder = pathlib.Path({str(tmp_path)!r}, 'disk'); folder.mkdir()\n"
        "disk, codes = disks.Disk(folder, 1 << 16), []\n"
        "for prepare in (lambda: None, lambda: disk.resize(1 << 20), lambda: disk.set_writable(False)):\n"
        "    prepare()\n"
        "    try: (folder / 'file').write_bytes(bytes(1 << 18)); codes.append(0)\n"
        "    except OSError as error: codes.append(error.errno)\n"
        "disk.unmount()\n"
        "assert codes == [errno.ENOSPC, 0, errno.EROFS], codes\n"
        "assert not list(folder.iterdir()); print('sound')\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    if "sound" not in ended.stdout:
        pytest.skip(ended.stdout)
