"""Test the CUDA kernels against the oracle, on a GPU and in the emulator, and their machine code."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import cuda_emulator
import pytest
import torch
from kernel_cases import (
    DECLARED,
    Case,
    RolloutTests,
    assert_as_accurate,
    assert_same,
    check_made_of_steps,
    check_not_finite,
    check_nothing_finite,
    check_rounded_policy,
    check_rounded_step,
    check_split,
    inputs,
    make_ensemble,
    make_policy,
    narrow_box,
    oracle,
    truncation,
)
from places import CSRC
from torch.nn import functional

from mopo_fast.backends import BackendStatus, philox
from mopo_fast.backends.gpu import cuda as host
from mopo_fast.backends.gpu.hopper_weights import SLOT_BYTES, hopper_weights
from mopo_fast.backends.interface import Need
from mopo_fast.config import ACTIVATIONS, PENALTIES
from mopo_fast.ensemble import mlp, round_factor
from mopo_fast.errors import InputError
from mopo_fast.rollout import RolloutEngine

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
DTYPES = ("float16", "bfloat16")


def make_engine(ensemble: torch.nn.Module, device: str, **options: Any) -> RolloutEngine:
    return RolloutEngine(ensemble.to(device), backend="cuda", **{"dtype": "float16", **options})


def make_start(batch: int, obs_dim: int, device: str) -> torch.Tensor:
    return inputs(batch, obs_dim, 1)[0].to(device)


@pytest.fixture
def case(device: str, request: pytest.FixtureRequest) -> Case:
    """Return an engine, a policy and start states, with rollouts that end at every step."""
    ensemble = make_ensemble(11, 3, members=2, elites=2, hidden=(33, 16), activation="relu")
    engine = make_engine(
        ensemble, device, termination=narrow_box(11), dtype=getattr(request, "param", "float16")
    )
    return engine, make_policy(11, 3, hidden=(41,)), make_start(150, 11, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("members", ["all", "elites"])
def test_every_penalty(device: str, dtype: str, penalty: str, members: str) -> None:
    ensemble = make_ensemble(17, 6, activation="relu", members=4)
    options = {"penalty": penalty, "penalty_coef": 0.7, "penalty_members": members, "dtype": dtype}
    check_rounded_step(make_engine(ensemble, device, **options), 200)


@pytest.mark.parametrize("declared", DECLARED)
def test_models_of_other_code(device: str, declared: str) -> None:
    ensemble = make_ensemble(5, 2, members=3, hidden=(64,), activation="relu", **DECLARED[declared])
    check_rounded_step(make_engine(ensemble, device, penalty="mixture_std"), 130)


def test_layer_norms_are_refused(device: str) -> None:
    ensemble = make_ensemble(5, 2, layer_norm=True)
    with pytest.raises(InputError, match="cuda: has no layer norm"):
        make_engine(ensemble, device)


@pytest.mark.parametrize(("obs_dim", "act_dim"), [(1, 1), (3, 4), (19, 8), (20, 5), (31, 8)])
def test_every_shape(device: str, obs_dim: int, act_dim: int) -> None:
    ensemble = make_ensemble(obs_dim, act_dim, members=2, hidden=(64,), activation="relu")
    check_rounded_step(make_engine(ensemble, device, penalty="mixture_std"), 130)


@pytest.mark.parametrize("hidden", [(1,), (200, 200), (7, 129, 64, 200), (201,), (256, 40, 256)])
@pytest.mark.parametrize("obs_dim", [17, 27])
def test_every_width_and_depth(device: str, hidden: tuple[int, ...], obs_dim: int) -> None:
    ensemble = make_ensemble(obs_dim, 6, members=2, hidden=hidden, activation="relu")
    check_rounded_step(make_engine(ensemble, device), 130)


# The error of the hardware's tanh is as large as the rounding to float16.
@pytest.mark.parametrize(("dtype", "apart"), [("float16", 1.5), ("bfloat16", 0.7)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(device: str, dtype: str, activation: str, apart: float) -> None:
    ensemble = make_ensemble(17, 6, members=2, hidden=(200, 200), activation=activation)
    check_rounded_step(make_engine(ensemble, device, dtype=dtype), 130, apart=apart)


@pytest.mark.parametrize(
    ("members", "penalty"), [(1, "mixture_std"), (32, "max_pairwise"), (200, "ensemble_std")]
)
def test_every_number_of_members(device: str, members: int, penalty: str) -> None:
    ensemble = make_ensemble(3, 1, members=members, hidden=(16,), activation="relu")
    check_rounded_step(make_engine(ensemble, device, penalty=penalty), 130)


def test_a_large_odd_batch(device: str) -> None:
    """The batch is so large that a block computes more than one tile."""
    ensemble = make_ensemble(5, 2, members=2, hidden=(16,), activation="relu")
    check_rounded_step(make_engine(ensemble, device), 1101 if device == "cpu" else 100_001)


def test_deterministic_is_the_mean_over_all_members(device: str) -> None:
    check_rounded_step(make_engine(make_ensemble(17, 6, activation="relu"), device), 200, deterministic=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_policy(device: str, dtype: str) -> None:
    engine = make_engine(make_ensemble(17, 6, members=1, hidden=(16,)), device, dtype=dtype)
    check_rounded_policy(engine, make_policy(17, 6, hidden=(256, 256)), make_start(300, 17, device))


@pytest.mark.parametrize("seed", range(1, 6))
def test_the_canonical_rollout(device: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are as accurate as PyTorch with the same roundings, for any order of the threads."""
    monkeypatch.setenv(cuda_emulator.SEED, str(seed))
    engine = make_engine(make_ensemble(17, 6, hidden=(200,) * 4), device)
    policy, start = make_policy(17, 6, hidden=(256, 256)), make_start(300, 17, device)
    kernel, same, exact = (
        each.rollout(policy, start.to(each.dtype), 2, seed=seed)
        for each in (engine, oracle(engine, "float16"), oracle(engine, "float64"))
    )
    for name in ("rollout_index", "step", "members", "terminals"):
        assert torch.equal(getattr(kernel, name), getattr(exact, name)), name
    for name in ("actions", "next_observations", "rewards", "penalties"):
        ours, theirs, truth = (getattr(result, name) for result in (kernel, same, exact))
        assert_as_accurate(ours, theirs, truth, name, units=2.0 * truncation(engine, policy))


@pytest.mark.parametrize("step", [0, 2**32 - 1])
def test_noise_is_philox(device: str, step: int) -> None:
    """With a network that predicts 0, results are the standard deviation times the noise."""
    ensemble = make_ensemble(17, 6, members=3, hidden=(16,))
    with torch.no_grad():
        for parameter in (ensemble.weights[-1], ensemble.biases[-1]):
            parameter.zero_()
    engine, start = make_engine(ensemble, device), torch.zeros(200, 17, device=device)
    rows = torch.arange(200, device=device) * 2**31 - 2**33
    call = {"seed": 2**64 - 3, "step": step, "rows": rows, "distributions": True}
    result = engine.step(start, torch.zeros(200, 6, device=device), **call)
    noise = philox.random_normals(rows, step, philox.NOISE_STREAM, 18, 2**64 - 3, torch.float64)
    assert result.std is not None
    expected = noise * result.std[0]
    torch.testing.assert_close(result.next_observations, expected[:, :-1].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.raw_rewards, expected[:, -1].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", DTYPES, indirect=True)
def test_rollout_is_made_of_steps(case: Case) -> None:
    check_made_of_steps(*case, 3)


def test_splits_do_not_matter(case: Case) -> None:
    check_split(*case, 2, split=37)


class TestRollouts(RolloutTests):
    pass


@pytest.mark.parametrize("member", [0, 2])
def test_what_is_not_finite_is_not_kept(device: str, member: int) -> None:
    ensemble = make_ensemble(11, 3, members=3, elites=3, hidden=(16,), activation="relu")

    def engine(*args: Any, **options: Any) -> RolloutEngine:
        return make_engine(*args, device, dtype="bfloat16", **options)

    check_not_finite(engine, ensemble, make_policy(11, 3, hidden=(8,)), make_start(70, 11, device), member)


def test_nothing_finite_at_all(device: str) -> None:
    check_nothing_finite(lambda ensemble: make_engine(ensemble, device), make_start(30, 5, device))


def test_log_std_is_clipped(case: Case) -> None:
    engine, policy, start = case
    with torch.no_grad():
        policy.biases[-1][3:] = torch.tensor([50.0, -50.0, float(policy.log_std_max)])
    kernel, same, exact = (
        each.rollout(policy, start.to(each.dtype), 1, seed=1).actions
        for each in (engine, oracle(engine, "float16"), oracle(engine, "float64"))
    )
    assert_as_accurate(kernel, same, exact, "actions", units=truncation(engine, policy))


def test_dtypes_that_it_refuses(device: str) -> None:
    with pytest.raises(InputError, match="cuda: serves bfloat16 and float16, not float32"):
        make_engine(make_ensemble(5, 2), device, dtype="float32")


@pytest.mark.parametrize(
    ("sizes", "hidden", "reason"),
    [
        ((32, 2), (16,), "observations of at most 31 dimensions, not 32"),
        ((5, 9), (16,), "actions of at most 8 dimensions, not 9"),
        ((5, 2), (16, 257), "hidden layers at most 256 wide, not 257"),
        ((5, 2), (), "networks with at least one hidden layer"),
    ],
)
def test_shapes_that_it_refuses(
    device: str, sizes: tuple[int, int], hidden: tuple[int, ...], reason: str
) -> None:
    with pytest.raises(InputError, match=f"cuda: serves {reason}"):
        make_engine(make_ensemble(*sizes, hidden=hidden), device)


@pytest.mark.parametrize(
    ("hidden", "reason"),
    [((300,), "a policy's hidden layers at most 256 wide, not 300"), ((), "at least one hidden layer")],
)
def test_policies_that_it_refuses(device: str, hidden: tuple[int, ...], reason: str) -> None:
    engine = make_engine(make_ensemble(5, 2), device)
    with pytest.raises(InputError, match=reason):
        engine.rollout(make_policy(5, 2, hidden=hidden), make_start(3, 5, device), 1, seed=0)


def test_auto_falls_to_another_backend(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend "auto" skips this backend for the models that it refuses, and for no others."""
    status = BackendStatus("cuda", True, "as if tested")
    monkeypatch.setattr(host.CudaBackend, "status", lambda self: status)
    ensemble, large = (make_ensemble(*sizes).to(device) for sizes in ((5, 2), (40, 2)))
    assert RolloutEngine(large, dtype="float16").backend != "cuda"
    engine = RolloutEngine(ensemble, dtype="float16")
    assert engine.backend == engine._backend_for(make_policy(5, 2)).name == "cuda"
    policy, start = make_policy(5, 2, hidden=(300,)), make_start(20, 5, device)
    assert engine._backend_for(policy).name != "cuda"
    assert_same(
        engine.rollout(policy, start, 1, seed=0),
        oracle(engine, "float16").rollout(policy, start, 1, seed=0),
    )


@pytest.mark.parametrize(("hidden", "obs_dim"), [((200, 200), 17), ((33, 256), 27)])
def test_the_packed_weights_are_the_networks(hidden: tuple[int, ...], obs_dim: int) -> None:
    """Multiplying the packed weights in the kernel's layout gives the results of the networks."""
    width, slots, dims, act_dim = max(hidden), 5 if obs_dim < 20 else 8, obs_dim + 1, 6
    engine = RolloutEngine(make_ensemble(obs_dim, act_dim, members=3, hidden=hidden, activation="relu"))
    actor = make_policy(obs_dim, act_dim, hidden=(256, 100))
    dynamics, policy = engine._dynamics(), engine._policy(actor)
    packed = hopper_weights(dynamics, policy, "float16", width, slots)
    assert packed.chunk_bytes.sum() == len(packed.data)
    assert packed.chunk_bytes.max() <= SLOT_BYTES and not (packed.chunk_bytes % 128).any()
    position = 0

    def take(count: int, dtype: torch.dtype) -> torch.Tensor:
        nonlocal position
        begin, position = position, position + count * dtype.itemsize
        return packed.data[begin:position].view(dtype).float()

    def network(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        for columns in sizes:
            bias = take(columns + -columns % 32, torch.float32)[:columns]
            x = functional.pad(x, (0, -x.shape[1] % 16))
            cores = take(x.shape[1] * columns, torch.float16).reshape(-1, 2, columns // 8, 8, 8)
            total = bias + x @ cores.permute(0, 1, 4, 2, 3).reshape(-1, columns)
            x = torch.relu(total)
        return total

    def fragment(x: torch.Tensor, of: int) -> torch.Tensor:
        """Put inputs in the kernel's order.

        Slot i of thread q in a step of 16 inputs is input 8 (i / 2) + 2 q + i % 2 and dimension 4 i + q.
        """
        inputs = torch.zeros(len(x), of + -of % 16)
        for d in range(x.shape[1]):
            slot, q = divmod(d, 4)
            inputs[:, 16 * (slot // 4) + 8 * (slot % 4 // 2) + 2 * q + slot % 2] = x[:, d]
        return inputs

    observations, actions = inputs(50, obs_dim, act_dim)
    heads = network(fragment(observations, 4 * slots), [256, 256, 16])
    rounded = [round_factor(weight, "float16") for weight in policy.weights]
    expected = mlp(observations, rounded, policy.biases, "relu")
    torch.testing.assert_close(heads[:, : 2 * act_dim : 2], expected[:, :act_dim])
    torch.testing.assert_close(heads[:, 1 : 2 * act_dim : 2], expected[:, act_dim:])
    assert not heads[:, 2 * act_dim :].any()
    rounded = [round_factor(weight, "float16") for weight in dynamics.weights]
    x = torch.cat([observations, actions], dim=1)
    together = torch.cat([functional.pad(observations, (0, 4 * slots - obs_dim)), actions], dim=1)
    for expected in mlp(x, rounded, dynamics.biases, "relu"):
        heads = network(fragment(together, 4 * slots + 8), [*(width for _ in hidden), 8 * slots])
        torch.testing.assert_close(heads[:, : 2 * dims : 2], expected[:, :dims])
        torch.testing.assert_close(heads[:, 1 : 2 * dims : 2], expected[:, dims:])
        assert not heads[:, 2 * dims :].any()
    assert position == len(packed.data)


# Options of CMakeLists.txt.
FLAGS = ["-std=c++20", "-O3", "-prec-div=false", "-prec-sqrt=false", "-Xptxas=-v", f"-I{CSRC}"]
FLAGS += ["-gencode=arch=compute_90a,code=sm_90a"]


class Compiled(NamedTuple):
    """Output of ptxas on the kernels of a file, and their machine code by name."""

    report: str
    code: dict[str, str]


@pytest.fixture(scope="session", params=DTYPES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Compile for an H100, without a need for one."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    triton = importlib.util.find_spec("triton")
    beside = [] if triton is None else triton.submodule_search_locations or []
    folders = [f"{folder}/backends/nvidia/bin" for folder in beside]
    disassembler = shutil.which("nvdisasm", path=os.pathsep.join([*folders, os.environ["PATH"]]))
    if disassembler is None:
        pytest.skip("needs nvdisasm, of the CUDA toolkit or of Triton")
    cubin = tmp_path_factory.mktemp("cuda") / f"{request.param}.cubin"
    command = [nvcc, *FLAGS, "-cubin", "-o", cubin]
    command += [CSRC / "cuda" / f"rollout_{request.param}.cu"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    command = [disassembler, "-c", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *parts = re.split(r"^\.text\.(\S*rollout_kernel\S*):", text, flags=re.MULTILINE)
    return Compiled(report, dict(zip(parts[::2], parts[1::2], strict=True)))


# Limits for any version of ptxas: spilled bytes, and instructions that access them. nvcc 13.0 spills none.
SPILLED_BYTES, LOCAL_ACCESSES = 64, 16


@pytest.mark.slow
def test_the_registers_suffice(compiled: Compiled) -> None:
    """Registers are not spilled, and products are not serialised for want of registers.

    A thread that multiplies has 240 registers; every thread has 168 until it asks for more or fewer.
    """
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled.report)
    assert len(spilled) == len(compiled.code) == 4
    assert all(int(count) <= SPILLED_BYTES for pair in spilled for count in pair)
    used = [int(count) for count in re.findall(r"Used (\d+) registers", compiled.report)]
    assert len(used) == 4 and max(used) <= 168
    # ptxas warns of products that are serialised and of a setmaxnreg that it ignores.
    assert not re.search(r"serialized|setmaxnreg|warning", compiled.report)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not there")
@pytest.mark.parametrize("source", ["rollout_float16", "sac"])
def test_the_watchdog_leaves_the_products_side_by_side(source: str, tmp_path: Path) -> None:
    """With the watchdog, too, products overlap and few registers are spilled, as in the usual build."""
    command = ["nvcc", *FLAGS, "-DMOPO_FAST_WATCHDOG", "-cubin", "-o", tmp_path / "kernels.cubin"]
    command.append(CSRC / "cuda" / f"{source}.cu")
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spilled and all(int(count) <= SPILLED_BYTES for pair in spilled for count in pair)
    assert not re.search(r"serialized|setmaxnreg|warning", report)


@pytest.mark.slow
def test_the_machine_code(compiled: Compiled) -> None:
    """Check instructions that the PTX prescribes by name; ptxas may choose how many it uses of some."""
    for name, code in compiled.code.items():
        width, slots = map(int, re.findall(r"Li(\d+)E", name))
        products = Counter(re.findall(r"HGMMA\.64x(\d+)x16\.F32", code))
        depth, inputs = -(-width // 16), -(-(slots + 2) // 4)
        expected = Counter({"256": 2 + 16, "16": 16})
        expected += Counter({str(width): inputs + depth, str(8 * slots): depth})
        assert products.keys() == expected.keys() and products >= expected, name
        for instruction in (r"UBLKCP\S*MULTICAST", r"USETMAXREG\b.*\b0xf0\b", r"MUFU\.TANH"):
            assert re.search(instruction, code), (name, instruction)
        assert len(re.findall(r"\b(?:LDL|STL)\b", code)) <= LOCAL_ACCESSES, name
        # Only the two calls of cluster_sync may fence to L2 or empty the first-level cache.
        assert code.count("MEMBAR.ALL.GPU") <= 2 and code.count("CCTL.IVALL") <= 2, name


def test_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = host.CudaBackend()
    host._load.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "mopo_fast._cuda", None)
    try:
        assert "not built; that takes nvcc" in backend.status().reason and not backend.status().available
    finally:
        host._load.cache_clear()
    versions = [13000, 13000]
    extension = SimpleNamespace(versions=lambda: tuple(versions))
    monkeypatch.setattr(host, "_load", lambda: (extension, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.status().reason == "PyTorch sees no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(host, "_capability", lambda device=None: (7, 5))
    assert backend.status().reason == "compute capability 8.0 or more is needed, the GPU has 7.5"
    monkeypatch.setattr(host, "_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    versions[:] = 12080, 13000
    assert not backend.status().available
    assert backend.status().reason == (
        "built for CUDA 13.0, the driver serves CUDA 12.8: update the NVIDIA driver, or build with CUDA 12.8"
    )
    versions[:] = 0, 13000
    assert backend.status().reason == "no NVIDIA driver was found"
    for driver, capability, available in (
        (13000, (8, 6), True),
        (13010, (12, 0), True),
        (14000, (8, 6), True),
        (13000, (9, 0), True),
        (13000, (10, 0), False),
    ):
        versions[:] = driver, 13010
        monkeypatch.setattr(host, "_capability", lambda device=None, has=capability: has)
        assert backend.status().available == available, (driver, capability)
    assert "whose PTX the driver for CUDA 13.0 does not compile" in backend.status().reason
    monkeypatch.setattr(host, "_capability", lambda device=None: (8, 6))
    device = torch.device("cuda:1")
    assert backend.refusal(Need("float16", device)) == "makes rollouts on compute capability 9.0, not 8.6"
    assert backend.refusal(Need("float32", device, training=256)) is None
    assert backend.refusal(Need("float16", torch.device("cpu"))) == "serves CUDA tensors, not cpu"
