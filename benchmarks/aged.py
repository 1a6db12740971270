"""Compare SAC's update rate of a trained network with a fresh one's: `python -m benchmarks.aged`.

Adam's moments of parameters that no longer have a gradient shrink until they are denormal numbers, on which
some processors are slow. Both networks make the same updates in turn, on the same random data with a reward
that can be learned. The fresh one makes so few of them that hardly a moment becomes denormal.
"""

from functools import partial
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import run_command
from benchmarks.record import RESULTS, write_record
from mopo_fast.bench.measure import interleave
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import SACConfig, TrainingDtype
from mopo_fast.data import Transitions
from mopo_fast.data.table import in_table
from mopo_fast.doctor import examine
from mopo_fast.sac import SAC

OBS_DIM, ACT_DIM, ROWS = 17, 6, 100_000
# A moment of 1 that decays by a tenth an update is denormal after 829, a smaller one somewhat sooner.
MOST_FRESH_UPDATES = 800


def main(
    *,
    updates: int = 15_000,
    rounds: int = 15,
    json: Path | None = None,
    quiet: bool = False,
) -> None:
    """Print the updates per second of both networks on one thread, in both precisions.

    Args:
        updates: Updates that the trained network has made before.
        rounds: Rounds, each with both networks.
        json: File of the results (default: benchmarks/results/aged.json).
        quiet: Show no progress bar.
    """
    findings, results = examine(), {}
    data = in_table(_transitions())
    buffer = RingBuffer.over(in_table(_transitions()))
    buffer.advance(ROWS)
    in_round = MOST_FRESH_UPDATES // (rounds + 1)
    table = Table("precision", f"after {updates:,} updates", "fresh", "times as fast", "denormal moments")
    for dtype in get_args(TrainingDtype):
        trained, fresh = _sac(dtype), _sac(dtype)
        trained.update_many(data, buffer, updates, seed=0)
        seconds = interleave(
            {
                name: partial(_update, sac, data, buffer, in_round)
                for name, sac in (("trained", trained), ("fresh", fresh))
            },
            rounds,
            f"aged: {dtype}",
            quiet,
        )
        rates = {name: in_round / value for name, value in seconds.items()}
        share = _denormal_share(trained)
        ratio = rates["trained"] / rates["fresh"]
        table.add_row(
            dtype, f"{rates['trained']:,.0f}", f"{rates['fresh']:,.0f}", f"{ratio:.2f}", f"{share:.1%}"
        )
        results[dtype] = {"updates_per_second": rates, "share_of_denormal_moments": share}
    Console().print(table)
    path = json or RESULTS / "aged.json"
    settings = {"updates": updates, "rounds": rounds, "updates_in_round": in_round, "threads": 1}
    write_record(path, "aged", findings, {"settings": settings, "results": results})
    print(path)


def _update(sac: SAC, data: Transitions, buffer: RingBuffer, updates: int) -> None:
    sac.update_many(data, buffer, updates, seed=sac.updates)


def _sac(dtype: TrainingDtype) -> SAC:
    return SAC(OBS_DIM, ACT_DIM, SACConfig(dtype=dtype), backend="cpu", threads=1)


def _transitions() -> Transitions:
    generator = torch.Generator().manual_seed(0)
    observations, following = torch.randn(2, ROWS, OBS_DIM, generator=generator)
    return Transitions(
        observations=observations,
        actions=torch.randn(ROWS, ACT_DIM, generator=generator).tanh(),
        rewards=observations[:, 0].tanh(),
        next_observations=following,
        terminals=torch.zeros(ROWS, dtype=torch.bool),
    )


def _denormal_share(sac: SAC) -> float:
    least = torch.finfo(torch.float32).tiny
    moments = [
        moment
        for name in ("actor", "critic")
        for moment in (*sac.optimizers[name].exp_avgs, *sac.optimizers[name].exp_avg_sqs)
    ]
    count: int = sum(int(((moment != 0.0) & (moment.abs() < least)).sum()) for moment in moments)
    total: int = sum(moment.numel() for moment in moments)
    return count / total


if __name__ == "__main__":
    run_command(main)
