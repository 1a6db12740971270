"""The memory that is available, of a system made of files."""

import resource
from pathlib import Path

import pytest

from mopo_fast import InputError
from mopo_fast.utils import machine
from mopo_fast.utils.machine import available_memory, check_memory

GIB = 2**20  # in the kilobytes of /proc


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB, of which 6 are available, and a GiB of swap; this process has 2."""
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    available = f"MemTotal: {8 * GIB} kB\nMemAvailable: {6 * GIB} kB\nHugePages_Total: 0\nSwapFree: {GIB} kB"
    write(tmp_path / "proc/meminfo", available)
    write(tmp_path / "proc/self/status", f"Name:\tpython\nVmSize:\t{2 * GIB} kB\nVmData:\t{GIB} kB")
    write(tmp_path / "proc/self/cgroup", "5:devices:/\n0::/")
    return tmp_path


def test_the_machine(root: Path) -> None:
    assert available_memory() == 7 * 2**30
    check_memory("it", 7 * 2**30, "cpu", "it")
    with pytest.raises(InputError, match="it would take 8 GiB, cpu has 7 GiB; lower that"):
        check_memory("it", 8 * 2**30, "cpu", "that")


@pytest.mark.parametrize(("limit", "used"), [(resource.RLIMIT_AS, 2), (resource.RLIMIT_DATA, 1)])
def test_limits_of_the_process(root: Path, limit: int, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    most = {limit: 5 * 2**30}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (most.get(which, resource.RLIM_INFINITY), -1))
    assert available_memory() == (5 - used) * 2**30
    most[limit] = 2**20
    assert available_memory() == 0


def test_control_groups(root: Path) -> None:
    folder = root / "sys/fs/cgroup/jobs/mine"
    write(root / "proc/self/cgroup", "0::/jobs/mine")
    write(folder / "memory.max", 4 * 2**30)
    write(folder / "memory.current", 3 * 2**30)
    write(folder / "memory.stat", f"anon 7\ninactive_file {2 * 2**30}")
    assert available_memory() == 3 * 2**30
    # A group above may have less.
    for name, value in (("max", 2**30), ("current", 0), ("stat", "anon 0")):
        write(folder.parent / f"memory.{name}", value)
    assert available_memory() == 2**30
    write(folder.parent / "memory.max", "max")
    assert available_memory() == 3 * 2**30


def test_control_groups_of_version_1(root: Path) -> None:
    folder = root / "sys/fs/cgroup/memory/jobs"
    write(root / "proc/self/cgroup", "7:cpu,memory:/jobs\n3:cpuset:/jobs")
    write(folder / "memory.limit_in_bytes", 4 * 2**30)
    write(folder / "memory.usage_in_bytes", 3 * 2**30)
    write(folder / "memory.stat", "total_inactive_file 0")
    assert available_memory() == 2**30


def test_other_systems(root: Path) -> None:
    for name in ("meminfo", "self/status", "self/cgroup"):
        (root / "proc" / name).unlink()
    assert available_memory() > 0


def test_this_one() -> None:
    assert available_memory() > 2**20
