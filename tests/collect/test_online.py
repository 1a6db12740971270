"""Test data sets made by SAC trained online, against gymnasium and the policy, and after killed trainings."""

import dataclasses
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from garbled import changes, check_tensors, expect, read_tensors
from places import HELPERS
from small_online import EPOCH_ROWS, SAMPLED, SMALL, make, read

from mopo_fast.cli import main
from mopo_fast.collect import collect, online
from mopo_fast.collect.online import OnlineTraining, sample_paths
from mopo_fast.data import load_dataset
from mopo_fast.environments import make_environment
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.tasks import TASKS
from mopo_fast.utils.lock import locked
from mopo_fast.utils.seeds import derive_seed
from mopo_fast.utils.tensors import load_tensors, save_tensors


def paths_of(data: dict[str, Any]) -> list[slice]:
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    assert ends[-1] == len(data["rewards"])
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(autouse=True)
def data_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_DATA_DIR", str(folder))


@pytest.fixture(scope="module")
def sets(folder: Path) -> dict[str, Path]:
    """Make every tier of hopper; the medium tiers come before the training is complete."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPO_FAST_DATA_DIR", str(folder))
        tiers = ("medium-replay", "medium", "full-replay", "expert", "medium-expert")
        return {tier: make(f"hopper-{tier}") for tier in tiers}


@pytest.mark.parametrize("task", ["halfcheetah", "hopper", "walker2d", "ant"])
def test_sampled_paths_equal_gymnasium_exactly(task: str) -> None:
    actor = Actor(TASKS[task].obs_dim, TASKS[task].act_dim, hidden=(16,))
    env = make_environment(TASKS[task].env_id)
    paths = sample_paths(TASKS[task], actor, 3, 2)
    for index, path in enumerate(itertools.islice(paths, 3)):
        observation, _ = env.reset(seed=derive_seed(3, online._RESET, index))
        for row, action in enumerate(path["actions"]):
            assert np.array_equal(path["infos/qpos"][row], env.unwrapped.data.qpos)
            assert np.array_equal(path["infos/qvel"][row], env.unwrapped.data.qvel)
            assert np.array_equal(path["observations"][row], observation.astype(np.float32))
            observation, reward, terminal, timeout, _ = env.step(action)
            assert np.array_equal(path["next_observations"][row], observation.astype(np.float32))
            assert path["rewards"][row] == np.float32(reward)
            assert (path["terminals"][row], path["timeouts"][row]) == (terminal, timeout)
            assert (terminal or timeout) == (row == len(path["actions"]) - 1)


def test_a_fall_at_the_limit_is_a_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    length = len(next(sample_paths(TASKS["hopper"], None, 0, 1))["rewards"])
    monkeypatch.setattr(online, "MAX_PATH", length)
    path = next(sample_paths(TASKS["hopper"], None, 0, 1))
    assert path["timeouts"][-1] and not path["terminals"].any()


def test_actions_are_sampled_from_the_policy_in_the_metadata(sets: dict[str, Path]) -> None:
    for tier in ("medium", "expert"):
        data = read(sets[tier])
        x = data["observations"].astype(np.float64)
        for layer in ("fc0", "fc1"):
            weight, bias = (data[f"metadata/policy/{layer}/{name}"] for name in ("weight", "bias"))
            x = np.maximum(x @ weight.T + bias, 0.0)
        mean, log_std = (
            x @ data[f"metadata/policy/{layer}/weight"].T + data[f"metadata/policy/{layer}/bias"]
            for layer in ("last_fc", "last_fc_log_std")
        )
        actions = data["actions"].astype(np.float64)
        noise = (np.arctanh(actions) - mean) / np.exp(log_std)
        log_probs = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - np.log(1 - actions**2)
        inner = np.abs(actions).max(axis=1) < 0.999
        assert inner.mean() > 0.8
        stored = data["infos/action_log_probs"][inner]
        assert np.allclose(log_probs.sum(axis=1)[inner], stored, atol=2e-3)
        # With 900 draws, one seed in 10,000 exceeds four standard errors of the mean.
        assert abs(noise[inner].mean()) < 0.2 and 0.8 < noise[inner].std() < 1.1


def test_replays_hold_every_step_of_the_training(sets: dict[str, Path]) -> None:
    medium, full = read(sets["medium-replay"]), read(sets["full-replay"])
    # Medium has one random epoch and two evaluated epochs.
    assert len(medium["rewards"]) == 3 * EPOCH_ROWS == medium["metadata/trained_steps"]
    assert len(full["rewards"]) == 5 * EPOCH_ROWS == full["metadata/trained_steps"]
    assert (medium["metadata/updates"], full["metadata/updates"]) == (2 * EPOCH_ROWS, 4 * EPOCH_ROWS)
    for key in ("observations", "actions", "rewards", "timeouts", "infos/qpos"):
        assert np.array_equal(medium[key], full[key][: 3 * EPOCH_ROWS]), key
    random = full["infos/action_log_probs"] == np.float32(3 * np.log(0.5))
    assert random[:EPOCH_ROWS].all() and not random[EPOCH_ROWS:].any()
    paths = paths_of(full)
    for path in paths:
        assert np.array_equal(full["next_observations"][path][:-1], full["observations"][path][1:])
        # Resets perturb the upright position by at most 0.005.
        assert np.abs(full["infos/qpos"][path][0] - [0, 1.25, 0, 0, 0, 0]).max() < 0.006
    assert len({path.start for path in paths} & set(range(0, 600, 60))) == 10
    assert sum(full["timeouts"]) <= 10 < len(paths)


def test_the_kernel_learns_from_what_is_stored(folder: Path, sets: dict[str, Path]) -> None:
    training = OnlineTraining(folder / "online" / "hopper-seed0", TASKS["hopper"], 0, SMALL, 1)
    assert (training.epoch, training.sac.updates, len(training.buffer)) == (5, 4 * EPOCH_ROWS, 5 * EPOCH_ROWS)
    full = read(sets["full-replay"])
    # The ring buffer stores an epoch step by step, the file path by path.
    for name in ("observations", "actions", "rewards", "next_observations", "terminals"):
        ring = getattr(training.buffer.storage, name).numpy().copy()
        by_step = ring.reshape(5, 60, 2, -1).swapaxes(1, 2).reshape(ring.shape)
        assert np.array_equal(by_step, full[name]), name


def test_layout_metadata_and_loading(sets: dict[str, Path]) -> None:
    data, random = read(sets["medium"]), read(collect("hopper-random", 50, quiet=True))
    rows = {key for key in data if not key.startswith("metadata/")}
    assert rows == {key for key in random if not key.startswith("metadata/")}
    for key in rows:
        assert (data[key].dtype, data[key].shape[1:]) == (random[key].dtype, random[key].shape[1:])
        assert len(data[key]) == SAMPLED
    assert data["metadata/name"] == b"hopper-medium-local"
    assert data["metadata/algorithm"] == b"SAC"
    assert (data["metadata/seed"], data["metadata/steps"]) == (0, SAMPLED)
    config = json.loads(data["metadata/config"])
    assert (config["sac"]["target_entropy"], config["epochs"]) == ("act_dim", 5)
    task = TASKS["hopper"]
    score = task.normalized_score(float(data["metadata/return_mean"]))
    assert data["metadata/score_mean"] == pytest.approx(score)
    loaded = load_dataset("hopper-medium-replay-local")
    assert (len(loaded), loaded.name) == (3 * EPOCH_ROWS, "hopper-medium-replay-local")


def test_medium_expert_is_medium_and_expert_stitched(sets: dict[str, Path]) -> None:
    both, medium, expert = (read(sets[tier]) for tier in ("medium-expert", "medium", "expert"))
    for key in ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations"):
        assert np.array_equal(both[key], np.concatenate([medium[key], expert[key]])), key
    assert both["terminals"][SAMPLED - 1] or both["timeouts"][SAMPLED - 1]
    assert both["metadata/medium/trained_steps"] < both["metadata/expert/trained_steps"]
    weights = both["metadata/medium/policy/fc0/weight"], both["metadata/expert/policy/fc0/weight"]
    assert not np.array_equal(*weights)
    assert np.array_equal(weights[0], medium["metadata/policy/fc0/weight"])


def test_tiers_share_one_training_and_threads_change_nothing(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(OnlineTraining, "_train_epoch", None)
        assert make("hopper-medium", out=tmp_path).read_bytes() == sets["medium"].read_bytes()
    monkeypatch.setenv("MOPO_FAST_DATA_DIR", str(tmp_path))
    before = torch.get_num_threads()
    # Here the training is completed before any other tier is made.
    assert make("hopper-expert", threads=3).read_bytes() == sets["expert"].read_bytes()
    assert make("hopper-medium-replay").read_bytes() == sets["medium-replay"].read_bytes()
    assert torch.get_num_threads() == before
    assert (
        make("hopper-medium-replay", seed=1, overwrite=True).read_bytes()
        != sets["medium-replay"].read_bytes()
    )


def test_goes_on_from_any_interruption(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPO_FAST_DATA_DIR", str(tmp_path))
    real = online.save_tensors
    saves = 0

    def stop_at_every_third_save(path: Path, *arguments: Any) -> None:
        nonlocal saves
        saves += 1
        if saves % 3 == 0:
            raise KeyboardInterrupt
        real(path, *arguments)

    monkeypatch.setattr(online, "save_tensors", stop_at_every_third_save)
    interruptions = 0
    while True:
        try:
            path = make("hopper-full-replay")
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert not list(tmp_path.glob("*.hdf5"))
    assert interruptions == 4
    assert path.read_bytes() == sets["full-replay"].read_bytes()


RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from small_online import make
make("hopper-expert")
"""


def test_goes_on_when_killed(sets: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(HELPERS)]
    environment = os.environ | {"MOPO_FAST_DATA_DIR": str(tmp_path)}
    training = tmp_path / "online" / "hopper-seed0"
    for epoch in (1, 3):
        process = subprocess.Popen(command, env=environment)
        while not (training / f"rows-{epoch:06}.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not list(tmp_path.glob("*.hdf5"))
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "hopper_expert-local.hdf5").read_bytes() == sets["expert"].read_bytes()


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(OnlineTraining, "_train_epoch", interrupt)
    monkeypatch.setenv("MOPO_FAST_DATA_DIR", str(tmp_path))
    assert main(["collect", "hopper-expert", "--quiet"]) == 130
    assert (
        capsys.readouterr().err
        == "stopped; no file was written, and the same command goes on with the training\n"
    )


def test_one_process_at_a_time(folder: Path, sets: dict[str, Path], tmp_path: Path) -> None:
    refused: list[str] = []

    def work() -> None:
        try:
            make("hopper-medium", out=tmp_path)
        except InputError as error:
            refused.append(str(error))

    with locked(folder / "online" / "hopper-seed0"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "another process is at work" in refused[0]


def test_medium_is_where_the_mean_of_some_evaluations_is_good_enough(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, medium_score=33.0, medium_window=3)
    training = OnlineTraining(tmp_path, TASKS["hopper"], 0, config, 1)
    assert training.medium_epoch is None
    for epoch, score in enumerate([50.0, 40.0, 5.0, 40.0, 53.0, 6.0, 90.0], start=2):
        training.evaluations.append({"epoch": epoch, "score_mean": score})
        # The means of (40, 5, 40) and (5, 40, 53) are below 33; the mean of (40, 53, 6) is 33.
        assert training.medium_epoch == (7 if epoch >= 7 else None)


def test_a_training_that_never_was_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_DATA_DIR", str(tmp_path))
    hard = dataclasses.replace(SMALL, medium_score=1000.0, epochs=2)
    for tier in ("medium", "medium-replay", "medium-expert"):
        with pytest.raises(InputError, match=r"never reached 1000, the best score was .*another seed"):
            make(f"hopper-{tier}", online=hard)
    assert not list(tmp_path.glob("*.hdf5"))
    assert len(read(make("hopper-full-replay", online=hard))["rewards"]) == 2 * EPOCH_ROWS


def test_other_settings_are_refused(sets: dict[str, Path], tmp_path: Path) -> None:
    other = dataclasses.replace(SMALL, medium_score=-999.0)
    with pytest.raises(InputError, match=r"holds a training with config\.medium_score = .*, not -999"):
        make("hopper-expert", online=other, out=tmp_path)


def test_a_broken_state_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_DATA_DIR", str(tmp_path))
    make("hopper-medium-replay", out=tmp_path / "one")
    training = tmp_path / "online" / "hopper-seed0"
    rows = (training / "rows-000002.safetensors").read_bytes()
    (training / "rows-000002.safetensors").write_bytes(rows[:-1])
    with pytest.raises(InputError, match=r"rows-000002\.safetensors is not a whole safetensors file"):
        make("hopper-expert")
    (training / "rows-000002.safetensors").write_bytes(rows)
    tensors = load_tensors(training / "state.safetensors")
    save_tensors(training / "state.safetensors", tensors)
    with pytest.raises(InputError, match=r"state\.safetensors is no checkpoint .*remove .*hopper-seed0"):
        make("hopper-expert")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch_steps": 55}, "epoch_steps must be a multiple of round_steps, got 55 and 10"),
        ({"environments": 0}, "environments must be at least 1, got 0"),
        ({"random_epochs": 0}, "random_epochs must be at least 1, got 0"),
        ({"epochs": 1}, "epochs must be more than random_epochs, got 1 and 1"),
    ],
)
def test_bad_settings(changes: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        OnlineTraining(tmp_path, TASKS["hopper"], 0, dataclasses.replace(SMALL, **changes), 1)


def test_unstable_simulation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # MuJoCo writes its log to the working directory.
    monkeypatch.chdir(tmp_path)
    with online._Paths(TASKS["halfcheetah"], 3, 2) as paths:
        rows = paths.new_rows(2, 3)
        for i in range(3):
            paths.begin(i, i)
        paths.step(np.ones((3, 6), np.float32), rows, 0)
        paths.episodes._batch.qvel[1] = 1e11
        with pytest.raises(InputError, match="became unstable"):
            paths.step(np.ones((3, 6), np.float32), rows, 1)


def test_random_ant(tmp_path: Path) -> None:
    data = read(collect("ant-random", 300, out=tmp_path, quiet=True))
    assert data["metadata/policy"] == b"uniform random actions"
    assert data["observations"].shape == (300, 27)
    assert np.all(data["infos/action_log_probs"] == np.float32(8 * np.log(0.5)))
    assert np.abs(data["actions"]).max() <= 1 and abs(data["actions"].mean()) < 0.06
    paths_of(data)


class TestGarbledTraining:
    """Change each value of a training's files: it raises one `InputError` that says what to remove."""

    @pytest.fixture
    def training(self, folder: Path, sets: dict[str, Path], tmp_path: Path) -> Path:
        shutil.copytree(folder / "online" / "hopper-seed0", tmp_path / "training")
        return tmp_path / "training"

    def load(self, training: Path) -> None:
        OnlineTraining(training, TASKS["hopper"], 0, SMALL, 1)

    def test_the_record(self, training: Path) -> None:
        self.load(training)
        path = training / "state.safetensors"
        tensors, metadata = read_tensors(path)
        for where, other, changed in changes(json.loads(metadata["record"])):
            save_tensors(path, tensors, {"record": json.dumps(changed)})
            harmless = where[-1] in ("return_mean", "return_std", "score_mean", "score_std")
            number = isinstance(other, (int, float)) and not isinstance(other, bool)
            expect(lambda: self.load(training), harmless and number, f"{where} = {other!r}")
        for text in ("", "{", "[]", "null", "[" * 100_000, '{"epoch": NaN}'):
            save_tensors(path, tensors, {"record": text})
            with pytest.raises(InputError, match=rf"state\.safetensors .*; remove {training} to train from"):
                self.load(training)

    @pytest.mark.parametrize("name", ["state.safetensors", "rows-000002.safetensors"])
    def test_the_tensors(self, training: Path, name: str) -> None:
        if name.startswith("rows"):
            # Remove arrays that are only copied to a data set, since their shapes and types are not checked
            # here.
            tensors, _ = read_tensors(training / name)
            kept = {key: value for key, value in tensors.items() if key not in ("infos/qpos", "infos/qvel")}
            save_tensors(training / name, kept)
        check_tensors(training / name, lambda: self.load(training))

    def test_rows_of_another_length(self, training: Path) -> None:
        path = training / "rows-000002.safetensors"
        tensors, _ = read_tensors(path)
        for name, message in ("infos/qpos", "has shape"), ("odd", "got .*odd"):
            save_tensors(path, tensors | {name: torch.zeros(61, 2)})
            with pytest.raises(InputError, match=rf"{message}.*; remove {training} to train"):
                self.load(training)
        save_tensors(path, {name: tensor for name, tensor in tensors.items() if name != "infos/qvel"})
        with pytest.raises(InputError, match=r"must hold .*infos/qvel"):
            self.load(training)
        path.unlink()
        with pytest.raises(InputError, match=rf"rows-000002.* does not exist; remove {training} to train"):
            self.load(training)


def test_a_replay_larger_than_the_memory_is_refused_first(tmp_path: Path) -> None:
    huge = dataclasses.replace(SMALL, epochs=10**12)
    with pytest.raises(
        InputError, match=r"the replay would take [\d,]+ GiB, .*; lower epochs, epoch_steps or"
    ):
        make("hopper-expert", online=huge, seed=9, out=tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    assert not (Path(os.environ["MOPO_FAST_DATA_DIR"]) / "online" / "hopper-seed9").exists()


def test_a_full_disk_is_one_sentence_and_the_training_goes_on(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPO_FAST_DATA_DIR", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*rows-000001\.safetensors: .*free space"):
            make("hopper-expert")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert make("hopper-expert").read_bytes() == sets["expert"].read_bytes()
