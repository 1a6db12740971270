"""Train OfflineRL-Kit as shipped and with our kernels, and compare what they have learnt, epoch by epoch.

    python -m benchmarks.compat.offlinerl_kit_parity CHECKOUT

Both ways have the same data, the same fitted dynamics and, seed by seed, the same initial networks. Their
random numbers differ. The two results of a seed are therefore a pair, and the mean of the pairs' differences
has a 95 % interval by Student's t.
"""

import csv
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

import mopo_fast
from benchmarks.command import run_command
from benchmarks.compat.offlinerl_kit_scripts import Algorithm, make_trainer, without_output
from benchmarks.record import write_record
from mopo_fast import Transitions
from mopo_fast.collect import collect
from mopo_fast.compat.offlinerl_kit import EnsembleDynamics, fuse_rollout, fuse_trainer
from mopo_fast.doctor import examine
from mopo_fast.utils.progress import progress_bar
from mopo_fast.utils.statistics import student_interval

Values = dict[str, list[float]]

# States, and their actions, at which Q and the entropy are computed.
_PROBES = 2000
# Columns of the logger's table that are no result of the training.
_OTHERS = ("eval/", "timestep", "rollout_info/num_transitions")


def main(
    checkout: Annotated[Path, Positional],
    *,
    algorithm: Algorithm = "mopo",
    task: str = "hopper",
    rows: int = 20_000,
    seeds: int = 5,
    epochs: int = 5,
    updates: int = 500,
    batch_size: int = 5000,
    length: int = 5,
    fit_epochs: int = 20,
    threads: int | None = None,
    json: Path | None = None,
    quiet: bool = False,
) -> None:
    """Print the means over the seeds of both ways after the last epoch; write those of all epochs.

    Args:
        checkout: Folder of OfflineRL-Kit.
        algorithm: Algorithm, with the settings of its run script except for those below.
        task: Task of the data set, whose actions are random.
        rows: Transitions of the data set.
        seeds: Number of seeds of each way.
        epochs: Epochs of a training.
        updates: Updates of an epoch, after one rollout.
        batch_size: Start states of a rollout.
        length: Steps of a rollout.
        fit_epochs: Maximal number of epochs of the dynamics' fit, which is OfflineRL-Kit's own. RAMBO's
            updates of the dynamics come once an epoch, with a tenth as many steps as an epoch has updates.
        threads: CPU threads of PyTorch. On a busy machine, one is faster than PyTorch's default.
        json: File of the results.
    """
    settings = {name: value for name, value in locals().items() if name not in ("checkout", "json", "quiet")}
    checkout = checkout.resolve()
    if threads is not None:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, progress_bar("train", 2 * seeds, quiet=quiet) as bar:
        data = mopo_fast.load_dataset(collect(f"{task}-random", rows, out=folder, quiet=True))
        arguments = ["--task", f"{task}-random-v2"]
        for name, value in (("rollout-freq", updates), ("rollout-batch-size", batch_size)):
            arguments += [f"--{name}", str(value)]
        for name, value in (("rollout-length", length), ("epoch", epochs), ("step-per-epoch", updates)):
            arguments += [f"--{name}", str(value)]
        arguments += ["--eval_episodes", "1"]
        if algorithm == "rambo":
            arguments += ["--dynamics-update-freq", str(updates), "--bc-epoch", "1"]
        make = functools.partial(make_trainer, checkout, algorithm, data, folder=folder)
        fitted = tempfile.mkdtemp(dir=folder)
        make(arguments, fit_epochs=fit_epochs).policy.dynamics.save(fitted)
        arguments += ["--load-dynamics-path", fitted]
        # COMBO keeps its own `learn`.
        take_over = _fuse_rollout if algorithm == "combo" else fuse_trainer
        ways: dict[str, Callable[[list[str]], Any]] = {
            "theirs": make,
            "ours": functools.partial(make, dynamics=EnsembleDynamics, take_over=take_over),
        }
        runs: dict[str, list[Values]] = {way: [] for way in ways}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for seed in range(seeds):
            for way, call in ways.items():
                trainer = call([*arguments, "--seed", str(seed)])
                trainer.policy._adv_train_steps = updates // 10
                started = time.perf_counter()
                runs[way].append(_results(train_recorded(trainer, data)))
                seconds[way].append(time.perf_counter() - started)
                bar.advance()
    results = [
        {"quantity": name, "epochs": [_compare(name, epoch, runs) for epoch in range(epochs)]}
        for name in runs["theirs"][0]
    ]
    _print(results)
    if json is not None:
        record = {"settings": settings, "seconds": seconds, "results": results}
        write_record(json.resolve(), "compat.offlinerl_kit_parity", examine(), record)


def _fuse_rollout(trainer: Any) -> None:
    fuse_rollout(trainer.policy)


class _Schedule:
    """A trainer's schedule of the learning rate, which looks at the policy after each epoch."""

    def __init__(self, trainer: Any, data: Transitions, on_epoch: Callable[[], None]) -> None:
        self._schedule, self._policy, self._on_epoch = trainer.lr_scheduler, trainer.policy, on_epoch
        rows = probe_rows(len(data))
        # RAMBO's states are normalised, so that its buffer's rows are taken and not the data's.
        buffer = trainer.real_buffer
        self._observations, self._actions = (
            torch.from_numpy(array[rows]) for array in (buffer.observations, buffer.actions)
        )
        self.seen: Values = {"q": [], "entropy": [], "alpha at the end": []}

    def step(self) -> None:
        if self._schedule is not None:
            self._schedule.step()
        policy = self._policy
        critics = policy.critics if hasattr(policy, "critics") else (policy.critic1, policy.critic2)
        # The fork keeps the training's random numbers.
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            q = torch.stack([critic(self._observations, self._actions) for critic in critics])
            _, log_prob = policy.actforward(self._observations)
        self.seen["q"].append(float(q.amin(0).mean()))
        self.seen["entropy"].append(-float(log_prob.mean()))
        self.seen["alpha at the end"].append(float(policy._alpha))
        self._on_epoch()


def train_recorded(trainer: Any, data: Transitions, on_epoch: Callable[[], None] = lambda: None) -> Values:
    """Train; return each quantity's value of each epoch.

    The quantities are the columns of the trainer's log, and q, entropy and alpha at the end of each epoch:
    means of the smallest Q, and of minus the log-density, over 2000 rows of the data.

    Args:
        trainer: OfflineRL-Kit's trainer.
        data: the data set.
        on_epoch: called after the updates of each epoch.
    """
    schedule = trainer.lr_scheduler = _Schedule(trainer, data, on_epoch)
    with without_output():
        trainer.train()
    with open(Path(trainer.logger.record_dir, "policy_training_progress.csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {**{name: [float(row[name]) for row in rows] for name in sorted(rows[0])}, **schedule.seen}


def probe_rows(count: int) -> npt.NDArray[np.int64]:
    """Return the rows of `count`, at which Q and the entropy are computed."""
    return np.linspace(0, count - 1, _PROBES).astype(np.int64)


def _results(values: Values) -> Values:
    return {name: each for name, each in values.items() if not name.startswith(_OTHERS)}


def _compare(name: str, epoch: int, runs: dict[str, list[Values]]) -> dict[str, Any]:
    theirs, ours = ([run[name][epoch] for run in runs[way]] for way in ("theirs", "ours"))
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    return {
        "theirs": {"mean": statistics.fmean(theirs), "interval": _interval(theirs), "all": theirs},
        "ours": {"mean": statistics.fmean(ours), "interval": _interval(ours), "all": ours},
        "difference": {"mean": statistics.fmean(differences), "interval": _interval(differences)},
        "within_their_range": min(theirs) <= statistics.fmean(ours) <= max(theirs),
    }


def _interval(values: list[float]) -> list[float]:
    """Return the 95 % interval of the mean by Student's t."""
    return list(student_interval(values))


def _print(results: list[dict[str, Any]]) -> None:
    """Print the last epoch: means over the seeds, and the least and the largest of them in brackets."""
    table = Table("after the last epoch", "as shipped", "ours", "difference: 95 % interval")
    for result in results:
        last = result["epochs"][-1]
        cells = [
            f"{last[way]['mean']:.4g} ({min(last[way]['all']):.4g}, {max(last[way]['all']):.4g})"
            for way in ("theirs", "ours")
        ]
        low, high = last["difference"]["interval"]
        table.add_row(result["quantity"], *cells, f"({low:.2g}, {high:.2g})")
    Console(width=110).print(table)
    every = [epoch for result in results for epoch in result["epochs"]]
    within = sum(epoch["within_their_range"] for epoch in every)
    covering = sum(low <= 0 <= high for low, high in (epoch["difference"]["interval"] for epoch in every))
    print(
        f"{len(every)} comparisons, one for each quantity and epoch. In {within}, our mean is within the"
        f" range of theirs. In {covering}, the interval of the difference contains 0."
    )


if __name__ == "__main__":
    run_command(main)
