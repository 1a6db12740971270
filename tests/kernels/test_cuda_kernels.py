"""Test small CUDA kernels with exact answers on a GPU and in the emulator, and faulty ones in the emulator.

On a GPU they reveal a wrong descriptor, fragment or fence within milliseconds. In the emulator they show
that it behaves as a GPU does and detects faults.
"""

import ctypes
import enum
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_emulator
import numpy as np
import pytest
import torch
from places import HELPERS

KERNELS = HELPERS / "cuda_kernels.cu"
COLUMNS = (16, 40, 64, 200, 256)
# Faults in the order of `Fault` in cuda_kernels.cu, and the emulator's message, or "" if a NaN reveals the
# fault.
FAULTS = {
    "kNoFullWait": "a product by b that landed in phase 0 of .*, which it has not waited for",
    "kEarlyRelease": "a bulk copy to .*, onto b of a product of warpgroup [01] that it knows no end of",
    "kOneRelease": "deadlock:(.|\n)*barrier_wait.*, [1-4] of 4 arrivals",
    "kExtraRelease": "more arrivals in a phase than its [14]|that it knows no end of",
    "kEarlyRead": "",
    "kEarlyWrite": "d was written to while products add to it",
    "kNoBegin": "a product without products_begin since a pack",
    "kLatePack": "a product without products_begin since a pack",
    "kNoFence": "not known to the cluster|is not fenced",
    "kNoClusterSync": "not known to the cluster|is not initialised",
    "kNoFirstTurn": r"deadlock:(.|\n)*named_sync\(1, 256\), 128 threads have come",
    "kNoLastSync": "which has ended|its block ends while",
    "kOtherMatrix": "where others of its warpgroup have",
    "kWrittenByThreads": "which threads have written to",
    "kWrongCount": "deadlock:(.|\n)*barrier_wait.*, 1 of 5 arrivals",
    "kGreedy": "deadlock:(.|\n)*more_registers, has 168",
}


def build_for_gpu(target: Path, *options: str) -> Path:
    """Build the kernels as a library for this machine's GPU."""
    command = [
        "nvcc",
        "-std=c++20",
        "-O3",
        "-shared",
        "-Xcompiler=-fPIC",
        f"-I{cuda_emulator.CSRC}",
        *options,
    ]
    command += ["-gencode=arch=compute_90a,code=sm_90a", str(KERNELS), "-o", str(target)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return target


def load(library: Path) -> ctypes.CDLL:
    kernels = ctypes.CDLL(str(library))
    for name in ("run_product", "run_chain", "run_pipeline", "run_warps", "run_company"):
        getattr(kernels, name).restype = ctypes.c_char_p
    return kernels


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load(cuda_emulator.build(tmp_path_factory.mktemp("cuda") / "kernels.so", [KERNELS]))


def need_hopper() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU is not of compute capability 9.0")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not there")


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    need_hopper()
    return load(build_for_gpu(tmp_path_factory.mktemp("cuda") / "kernels.so"))


def address(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def as_halves(x: np.ndarray, bfloat16: bool) -> np.ndarray:
    """Return small integers in 16 bits; bfloat16 represents them exactly."""
    return (x.view(np.uint32) >> 16).astype(np.uint16) if bfloat16 else x.astype(np.float16).view(np.uint16)


def images(b: np.ndarray, bfloat16: bool = False) -> np.ndarray:
    """Return b [k, n] in 16 bits as [k / 16][k half][n / 8][n % 8][k % 8], aligned to 16 bytes."""
    k, n = b.shape
    cores = np.ascontiguousarray(b.reshape(k // 16, 2, 8, n // 8, 8).transpose(0, 1, 3, 4, 2))
    memory = np.empty(2 * cores.size + 16, np.uint8)
    aligned = memory[-memory.ctypes.data % 16 :][: 2 * cores.size].view(np.uint16).reshape(cores.shape)
    aligned[...] = as_halves(cores, bfloat16)
    return aligned


def fragment(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the column [count, 128] of each thread's values in wgmma's m64nNk16.

    The figures of the PTX ISA show the same positions for the values of d and for the halves of a.
    """
    i, thread = np.arange(count)[:, None], np.arange(128)
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
    return row, 8 * (i // 4) + 2 * (thread % 4) + i % 2


def integers(shape: tuple[int, ...], largest: int, seed: int) -> np.ndarray:
    """Return random integers so small that sums of their products are exact in any order."""
    return np.random.default_rng(seed).integers(-largest, largest + 1, shape).astype(np.float32)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("columns", COLUMNS)
def test_products(kernels: ctypes.CDLL, columns: int, bfloat16: bool) -> None:
    a, b, d = integers((64, 48), 9, 0), integers((48, columns), 9, 1), integers((64, columns), 9, 2)
    # Registers of a thread: 24 halves of a in pairs, the lower one first, and its part of d.
    halves = as_halves(a[fragment(24)], bfloat16).astype(np.uint32)
    pairs = halves[::2] | halves[1::2] << 16
    registers = d[fragment(columns // 2)]
    told = kernels.run_product(
        bfloat16, columns, 3, address(pairs), address(images(b, bfloat16)), address(registers)
    )
    assert told == b""
    np.testing.assert_array_equal(registers, (d + a @ b)[fragment(columns // 2)])


@pytest.mark.parametrize("bfloat16", [False, True])
def test_what_a_product_gives_is_what_the_next_takes(kernels: ctypes.CDLL, bfloat16: bool) -> None:
    a, b, d = integers((64, 64), 1, 0), integers((64, 64), 1, 1), integers((64, 64), 9, 2)
    expected = d + np.maximum(a @ b, 0.0) @ b
    assert kernels.run_chain(bfloat16, address(a), address(images(b, bfloat16)), address(d)) == b""
    np.testing.assert_array_equal(d, expected)


def run_pipeline(kernels: ctypes.CDLL, fault: int, seed: int) -> tuple[str, np.ndarray, np.ndarray]:
    """Run two clusters with a ring of slots; return the emulator's message, d, and the expected d."""
    blocks, steps = 4, 11
    a, b = integers((blocks, 2, 64, 16 * steps), 9, 3), integers((16 * steps, 64), 9, 4)
    d = integers((blocks, 2, 64, 64), 9, 5)
    expected = d + a @ b
    os.environ[cuda_emulator.SEED] = str(seed)
    try:
        told = kernels.run_pipeline(fault, blocks, steps, address(a), address(images(b)), address(d))
    finally:
        del os.environ[cuda_emulator.SEED]
    return told.decode(), d, expected


@pytest.mark.parametrize("seed", range(50))
def test_a_cluster_fills_a_ring_together(kernels: ctypes.CDLL, seed: int) -> None:
    told, d, expected = run_pipeline(kernels, 0, seed)
    assert told == ""
    np.testing.assert_array_equal(d, expected)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_found(emulated: ctypes.CDLL, fault: str) -> None:
    """Nearly all schedules reveal the fault, and at least one names the reason."""
    number = 1 + list(FAULTS).index(fault)
    runs = [run_pipeline(emulated, number, seed) for seed in range(8)]
    right = [told == "" and np.array_equal(d, expected) for told, d, expected in runs]
    assert sum(right) <= 1
    if FAULTS[fault]:
        assert any(re.search(FAULTS[fault], told) for told, _, _ in runs), {told for told, _, _ in runs}
    else:
        assert all(told == "" and np.isnan(d).any() for told, d, _ in runs)


def test_a_seed_repeats_a_schedule(emulated: ctypes.CDLL) -> None:
    """In a race, the first message and the thread that it names depend on the seed alone."""
    told = [[run_pipeline(emulated, 1, seed)[0] for seed in range(1, 6)] for _ in range(2)]
    assert told[0] == told[1] and len(set(told[0])) > 1


def run_warps(kernels: ctypes.CDLL) -> tuple[np.ndarray, ...]:
    """Return numbers, their sums by fours, and the largest relative errors of the approximate functions."""
    x = np.random.default_rng(0).normal(0.0, 2.0, 256).astype(np.float32)
    sums, tanh, exp2 = (np.empty_like(x) for _ in range(3))
    assert kernels.run_warps(4, address(x), address(sums), address(tanh), address(exp2)) == b""
    exact = np.tanh(x.astype(np.float64)), np.exp2(x.astype(np.float64))
    return (
        x,
        sums,
        *(np.abs(rough / true - 1.0).max() for rough, true in zip((tanh, exp2), exact, strict=True)),
    )


def test_warps_and_rough_functions(kernels: ctypes.CDLL) -> None:
    x, sums, tanh_error, exp2_error = run_warps(kernels)
    np.testing.assert_allclose(sums, np.repeat(x.reshape(-1, 4).sum(1), 4), rtol=1e-5, atol=1e-6)
    assert tanh_error < 1.01 * 2.0**-11 and exp2_error < 1.01 * 2.0**-22


def test_rough_functions_are_as_rough_as_they_may_be(emulated: ctypes.CDLL) -> None:
    _, _, tanh_error, exp2_error = run_warps(emulated)
    assert tanh_error > 0.5 * 2.0**-11 and exp2_error > 0.5 * 2.0**-22


class Company(enum.IntEnum):
    """Kinds of waiting, in the order of `Company` in cuda_kernels.cu."""

    waits = 0
    does_not_wait = 1
    lacks_one = 2


def run_company(kernels: ctypes.CDLL, how: Company, blocks: int) -> tuple[str, list[int]]:
    """Return the emulator's message, and the sum 1 + 2 + ... + blocks as computed by each block."""
    counter, values, sums = np.zeros(1, np.uint32), np.zeros(blocks, np.int32), np.zeros(blocks, np.int32)
    told = kernels.run_company(int(how), blocks, address(counter), address(values), address(sums))
    return told.decode(), sums.tolist()


def test_blocks_wait_for_one_another(kernels: ctypes.CDLL) -> None:
    assert run_company(kernels, Company.waits, 4) == ("", [10] * 4)


def test_blocks_that_do_not_wait_are_found(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in range(8):
        monkeypatch.setenv(cuda_emulator.SEED, str(seed))
        assert run_company(emulated, Company.waits, 4) == ("", [10] * 4)
        found.append(run_company(emulated, Company.does_not_wait, 4)[1] != [10] * 4)
    assert any(found)
    told, _ = run_company(emulated, Company.lacks_one, 4)
    assert re.search(r"deadlock:(.|\n)*block 3, warp  0: wait_for\(4\)", told)
    assert "5 blocks do not run at once" in run_company(emulated, Company.waits, 5)[0]


# Calls that hang on a GPU, and the watchdog's message about each.
HANGS = {
    "run_company(kernels, Company.lacks_one, 4)": (
        "block 3, warp 0 waits for arrival 4 at the blocks' counter, 3 have come"
    ),
    "run_pipeline(kernels, 1 + list(FAULTS).index('kWrongCount'), 0)": (
        "block 1, warp [0-9]+ waits for phase [01] of the barrier at byte"
    ),
}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_hopper()
    return build_for_gpu(tmp_path_factory.mktemp("watched") / "kernels.so", "-DMOPO_FAST_WATCHDOG")


@pytest.mark.gpu
@pytest.mark.parametrize("hang", HANGS)
def test_the_watchdog_ends_a_hang(hang: str, watched: Path) -> None:
    """The call runs in a separate process, because the watchdog destroys the GPU's context."""
    script = f"""
import sys
sys.path.insert(0, {str(HELPERS)!r})
from test_cuda_kernels import *
kernels = load(Path({str(watched)!r}))
print(({hang})[0])
"""
    command = [sys.executable, "-c", script]
    run = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30, check=False
    )
    assert re.search(HANGS[hang], run.stderr), (run.stdout, run.stderr)
    assert "launch failure" in run.stdout


def disassembler() -> str | None:
    """Return the path of nvdisasm, from the toolkit or from Triton."""
    found = importlib.util.find_spec("triton")
    inside = Path(str(found and found.origin)).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return shutil.which("nvdisasm") or (str(inside) if inside.exists() else None)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not there")
def test_the_kernels_are_cuda(tmp_path: Path) -> None:
    """The kernels compile with nvcc, and ptx.cuh names a product's registers in their order."""
    cubin = tmp_path / "kernels.cubin"
    command = ["nvcc", "-std=c++20", f"-I{cuda_emulator.CSRC}", "-gencode=arch=compute_90a,code=sm_90a"]
    subprocess.run([*command, "-cubin", str(KERNELS), "-o", str(cubin)], check=True, capture_output=True)
    if (nvdisasm := disassembler()) is None:
        pytest.skip("nvdisasm is not there")
    text = subprocess.run([nvdisasm, str(cubin)], check=True, capture_output=True, text=True).stdout
    functions = [part for part in text.split(".section\t.text.")[1:] if "product_kernel" in part.split()[0]]
    products = set()
    for function in functions:
        # This is the notation of nvcc 13.0. Other notations are skipped.
        product = re.search(r"HGMMA\.64x(\d+)x16\.F32(\.BF16)? R(\d+), R(\d+), gdesc\S+ R(\d+)", function)
        if product is None:
            pytest.skip("this machine code is written another way")
        columns, d, a, added = (int(product[group]) for group in (1, 3, 4, 5))
        assert d == added
        loads = re.findall(r"LDG\.E\S* R(\d+), \S*\[R(\d+)\.64(?:\+(-?0x\w+))?\]", function)
        # Registers are loaded in their order, from addresses 512 bytes apart.
        for first, count in ((d, columns // 2), (a, 4)):
            places = {
                int(to) - first: (base, int(by or "0", 16)) for to, base, by in loads if int(to) >= first
            }
            base, offset = places[0]
            assert [places[i] for i in range(count)] == [(base, offset + 512 * i) for i in range(count)]
        products.add((columns, product[2] is not None))
    assert products == {(columns, bfloat16) for columns in COLUMNS for bfloat16 in (False, True)}
