"""Test the Triton kernels against the float64 oracle: on a GPU if there is one, else interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_cases import (
    DECLARED,
    NORMED,
    Case,
    RolloutTests,
    check_actions,
    check_made_of_steps,
    check_not_finite,
    check_nothing_finite,
    check_rollout,
    check_rounded_policy,
    check_rounded_step,
    check_split,
    check_step,
    inputs,
    make_ensemble,
    make_policy,
    narrow_box,
    oracle,
)
from places import HELPERS

from mopo_fast.backends import choose, philox, training_kernels
from mopo_fast.backends.gpu import triton as host
from mopo_fast.backends.gpu.pack import pack
from mopo_fast.backends.interface import Need
from mopo_fast.config import ACTIVATIONS, PENALTIES
from mopo_fast.data import Transitions
from mopo_fast.ensemble import round_factor
from mopo_fast.errors import InputError
from mopo_fast.rollout import RolloutEngine

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("mopo_fast.backends.gpu.triton_kernels")

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
if not kernels.INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

# The interpreter computes with NumPy, which warns about values that are not finite.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
ROUNDED = ["tfloat32", "float16", *([] if kernels.INTERPRETED else ["bfloat16"])]


def make_engine(ensemble: torch.nn.Module, **options: Any) -> RolloutEngine:
    return RolloutEngine(ensemble.to(DEVICE), backend="triton", **options)


def make_start(batch: int, obs_dim: int) -> torch.Tensor:
    return inputs(batch, obs_dim, 1)[0].to(DEVICE)


@triton.jit
def _words_kernel(
    rows,
    words,
    step: tl.uint32,
    seed: tl.uint64,
    STREAM: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
):
    lane = tl.arange(0, ROWS)
    number = tl.load(rows + lane)
    a, b, c, d = kernels.random_words(number, step.to(tl.uint32), STREAM, FIRST, seed)
    at = words + lane[:, None] * 16 + tl.arange(0, 4)[None, :] * 4
    tl.store(at, a)
    tl.store(at + 1, b)
    tl.store(at + 2, c)
    tl.store(at + 3, d)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 2**31 + 3), (2**63 + 11, 2**32 - 1)])
@pytest.mark.parametrize("stream", [philox.ACTION_STREAM, philox.NOISE_STREAM])
@pytest.mark.parametrize("first", [0, 400])
def test_the_words_are_philox(seed: int, step: int, stream: int, first: int) -> None:
    rows = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1, 12345678901, 7], device=DEVICE)
    words = torch.empty(8, 16, dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](rows, words, step, seed, STREAM=stream, FIRST=first, ROWS=8)
    expected = philox.random_words(rows, step, stream, first + 16, seed)
    assert torch.equal(words, expected[:, first:])


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("members", ["all", "elites"])
def test_every_penalty(penalty: str, members: str) -> None:
    ensemble = make_ensemble(17, 6)
    check_step(make_engine(ensemble, penalty=penalty, penalty_coef=0.7, penalty_members=members), 33)


@pytest.mark.parametrize(
    ("obs_dim", "act_dim", "members"), [(3, 1, 7), (16, 16, 2), (111, 8, 1), (400, 17, 1)]
)
def test_every_shape(obs_dim: int, act_dim: int, members: int) -> None:
    check_step(make_engine(make_ensemble(obs_dim, act_dim, members=members), penalty="mixture_std"), 33)


@pytest.mark.parametrize("declared", DECLARED)
def test_models_of_other_code(declared: str) -> None:
    ensemble = make_ensemble(5, 2, members=3, **DECLARED[declared])
    check_step(make_engine(ensemble, penalty="mixture_std"), 100)
    engine = make_engine(ensemble, termination=narrow_box(5))
    check_rollout(engine, make_policy(5, 2).to(DEVICE), make_start(200, 5), 2)


@pytest.mark.parametrize("normed", NORMED)
def test_layer_norms(normed: str) -> None:
    ensemble = make_ensemble(5, 2, members=2, layer_norm=True, **NORMED[normed])
    check_step(make_engine(ensemble, penalty="mixture_std"), 100)
    engine = make_engine(ensemble, termination=narrow_box(5))
    check_rollout(engine, make_policy(5, 2).to(DEVICE), make_start(200, 5), 2)


def test_a_single_row() -> None:
    check_step(make_engine(make_ensemble(17, 6)), 1)


@pytest.mark.parametrize(
    ("members", "penalty"), [(200, "mixture_std"), (32, "max_pairwise"), *((1, name) for name in PENALTIES)]
)
def test_every_number_of_members(members: int, penalty: str) -> None:
    check_step(make_engine(make_ensemble(3, 1, members=members, hidden=()), penalty=penalty), 20)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(1,), (64, 7, 129)])
def test_every_activation_and_depth(activation: str, hidden: tuple[int, ...]) -> None:
    check_step(make_engine(make_ensemble(17, 6, members=2, hidden=hidden, activation=activation)), 130)


def test_a_large_odd_batch() -> None:
    """The batch is so large that a program computes more than one tile."""
    check_step(make_engine(make_ensemble(5, 2, members=2, hidden=(16,))), 300 if DEVICE == "cpu" else 50_001)


def test_the_canonical_ensemble() -> None:
    check_step(make_engine(make_ensemble(17, 6, hidden=(200,) * 4)), 70)


def test_the_canonical_policy() -> None:
    """Actions of the canonical policy, and the steps that follow from them, match the oracle."""
    engine = make_engine(make_ensemble(17, 6, members=1, hidden=(200,) * 4))
    check_rollout(engine, make_policy(17, 6, hidden=(256, 256)), make_start(200, 17), 2)


def test_deterministic_is_the_mean_over_all_members() -> None:
    check_step(make_engine(make_ensemble(17, 6)), 100, deterministic=True)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("hidden", [(200, 200), (33, 51), ()])
def test_rounded_factors(dtype: str, hidden: tuple[int, ...]) -> None:
    engine = make_engine(make_ensemble(17, 6, members=3, hidden=hidden), dtype=dtype, penalty="mixture_std")
    # A GPU's tanh is rounded in another way than PyTorch's SiLU.
    check_rounded_step(engine, 200, apart=0.5 if kernels.INTERPRETED else 1.25)


def test_a_tanh_of_eleven_bits_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """SiLU in float16 is accurate enough if tanh has a relative error of 2^-11, the largest of any GPU."""
    engine = RolloutEngine(
        make_ensemble(17, 6, members=3, hidden=(200,) * 4),
        penalty="mixture_std", backend="reference", dtype="float16",
    )  # fmt: skip
    observations, actions = inputs(500, 17, 6)
    call = {"seed": 5, "distributions": True}
    usual = engine.step(observations, actions, **call)
    exact = oracle(engine, "float64").step(observations.double(), actions.double(), **call)
    monkeypatch.setattr(
        "mopo_fast.ensemble.activate", lambda x, _: 0.5 * x * (1.0 + torch.tanh(0.5 * x) * (1.0 - 2.0**-11))
    )
    rough = engine.step(observations, actions, **call)
    for name in ("next_observations", "rewards", "penalties", "mean", "std"):
        ours, theirs, truth = (getattr(result, name) for result in (rough, usual, exact))
        assert not torch.equal(ours, theirs)
        assert (ours - truth).norm() < 1.5 * (theirs - truth).norm(), name


@pytest.mark.parametrize("dtype", ROUNDED)
def test_rounded_factors_of_the_policy(dtype: str) -> None:
    engine = make_engine(make_ensemble(11, 3, members=2), dtype=dtype)
    check_rounded_policy(engine, make_policy(11, 3), make_start(300, 11))


def test_tfloat32_is_rounded_to_nearest_and_keeps_what_is_not_finite() -> None:
    step = 2.0**-10
    x = torch.tensor(
        [1.0, 1.0 + 0.5 * step, 1.0 + 1.5 * step, 1.0 + 0.51 * step, -3e38, torch.inf, torch.nan]
    )
    expected = torch.tensor([1.0, 1.0, 1.0 + 2.0 * step, 1.0 + step])
    rounded = round_factor(x, "tfloat32")
    assert torch.equal(rounded[:4], expected)
    assert abs(rounded[4] / x[4] - 1.0) < step and rounded[5] == torch.inf and rounded[6].isnan()


def test_packed_networks_are_padded_with_zeros() -> None:
    weights, biases = [torch.ones(2, 3, 17), torch.ones(2, 17, 4)], [torch.ones(2, 17), torch.ones(2, 4)]
    packed = pack(weights, biases, "float16")
    assert packed.sizes == (16, 32, 16)
    assert packed.weights.shape == (2, 16 * 32 + 32 * 16) and packed.weights.dtype == torch.float16
    first = packed.weights[:, : 16 * 32].unflatten(1, (16, 32))
    assert first[:, :3, :17].eq(1.0).all() and first.sum() == 2 * 3 * 17
    assert packed.biases.sum() == 2 * 21 and packed.biases[:, 32:36].eq(1.0).all()


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """Return an engine, a policy and start states, with rollouts that end at every step."""
    ensemble = make_ensemble(11, 3, members=2, elites=2, hidden=(33, 16))
    engine = make_engine(ensemble, termination=narrow_box(11), dtype=getattr(request, "param", "float32"))
    return engine, make_policy(11, 3, hidden=(41,)), make_start(150, 11)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_rollout_against_the_oracle(case: Case, penalty: str) -> None:
    engine, policy, start = case
    engine = make_engine(engine.ensemble, penalty=penalty, termination=narrow_box(11))
    check_rollout(engine, policy, start, 4, ended=30)


@pytest.mark.parametrize("case", ["float32", "float16"], indirect=True)
def test_rollout_is_made_of_steps(case: Case) -> None:
    check_made_of_steps(*case, 3)


@pytest.mark.parametrize("case", ["float32", "float16"], indirect=True)
def test_splits_do_not_matter(case: Case) -> None:
    check_split(*case, 2, split=37)


class TestRollouts(RolloutTests):
    pass


@pytest.mark.parametrize("member", [0, 2])
def test_what_is_not_finite_is_not_kept(member: int) -> None:
    ensemble = make_ensemble(11, 3, members=3, elites=3, hidden=(16,))
    check_not_finite(make_engine, ensemble, make_policy(11, 3, hidden=()), make_start(70, 11), member)


def test_nothing_finite_at_all() -> None:
    check_nothing_finite(make_engine, make_start(30, 5))


def test_log_std_is_clipped(case: Case) -> None:
    engine, policy, start = case
    with torch.no_grad():
        policy.biases[-1][3:] = torch.tensor([50.0, -50.0, float(policy.log_std_max)])
    check_actions(engine, policy, start)


def compile_for(tmp_path: Path, capability: int, operands: str) -> list[dict[str, Any]]:
    """Return the resources of the compiled kernels: one step, a rollout, and the copy to the ring buffer."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, HELPERS / "triton_compiles.py", str(capability), operands]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert [kernel["kernel"] for kernel in compiled] == ["rollout_kernel", "rollout_kernel", "compact_kernel"]
    # No code was replaced by a trap, and weights are copied 16 bytes at a time, bypassing the registers.
    assert not any(kernel["trap;"] for kernel in compiled)
    assert all(kernel["cp.async.cg"] for kernel in compiled[:2])
    return compiled


@pytest.mark.slow
@pytest.mark.parametrize("operands", ["float16", "bfloat16"])
def test_it_compiles_for_an_h100(tmp_path: Path, operands: str) -> None:
    """The kernels use tensor cores and keep activations in registers without spills. No GPU is needed."""
    *rollouts, copy = compile_for(tmp_path, 90, operands)
    assert copy["spilled"] == 0
    for kernel in rollouts:
        assert kernel["spilled"] == 0 and kernel["shared"] <= 227 * 1024
        # The hidden layers have 13 x 4 products of blocks, the heads 13 x 2. Other products read the scratch.
        assert kernel["wgmma_from_registers"] == 13 * 4 + 13 * 2


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 120])
def test_it_compiles_for_others(tmp_path: Path, capability: int) -> None:
    for kernel in compile_for(tmp_path, capability, "float16")[:2]:
        assert kernel["mma.sync"] > 0 and kernel["shared"] <= 99 * 1024


@pytest.mark.parametrize(("major", "shared", "held"), [(9, 232448, 240), (8, 101376, 224), (7, 65536, 0)])
def test_activations_are_held_where_weights_fit(
    monkeypatch: pytest.MonkeyPatch, major: int, shared: int, held: int
) -> None:
    gpu = SimpleNamespace(major=major, shared_memory_per_block_optin=shared)
    monkeypatch.setattr(host, "_gpu", lambda _: gpu)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert host._tile("float16", torch.device("cuda")).held == held
    assert host._tile("tfloat32", torch.device("cuda")).held == 0


def test_gpus_that_cannot() -> None:
    assert host._refusal_of_gpu("float16", (9, 0)) is None
    reason = host._refusal_of_gpu("bfloat16", (7, 5))
    assert reason == "bfloat16 needs compute capability 8.0, the GPU has 7.5"
    assert "to a trap" in (host._refusal_of_gpu("float16", (10, 0)) or "")
    assert host._refusal_of_gpu("float32", (10, 0)) is None


def test_what_it_refuses() -> None:
    ensemble = make_ensemble(5, 2).to(DEVICE)
    with pytest.raises(InputError, match="triton: serves float32, tfloat32, bfloat16, float16, not float64"):
        RolloutEngine(ensemble, backend="triton", dtype="float64")
    with pytest.raises(InputError, match="triton: makes rollouts, does not train"):
        choose("triton", Need("float32", torch.device(DEVICE), training=256))
    assert training_kernels("triton") is training_kernels("reference") is None
    for train in (host.TritonBackend().sac_updates, host.TritonBackend().fit_steps):
        with pytest.raises(RuntimeError, match="backend triton has no kernels that train"):
            train([], 1)


@pytest.mark.skipif(not kernels.INTERPRETED, reason="of the interpreter")
def test_the_interpreter_serves_by_name_alone() -> None:
    ensemble = make_ensemble(5, 2)
    assert RolloutEngine(ensemble, dtype="float16").backend == "reference"
    with pytest.raises(InputError, match="triton: Triton's interpreter multiplies bfloat16 wrongly"):
        RolloutEngine(ensemble, backend="triton", dtype="bfloat16")
    reason = host.TritonBackend().refusal(Need("float32", torch.device("cuda:0")))
    assert reason == "serves CPU tensors, as it is interpreted, not cuda:0"


def test_without_triton_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    host._load.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "mopo_fast.backends.gpu.triton_kernels", None)
    try:
        status = host.TritonBackend().status()
        assert not status.available and "pip install triton" in status.reason
    finally:
        host._load.cache_clear()


def test_without_a_gpu_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = host.TritonBackend().status()
    assert not status.available and "PyTorch sees no GPU" in status.reason
    reason = host.TritonBackend().refusal(Need("float32", torch.device("cpu")))
    assert reason == "serves CUDA tensors, not cpu"


def test_transitions_are_valid(case: Case) -> None:
    engine, policy, start = case
    result = engine.rollout(policy, start, 2, seed=4)
    assert isinstance(result, Transitions)
    result.validate()
