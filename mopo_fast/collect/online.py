"""Train SAC in the environment, and collect D4RL's tiers from it: medium, expert and the replays.

In an epoch every environment takes `epoch_steps` steps, in rounds of `round_steps`. After each round SAC
makes one update per step taken. An evaluation and a checkpoint end the epoch. An epoch depends only on the
last checkpoint and on (seed, epoch), so a training that was killed continues to the same bits.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from typing_extensions import TypedDict

from mopo_fast.buffer import RingBuffer, row_bytes
from mopo_fast.collect.uniform import MAX_PATH, UNIFORM
from mopo_fast.config import OnlineConfig, ZInit, to_dict
from mopo_fast.data.hdf5_writer import new_file
from mopo_fast.data.local import local_folder
from mopo_fast.data.rewards import relabeller
from mopo_fast.data.transitions import DATA_ARRAYS, Transitions
from mopo_fast.errors import InputError
from mopo_fast.evaluate import evaluate
from mopo_fast.policy import Actor
from mopo_fast.run.folder import first_difference
from mopo_fast.sac import SAC
from mopo_fast.simulation import make_episodes
from mopo_fast.tasks import Task, get_task
from mopo_fast.utils.atomic import atomic_path, parse_json_as
from mopo_fast.utils.kinds import Count, Number
from mopo_fast.utils.lock import locked
from mopo_fast.utils.machine import check_memory, torch_threads
from mopo_fast.utils.progress import Bar, progress_bar
from mopo_fast.utils.seeds import ONLINE, derive_seed
from mopo_fast.utils.tensors import load_into, load_metadata, load_tensors, save_tensors

Rows = dict[str, npt.NDArray[Any]]

# Purposes of random numbers, the second element of a seed's path.
_RESET, _ACT, _UPDATE, _EVALUATE, _SAMPLE = range(5)
# Number of environments that sample from a finished policy.
_SAMPLERS = 10


class _Paths:
    """Paths side by side in a MuJoCo environment; each ends at a fall or after `MAX_PATH` steps."""

    def __init__(self, task: Task, count: int, threads: int) -> None:
        self.episodes = make_episodes(task.env_id, count, threads, task.recorded)
        self.observations = np.zeros((count, task.obs_dim), dtype=np.float32)
        self.lengths = np.zeros(count, dtype=np.int64)
        self.recorded = task.recorded
        self.all = np.arange(count)

    def __enter__(self) -> "_Paths":
        return self

    def __exit__(self, *error: object) -> None:
        self.episodes.close()

    def begin(self, i: int, seed: int) -> None:
        self.observations[i] = self.episodes.reset(i, seed)
        self.lengths[i] = 0

    def step(self, actions: npt.NDArray[np.float32], rows: Rows, at: Any) -> list[int]:
        """Take a step on every path, write the paths' steps to `rows` at `at`, and return the ended paths."""
        for name in ("qpos", "qvel"):
            rows[f"infos/{name}"][at] = self.episodes.physics(name)
        rows["observations"][at], rows["actions"][at] = self.observations, actions
        step = self.episodes.step(actions, self.all)
        self.observations[:], rows["rewards"][at] = step.observations, step.rewards
        self.lengths += 1
        for name in self.recorded:
            rows[f"infos/{name}"][at] = step.info[name]
        # MuJoCo resets an unstable simulation to time 0.
        seconds = self.lengths * self.episodes.environment.unwrapped.dt
        stable = np.abs(self.episodes.physics("time") - seconds) <= 1e-6 * seconds
        if not (stable.all() and np.isfinite(self.observations).all()):
            raise InputError("the simulation became unstable; choose another seed")
        limit = self.lengths == MAX_PATH
        rows["next_observations"][at] = self.observations
        # At the step limit D4RL writes a time-out, never a terminal.
        rows["terminals"][at], rows["timeouts"][at] = step.terminated & ~limit, limit
        return np.flatnonzero(step.terminated | limit).tolist()

    def new_rows(self, *shape: int) -> Rows:
        """Allocate D4RL's arrays for `shape` steps."""
        model, obs_dim = self.episodes.environment.unwrapped.model, self.observations.shape[1]
        return {
            "observations": np.empty((*shape, obs_dim), np.float32),
            "actions": np.empty((*shape, model.nu), np.float32),
            "rewards": np.empty(shape, np.float32),
            "next_observations": np.empty((*shape, obs_dim), np.float32),
            "terminals": np.empty(shape, bool),
            "timeouts": np.empty(shape, bool),
            "infos/action_log_probs": np.empty(shape, np.float32),
            "infos/qpos": np.empty((*shape, model.nq)),
            "infos/qvel": np.empty((*shape, model.nv)),
            **{f"infos/{name}": np.empty(shape) for name in self.recorded},
        }


def _draw(actor: Actor | None, seed: int, *shape: int) -> torch.Tensor:
    """Draw standard normal noise for the actor's actions, or uniform actions where there is no actor."""
    generator = torch.Generator().manual_seed(seed)
    if actor is None:
        return torch.empty(shape).uniform_(-1.0, 1.0, generator=generator)
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def _act(actor: Actor | None, observations: npt.NDArray[np.float32], drawn: torch.Tensor) -> tuple[Any, Any]:
    """Return actions [batch, act_dim] and their log-probabilities [batch]."""
    if actor is None:
        return drawn.numpy(), -drawn.shape[-1] * math.log(2.0)
    actions, log_probs = actor.sample(torch.from_numpy(observations), drawn)
    return actions.numpy(), log_probs.numpy()


class _Evaluated(TypedDict):
    """A row of progress.csv."""

    epoch: Count
    steps: Count
    updates: Count
    return_mean: Number
    return_std: Number
    score_mean: Number | None
    score_std: Number | None


class _Record(TypedDict):
    """The values of a checkpoint that are not tensors."""

    settings: dict[str, Any]
    epoch: Annotated[int, Field(ge=1)]
    evaluations: list[_Evaluated]


class OnlineTraining:
    """The training of SAC on one task with one seed, in a folder of its own.

    It continues from the folder's checkpoint if there is one.

    Args:
        folder: folder of the training.
        task: task with an environment.
        seed: seed of all random numbers.
        config: settings of the training.
        threads: number of threads of the SAC updates.

    Attributes:
        medium: actor of the medium tier, once it was reached.
        evaluations: results of all evaluations, in order.
        epoch: number of finished epochs.

    Raises:
        InputError: a setting is out of range, or the folder holds a damaged training or one with other
            settings.
    """

    def __init__(self, folder: Path, task: Task, seed: int, config: OnlineConfig, threads: int) -> None:
        config.validate()
        self.folder, self.task, self.seed, self.config = folder, task, seed, config
        self.sac = SAC(task.obs_dim, task.act_dim, config.sac, seed=seed, threads=threads)
        self.epoch_rows = config.environments * config.epoch_steps
        check_memory(
            "the replay",
            config.epochs * self.epoch_rows * row_bytes(task.obs_dim, task.act_dim),
            "cpu",
            "epochs, epoch_steps or environments",
        )
        self.buffer = RingBuffer(config.epochs * self.epoch_rows, task.obs_dim, task.act_dim)
        self.medium = copy_actor(self.sac.actor)
        self.evaluations: list[_Evaluated] = []
        self.epoch = 0
        if (folder / "state.safetensors").exists():
            self._load()

    @property
    def medium_epoch(self) -> int | None:
        """Epoch after which the policy was good enough for medium; None if it never was or has no score."""
        if self.task.max_return is None:
            return None
        scores = [one["score_mean"] for one in self.evaluations if one["score_mean"] is not None]
        for last in range(self.config.medium_window - 1, len(scores)):
            recent = scores[last + 1 - self.config.medium_window : last + 1]
            if statistics.fmean(recent) >= self.config.medium_score:
                return int(self.evaluations[last]["epoch"])
        return None

    @property
    def policies(self) -> dict[str, tuple[Actor, int | None]]:
        """Actors of the medium and expert tiers, each with the epoch after which it was taken."""
        return {"medium": (self.medium, self.medium_epoch), "expert": (self.sac.actor, self.epoch)}

    def run(self, *, until_medium: bool, quiet: bool) -> None:
        """Train until there is a medium policy, or to the last epoch.

        Args:
            until_medium: stop at the medium policy.
            quiet: show no progress bar.

        Raises:
            InputError: the simulation or SAC diverged, or the disk is full.
        """
        goal = f" to a score of {self.config.medium_score:g}" if until_medium else ""
        label, total = f"train {self.task.name}{goal}", self.config.epochs * self.epoch_rows
        with (
            _Paths(self.task, self.config.environments, self.sac.threads) as paths,
            progress_bar(label, total, completed=len(self.buffer), quiet=quiet) as bar,
        ):
            while self.epoch < self.config.epochs and not (until_medium and self.medium_epoch):
                self._train_epoch(paths, bar)
                self._save()

    def _train_epoch(self, paths: _Paths, bar: Bar) -> None:
        config, epoch, began = self.config, self.epoch + 1, time.perf_counter()
        actor = self.sac.actor if epoch > config.random_epochs else None
        rows = paths.new_rows(config.epoch_steps, config.environments)
        drawn = _draw(actor, self._derive_seed(_ACT, epoch), *rows["actions"].shape)
        resets = itertools.count()
        for i in range(config.environments):
            paths.begin(i, self._derive_seed(_RESET, epoch, next(resets)))
        for step in range(config.epoch_steps):
            actions, rows["infos/action_log_probs"][step] = _act(actor, paths.observations, drawn[step])
            for i in paths.step(actions, rows, step):
                paths.begin(i, self._derive_seed(_RESET, epoch, next(resets)))
            done = step + 1
            if done % config.round_steps:
                continue
            self._add_to_replay({key: array[done - config.round_steps : done] for key, array in rows.items()})
            if actor is not None:
                updates = config.round_steps * config.environments
                seed = self._derive_seed(_UPDATE, epoch, done)
                self.sac.update_many(self.buffer.storage, self.buffer, updates, seed)
                rate = done * config.environments / (time.perf_counter() - began)
                bar.update(completed=len(self.buffer), note=f"{self._last_score()}{rate:.0f} updates/s")
        # The next epoch begins new paths, so the last ones are cut.
        rows["timeouts"][-1] = ~rows["terminals"][-1]
        save_tensors(self._rows_path(epoch), {key: torch.from_numpy(array) for key, array in rows.items()})
        self.epoch = epoch
        if actor is not None:
            seed = self._derive_seed(_EVALUATE, epoch)
            result = evaluate(actor, self.task, episodes=config.episodes, seed=seed, threads=self.sac.threads)
            self.evaluations.append(
                {
                    "epoch": epoch,
                    "steps": epoch * self.epoch_rows,
                    "updates": self.sac.updates,
                    "return_mean": result.return_mean,
                    "return_std": result.return_std,
                    "score_mean": result.score_mean,
                    "score_std": result.score_std,
                }
            )
        if self.medium_epoch == epoch:
            self.medium = copy_actor(self.sac.actor)

    def _derive_seed(self, *path: int) -> int:
        return derive_seed(self.seed, ONLINE, *path)

    def _last_score(self) -> str:
        if not self.evaluations:
            return ""
        last = self.evaluations[-1]
        score = last["score_mean"]
        return f"return {last['return_mean']:.1f}, " if score is None else f"score {score:.1f}, "

    def _add_to_replay(self, rows: Rows) -> None:
        """Append rows [steps, environments, ...] to the replay buffer."""
        arrays: dict[str, Any] = {name: torch.from_numpy(rows[name]).flatten(0, 1) for name in DATA_ARRAYS}
        rewards = arrays["rewards"]
        self.buffer.append(Transitions(**arrays, raw_rewards=rewards, penalties=torch.zeros_like(rewards)))

    def _rows_path(self, epoch: int) -> Path:
        return self.folder / f"rows-{epoch:06}.safetensors"

    @functools.cached_property
    def _layout(self) -> Rows:
        """Arrays with the shapes and types of an epoch's rows."""
        with _Paths(self.task, 1, 1) as paths:
            return paths.new_rows(self.config.epoch_steps, self.config.environments)

    def _rows(self, epoch: int) -> Rows:
        path = self._rows_path(epoch)
        tensors = load_tensors(path)
        if tensors.keys() != self._layout.keys():
            raise InputError(f"{path} must hold {', '.join(self._layout)}, got {', '.join(tensors)}"[:1000])
        rows = {name: np.empty_like(array) for name, array in self._layout.items()}
        load_into(path, tensors, {name: torch.from_numpy(array) for name, array in rows.items()})
        return rows

    def replay(self, epochs: int) -> Iterator[Rows]:
        """Yield the steps of the first `epochs` epochs, path by path."""
        for epoch in range(1, epochs + 1):
            yield {
                key: array.swapaxes(0, 1).reshape(-1, *array.shape[2:])
                for key, array in self._rows(epoch).items()
            }

    def _settings(self) -> dict[str, Any]:
        # The round trip turns values into those that JSON reads back, such as lists for tuples.
        settings = {"task": self.task.name, "seed": self.seed, "config": to_dict(self.config)}
        return dict(json.loads(json.dumps(settings)))

    def _save(self) -> None:
        tensors = self.sac.state() | {
            f"medium.{key}": value for key, value in self.medium.state_dict().items()
        }
        record = {"settings": self._settings(), "epoch": self.epoch, "evaluations": self.evaluations}
        save_tensors(self.folder / "state.safetensors", tensors, {"record": json.dumps(record)})
        if self.evaluations:
            lines = [",".join("" if x is None else str(x) for x in row.values()) for row in self.evaluations]
            with atomic_path(self.folder / "progress.csv") as temporary:
                temporary.write_text("\n".join([",".join(self.evaluations[0]), *lines]) + "\n")

    def _load(self) -> None:
        path = self.folder / "state.safetensors"
        try:
            record = parse_json_as(load_metadata(path).get("record", "{}"), _Record, path)
        except InputError as error:
            raise InputError(
                f"{path} is no checkpoint ({error}); remove {self.folder} to train from the start"
            ) from error
        if record["settings"] != (settings := self._settings()):
            difference = first_difference(record["settings"], settings) or "other settings"
            raise InputError(
                f"{self.folder} holds a training with {difference}; remove it, or choose another seed"
            )
        try:
            self._restore(path, record)
        except InputError as error:
            raise InputError(f"{error}; remove {self.folder} to train from the start") from error

    def _restore(self, path: Path, record: _Record) -> None:
        """Restore a checkpoint with these settings, and the rows beside it."""
        tensors, config = load_tensors(path), self.config
        self.sac.load_state(tensors, path)
        load_into(path, tensors, {f"medium.{name}": t for name, t in self.medium.state_dict().items()})
        self.epoch, self.evaluations = record["epoch"], record["evaluations"]

        def counts(epoch: int) -> tuple[int, int, int]:
            return epoch, epoch * self.epoch_rows, max(0, epoch - config.random_epochs) * self.epoch_rows

        found = [(one["epoch"], one["steps"], one["updates"]) for one in self.evaluations]
        trained = range(config.random_epochs + 1, self.epoch + 1)
        if self.epoch > config.epochs or counts(self.epoch)[2] != self.sac.updates:
            raise InputError(
                f"{path} holds {self.sac.updates} updates, which do not fit its epoch {self.epoch}"
            )
        scored = self.task.max_return is not None
        if found != [counts(epoch) for epoch in trained] or any(
            (one["score_mean"] is not None, one["score_std"] is not None) != (scored, scored)
            for one in self.evaluations
        ):
            raise InputError(f"{path} does not hold one evaluation per epoch")
        for epoch in range(1, self.epoch + 1):
            self._add_to_replay(self._rows(epoch))

    def describe(self, policy: str) -> dict[str, Any]:
        """Return the metadata of a policy: its training, its scores, and its weights in D4RL's layout.

        Args:
            policy: one of `policies`.

        Raises:
            InputError: the training ended without a medium policy.
        """
        actor, epoch = self.policies[policy]
        if epoch is None:
            scores = [one["score_mean"] for one in self.evaluations if one["score_mean"] is not None]
            raise InputError(
                f"the mean score of {self.config.medium_window} evaluations in a row never reached"
                f" {self.config.medium_score:g}, the best score was {max(scores):.1f}; choose another seed"
            )
        reached = next(evaluation for evaluation in self.evaluations if evaluation["epoch"] == epoch)
        tensors: dict[str, torch.Tensor] = {}
        for i in range(len(actor.hidden)):
            tensors |= {f"fc{i}/weight": actor.weights[i].T, f"fc{i}/bias": actor.biases[i]}
        heads = zip(actor.weights[-1].chunk(2, dim=1), actor.biases[-1].chunk(2), strict=True)
        for layer, (weight, bias) in zip(("last_fc", "last_fc_log_std"), heads, strict=True):
            tensors |= {f"{layer}/weight": weight.T, f"{layer}/bias": bias}
        return {
            "trained_steps": reached["steps"],
            "updates": reached["updates"],
            **{
                name: value
                for name, value in reached.items()
                if name.startswith(("return_", "score_")) and value is not None
            },
            "policy/nonlinearity": actor.activation,
            "policy/output_distribution": "tanh_gaussian",
            **{f"policy/{name}": tensor.detach().numpy() for name, tensor in tensors.items()},
        }


def copy_actor(actor: Actor) -> Actor:
    """Return another actor with the same parameters."""
    copied = Actor(**actor.settings())
    copied.load_state_dict(actor.state_dict())
    return copied


def sample_paths(task: Task, actor: Actor | None, seed: int, threads: int) -> Iterator[Rows]:
    """Yield paths 0, 1, 2, ... without end, with the actor's actions, or uniform ones without an actor."""
    with _Paths(task, _SAMPLERS, threads) as paths:
        rows = paths.new_rows(_SAMPLERS, MAX_PATH)
        drawn = torch.empty(rows["actions"].shape)
        finished: dict[int, Rows] = {}
        indices = itertools.count()
        running = [0] * _SAMPLERS

        def begin(i: int) -> None:
            running[i] = next(indices)
            paths.begin(i, derive_seed(seed, _RESET, running[i]))
            drawn[i] = _draw(actor, derive_seed(seed, _ACT, running[i]), *drawn.shape[1:])

        for i in range(_SAMPLERS):
            begin(i)
        for wanted in itertools.count():
            while wanted not in finished:
                at = paths.all, paths.lengths.copy()
                actions, rows["infos/action_log_probs"][at] = _act(actor, paths.observations, drawn[at])
                for i in paths.step(actions, rows, at):
                    length = paths.lengths[i]
                    finished[running[i]] = {key: array[i, :length].copy() for key, array in rows.items()}
                    begin(i)
            yield finished.pop(wanted)


def collect_online(
    path: Path,
    task_name: str,
    tier: str,
    steps: int,
    metadata: dict[str, Any],
    *,
    seed: int,
    threads: int,
    config: OnlineConfig,
    z_init: ZInit,
    quiet: bool,
) -> None:
    """Write one data set from SAC trained online. `collect` checks the arguments.

    Raises:
        InputError: `OnlineTraining` or its `run` raised it, or another process trains in the folder.
    """
    task, relabel = get_task(task_name), None
    if task.online_env_id is not None:
        relabel, marks = relabeller(task_name, z_init)
        metadata = metadata | marks | {"trained_in": task.online_env_id}
        task = dataclasses.replace(task, env_id=task.online_env_id)
    folder = local_folder() / "online" / f"{task_name}-seed{seed}"
    with contextlib.ExitStack() as stack:
        # Actions must not depend on the number of threads; batches of a few rows need only one.
        stack.enter_context(torch_threads(1))
        parts: list[tuple[int, Iterator[Rows]]] = []
        if tier == "random":
            metadata = metadata | {"policy": UNIFORM}
            parts.append((steps, sample_paths(task, None, derive_seed(seed, ONLINE, _SAMPLE), threads)))
        else:
            stack.enter_context(locked(folder))
            training = OnlineTraining(folder, task, seed, config, threads)
            training.run(until_medium=tier in ("medium", "medium-replay"), quiet=quiet)
            metadata = metadata | {
                "algorithm": "SAC",
                "config": json.dumps(to_dict(config)),
                "backend": training.sac.backend,
                "torch": str(torch.__version__),
            }
            names = {
                "medium-expert": ("medium", "expert"),
                "medium-replay": ("medium",),
                "full-replay": ("expert",),
            }
            for name in names.get(tier, (tier,)):
                description = training.describe(name)
                prefix = f"{name}/" if tier == "medium-expert" else ""
                metadata |= {prefix + key: value for key, value in description.items()}
                if tier.endswith("replay"):
                    steps = description["trained_steps"]
                    parts.append((steps, training.replay(steps // training.epoch_rows)))
                else:
                    paths_seed = derive_seed(seed, ONLINE, _SAMPLE, list(training.policies).index(name))
                    parts.append((steps, sample_paths(task, training.policies[name][0], paths_seed, threads)))
        total = sum(count for count, _ in parts)
        bar = stack.enter_context(progress_bar(f"write {path.name}", total, quiet=quiet))
        file = stack.enter_context(new_file(path, total, metadata))
        for count, paths in parts:
            end = file.written + count
            while file.written < end:
                rows = {key: array[: end - file.written] for key, array in next(paths).items()}
                if relabel is not None:
                    rows = relabel(rows)
                if file.written + len(rows["rewards"]) == end:
                    # The last path may be cut, which is a time-out.
                    rows["timeouts"][-1] = not rows["terminals"][-1]
                file.append(rows)
                bar.update(completed=file.written)
