"""Train by OfflineRL-Kit, with our kernels, and here: `python -m benchmarks.study.parity CHECKOUT`.

For each data set and seed, `mopo-fast train --preset offlinerl-kit` fits an ensemble and trains. The ensemble
is converted, and OfflineRL-Kit's own script trains in it, once as shipped and once with `fuse_trainer`. All
three have the same file, whose successors are read as OfflineRL-Kit reads them, and float32. A training by
OfflineRL-Kit cannot be resumed, so a stopped one begins again.
"""

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import load_file

from benchmarks.command import run_command
from benchmarks.compat.offlinerl_kit_parity import probe_rows, train_recorded
from benchmarks.compat.offlinerl_kit_scripts import TaskEnvironment, make_trainer
from benchmarks.study.experiments import HALFCHEETAH, HOPPER, parity_training
from benchmarks.study.train import STUDY, keep, make
from mopo_fast import Transitions, load_dataset
from mopo_fast.compat import convert_checkpoint, offlinerl_kit
from mopo_fast.run.checkpoint import last_checkpoint, select_group
from mopo_fast.run.folder import read_config
from mopo_fast.run.log import read_rows
from mopo_fast.sac import SAC
from mopo_fast.tasks import get_task
from mopo_fast.utils.atomic import write_json
from mopo_fast.utils.progress import progress_bar

# Ways to train, by the names of their files.
WAYS = {
    "preset": "mopo-fast, preset offlinerl-kit",
    "kernels": "OfflineRL-Kit with the kernels",
    "shipped": "OfflineRL-Kit as shipped",
}


@dataclass(frozen=True)
class Case:
    """A data set and a seed.

    Attributes:
        dataset: name of the data set.
        seed: the seed.
        folder: folder of its trainings.
        data: the data, as OfflineRL-Kit reads them.
        epochs: epochs of 1000 updates.
    """

    dataset: str
    seed: int
    folder: Path
    data: Transitions
    epochs: int


def main(
    checkout: tyro.conf.Positional[Path],
    *,
    out: Path,
    datasets: tuple[str, ...] = (HOPPER, HALFCHEETAH),
    seeds: tuple[int, ...] = (0, 1, 2),
    ways: tuple[Literal["preset", "kernels", "shipped"], ...] = ("preset", "kernels", "shipped"),
    epochs: int = 50,
    kept: Path = STUDY,
    quiet: bool = False,
) -> None:
    """Make all trainings that are not finished.

    Args:
        checkout: Folder of OfflineRL-Kit.
        out: Folder of the whole study. The runs' folders are made below it.
        datasets: Names of the data sets.
        seeds: Seeds; each has an ensemble of its own.
        ways: Ways to train, of preset, kernels and shipped. The others need the ensemble of preset.
        epochs: Epochs of 1000 updates; the cosine schedule of the learning rate ends with the last one.
        kept: Folder of the results.
        quiet: Show no progress bars.
    """
    checkout, out = checkout.resolve(), out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for dataset in datasets:
            folder = f"parity/{dataset}/seed{seed}"
            data = load_dataset(dataset, compat="offlinerl-kit")
            case = Case(dataset, seed, out / folder, data, epochs)
            # Made before a training of half an hour, which would be lost without it.
            (kept / folder).mkdir(parents=True, exist_ok=True)
            for way in ways:
                path = kept / folder / f"{way}.json"
                if path.exists():
                    continue
                print(f"{folder}: {WAYS[way]}", flush=True)
                started = time.perf_counter()
                if way == "preset":
                    training = parity_training(dataset, seed, epochs)
                    make(training, out, quiet=quiet)
                    keep(out, training.folder, kept)
                    results = _of_run(case)
                else:
                    results = _train(checkout, case, fused=way == "kernels", quiet=quiet)
                record = {"dataset": dataset, "seed": seed, "way": way, **results}
                write_json(path, record | {"seconds": time.perf_counter() - started})


def _train(checkout: Path, case: Case, *, fused: bool, quiet: bool) -> dict[str, Any]:
    """Train by OfflineRL-Kit's script, in the ensemble of the case's run."""
    run = case.folder / "preset"
    config = read_config(run)
    task = get_task(config.task)
    converted = case.folder / "converted"
    convert_checkpoint(run, converted, "mopo-fast", "offlinerl-kit", overwrite=True)
    arguments = {
        "task": f"{case.dataset.removesuffix('-local')}-v2",
        "seed": case.seed,
        "rollout-length": config.rollout.horizon,
        "penalty-coef": config.rollout.penalty_coef,
        "epoch": case.epochs,
        "load-dynamics-path": converted,
        "device": "cpu",
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar("train", case.epochs, quiet=quiet) as bar,
    ):
        trainer = make_trainer(
            checkout,
            "mopo",
            case.data,
            [part for name, value in arguments.items() for part in (f"--{name}", str(value))],
            folder,
            environment=TaskEnvironment(task, case.data),
            dynamics=offlinerl_kit.EnsembleDynamics if fused else None,
            take_over=offlinerl_kit.fuse_trainer if fused else None,
        )
        values = train_recorded(trainer, case.data, bar.advance)
    scores = values["eval/normalized_episode_reward"]
    assert task.min_return is not None and task.max_return is not None
    scale = (task.max_return - task.min_return) / 100
    return {
        "updates": [int(steps) for steps in values["timestep"]],
        "score": scores,
        "return": [task.min_return + scale * score for score in scores],
        "alpha": values["alpha"],
        "q_at_end": values["q"][-1],
        "entropy_at_end": values["entropy"][-1],
        "alpha_at_end": values["alpha at the end"][-1],
    }


@torch.no_grad()
def _of_run(case: Case) -> dict[str, Any]:
    """Return the same quantities of the case's own run."""
    run = case.folder / "preset"
    config, rows = read_config(run), read_rows(run / "progress.csv")
    sac = SAC(case.data.obs_dim, case.data.act_dim, config.sac, total_updates=config.steps)
    path = last_checkpoint(run)
    assert path is not None
    sac.load_state(select_group(load_file(path), "sac"), path)
    chosen = torch.from_numpy(probe_rows(len(case.data)))
    observations, actions = case.data.observations[chosen], case.data.actions[chosen]
    noise = torch.randn(actions.shape, generator=torch.Generator().manual_seed(0))
    _, log_prob = sac.actor.sample(observations, noise, epsilon=config.sac.log_prob_epsilon)
    return {
        "updates": [int(row["updates"]) for row in rows],
        "score": [float(row["score_mean"]) for row in rows],
        "return": [float(row["return_mean"]) for row in rows],
        "alpha": [float(row["alpha"]) for row in rows],
        "q_at_end": float(sac.critic(observations, actions).amin(0).mean()),
        "entropy_at_end": -float(log_prob.mean()),
        "alpha_at_end": min(float(sac.log_alpha.exp()), config.sac.alpha_max or math.inf),
    }


if __name__ == "__main__":
    run_command(main)
