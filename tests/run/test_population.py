"""Test several runs, SACs or fits at once: each gives what it gives alone, even if stopped and resumed."""

import dataclasses
import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import EagerGraph, fit_to_double, to_double
from safetensors.torch import load_file
from small_fits import SMALL, toy_data
from small_runs import progress
from small_sacs import ACT, OBS, filled, transitions
from small_sacs import CONFIG as SAC_CONFIG
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mopo_fast.buffer import RingBuffer
from mopo_fast.cli import main
from mopo_fast.config import SACConfig, TrainConfig
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.evaluate import Evaluation, Evaluator
from mopo_fast.fit import Fit, data_sha256, fit_and_save
from mopo_fast.run.log import Log
from mopo_fast.run.population import FitPopulation, SacPopulation, fit_and_save_many, train_many
from mopo_fast.sac import SAC
from mopo_fast.train import Training, train


@pytest.fixture(scope="module")
def configs(config: TrainConfig) -> list[TrainConfig]:
    """Return configurations of two seeds and two penalty coefficients."""
    config = dataclasses.replace(config, steps=45)
    return [
        dataclasses.replace(config, seed=seed, rollout=dataclasses.replace(config.rollout, penalty_coef=coef))
        for seed in (4, 5)
        for coef in (0.0, 2.0)
    ]


@pytest.fixture(scope="module")
def alone(configs: list[TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    outs = [tmp_path_factory.mktemp("alone") / str(i) for i in range(4)]
    for config, out in zip(configs, outs, strict=True):
        train(config, out, quiet=True)
    return outs


def assert_same(ours: list[Path], theirs: list[Path]) -> None:
    """Check that parameters, logs and configurations are equal bit for bit."""
    for one, other in zip(ours, theirs, strict=True):
        for name in ("dynamics.safetensors", "policy.safetensors", "checkpoint/epoch-000005.safetensors"):
            left, right = load_file(one / name), load_file(other / name)
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left), (one, name)
        assert progress(one) == progress(other) and len(progress(one)) == 5
        assert (one / "config.json").read_text() == (other / "config.json").read_text()
        assert {path.name for path in one.iterdir() if "tfevents" not in path.name} == {
            path.name for path in other.iterdir() if "tfevents" not in path.name
        }
        board = EventAccumulator(str(one))
        board.Reload()
        assert [event.step for event in board.Scalars("sac/q")] == [10, 20, 30, 40, 45]
        assert [event.step for event in board.Scalars("evaluation/return_mean")] == [20, 40, 45]


def test_each_is_what_it_is_alone(configs: list[TrainConfig], alone: list[Path], tmp_path: Path) -> None:
    outs = [tmp_path / str(i) for i in range(4)]
    summaries = train_many(configs, outs, quiet=True)
    assert_same(outs, alone)
    for summary, config, out in zip(summaries, configs, alone, strict=True):
        theirs = json.loads((out / "summary.json").read_text())
        assert (summary["runs_together"], theirs["runs_together"]) == (4, 1)
        assert summary["score_mean"] == theirs["score_mean"] and summary["seed"] == config.seed
    assert len({(out / "policy.safetensors").read_bytes() for out in outs}) == 4


def test_in_pytorch_it_is_so_to_rounding(configs: list[TrainConfig], tmp_path: Path) -> None:
    few = [dataclasses.replace(config, backend="reference", steps=20) for config in configs]
    outs = [tmp_path / str(i) for i in range(4)]
    train_many(few, outs, quiet=True)
    for i, config in enumerate(few):
        train(config, tmp_path / "alone" / str(i), quiet=True)
        policies = [load_file(out / "policy.safetensors") for out in (outs[i], tmp_path / "alone" / str(i))]
        for name, tensor in policies[1].items():
            torch.testing.assert_close(policies[0][name], tensor, rtol=0.0, atol=2e-3)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("saves", [3, 6, 8, 13])
def test_stopped_between_the_checkpoints_of_two_they_go_on(
    configs: list[TrainConfig],
    alone: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saves: int,
) -> None:
    outs, made, save = [tmp_path / str(i) for i in range(4)], 0, Training.save

    def stopping(self: Training) -> None:
        nonlocal made
        made += 1
        if made > saves:
            raise Stopped
        save(self)

    monkeypatch.setattr(Training, "save", stopping)
    with pytest.raises(Stopped):
        train_many(configs, outs, quiet=True)
    monkeypatch.undo()
    # One of the runs continues alone.
    train(configs[2], outs[2], resume=True, quiet=True)
    train_many(configs, outs, resume=True, quiet=True)
    assert_same(outs, alone)


def test_evaluated_beside_the_training(configs: list[TrainConfig], alone: list[Path], tmp_path: Path) -> None:
    def beside(config: TrainConfig) -> TrainConfig:
        return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, workers=1))

    outs = [tmp_path / "0", tmp_path / "1"]
    train_many([beside(config) for config in configs[:2]], outs, quiet=True)
    for one, other in zip(outs, alone, strict=False):
        assert progress(one) == progress(other)


def test_stopped_while_evaluations_are_at_work_they_go_on(
    configs: list[TrainConfig], alone: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows after an unfinished evaluation are held back, and written when the runs are resumed."""
    outs, given, submit, save = [tmp_path / str(i) for i in range(4)], 0, Evaluator.submit, Training.save

    def slow(self: Evaluator, *arguments: Any, **options: Any) -> "Future[Evaluation]":
        nonlocal given
        given += 1
        return submit(self, *arguments, **options) if given == 1 else Future()

    def stopping(self: Training) -> None:
        save(self)
        if self.epoch == 4 and self.out == outs[3]:
            raise Stopped

    monkeypatch.setattr(Evaluator, "submit", slow)
    monkeypatch.setattr(Training, "save", stopping)
    with pytest.raises(Stopped):
        train_many(configs, outs, quiet=True)
    monkeypatch.undo()
    assert [len(progress(out)) for out in outs] == [3, 1, 1, 1]
    train_many(configs, outs, resume=True, quiet=True)
    assert_same(outs, alone)


def test_no_more_evaluations_wait_than_may(
    configs: list[TrainConfig], alone: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mopo_fast.run.log._PENDING", 1)
    waiting, write = [], Log.write

    def counted(self: Log, waiting_at_most: int = 0) -> None:
        write(self, waiting_at_most)
        waiting.append(len(self.pending))

    monkeypatch.setattr(Log, "write", lambda self, waiting=0: counted(self, waiting))
    monkeypatch.setattr(Future, "done", lambda self: False)
    train(configs[0], tmp_path / "run", quiet=True)
    assert progress(tmp_path / "run") == progress(alone[0])
    assert max(waiting) == 1 and waiting[-1] == 0


def test_what_cannot_be_together_is_refused(configs: list[TrainConfig], tmp_path: Path) -> None:
    other = dataclasses.replace(configs[0], steps=7)
    with pytest.raises(InputError, match=r"differ only in seed and penalty_coef: .*0 has steps = 45, not 7"):
        train_many([configs[0], other], [tmp_path / "0", tmp_path / "1"], quiet=True)
    with pytest.raises(InputError, match="every run needs a folder of its own"):
        train_many(configs[:2], [tmp_path / "0", tmp_path / "0"], quiet=True)
    assert not list(tmp_path.iterdir())


class TestCommandLine:
    def test_a_folder_for_each(
        self,
        hopper_data: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        small = (
            "--steps 10 --rollout.interval 10 --rollout.batch-size 20 --horizon 1 --dynamics.max-epochs 1"
            " --dynamics.members 2 --dynamics.elites 1 --dynamics.hidden 8 --dynamics.weight-decay 0 0"
            " --sac.hidden 8 --evaluation.episodes 1 --quiet"
        )
        command = ["train", str(hopper_data), *small.split()]
        assert main([*command, "--seeds", "2:4", "--penalty-coefs", "0", "1.5", "--out", "sweep"]) == 0
        lines = capsys.readouterr().out.splitlines()
        names = [f"seed{seed}-coef{coef}" for seed in (2, 3) for coef in ("0", "1.5")]
        assert lines[1:8:2] == [f"sweep/{name}" for name in names]
        scores = [json.loads(Path("sweep", name, "summary.json").read_text())["score_mean"] for name in names]
        assert lines[9].split()[:4] == ["penalty_coef", "0", "2", f"{(scores[0] + scores[2]) / 2:.2f}"]
        assert lines[10].startswith("penalty_coef 1.5 ")
        assert lines[12].startswith("penalty_coef 1.5 minus penalty_coef 0  ")
        assert lines[-1] == "sweep/comparison.html"
        assert main([*command, "--seeds", "7,9"]) == 0
        stem = hopper_data.stem
        names = {f"{stem}-seed7", f"{stem}-seed9", f"{stem}-comparison"}
        assert {path.name for path in Path("runs").iterdir()} == names

    @pytest.mark.parametrize("text", ["3:3", "a", "0:8:2", "1,"])
    def test_seeds_that_are_none(self, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "x.hdf5", "--seeds", text]) == 2
        assert f"error: --seeds takes FIRST:END, such as 0:8, or a list, such as 0,3,5, got {text!r}" in (
            capsys.readouterr().err
        )


POPULATIONS = {
    "authors": SAC_CONFIG,
    "others": dataclasses.replace(
        SAC_CONFIG, order="critic_first", alpha_max=1.0, critic_loss="mse", critics=3, actor_schedule="cosine"
    ),
    "unifloral": dataclasses.replace(
        SAC_CONFIG, order="actor_first", adam_epsilon=1e-3, critic_loss="mse", critics=3
    ),
    "redq": dataclasses.replace(
        SAC_CONFIG, order="critic_first", critics=5, target_critics=2, actor_q="mean"
    ),
    "real only": dataclasses.replace(SAC_CONFIG, real_ratio=1.0),
}


class TestSacPopulation:
    """Three SACs with their own seeds and buffers give the same together as one by one."""

    def sacs(self, config: SACConfig, backend: str, double: bool = False) -> list[SAC]:
        sacs = [SAC(OBS, ACT, config, seed=i, total_updates=20, backend=backend) for i in range(3)]
        return [to_double(sac) for sac in sacs] if double else sacs

    def buffers(self) -> list[RingBuffer]:
        buffers = [filled(20 + 20 * i) for i in range(3)]
        for i, buffer in enumerate(buffers):
            buffer.storage.rewards.add_(i)
        return buffers

    @pytest.mark.parametrize("config", POPULATIONS.values(), ids=POPULATIONS)
    def test_in_pytorch_each_gets_what_it_gets_alone(self, config: SACConfig) -> None:
        data, buffers = transitions(50, seed=1, dtype=torch.float64), self.buffers()
        together, alone = (self.sacs(config, "reference", double=True) for _ in range(2))
        population = SacPopulation(together)
        for call in range(2):
            seeds = [10 * call + i for i in range(3)]
            ours = population.update_many(data, buffers, 4, seeds)
            for i, sac in enumerate(alone):
                theirs = sac.update_many(data, buffers[i], 4, seeds[i])
                assert ours[i] == pytest.approx(theirs, rel=1e-9, abs=1e-12)
        for one, other in zip(together, alone, strict=True):
            assert one.updates == 8
            for name, tensor in other.state().items():
                torch.testing.assert_close(one.state()[name], tensor, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("name", ["others", "redq"])
    @pytest.mark.parametrize("runs", [1, 3])
    def test_recorded_updates_are_the_same(
        self, runs: int, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Simulated recording gives the eager results, for full graphs, a remainder and a second call."""
        data, buffers = transitions(50, seed=1), self.buffers()[:runs]
        plain, recorded = (self.sacs(POPULATIONS[name], "reference")[:runs] for _ in range(2))
        populations = [SacPopulation(plain), SacPopulation(recorded)]
        monkeypatch.setattr("mopo_fast.sac._UPDATES_AT_ONCE", 3)
        for call in range(2):
            seeds = [10 * call + i for i in range(runs)]
            eager = populations[0].update_many(data, buffers, 8, seeds)
            with monkeypatch.context() as patch:
                patch.setattr("mopo_fast.sac.records", lambda device: True)
                patch.setattr("mopo_fast.utils.cuda_graphs.Graph", EagerGraph)
                played = populations[1].update_many(data, buffers, 8, seeds)
            for ours, theirs in zip(played, eager, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5)
        for one, other in zip(plain, recorded, strict=True):
            assert (one.updates, other.updates) == (16, 16)
            assert all(torch.equal(tensor, other.state()[name]) for name, tensor in one.state().items())

    @pytest.mark.parametrize("config", [SAC_CONFIG, POPULATIONS["redq"]], ids=["authors", "redq"])
    def test_the_kernel_gives_each_the_same_bits_as_alone(self, config: SACConfig) -> None:
        data, buffers = transitions(50, seed=1), self.buffers()
        together, alone = (self.sacs(config, "cpu") for _ in range(2))
        ours = SacPopulation(together).update_many(data, buffers, 7, [4, 5, 6])
        for i, sac in enumerate(alone):
            assert sac.update_many(data, buffers[i], 7, 4 + i) == ours[i]
            assert all(torch.equal(t, together[i].state()[name]) for name, t in sac.state().items())

    def test_one_can_leave_and_join(self) -> None:
        data, buffers = transitions(50, seed=1, dtype=torch.float64), self.buffers()
        moving, staying = (self.sacs(SAC_CONFIG, "reference", double=True) for _ in range(2))
        three = SacPopulation(moving)
        three.update_many(data, buffers, 1, [0, 1, 2])
        SacPopulation(moving[1:]).update_many(data, buffers[1:], 2, [3, 4])
        moving[0].update_many(data, buffers[0], 2, 5)
        three.update_many(data, buffers, 1, [6, 7, 8])
        for i, (sac, buffer) in enumerate(zip(staying, buffers, strict=True)):
            for updates, seed in ((1, i), (2, (5, 3, 4)[i]), (1, 6 + i)):
                sac.update_many(data, buffer, updates, seed)
            for name, tensor in sac.state().items():
                torch.testing.assert_close(moving[i].state()[name], tensor, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_one_that_diverges_is_one_clear_error(self, backend: str) -> None:
        buffers = self.buffers()
        buffers[1].storage.rewards[:] = float("inf")
        with pytest.raises(InputError, match="SAC diverged before update 2"):
            population = SacPopulation(self.sacs(SAC_CONFIG, backend))
            population.update_many(transitions(50, seed=1), buffers, 2, [0, 1, 2])


class TestFitPopulation:
    """Three fits with their own seeds give the same together as one by one."""

    def test_progress_is_the_share_of_the_epoch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mopo_fast.fit._STEPS_AT_ONCE", 2)
        fits = [Fit(toy_data(), i, SMALL) for i in range(3)]
        for run_epoch in (fits[0].run_epoch, FitPopulation(fits[1:]).run_epoch):
            for _ in range(2):
                shares: list[float] = []
                run_epoch(shares.append)
                assert shares == [0.25, 0.5, 0.75, 1.0]

    def test_in_pytorch_fits_together_get_what_each_gets_alone(self) -> None:
        data = toy_data()
        together, alone = (
            [fit_to_double(Fit(data, i, SMALL, backend="reference")) for i in range(3)] for _ in "ab"
        )
        three = FitPopulation(together)
        ours = [three.run_epoch() for _ in range(2)]
        # The first fit stops for one epoch while the others continue, and then joins them again.
        last = FitPopulation(together[1:]).run_epoch()
        together[0].run_epoch()
        three.run_epoch()
        for i, fit in enumerate(alone):
            theirs = [fit.run_epoch() for _ in range(4)]
            records = [ours[0][i], ours[1][i], *([last[i - 1]] if i else [])]
            for record, their in zip(records, theirs, strict=False):
                assert record.train_loss == pytest.approx(their.train_loss, rel=1e-9)
                assert record.holdout_mse == pytest.approx(their.holdout_mse, rel=1e-9)
                assert record.improved == their.improved
            for name, tensor in fit.live_state().items():
                torch.testing.assert_close(together[i].live_state()[name], tensor, rtol=1e-8, atol=1e-11)

    def test_by_the_kernel_fits_together_get_the_same_bits(self) -> None:
        together, alone = ([Fit(toy_data(), i, SMALL, backend="cpu") for i in range(2)] for _ in "ab")
        records = FitPopulation(together).run_epoch()
        for fit, other, record in zip(alone, together, records, strict=True):
            assert fit.run_epoch().train_loss == record.train_loss
            assert all(torch.equal(t, other.live_state()[name]) for name, t in fit.live_state().items())

    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_fits_together_stop_each_at_its_own_end_and_are_saved(self, tmp_path: Path, backend: str) -> None:
        config = dataclasses.replace(SMALL, max_epochs=None, patience=1)
        seeds, folders = [0, 1, 2], [tmp_path / str(seed) for seed in range(3)]
        # One fit was stopped after its first epoch.
        started = Fit(toy_data(), 1, config, backend=backend)
        (folders[1] / "checkpoint").mkdir(parents=True)
        started.use_checkpoint(folders[1] / "checkpoint" / "fit.safetensors", data_sha256(toy_data()))
        started.run_epoch()
        fit_and_save_many(toy_data(), folders, seeds=seeds, config=config, backend=backend)
        epochs = []
        for seed, folder in zip(seeds, folders, strict=True):
            model, record = fit_and_save(
                toy_data(), tmp_path / "alone" / str(seed), seed=seed, config=config, backend=backend
            )
            together = json.loads((folder / "fit.json").read_text())
            assert together["epochs"] == record["epochs"] and together["elites"] == record["elites"]
            assert together["best_mse"] == pytest.approx(record["best_mse"], rel=1e-2)
            weights = EnsembleDynamics.load(folder).weights[1]
            torch.testing.assert_close(weights, model.weights[1], rtol=0.0, atol=1e-2)
            assert not (folder / "checkpoint" / "fit.safetensors").exists()
            epochs.append(record["epochs"])
        assert len(set(epochs)) > 1, "they all stop at once, so nothing was shown"

    @pytest.mark.parametrize("count", [1, 2])
    def test_recorded_steps_are_the_same(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Simulated recording gives the eager results; real recording needs a GPU."""
        plain, recorded = (
            [Fit(toy_data(), i, SMALL, backend="reference") for i in range(count)] for _ in "ab"
        )
        populations = [FitPopulation(plain), FitPopulation(recorded)]
        monkeypatch.setattr("mopo_fast.fit._STEPS_AT_ONCE", 3)
        for _ in range(2):
            eager = populations[0].run_epoch()
            with monkeypatch.context() as patch:
                patch.setattr("mopo_fast.fit.records", lambda device: True)
                patch.setattr("mopo_fast.utils.cuda_graphs.Graph", EagerGraph)
                played = populations[1].run_epoch()
            assert [record.train_loss for record in played] == [record.train_loss for record in eager]
        for one, other in zip(plain, recorded, strict=True):
            assert all(torch.equal(t, other.live_state()[name]) for name, t in one.live_state().items())
