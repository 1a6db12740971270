"""Compare all contenders of a kernel, which take turns in every round: `python -m benchmarks.compare sac`.

Results go to standard output and, with the machine, versions, commit and date, to a JSON file.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import Positional

from benchmarks.baselines import (
    BFloat16Fit,
    BFloat16SAC,
    CompiledBFloat16Fit,
    CompiledBFloat16SAC,
    CompiledFit,
    CompiledSAC,
    EagerFit,
    PlainSAC,
    RecordedFit,
    RecordedSAC,
)
from benchmarks.baselines_rollout import (
    BatchedBFloat16Rollout,
    BatchedFloat16Rollout,
    BFloat16Rollout,
    CompiledBatchedBFloat16Rollout,
    CompiledBFloat16Rollout,
    CompiledFloat16Rollout,
    CompiledRollout,
    LinearRollout,
    NumpyRollout,
)
from benchmarks.command import run_command
from benchmarks.record import RESULTS, write_record
from mopo_fast.bench.measure import bench, to_table
from mopo_fast.bench.roofline import check_picture, write_roofline
from mopo_fast.config import ActorQ, SACConfig
from mopo_fast.doctor import examine
from mopo_fast.errors import InputError
from mopo_fast.utils.machine import resolve_threads

# Contenders on a CPU besides the kernel and the reference.
BASELINES: dict[str, dict[str, Callable[..., Any]]] = {
    "rollout": {
        "PyTorch, linears": LinearRollout,
        "torch.compile": CompiledRollout,
        "PyTorch, NumPy between": NumpyRollout,
        "PyTorch, bfloat16": BFloat16Rollout,
        "torch.compile, bfloat16": CompiledBFloat16Rollout,
    },
    "sac": {
        "PyTorch, plain": PlainSAC,
        "torch.compile": CompiledSAC,
        "PyTorch, bfloat16": BFloat16SAC,
        "torch.compile, bfloat16": CompiledBFloat16SAC,
    },
    "fit": {
        "PyTorch, eager": EagerFit,
        "torch.compile": CompiledFit,
        "PyTorch, bfloat16": BFloat16Fit,
        "torch.compile, bfloat16": CompiledBFloat16Fit,
    },
}
# Contenders on a GPU.
GPU_BASELINES: dict[str, dict[str, Callable[..., Any]]] = {
    "rollout float16": {
        "PyTorch, float16": BatchedFloat16Rollout,
        "torch.compile, float16": CompiledFloat16Rollout,
    },
    "rollout bfloat16": {
        "PyTorch, batched, bfloat16": BatchedBFloat16Rollout,
        "torch.compile, batched, bfloat16": CompiledBatchedBFloat16Rollout,
    },
    "sac": {
        "PyTorch, plain": PlainSAC,
        "torch.compile": CompiledSAC,
        "torch.compile, CUDA graphs": RecordedSAC,
    },
    "fit": {
        "PyTorch, eager": EagerFit,
        "torch.compile": CompiledFit,
        "torch.compile, CUDA graphs": RecordedFit,
    },
}
if importlib.util.find_spec("jax"):
    from benchmarks.baselines_jax import JaxFit, JaxRollout, JaxSAC

    for kernel, baseline in {"rollout": JaxRollout, "sac": JaxSAC, "fit": JaxFit}.items():
        BASELINES[kernel]["JAX"] = baseline


def compare(
    kernel: Annotated[Literal["rollout", "sac", "fit"], Positional],
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    critics: int = SACConfig.critics,
    target_critics: int | None = None,
    actor_q: ActorQ = SACConfig.actor_q,
    batch_size: int = SACConfig.batch_size,
    rounds: int = 5,
    threads: int | None = None,
    json: Path | None = None,
    plot: Path | None = None,
    quiet: bool = False,
) -> None:
    """Time all contenders of a kernel in turn; print the first one's rate divided by each other's.

    Args:
        kernel: The kernel to compare.
        dtype: Precision of the kernel's products.
        critics: Number of SAC's critics.
        target_critics: Number of critics that SAC's targets are taken from (default: all).
        actor_q: Q value that SAC's actor raises.
        batch_size: Transitions of one of SAC's updates.
        rounds: Rounds in which all contenders take turns; medians count.
        threads: CPU threads (default: one for each core).
        json: File of the results (default: benchmarks/results/KERNEL-cpu-ISA.json, with settings that are
            not the defaults behind the kernel's name).
        plot: Also draw a roofline of the results to this .png, .svg or .pdf file.
        quiet: Show no progress bar.
    """
    if plot is not None:
        check_picture(plot)
    threads, findings = resolve_threads(threads), examine()
    # JAX uses every core that the process may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    # Rounds so long that what the first steps lose to cold caches counts as little as in a training.
    options: dict[str, Any] = {"fit": {"steps": 256}}.get(kernel, {})
    config = SACConfig(critics=critics, target_critics=target_critics, actor_q=actor_q, batch_size=batch_size)
    if kernel == "sac":
        config.validate()
        options = {"config": config, "updates": _updates(config)}
    elif config != SACConfig():
        raise InputError(f"critics and batches are settings of sac, not of {kernel}")
    if dtype != "float32":
        options["dtype"] = dtype
    rows = bench(
        kernel,
        backend="cpu",
        rounds=rounds,
        threads=threads,
        quiet=quiet,
        baselines=BASELINES[kernel],
        **options,
    )
    Console().print(to_table(rows))
    name = "-".join([kernel, *_differences(config), *([] if dtype == "float32" else [dtype])])
    path = json or RESULTS / f"{name}-cpu-{findings.machine.isa}.json"
    write_record(path, "compare", findings, {"rows": [dataclasses.asdict(row) for row in rows]})
    if plot is not None:
        write_roofline(plot, rows)
    print(path)


def _updates(config: SACConfig) -> int:
    """Return the updates of a round: 500 of the usual size, fewer of a larger one."""
    usual = SACConfig()
    share = usual.critics * usual.batch_size / (config.critics * config.batch_size)
    return max(10, min(500, int(500 * share)))


def _differences(config: SACConfig) -> list[str]:
    """Return the settings that are not the defaults, for the name of a file."""
    usual, words = SACConfig(), []
    if (config.critics, config.batch_size) != (usual.critics, usual.batch_size):
        words.append(f"{config.critics}x{config.batch_size}")
    if config.target_critics is not None:
        words.append(f"target{config.target_critics}")
    return words + ([] if config.actor_q == usual.actor_q else [config.actor_q])


if __name__ == "__main__":
    run_command(compare)
