"""The Triton backend: rollouts on any GPU that Triton serves, or interpreted on the CPU to test it."""

import functools
import importlib
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from typing_extensions import override

from mopo_fast.backends.gpu.pack import MULTIPLE, PackedNetwork, pack, pack_norms, storage_dtype
from mopo_fast.backends.gpu.padded import PaddedRollouts, padded_rollout, padded_step
from mopo_fast.backends.interface import (
    Backend,
    BackendStatus,
    Need,
    RolloutCall,
    RolloutCounts,
    StepCall,
    StepResult,
    ValuesCall,
    refuse_penalty,
)
from mopo_fast.backends.reference import least_values
from mopo_fast.data.transitions import ROLLOUT_ARRAYS

_SERVED = ("float32", "tfloat32", "bfloat16", "float16")
# As `_penalise` in triton_kernels.py has them.
PENALTIES = ("max_aleatoric", "max_deviation", "max_pairwise", "ensemble_std", "mixture_std")
# Rows that one program of the second kernel copies.
_COPIED_ROWS = 128


class Tile(NamedTuple):
    """The sizes of a program's work.

    Attributes:
        rows: number of rollouts.
        columns: most outputs of a product.
        depth: most inputs of a product.
        warps: number of warps.
        stages: number of stages of Triton's software pipeline.
        held: width up to which networks keep activations in registers, in blocks of `depth` columns.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    held: int


# Products in float32 take registers, the others take tensor cores. Factors of 16 bits leave registers for the
# activations; in blocks of 64 columns nothing spills on Hopper.
_TILES = {
    "float32": Tile(64, 64, 16, 4, 2, 0),
    "tfloat32": Tile(64, 64, 32, 4, 3, 0),
    "bfloat16": Tile(128, 128, 64, 8, 2, 240),
    "float16": Tile(128, 128, 64, 8, 2, 240),
}
# The interpreter takes as long for an operation on few numbers as on many.
_INTERPRETED = Tile(128, 128, 64, 1, 1, 240)


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """Return the module of the kernels, or None and the reason why it cannot be loaded."""
    try:
        return importlib.import_module("mopo_fast.backends.gpu.triton_kernels"), ""
    except ImportError as error:
        return None, f"Triton did not load ({error}); install it with: pip install triton"


def _kernels() -> ModuleType:
    module, _ = _load()
    assert module is not None, "a backend that was chosen can be loaded"
    return module


def _gpu(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def _tile(operands: str, device: torch.device) -> Tile:
    if _kernels().INTERPRETED:
        return _INTERPRETED
    tile, gpu = _TILES[operands], _gpu(device)
    # Shared memory holds a layer's weights, on Hopper the next layer's too.
    bytes_each = 4 if gpu.major == 9 else 2
    room: int = math.isqrt(gpu.shared_memory_per_block_optin // bytes_each) // MULTIPLE * MULTIPLE
    return tile._replace(held=min(tile.held, room) if gpu.major >= 8 else 0)


def _programs(tiles: int, warps: int, device: torch.device) -> int:
    """Return how many programs run at a time; each takes many tiles, so that their scratch stays in cache."""
    if _kernels().INTERPRETED:
        return min(tiles, 2)
    # Eight warps of 255 registers a thread fill a multiprocessor.
    processors: int = _gpu(device).multi_processor_count
    return min(tiles, processors * 8 // warps)


def _launch(
    networks: tuple[PackedNetwork, PackedNetwork | None],
    call: StepCall | RolloutCall,
    padded: PaddedRollouts,
    *,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> None:
    """Make all steps of all rollouts; see `padded.Launch`."""
    dynamics, policy, start, settings = call.dynamics, call.policy, call.observations, call.settings
    (batch, obs_dim), device = start.shape, start.device
    tile = _tile(settings.operands, device)
    packed, packed_policy = networks
    members = len(packed.weights)
    everyone = [network for network in networks if network is not None]
    width = max(size for network in everyone for size in network.sizes[:-1])
    heads = max(network.sizes[-1] for network in everyone)
    programs = _programs(-(-batch // tile.rows), tile.warps, device)
    factors = storage_dtype(settings.operands)
    scales = shifts = raw = norm_sizes = None
    if dynamics.norms is not None:
        norm_sizes = tuple(scale.shape[1] for scale in dynamics.norms[0])
        scales, shifts = pack_norms(dynamics.norms, packed.sizes)
        raw = torch.empty(programs, tile.rows, width, dtype=torch.float32, device=device)
    truncation = dynamics.truncation
    _kernels().rollout_kernel[(programs,)](
        packed.weights,
        packed.biases,
        packed.weights.stride(0),
        packed.biases.stride(0),
        scales,
        shifts,
        packed_policy and packed_policy.weights,
        packed_policy and packed_policy.biases,
        dynamics.input_mean,
        dynamics.input_std,
        torch.stack([torch.exp(-dynamics.max_logvar), torch.exp(dynamics.min_logvar)], dim=1),
        dynamics.carry,
        dynamics.elites,
        dynamics.penalty_members,
        dynamics.low,
        dynamics.high,
        start,
        call.rows,
        batch,
        call.horizon,
        call.step,
        settings.seed,
        dynamics.penalty_coef,
        # None leaves the code out, which would take registers.
        truncation.at if truncation.needs_penalties else None,
        truncation.halt_reward,
        policy.log_std_min if policy else 0.0,
        policy.log_std_max if policy else 0.0,
        *padded,
        mean,
        std,
        torch.zeros(programs, 3, tile.rows, width, dtype=factors, device=device),
        torch.empty(programs, members + 2, tile.rows, heads, dtype=torch.float32, device=device),
        raw,
        OBS=obs_dim,
        ACT=len(dynamics.input_mean) - obs_dim,
        MEMBERS=members,
        LOG_STD=dynamics.log_std,
        OWN_BOUNDS=len(dynamics.max_logvar) > 1,
        ELITES=len(dynamics.elites),
        CHOSEN=len(dynamics.penalty_members),
        SIZES=packed.sizes,
        POLICY_SIZES=packed_policy and packed_policy.sizes,
        ACTIVATION=dynamics.activation,
        POLICY_ACTIVATION=policy and policy.activation,
        PENALTY=dynamics.penalty,
        KEEP_MEMBER=dynamics.keep_member,
        NORM_SIZES=norm_sizes,
        DETERMINISTIC=settings.deterministic,
        MEAN_ACTIONS=settings.mean_actions,
        OPERANDS=settings.operands,
        WIDTH=width,
        HEADS=heads,
        HELD=tile.held,
        ROWS=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _compact(call: RolloutCall, padded: PaddedRollouts, head: int) -> None:
    """Copy the transitions that exist into the ring; see `padded.Compact`."""
    batch, horizon = padded.rewards.shape
    targets = [call.out.arrays.get(name) for name in ROLLOUT_ARRAYS]
    _kernels().compact_kernel[(-(-batch * horizon // _COPIED_ROWS),)](
        call.observations,
        call.rows,
        *padded[:-1],
        padded.offsets(),
        batch,
        horizon,
        *targets,
        *(0 if target is None else target.stride(0) for target in targets),
        head,
        call.out.capacity,
        OBS=call.observations.shape[1],
        ACT=padded.actions.shape[2],
        ROWS=_COPIED_ROWS,
    )


def _refusal_of_gpu(dtype: str, capability: tuple[int, int]) -> str | None:
    """Return why a GPU of such a compute capability cannot serve one of `_SERVED`, or None."""
    if dtype in ("bfloat16", "tfloat32") and capability < (8, 0):
        return f"{dtype} needs compute capability 8.0, the GPU has {capability[0]}.{capability[1]}"
    if dtype != "float32" and capability[0] in (10, 11):
        return f"compute capability {capability[0]}: Triton 3.6 compiles products in {dtype} to a trap"
    return None


class TritonBackend(Backend):
    """float32 arrays on a GPU, or on the CPU if interpreted; products in `_SERVED`; chosen by name only."""

    name = "triton"
    trains = None

    @override
    def status(self) -> BackendStatus:
        kernels, reason = _load()
        if kernels is None:
            return BackendStatus(self.name, False, reason)
        if kernels.INTERPRETED:
            reason = "interpreted on the CPU, slowly, as TRITON_INTERPRET=1 asks"
            return BackendStatus(self.name, True, reason, by_name_only=True)
        if not torch.cuda.is_available():
            reason = "PyTorch sees no GPU; TRITON_INTERPRET=1 interprets the kernels on the CPU"
            return BackendStatus(self.name, False, reason)
        # "auto" does not choose it until it has been tested on a GPU.
        reason = f"{torch.cuda.get_device_name()}; not tested on a GPU yet"
        return BackendStatus(self.name, True, reason, by_name_only=True)

    @override
    def refusal(self, need: Need) -> str | None:
        if need.training is not None:
            return "makes rollouts, does not train"
        interpreted = _kernels().INTERPRETED
        if need.dtype not in _SERVED:
            return f"serves {', '.join(_SERVED)}, not {need.dtype}"
        if reason := refuse_penalty(need, PENALTIES):
            return reason
        if need.device.type != ("cpu" if interpreted else "cuda"):
            served = "CPU tensors, as it is interpreted" if interpreted else "CUDA tensors"
            return f"serves {served}, not {need.device}"
        if interpreted and need.dtype == "bfloat16":
            return "Triton's interpreter multiplies bfloat16 wrongly"
        return (
            None
            if interpreted
            else _refusal_of_gpu(need.dtype, torch.cuda.get_device_capability(need.device))
        )

    @override
    def step(self, call: StepCall) -> StepResult:
        dynamics = pack(call.dynamics.weights, call.dynamics.biases, call.settings.operands)
        return padded_step(functools.partial(_launch, (dynamics, None)), call)

    @override
    def least_values(self, call: ValuesCall) -> torch.Tensor:
        return least_values(call)

    @override
    def rollout(self, call: RolloutCall) -> RolloutCounts:
        networks = (
            pack(call.dynamics.weights, call.dynamics.biases, call.settings.operands),
            pack(call.policy.weights, call.policy.biases, call.settings.operands),
        )
        return padded_rollout(functools.partial(_launch, networks), _compact, call)
