"""Test the available memory, on a system simulated by files, and large pages."""

import ctypes
import mmap
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mopo_fast import InputError
from mopo_fast.utils import machine
from mopo_fast.utils.machine import _advise_large_pages, available_memory, check_memory, large_zeros

GIB = 2**20  # in the kilobytes of /proc


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate a machine with 8 GiB, 6 of them available, 1 GiB of swap, and 2 used by this process."""
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
    # A parent group may have a lower limit.
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


# --- large pages


def large_page_bytes(address: int) -> int | None:
    """Return the bytes in large pages of the mapping at an address, None if the system does not tell."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, dash, last = line.split()[0].partition("-")
        if dash:
            inside = int(first, 16) <= address < int(last, 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return None


def test_zeros_lie_in_large_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no large pages")
    tensor = large_zeros((1 << 20, 32))
    assert tensor.dtype == torch.float32 and not tensor.any()
    found = large_page_bytes(tensor.data_ptr() + tensor.nbytes // 2)
    if found is None:
        pytest.skip("this system does not tell")
    assert found > tensor.nbytes // 2


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Record the calls of madvise (address, length, advice) and let each fail."""
    calls = []

    def madvise(address: ctypes.c_void_p, length: ctypes.c_size_t, advice: int) -> int:
        calls.append((address.value, length.value, advice))
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(madvise=madvise))
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    return calls


def test_only_whole_large_pages_inside_the_tensor_are_advised(advised: list[tuple[int, int, int]]) -> None:
    page = 2 << 20
    whole = torch.empty(8 * page, dtype=torch.uint8)
    first = -whole.data_ptr() % page
    for begin, end, pages in (
        (first, first + 3 * page, (0, 3)),
        (first + 1, first + 3 * page - 1, (1, 2)),
        (first, first + page, (0, 1)),
    ):
        _advise_large_pages(whole[begin:end])
        low, high = pages
        expected = whole.data_ptr() + first + low * page, (high - low) * page, 14
        assert advised.pop() == expected and not advised
    for begin, end in ((first + 1, first + page), (first + 1, first + 2 * page - 1), (first, first)):
        _advise_large_pages(whole[begin:end])
    _advise_large_pages(torch.empty(8 * page, dtype=torch.uint8, device="meta"))
    assert not advised


def test_a_system_without_large_pages(
    advised: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert not large_zeros((16 << 20,), torch.uint8).any() and not advised


def test_a_device_that_the_build_lacks_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="device 'mps' cannot be used") as refused:
        machine.check_device("mps")
    assert "\n" not in str(refused.value)
