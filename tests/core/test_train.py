"""Test a complete small run in hopper, its folder, and the refusals of `train`."""

import contextlib
import csv
import dataclasses
import json
import math
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from garbled import GONE, changes, check_json, check_tensors, expect, read_tensors
from safetensors.torch import load_file, save_file
from small_runs import CONFIG, assert_same_results, progress
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mopo_fast.buffer import RingBuffer
from mopo_fast.collect import collect
from mopo_fast.config import TrainConfig
from mopo_fast.data import Transitions, load_dataset
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.evaluate import Evaluator, evaluate
from mopo_fast.fit import data_sha256, read_fit
from mopo_fast.policy import Actor
from mopo_fast.run.log import (
    COLUMNS,
    END_COLUMNS,
    EVALUATION_COLUMNS,
    LATER_COLUMNS,
    PENALTY_COLUMNS,
    append_row,
)
from mopo_fast.run.population import train_many
from mopo_fast.run.resolve import make_engine, resolve
from mopo_fast.tasks import BOXES, TASKS
from mopo_fast.train import Training, train
from mopo_fast.utils.seeds import EVALUATE, derive_seed

pytestmark = pytest.mark.usefixtures("unrendered")


@pytest.fixture(scope="module")
def finished(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(config, out, quiet=True)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Copy the finished run without its summary and report, so that it can be resumed or damaged."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "summary.json").unlink()
    (out / "report.html").unlink()
    return out


def train_alone(config: TrainConfig, out: Path) -> dict[str, Any]:
    """Call `train` with an existing report, which it does not write again, to save time."""
    out.mkdir(exist_ok=True)
    (out / "report.html").touch()
    return train(config, out, resume=True, quiet=True)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "progress.csv").open() as file:
        return list(csv.DictReader(file))


class TestRunFolder:
    def test_summary(self, finished: Path, config: TrainConfig) -> None:
        summary = json.loads((finished / "summary.json").read_text())
        expected = {
            "updates": 25, "epochs": 3, "device": "cpu", "dtype": "float32", "dataset": config.dataset,
            "task": "hopper", "seed": 1, "horizon": 5, "penalty": "max_aleatoric", "penalty_coef": 1.0,
        }  # fmt: skip
        assert {name: summary[name] for name in expected} == expected
        assert summary["backend"] in ("cpu", "reference")
        assert {"mopo_fast", "python", "torch", "gymnasium", "mujoco"} == set(summary["versions"])
        seconds = summary["seconds"]
        assert set(seconds) == {"fit", "rollout", "sac", "evaluate", "total"}
        assert all(value > 0 for value in seconds.values())
        assert seconds["total"] >= sum(seconds.values()) - seconds["total"]

    def test_summary_scores_the_saved_policy(self, finished: Path, config: TrainConfig) -> None:
        summary = json.loads((finished / "summary.json").read_text())
        seed = derive_seed(config.seed, EVALUATE, 3)
        result = evaluate(Actor.load(finished), TASKS["hopper"], episodes=2, seed=seed)
        for name in ("score_mean", "score_std", "return_mean", "return_std"):
            assert summary[name] == getattr(result, name)

    def test_config_holds_the_resolved_values(self, finished: Path) -> None:
        written = json.loads((finished / "config.json").read_text())
        assert written["task"] == "hopper"
        assert (written["rollout"]["horizon"], written["rollout"]["penalty_coef"]) == (5, 1.0)

    def test_progress_has_a_row_per_epoch(self, finished: Path) -> None:
        table = rows(finished)
        assert list(table[0]) == list(COLUMNS)
        assert [row["epoch"] for row in table] == ["1", "2", "3"]
        # `steps` cuts the last epoch short.
        assert [row["updates"] for row in table] == ["10", "20", "25"]
        # Evaluations follow every second epoch and the last one.
        assert [bool(row["score_mean"]) for row in table] == [False, True, True]
        for row in table:
            assert float(row["penalty"]) > 0 and 0 < float(row["terminal_share"]) < 1
            assert 50 <= int(row["rows"]) <= 250 and row["non_finite"] == "0"
        sizes = [int(row["rows"]) for row in table]
        kept = [min(sum(sizes[: i + 1]), 250) for i in range(3)]
        assert [int(row["buffer_size"]) for row in table] == kept

    def test_tensorboard_holds_the_same(self, finished: Path) -> None:
        board = EventAccumulator(str(finished))
        board.Reload()
        events = board.Scalars("sac/critic_loss")
        assert [event.step for event in events] == [10, 20, 25]
        values = [float(row["critic_loss"]) for row in rows(finished)]
        assert [event.value for event in events] == pytest.approx(values)
        assert [event.step for event in board.Scalars("evaluation/score_mean")] == [20, 25]
        fit = EventAccumulator(str(finished / "tensorboard-fit"))
        fit.Reload()
        assert len(fit.Scalars("holdout_mse/member_2")) == 3

    def test_other_files(self, finished: Path) -> None:
        assert EnsembleDynamics.load(finished).members == 3
        assert (finished / "report.html").exists()
        assert [path.name for path in (finished / "checkpoint").iterdir()] == ["epoch-000003.safetensors"]
        assert not list(finished.rglob("*.tmp"))


class TestResume:
    def test_a_finished_run_is_left_alone(self, finished: Path, config: TrainConfig) -> None:
        before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
        summary = train(config, finished, resume=True, quiet=True)
        assert summary == json.loads((finished / "summary.json").read_text())
        assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}

    def test_a_lost_report_is_written_again(
        self, finished: Path, config: TrainConfig, tmp_path: Path
    ) -> None:
        out = tmp_path / "run"
        shutil.copytree(finished, out)
        (out / "report.html").unlink()
        train(config, out, resume=True, quiet=True)
        assert (out / "report.html").exists()

    def test_seconds_add_up_over_sessions(self, finished: Path, run: Path, config: TrainConfig) -> None:
        first = json.loads((finished / "summary.json").read_text())["seconds"]
        second = train_alone(config, run)["seconds"]
        assert second["fit"] == first["fit"]
        assert second["total"] > float(rows(finished)[-1]["seconds_total"])
        assert second["sac"] == first["sac"] and second["evaluate"] == first["evaluate"]

    def test_the_fit_is_not_counted_again(self, run: Path, config: TrainConfig) -> None:
        fit = json.loads((run / "fit.json").read_text())
        (run / "fit.json").write_text(json.dumps(fit | {"seconds": 1e4}))
        assert 0 < train_alone(config, run)["seconds"]["total"] < 1e3
        (run / "summary.json").unlink()
        for checkpoint in (run / "checkpoint").iterdir():
            checkpoint.unlink()
        assert train_alone(config, run)["seconds"]["total"] > 1e4

    def test_what_lies_deeper_is_left_alone(self, run: Path, config: TrainConfig) -> None:
        """Temporary files in other folders may belong to another run, which is about to rename them."""
        ours, theirs = (folder / ".a.12345678.tmp" for folder in (run / "checkpoint", run / "other"))
        theirs.parent.mkdir(parents=True)
        ours.touch()
        theirs.touch()
        train_alone(config, run)
        assert theirs.exists() and not ours.exists()

    def test_an_older_checkpoint_left_by_a_kill_is_removed(self, run: Path, config: TrainConfig) -> None:
        newest = run / "checkpoint" / "epoch-000003.safetensors"
        shutil.copy(newest, newest.with_name("epoch-000002.safetensors"))
        train_alone(config, run)
        assert list((run / "checkpoint").iterdir()) == [newest]

    def test_a_folder_with_a_run_needs_resume(self, finished: Path, config: TrainConfig) -> None:
        ways = (
            f"continue it with `mopo-fast train --resume {finished}`, or with `train(config, out,"
            " resume=True)` in Python"
        )
        with pytest.raises(InputError, match=re.escape(f"already holds a run; {ways}")):
            train(config, finished, quiet=True)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"seed": 2}, "seed = 1, not 2"),
            ({"steps": 30}, "steps = 25, not 30"),
            ({"rollout": dataclasses.replace(CONFIG.rollout, horizon=1)}, "rollout.horizon = 5, not 1"),
            ({"sac": dataclasses.replace(CONFIG.sac, hidden=(16,))}, r"sac.hidden = \[16, 16\], not \[16\]"),
        ],
    )
    def test_another_config_is_refused_by_name(
        self, finished: Path, config: TrainConfig, change: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(InputError, match=named):
            train(dataclasses.replace(config, **change), finished, resume=True, quiet=True)

    def test_a_setting_that_the_run_did_not_have_is_its_default(
        self, run: Path, finished: Path, config: TrainConfig
    ) -> None:
        for name, part in (("config.json", "sac"), ("fit.json", "config")):
            written = json.loads((run / name).read_text())
            del written[part]["polyak" if part == "sac" else "improvement"]
            (run / name).write_text(json.dumps(written))
        other = dataclasses.replace(config, sac=dataclasses.replace(config.sac, polyak=0.01))
        with pytest.raises(InputError, match=r"sac.polyak = 0.005, not 0.01"):
            train(other, run, resume=True, quiet=True)
        train(config, run, resume=True, quiet=True)
        assert_same_results(run, finished)

    def test_a_run_begins_with_its_config(self, config: TrainConfig, tmp_path: Path) -> None:
        write_config(tmp_path, config)
        with pytest.raises(InputError, match="already holds a run"):
            train(config, tmp_path, quiet=True)

    def test_a_fit_by_another_seed_is_refused(self, run: Path, config: TrainConfig) -> None:
        fit = json.loads((run / "fit.json").read_text())
        (run / "fit.json").write_text(json.dumps(fit | {"seed": 2}))
        with pytest.raises(InputError, match=r"fit.json was made with seed = 2, not 1"):
            train(config, run, resume=True, quiet=True)

    def test_other_data_is_refused(self, run: Path, config: TrainConfig) -> None:
        path = Path(config.dataset)
        original = path.read_bytes()
        try:
            collect("hopper-random", 600, seed=5, out=path, overwrite=True, quiet=True)
            with pytest.raises(InputError, match=r"fit.json was made with data_sha256"):
                train(config, run, resume=True, quiet=True)
            reused = dataclasses.replace(config, dynamics_from=str(run))
            write_config(run, reused)
            with pytest.raises(InputError, match=r"epoch-000003.safetensors was made with other data than"):
                train(reused, run, resume=True, quiet=True)
        finally:
            path.write_bytes(original)

    @pytest.mark.parametrize("spoil", ["truncated", "empty", "garbage", "no state", "nan", "shape"])
    def test_a_corrupt_checkpoint_is_one_error(self, run: Path, config: TrainConfig, spoil: str) -> None:
        path = run / "checkpoint" / "epoch-000003.safetensors"
        content = path.read_bytes()
        if spoil == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif spoil == "empty":
            path.write_bytes(b"")
        elif spoil == "garbage":
            path.write_bytes(content[:8] + b"x" * 200 + content[208:])
        elif spoil == "no state":
            save_with(path, {}, state=None)
        elif spoil == "nan":
            save_with(path, {"sac.log_alpha": torch.tensor(math.nan)})
        else:
            save_with(path, {"sac.actor.weights.0": torch.zeros(2, 2)})
        with pytest.raises(InputError, match=r"epoch-000003\.safetensors"):
            train(config, run, resume=True, quiet=True)

    @pytest.mark.parametrize("name", ["checkpoint", "tensorboard-fit"])
    @pytest.mark.parametrize("kind", ["a link", "a dangling link", "a file"])
    def test_a_folder_that_leads_into_another_run_is_refused(
        self, run: Path, finished: Path, config: TrainConfig, tmp_path: Path, name: str, kind: str
    ) -> None:
        other = tmp_path / "other"
        if kind == "a link":
            shutil.copytree(finished / name, other)
            (other / ".config.json.12345678.tmp").touch()
        before = sorted(tmp_path.glob("other/*"))
        shutil.rmtree(run / name)
        (run / name).symlink_to(other) if "link" in kind else (run / name).touch()
        with pytest.raises(InputError, match=rf"/{name} is a link or no folder"):
            train(config, run, resume=True, quiet=True)
        assert sorted(tmp_path.glob("other/*")) == before

    def test_another_ensemble_is_noticed(self, run: Path, config: TrainConfig) -> None:
        """The smallest change is noticed, even if no rollout becomes shorter or longer."""
        ensemble = EnsembleDynamics.load(run)
        with torch.no_grad():
            ensemble.biases[0][0, 0] += 1e-7
        ensemble.save(run)
        with pytest.raises(
            InputError, match=r"made with another ensemble than the one in .*; restore that ensemble's files"
        ):
            train(config, run, resume=True, quiet=True)

    @pytest.mark.parametrize("declared", ["log_scale", "absolute"])
    def test_an_ensemble_that_is_declared_another_is_noticed(
        self, run: Path, config: TrainConfig, declared: str
    ) -> None:
        ensemble = EnsembleDynamics.load(run)
        if declared == "log_scale":
            ensemble.log_scale = "std"
        else:
            ensemble.absolute[2] = True
        ensemble.save(run)
        with pytest.raises(InputError, match="was made with another ensemble"):
            train(config, run, resume=True, quiet=True)


def write_config(out: Path, config: TrainConfig) -> None:
    resolved, _ = resolve(config)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(resolved)))


def save_with(path: Path, changes: dict[str, torch.Tensor], state: str | None = "kept") -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors | changes, path, metadata if state else {})


class TestReuse:
    def test_dynamics_of_another_run_after_a_kill(
        self, finished: Path, config: TrainConfig, tmp_path: Path
    ) -> None:
        reused = dataclasses.replace(config, dynamics_from=str(finished))
        # If a run is killed while it writes its first file, only this temporary file is left.
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".config.json.12345678.tmp").touch()
        summary = train_alone(reused, tmp_path / "run")
        assert not list((tmp_path / "run").rglob("*.tmp"))
        assert summary["seconds"]["fit"] == 0.0 and summary["updates"] == 25
        for name in ("dynamics.safetensors", "dynamics.json", "fit.json", "policy.safetensors"):
            assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()

    def test_goes_on_when_the_other_run_is_gone(
        self, finished: Path, config: TrainConfig, tmp_path: Path
    ) -> None:
        source, out = tmp_path / "source", tmp_path / "run"
        shutil.copytree(finished, source)
        reused = dataclasses.replace(config, dynamics_from=str(source))
        train_alone(reused, out)
        (out / "summary.json").unlink()
        shutil.rmtree(source)
        assert train_alone(reused, out)["updates"] == 25

    @pytest.mark.parametrize("name", ["fit", "tensorboard-fit"])
    def test_a_fit_inside_the_runs_folder_is_left_alone(
        self, finished: Path, config: TrainConfig, tmp_path: Path, name: str
    ) -> None:
        fit = tmp_path / "run" / name
        shutil.copytree(finished, fit)
        train_alone(dataclasses.replace(config, dynamics_from=str(fit)), tmp_path / "run")
        assert EnsembleDynamics.load(fit).members == 3

    def test_a_missing_or_unfit_ensemble_is_refused(self, config: TrainConfig, tmp_path: Path) -> None:
        missing = dataclasses.replace(config, dynamics_from=str(tmp_path / "none"))
        with pytest.raises(InputError, match=r"none/dynamics\.json does not exist"):
            train(missing, tmp_path / "run", quiet=True)
        EnsembleDynamics(17, 6).save(tmp_path / "cheetah")
        unfit = dataclasses.replace(config, dynamics_from=str(tmp_path / "cheetah"))
        with pytest.raises(InputError, match=r"is for 17 observation .* the task hopper has 11 and 3"):
            train(unfit, tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("name", ["dynamics.safetensors", "dynamics.json", "fit.json"])
    @pytest.mark.parametrize("target", ["the file", "a secret", "/dev/zero"])
    def test_links_in_its_folder_are_refused_before_anything_is_written(
        self, finished: Path, config: TrainConfig, tmp_path: Path, name: str, target: str
    ) -> None:
        source, secret = tmp_path / "source", tmp_path / "secret"
        shutil.copytree(finished, source)
        secret.write_text('{"a": "private key"}')
        (source / name).unlink()
        links = {"the file": finished / name, "a secret": secret, "/dev/zero": Path("/dev/zero")}
        (source / name).symlink_to(links[target])
        with pytest.raises(InputError, match=rf"{re.escape(name)} is not a regular file"):
            train(dataclasses.replace(config, dynamics_from=str(source)), tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()

    def test_an_unsound_fit_is_refused_before_anything_is_written(
        self, finished: Path, config: TrainConfig, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        shutil.copytree(finished, source)
        (source / "fit.json").write_text("root:x:0:0")
        with pytest.raises(InputError, match=r"fit\.json is not a readable JSON file"):
            train(dataclasses.replace(config, dynamics_from=str(source)), tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "rollout",
    [
        {"dtype": "float64"},
        {"penalty": "ensemble_std", "penalty_members": "elites", "horizon": 2, "retain_epochs": 3},
        {"termination": "hopper-authors", "penalty": "max_pairwise"},
    ],
)
def test_rollout_options_reach_the_engine(
    rollout: dict[str, Any], finished: Path, config: TrainConfig, tmp_path: Path
) -> None:
    options = dataclasses.replace(config.rollout, **rollout)
    config = dataclasses.replace(config, rollout=options, dynamics_from=str(finished), steps=15)
    summary = train_alone(config, tmp_path / "run")
    assert (summary["dtype"], summary["penalty"]) == (options.dtype or "float32", options.penalty)
    ours, default = rows(tmp_path / "run")[0], rows(finished)[0]
    if options.dtype == "float64":
        assert summary["backend"] == "reference"
        # The cpu backend has no float64. Random draws are the same, so results differ only by rounding.
        assert float(ours["penalty"]) == pytest.approx(float(default["penalty"]), rel=1e-4)
    else:
        assert float(ours["penalty"]) != pytest.approx(float(default["penalty"]), rel=1e-2)
        assert int(ours["rows"]) <= 2 * options.batch_size


def test_the_cosine_schedule_spans_the_run(finished: Path, config: TrainConfig, tmp_path: Path) -> None:
    sac = dataclasses.replace(config.sac, actor_schedule="cosine")
    train_alone(dataclasses.replace(config, sac=sac, dynamics_from=str(finished)), tmp_path / "run")
    first, other = (load_file(out / "policy.safetensors") for out in (finished, tmp_path / "run"))
    # The schedule spans this run; otherwise it would span far more and be nearly constant.
    assert (first["weight_0"] - other["weight_0"]).abs().max() > 1e-4


class TestResolve:
    def test_tuned_values_follow_the_name(self) -> None:
        resolved, task = resolve(
            dataclasses.replace(CONFIG, dataset="data/halfcheetah_medium_expert-v2.hdf5")
        )
        assert task.name == resolved.task == "halfcheetah"
        assert (resolved.rollout.horizon, resolved.rollout.penalty_coef) == (5, 5.0)

    def test_tuned_values_of_others(self) -> None:
        rollout = dataclasses.replace(CONFIG.rollout, tuned="offlinerl-kit")
        config = dataclasses.replace(CONFIG, dataset="walker2d-medium-replay-v2", rollout=rollout)
        resolved, _ = resolve(config)
        assert (resolved.rollout.horizon, resolved.rollout.penalty_coef) == (1, 2.5)

    def test_termination_by_name(self) -> None:
        ensemble = EnsembleDynamics(11, 3, members=2, elites=1, hidden=(8,))
        for name, box in (
            (None, "hopper"),
            ("hopper-authors", "hopper-authors"),
            ("authors", "hopper-authors"),
            ("offlinerl-kit", "hopper-offlinerl-kit"),
        ):
            rollout = dataclasses.replace(CONFIG.rollout, termination=name)
            config, task = resolve(dataclasses.replace(CONFIG, rollout=rollout))
            low = make_engine(config, task, ensemble, "reference")._low
            assert low.tolist() == list(BOXES[box].low)

    def test_given_values_stay(self) -> None:
        rollout = dataclasses.replace(CONFIG.rollout, horizon=2, penalty_coef=0.0)
        resolved, _ = resolve(dataclasses.replace(CONFIG, dataset="walker2d-random-v2", rollout=rollout))
        assert (resolved.rollout.horizon, resolved.rollout.penalty_coef) == (2, 0.0)

    def test_a_task_for_a_nameless_file(self) -> None:
        resolved, task = resolve(dataclasses.replace(CONFIG, dataset="mine.npz", task="hopper"))
        assert task.name == "hopper"
        assert (resolved.rollout.horizon, resolved.rollout.penalty_coef) == (5, 1.0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"dataset": "mine.npz"}, "mine.npz does not exist"),
            ({"dataset": __file__}, "test_train.py is no data set of a known format"),
            ({"task": "cheetah"}, "unknown task 'cheetah'; there are: halfcheetah, hopper"),
            ({"seed": -1}, "seed must not be negative, got -1"),
            ({"steps": 0}, "steps must be at least 1, got 0"),
            ({"device": "tpu9"}, "device 'tpu9' cannot be used"),
            ({"rollout": {"horizon": 0}}, "rollout horizon must be at least 1, got 0"),
            ({"rollout": {"batch_size": 0}}, "rollout batch_size must be at least 1, got 0"),
            ({"rollout": {"interval": -5}}, "rollout interval must be at least 1, got -5"),
            ({"rollout": {"retain_epochs": 0}}, "rollout retain_epochs must be at least 1, got 0"),
            ({"rollout": {"penalty": "max"}}, "unknown penalty 'max'; there are: max_aleatoric"),
            (
                {"rollout": {"penalty_coef": -1.0}},
                "penalty_coef must be finite and not negative, got -1.0",
            ),
            (
                {"rollout": {"penalty_coef": math.nan}},
                r"rollout\.penalty_coef must be finite, got nan",
            ),
            ({"backend": "gpu"}, "unknown backend .gpu."),
            ({"rollout": {"dtype": "float8"}}, "unknown dtype 'float8'"),
            ({"sac": {"real_ratio": -0.1}}, r"real_ratio must be in \[0, 1\], got -0.1"),
            ({"sac": {"batch_size": 0}}, "batch_size must be at least 1, got 0"),
            ({"evaluation": {"episodes": 0}}, "evaluation episodes must be at least 1, got 0"),
            ({"evaluation": {"interval": 0}}, "evaluation interval must be at least 1, got 0"),
            ({"dynamics": {"elites": 9}}, "elites must be 1 to members"),
            ({"dynamics": {"hidden": (16,)}}, "hidden has 1 layers, so weight_decay needs 2 values"),
            ({"dynamics": {"max_logvar": math.nan}}, "max_logvar must be finite, got nan"),
            ({"device": "meta"}, "device 'meta' cannot be used"),
            ({"rollout": {"tuned": "mine"}}, "unknown tuned 'mine'; there are: authors, offlinerl-kit"),
            ({"rollout": {"termination": "mine"}}, "unknown termination 'mine'; there are: .*hopper-authors"),
            ({"rollout": {"termination": "ant"}}, "the termination box has 27 dimensions"),
            (
                {"rollout": {"horizon": 10**10}},
                r"model buffer would take [\d,]+ GiB, cpu has .*; lower horizon",
            ),
            ({"rollout": {"batch_size": 10**12}}, r"lower .*rollout\.batch_size"),
            ({"rollout": {"retain_epochs": 10**12}}, r"lower .*rollout\.retain_epochs"),
            ({"dynamics": {"batch_size": 10**12}}, r"fit would take [\d,]+ GiB, .*; lower batch_size"),
            ({"dynamics": {"hidden": (10**7, 10**7)}}, "fit would take .* members or hidden"),
            ({"sac": {"batch_size": 10**12}}, r"SAC would take [\d,]+ GiB, .*; lower sac\.batch_size"),
            ({"sac": {"hidden": (10**7, 10**7)}}, r"lower .*sac\.hidden"),
            ({"sac": {"critics": 10**12}}, r"lower .*sac\.critics"),
            ({"sac": {"target_entropy": math.nan}}, r"sac\.target_entropy must be finite, got nan"),
            ({"sac": {"log_std_min": -math.inf}}, r"sac\.log_std_min must be finite, got -inf"),
            ({"sac": {"log_std_max": math.inf}}, r"sac\.log_std_max must be finite, got inf"),
            ({"sac": {"alpha_max": math.inf}}, r"sac\.alpha_max must be finite, got inf"),
        ],
    )
    def test_refuses_before_anything_is_written(
        self, change: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        change = {
            name: dataclasses.replace(getattr(CONFIG, name), **value) if isinstance(value, dict) else value
            for name, value in change.items()
        }
        with pytest.raises(InputError, match=message):
            train(dataclasses.replace(CONFIG, **change), tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_refuses_cuda_where_there_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="device 'cuda' cannot be used"):
            train(dataclasses.replace(CONFIG, device="cuda"), tmp_path / "run", quiet=True)


def test_a_data_set_of_another_task_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 11 observation and 3 action .* task halfcheetah has 17 and 6"):
        train(dataclasses.replace(config, task="halfcheetah"), tmp_path / "run", quiet=True)
    # The folder can be used once the mistake is corrected.
    assert not (tmp_path / "run" / "config.json").exists()


def test_actions_in_other_units_are_refused(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_dataset(config.dataset, quiet=True)
    monkeypatch.setattr("mopo_fast.run.resolve.load_configured", lambda *_, **__: data)
    for action in (-2.5, 1.01):
        data.actions[3, 1] = action
        with pytest.raises(
            InputError, match=rf"has actions up to {abs(action)}; scale .* range to \[-1, 1\]"
        ):
            train(config, tmp_path / "run", quiet=True)
    # A value beyond the range by rounding alone is accepted.
    data.actions[3, 1] = 1.0005

    def past_the_check(*_: object) -> None:
        raise InputError("past the check")

    monkeypatch.setattr("mopo_fast.train.make_dynamics", past_the_check)
    with pytest.raises(InputError, match="past the check"):
        train(config, tmp_path / "run", quiet=True)


def test_a_missing_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hopper-none"):
        train(dataclasses.replace(CONFIG, dataset="hopper-none.hdf5"), tmp_path / "run", quiet=True)


def test_a_folder_that_cannot_be_made_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot work in .*file/run"):
        train(config, tmp_path / "file" / "run", quiet=True)


def test_a_full_disk_is_one_error_and_the_run_can_go_on(
    finished: Path, config: TrainConfig, tmp_path: Path
) -> None:
    """The limit of file sizes permits small files but not the first checkpoint."""
    config = dataclasses.replace(config, dynamics_from=str(finished))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*checkpoint/epoch-000001.safetensors"):
            train_alone(config, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    train_alone(config, tmp_path / "run")
    one, other = (load_file(folder / "policy.safetensors") for folder in (finished, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(rows(tmp_path / "run")) == 3


def test_without_penalty(
    finished: Path, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statistics of penalties come from some start states; nothing else changes."""
    rollout = dataclasses.replace(config.rollout, penalty_coef=0.0)
    config = dataclasses.replace(config, rollout=rollout, dynamics_from=str(finished))

    def penalties(name: str) -> tuple[list[float], list[dict[str, str]]]:
        train_alone(config, tmp_path / name)
        table = progress(tmp_path / name)
        for row in table:
            assert row["penalty_share"] == "0.0"
            for quantile in PENALTY_COLUMNS[:3]:
                assert float(row.pop(quantile)) > 0
        return [float(row.pop("penalty")) for row in table], table

    of_all, table = penalties("all")
    monkeypatch.setattr("mopo_fast.train._PENALISED_STARTS", 10)
    of_some, same = penalties("some")
    monkeypatch.setattr("mopo_fast.train.RingBuffer", lambda *sizes, penalties=True: RingBuffer(*sizes))
    stored, stored_table = penalties("stored")
    assert of_all == stored and table == same == stored_table
    assert of_some == pytest.approx(stored, rel=0.2) and of_some != stored
    assert_same_results(tmp_path / "all", tmp_path / "stored")


def test_what_is_measured_changes_nothing(
    finished: Path, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run without its measurements, and the run that measures other rows, has the same parameters."""
    config = dataclasses.replace(config, dynamics_from=str(finished))
    train_alone(config, tmp_path / "with")
    monkeypatch.setattr("mopo_fast.train._MEASURED_ROWS", 3)
    monkeypatch.setattr("mopo_fast.train._MEASURED_PENALTIES", 5)
    train_alone(config, tmp_path / "less")
    monkeypatch.setattr("mopo_fast.sac.SAC.measure", lambda *_: {})
    monkeypatch.setattr(Training, "_describe_penalties", lambda *_: {"penalty": 1.0})
    monkeypatch.setattr(Training, "_describe_ends", lambda *_: {})
    train_alone(config, tmp_path / "without")
    checkpoints = [
        load_file(tmp_path / name / "checkpoint" / "epoch-000003.safetensors")
        for name in ("with", "less", "without")
    ]
    assert checkpoints[0].keys() == checkpoints[1].keys() == checkpoints[2].keys()
    for name, tensor in checkpoints[0].items():
        assert all(torch.equal(tensor, other[name]) for other in checkpoints[1:]), name
    measured = [[row[name] for name in LATER_COLUMNS] for row in rows(tmp_path / "with")]
    assert all(math.isfinite(float(value)) for row in measured for value in row)
    assert measured != [[row[name] for name in LATER_COLUMNS] for row in rows(tmp_path / "less")]
    assert not any(row[name] for row in rows(tmp_path / "without") for name in LATER_COLUMNS)
    for own, other in zip(rows(tmp_path / "with"), rows(tmp_path / "without"), strict=True):
        for name in COLUMNS.keys() - {*LATER_COLUMNS, "penalty"}:
            assert name.startswith("seconds") or own[name] == other[name]


def test_penalties_are_described(finished: Path, config: TrainConfig, tmp_path: Path) -> None:
    resolved, task = resolve(config)
    data = load_dataset(config.dataset, quiet=True)
    shutil.copytree(finished, tmp_path / "run")
    training = Training(resolved, task, tmp_path / "run", data, data_sha256(data), Evaluator(), 0.0)
    values = torch.linspace(0.0, 100.0, 10_001)
    made = Transitions(
        *(torch.zeros(10_001, 1) for _ in range(2)),
        torch.zeros(10_001),
        torch.zeros(10_001, 1),
        torch.zeros(10_001, dtype=torch.bool),
        raw_rewards=torch.tensor([-3.0, 1.0]).repeat(5001)[:10_001],
        penalties=values,
    )
    found = training._describe_penalties(made)
    assert found["penalty"] == pytest.approx(50.0)
    assert [found[name] for name in PENALTY_COLUMNS[:3]] == pytest.approx([50, 90, 99], abs=2.5)
    # The mean penalty is 50 with lambda 1, the mean size of the rewards is 2.
    assert found["penalty_share"] == pytest.approx(50 / 52, rel=1e-3)


def test_a_run_of_an_earlier_version_goes_on(
    finished: Path, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows, and those that wait for an evaluation, lack the later columns."""
    run = tmp_path / "run"
    config = dataclasses.replace(config, steps=30, dynamics_from=str(finished))
    train_alone(config, run)
    (run / "summary.json").unlink()
    earlier = [name for name in COLUMNS if name not in LATER_COLUMNS]
    first, second, third = rows(run)
    (run / "progress.csv").unlink()
    with monkeypatch.context() as patched:
        patched.setattr("mopo_fast.run.log.COLUMNS", dict.fromkeys(earlier, ""))
        append_row(run / "progress.csv", {name: first[name] for name in earlier})
    assert (run / "progress.csv").read_text().splitlines()[0] == ",".join(earlier)
    checkpoint = run / "checkpoint" / "epoch-000003.safetensors"
    tensors, metadata = read_tensors(checkpoint)
    state = json.loads(metadata["state"])
    own = [name for name in earlier if name not in EVALUATION_COLUMNS]
    state["pending"] = [[{name: float(row[name]) for name in own}, False] for row in (second, third)]
    for row, _ in state["pending"]:
        row |= {name: int(row[name]) for name in ("epoch", "updates", "rows", "non_finite", "buffer_size")}
    save_file(tensors, checkpoint, {"state": json.dumps(state)})
    train_alone(dataclasses.replace(config, steps=40), run)
    after = rows(run)
    assert list(after[0]) == list(COLUMNS) and [row["epoch"] for row in after] == ["1", "2", "3", "4"]
    for row, before in zip(after, (first, second, third), strict=False):
        assert row["q"] == before["q"] and not any(row[name] for name in LATER_COLUMNS)
    zeros = "saturation", *END_COLUMNS
    assert all(float(after[3][name]) or name in zeros for name in LATER_COLUMNS)


def test_diverging_training_says_so(finished: Path, config: TrainConfig, tmp_path: Path) -> None:
    rollout = dataclasses.replace(config.rollout, penalty_coef=1e38)
    config = dataclasses.replace(config, rollout=rollout, dynamics_from=str(finished))
    with pytest.raises(InputError, match="SAC diverged"):
        train(config, tmp_path / "run", quiet=True)


class TestGarbledCheckpoint:
    """Change each value of a checkpoint: it raises one `InputError` or the change does no harm."""

    @pytest.fixture
    def checkpoint(self, run: Path) -> Path:
        return run / "checkpoint" / "epoch-000003.safetensors"

    @pytest.fixture
    def restore(self, run: Path, config: TrainConfig, checkpoint: Path) -> Callable[[], None]:
        resolved, task = resolve(config)
        data = load_dataset(config.dataset, quiet=True)
        digest = data_sha256(data)
        # Evaluations are slow and not needed here.
        evaluator = Evaluator()
        evaluator.submit = lambda *_, **__: Future()  # type: ignore[method-assign]

        def restore() -> None:
            Training(resolved, task, run, data, digest, evaluator, 0.0).restore(checkpoint)

        restore()
        return restore

    def with_state(self, checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
        tensors, metadata = read_tensors(checkpoint)
        state = json.loads(metadata["state"])
        change(state)
        save_file(tensors, checkpoint, {"state": json.dumps(state)})

    def test_the_state(self, checkpoint: Path, restore: Callable[[], None]) -> None:
        tensors, metadata = read_tensors(checkpoint)
        state = json.loads(metadata["state"])
        assert state["pending"] == [] and len(state["rollouts"]) > 1
        state["pending"] = [[{name: 1 for name in COLUMNS.keys() - set(EVALUATION_COLUMNS)}, False]]
        state["pending"][0][0] |= {"epoch": 3, "updates": 25}
        for where, other, changed in changes(state):
            save_file(tensors, checkpoint, {"state": json.dumps(changed)})
            # Nothing checks these numbers and lists of numbers, so others are accepted.
            free = where[0] in ("seconds", "evaluation") or (where[0] == "pending" and len(where) > 3)
            number = other is None or (isinstance(other, (int, float)) and not isinstance(other, bool))
            listed = where[:2] in (("evaluation", "returns"), ("evaluation", "lengths")) and other in (
                GONE,
                [],
            )
            none_waits = (where, other) in ((("pending",), []), (("pending", 0), GONE))
            # Version 0.1.0 recorded no instruction set, and another one is a warning.
            elsewhere = where == ("backends", "isa") and (other is GONE or isinstance(other, str))
            expect(restore, (free and number) or listed or none_waits or elsewhere, f"{where} {other}")
        for text in ("", "{", "[]", "null", "[" * 100_000, '{"format_version": NaN}'):
            save_file(tensors, checkpoint, {"state": text})
            expect(restore, False, text[:20])

    def test_the_tensors(self, checkpoint: Path, restore: Callable[[], None]) -> None:
        check_tensors(checkpoint, restore)

    @pytest.mark.parametrize("updates", [-1, 0, 24, 26, 2**40, -(2**63), 2**63 - 1])
    def test_the_number_of_updates(self, checkpoint: Path, restore: Callable[[], None], updates: int) -> None:
        tensors, metadata = read_tensors(checkpoint)
        save_file(tensors | {"sac.updates": torch.tensor(updates)}, checkpoint, metadata)
        with pytest.raises(
            InputError, match=r"Adam's steps are not its -?\d+ updates; delete .*epoch-000003"
        ):
            restore()
        for name in tensors:
            if name.endswith(".step"):
                tensors[name].fill_(updates)
        save_file(tensors | {"sac.updates": torch.tensor(updates)}, checkpoint, metadata)
        with pytest.raises(InputError, match=r"epoch-000003.* updates"):
            restore()

    def test_moments_that_are_negative(self, checkpoint: Path, restore: Callable[[], None]) -> None:
        tensors, metadata = read_tensors(checkpoint)
        tensors["sac.adam.critic.0.exp_avg_sq"][0] = -1.0
        save_file(tensors, checkpoint, metadata)
        with pytest.raises(InputError, match="second moment of Adam is negative"):
            restore()

    @pytest.mark.parametrize("head", [-1, 250, 2**62])
    def test_rows_outside_the_buffer(self, checkpoint: Path, restore: Callable[[], None], head: int) -> None:
        """The rollouts are contiguous, but the first begins outside the buffer."""

        def shift(state: dict[str, Any]) -> None:
            at = head
            for rollout in state["rollouts"]:
                rollout["head"], at = at, (at + rollout["rows"]) % 250

        self.with_state(checkpoint, shift)
        with pytest.raises(
            InputError, match=r"epoch-000003\.safetensors.*(buffer has no row|rollouts.0.head)"
        ):
            restore()

    def test_another_files_name(self, checkpoint: Path, config: TrainConfig, run: Path) -> None:
        checkpoint.rename(checkpoint.with_name("epoch-000002.safetensors"))
        with pytest.raises(InputError, match="holds epoch 3, which does not fit its name"):
            train(config, run, resume=True, quiet=True)

    def test_names_that_are_no_checkpoints(self, checkpoint: Path, config: TrainConfig, run: Path) -> None:
        others = [checkpoint.with_name(f"epoch-{name}.safetensors") for name in ("zzz", "00009", "9999999x")]
        for other in others:
            other.write_text("not ours")
        assert train_alone(config, run)["updates"] == 25
        assert all(other.read_text() == "not ours" for other in others)


def test_a_garbled_fit_is_refused(run: Path) -> None:
    def may_pass(where: tuple[Any, ...], other: Any) -> bool:
        text = where[0] in ("dataset", "data_sha256", "device") and other in ("x", "\x00")
        unread = where[0] in ("backend", "isa", "threads", "improved") or (
            where[0] == "config" and len(where) > 1
        )
        numbers = (
            "seconds",
            "train_loss",
            "holdout_mse",
            "best_mse",
            "seed",
            "holdout",
            "transitions",
            "elites",
        )
        number = isinstance(other, (int, float)) and not isinstance(other, bool)
        return (
            text
            or unread
            or (
                where[0] in numbers
                and (number or (where[0] == "elites" and len(where) == 2 and other is GONE))
            )
        )

    check_json(run / "fit.json", lambda: read_fit(run), may_pass)


@pytest.mark.parametrize("name", ["config.json", "fit.json", "summary.json", "progress.csv", "policy.json"])
@pytest.mark.parametrize("make", ["folder", "pipe", "nothing"])
def test_a_file_that_is_none_is_one_sentence(
    name: str, make: str, run: Path, config: TrainConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    """It raises one `InputError` or the run continues without the file."""
    path = run / name
    path.unlink(missing_ok=True)
    if make == "folder":
        (path / "file").mkdir(parents=True)
    elif make == "pipe":
        os.mkfifo(path)
    with contextlib.suppress(InputError):
        train(config, run, resume=True, quiet=True)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["checkpoint", "tensorboard-fit"])
def test_a_file_where_a_folder_belongs_is_one_sentence(
    name: str, config: TrainConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / name).touch()
    with pytest.raises(InputError, match=rf"{name}.*(choose another folder|with --resume)"):
        train(config, out, quiet=True)


def test_rows_that_the_checkpoint_comes_after_must_be_there(run: Path, config: TrainConfig) -> None:
    lines = (run / "progress.csv").read_text().splitlines(keepends=True)
    for content in ("".join(lines[:3]), "".join([lines[0], *lines[2:]]), ""):
        (run / "progress.csv").write_text(content)
        with pytest.raises(InputError, match=r"progress\.csv does not hold epochs 1 to 3"):
            train(config, run, resume=True, quiet=True)


def test_a_deeply_nested_config_is_refused(run: Path, config: TrainConfig) -> None:
    written = json.loads((run / "config.json").read_text())
    for depth in (50, 400, 900, 10**5):
        deep = json.dumps(written)[:-1] + ', "x": ' + '{"a":' * depth + "1" + "}" * depth + "}"
        (run / "config.json").write_text(deep)
        with pytest.raises(InputError, match=r"x = {.*, not None|config\.json.* (recursion|readable)"):
            train(config, run, resume=True, quiet=True)


def test_a_refused_run_leaves_nothing_behind(config: TrainConfig, tmp_path: Path) -> None:
    few = dataclasses.replace(config.dynamics, holdout_fraction=1e-9)
    absent = dataclasses.replace(config, dataset=str(tmp_path / "hopper-none.hdf5"))
    for refused in (
        absent,
        dataclasses.replace(config, task="halfcheetah"),
        dataclasses.replace(config, dynamics=few),
    ):
        with pytest.raises(InputError):
            train_many(
                [refused, dataclasses.replace(refused, seed=7)], [tmp_path / "a/b/c", tmp_path / "a/d"]
            )
        assert list(tmp_path.iterdir()) == []
    # An existing folder is kept.
    (tmp_path / "e").mkdir()
    with pytest.raises(InputError):
        train(absent, tmp_path / "e", quiet=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["e", ".lock"]


def test_a_full_disk_under_tensorboards_log(config: TrainConfig, finished: Path, tmp_path: Path) -> None:
    """One error is printed without a thread's traceback, and the resumed run ends with the same bits."""
    # The event file of this long fit is the first file to exceed the limit.
    long = dataclasses.replace(
        config.dynamics, hidden=(2,), weight_decay=(0.0, 0.0), max_epochs=250, patience=250
    )
    config = dataclasses.replace(config, dynamics=long)
    command = (
        "import resource, sys, pickle, mopo_fast.train as t; from mopo_fast.errors import InputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))\n"
        "try: t.train(pickle.loads(bytes.fromhex(sys.argv[1])), sys.argv[2], quiet=True)\n"
        "except InputError as error: sys.exit(str(error))\n"
    )
    train_alone(config, tmp_path / "whole")
    (events,) = (tmp_path / "whole" / "tensorboard-fit").iterdir()
    smaller, larger = (path.stat().st_size for path in (tmp_path / "whole" / "fit.json", events))
    assert smaller + 1000 < larger
    arguments = [pickle.dumps(config).hex(), str(tmp_path / "run"), str(larger - 500)]
    result = subprocess.run(
        [sys.executable, "-c", command, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert re.fullmatch(
        r"the log of the fit in .*run cannot be written \(\[Errno 27\] File too large\); remove the cause,"
        r" then give the same command again, `train` with --resume\n",
        result.stderr,
    )
    train_alone(config, tmp_path / "run")
    one, other = (load_file(tmp_path / name / "policy.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    fit = EventAccumulator(str(tmp_path / "run" / "tensorboard-fit"))
    fit.Reload()
    assert len(fit.Scalars("train_loss")) == 250


def test_a_run_truncates_its_rollouts_and_says_so(
    finished: Path, config: TrainConfig, tmp_path: Path
) -> None:
    rollout = dataclasses.replace(config.rollout, truncate_quantile=0.5, member="per_rollout", horizon=20)
    config = dataclasses.replace(config, steps=40, dynamics_from=str(finished), rollout=rollout)
    train_alone(config, tmp_path / "whole")
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())["rollouts"]
    last = rows(tmp_path / "whole")[-1]
    count, shares = config.rollout.batch_size, [float(last[name]) for name in END_COLUMNS]
    assert summary["truncate_at"] > 0 and summary["length"] == float(last["length"])
    assert float(last["length"]) == pytest.approx(int(last["rows"]) / count)
    assert sum(shares) + int(last["non_finite"]) / count == pytest.approx(1.0)
    assert shares[1] > 0.2 and [summary[name] for name in END_COLUMNS] == shares
    # The limit is found again when the run goes on, so that the rollouts are the same.
    half = dataclasses.replace(config, steps=20)
    train_alone(half, tmp_path / "parts")
    train_alone(config, tmp_path / "parts")
    keys = [key for key in last if not key.startswith("seconds")]
    assert [last[key] for key in keys] == [rows(tmp_path / "parts")[-1][key] for key in keys]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truncate_quantile": 1.5}, r"truncate_quantile must be in \[0, 1\], got 1.5"),
        ({"truncate_at": -1.0}, "truncate_at must not be negative, got -1.0"),
        ({"truncate_at": 1.0, "truncate_quantile": 0.5}, "truncate_at or truncate_quantile, not both"),
        ({"halt_reward": -1.0}, "halt_reward needs truncate_at or truncate_quantile"),
        ({"member": "per_epoch"}, "per_epoch"),
    ],
)
def test_bad_limits_of_rollouts(
    config: TrainConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **change))
    with pytest.raises(InputError, match=message):
        train_alone(config, tmp_path / "run")
