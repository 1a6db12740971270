"""Compare the return with the discounted one, which SAC raises: `python -m benchmarks.study.discount RUN`.

Every policy that a run has kept plays some episodes in the true environment.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.command import run_command
from benchmarks.record import write_record
from benchmarks.study.train import STUDY
from mopo_fast.doctor import examine
from mopo_fast.errors import InputError
from mopo_fast.evaluate import evaluate
from mopo_fast.policy import Actor
from mopo_fast.run.folder import read_config, read_summary
from mopo_fast.run.kept import kept_policies
from mopo_fast.utils.progress import progress_bar

Array = npt.NDArray[np.float64]

# Measures of a policy, in the order of `play`.
MEASURES = ("return", "discounted", "length")


def main(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    *,
    episodes: int = 20,
    seed: int = 0,
    json: Path | None = None,
    quiet: bool = False,
) -> None:
    """Play episodes with the policies that some runs have kept, and print both returns and the lengths.

    Args:
        runs: Folders of finished runs on one data set.
        episodes: Episodes of each policy.
        seed: Seed of the episodes.
        json: File of the results (default: benchmarks/results/study/discount-DATASET.json).
        quiet: Show no progress bar.
    """
    if not runs:
        raise InputError("give the folder of a run")
    results: list[dict[str, Any]] = []
    with progress_bar("policies", sum(len(kept_policies(run)) for run in runs), quiet=quiet) as bar:
        for run in runs:
            config, summary = read_config(run), read_summary(run)
            means = []
            for file in kept_policies(run).values():
                actor = Actor.load(run, tensors_from=file)
                measured = play(actor, summary["task"], config.sac.discount, episodes, seed)
                means.append([float(values.mean()) for values in measured])
                bar.advance(1)
            settings = {"seed": summary["seed"], "penalty_coef": summary["penalty_coef"]}
            measures = dict(zip(MEASURES, map(list, zip(*means, strict=True)), strict=True))
            results.append({**settings, "updates": list(kept_policies(run)), **measures})
    table = Table(*HEADER)
    for row in table_rows(results):
        table.add_row(*row)
    Console().print(table)
    path = json or STUDY / f"discount-{summary['dataset']}.json"
    settings = {"episodes": episodes, "seed": seed, "discount": config.sac.discount}
    write_record(path, "study.discount", examine(), {"settings": settings, "runs": results})
    print(path)


def play(actor: Actor, task: str, discount: float, episodes: int, seed: int) -> tuple[Array, Array, Array]:
    """Evaluate the policy's mean action.

    Returns:
        Sums of the rewards of each episode, the same discounted, and numbers of steps, [episodes] each.
    """
    discounted, weight = np.zeros(episodes), 1.0

    def add(rewards: Array) -> None:
        nonlocal weight
        discounted[:] += weight * rewards
        weight *= discount

    played = evaluate(actor, task, episodes=episodes, seed=seed, on_rewards=add)
    return np.array(played.returns), discounted, np.array(played.lengths)


HEADER = ("setting", "updates", "return", "steps", "discounted return", "discounted return of each seed")


def table_rows(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the means over the seeds, a row for each lambda and number of updates."""
    rows = []
    for coef in sorted({run["penalty_coef"] for run in runs}):
        group = sorted((run for run in runs if run["penalty_coef"] == coef), key=lambda run: run["seed"])
        for i, updates in enumerate(group[0]["updates"]):
            whole, discounted, length = (np.mean([run[measure][i] for run in group]) for measure in MEASURES)
            each = ", ".join(f"{run['discounted'][i]:.0f}" for run in group)
            row = [f"lambda {coef:g}", f"{updates:,}", f"{whole:,.0f}", f"{length:.0f}"]
            rows.append([*row, f"{discounted:.0f}", each])
    return rows


if __name__ == "__main__":
    run_command(main)
