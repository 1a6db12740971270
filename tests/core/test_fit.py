"""Test the ensemble's fit: its gradient, epochs, checkpoints and refusals."""

import csv
import dataclasses
import itertools
import json
import math
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from garbled import check_tensors, read_tensors
from places import HELPERS, ROOT
from small_fits import SMALL, toy_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mopo_fast.config import DynamicsConfig
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.fit import (
    Fit,
    FitEpoch,
    PyTorchSteps,
    data_sha256,
    dynamics_inputs_targets,
    fit_and_save,
    fit_dynamics,
    negative_log_likelihood,
    split_holdout,
)
from mopo_fast.utils.tensors import load_tensors, save_tensors


def same_state(left: EnsembleDynamics, right: EnsembleDynamics) -> bool:
    pairs = zip(left.state_dict().items(), right.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def holdout_mse(
    model: EnsembleDynamics, data: Transitions, seed: int, config: DynamicsConfig
) -> torch.Tensor:
    inputs, targets = dynamics_inputs_targets(data[split_holdout(len(data), seed, config)[1]])
    with torch.no_grad():
        return (model(inputs)[0] - targets).square().mean((1, 2))


# --- the holdout


@pytest.mark.parametrize(
    ("n", "count"), [(5, 1), (9, 1), (10, 2), (4999, 999), (5000, 1000), (100_000, 1000)]
)
def test_holdout_is_a_fifth_but_at_most_a_thousand(n: int, count: int) -> None:
    train, holdout = split_holdout(n, 0, DynamicsConfig())
    assert len(holdout) == count
    assert torch.equal(torch.cat([train, holdout]).sort().values, torch.arange(n))


def test_holdout_is_drawn_by_the_seed() -> None:
    first, again, other = (split_holdout(1000, seed, DynamicsConfig())[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, torch.arange(len(first)))


@pytest.mark.parametrize(
    ("n", "config"), [(4, {}), (100, {"holdout_fraction": 0.0}), (3, {"holdout_fraction": 1.0})]
)
def test_a_holdout_that_cannot_be_is_refused(n: int, config: dict[str, float]) -> None:
    with pytest.raises(InputError, match="at least one transition"):
        split_holdout(n, 0, DynamicsConfig(**config))


# --- loss and gradient


@pytest.mark.parametrize("activation", ["silu", "relu", "tanh"])
def test_the_loss_is_that_of_a_normal_distribution(activation: str) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, activation=activation, logvar_bound_weight=0.03)
    model = EnsembleDynamics(3, 2, members=3, elites=2, hidden=(8, 5), activation=activation).double()
    with torch.no_grad():
        for parameter in (*model.biases, model.max_logvar, model.min_logvar):
            parameter.normal_()
    parameters = [*model.weights, *model.biases, model.max_logvar, model.min_logvar]
    inputs = torch.randn(3, 11, 5, dtype=torch.float64)
    targets = torch.randn(3, 11, 4, dtype=torch.float64)
    loss = negative_log_likelihood(parameters, inputs, targets, config)

    mean, logvar = model(inputs)
    nll = -torch.distributions.Normal(mean, (0.5 * logvar).exp()).log_prob(targets)
    # (mu - y)^2 / sigma^2 + log sigma^2 equals 2 nll - log 2 pi.
    expected = (2 * nll - math.log(2 * math.pi)).mean((1, 2)).sum()
    expected = expected + 0.03 * (model.max_logvar.sum() - model.min_logvar.sum())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    several = [torch.stack([parameter, parameter]) for parameter in parameters]
    both = negative_log_likelihood(several, torch.stack([inputs, inputs]), torch.stack([targets] * 2), config)
    torch.testing.assert_close(both, torch.stack([expected, expected]), rtol=1e-12, atol=1e-12)


def test_bfloat16_rounds_the_factors_of_every_product() -> None:
    """Loss and gradients of one layer equal products written out with rounded factors."""
    config = dataclasses.replace(SMALL, hidden=(), weight_decay=(0.0,), dtype="bfloat16")
    g = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(shape, generator=g) for shape in ((2, 5, 8), (2, 8)))
    inputs, targets = (torch.randn(2, 7, width, generator=g) for width in (5, 4))
    parameters = [weight, bias, torch.full((4,), 0.5), torch.full((4,), -3.0)]
    for parameter in parameters:
        parameter.requires_grad_()
    loss = negative_log_likelihood(parameters, inputs, targets, config)
    found = torch.autograd.grad(loss, parameters)

    rounded_inputs, rounded_weight = (x.detach().bfloat16().float() for x in (inputs, weight))
    head = (rounded_inputs @ rounded_weight + bias.detach().unsqueeze(1)).requires_grad_()
    mean, raw = head.chunk(2, dim=-1)
    logvar = 0.5 - torch.nn.functional.softplus(0.5 - raw)
    logvar = -3.0 + torch.nn.functional.softplus(logvar + 3.0)
    expected = ((mean - targets).square() * (-logvar).exp() + logvar).mean((1, 2)).sum()
    (grad,) = torch.autograd.grad(expected, head)
    rounded = grad.bfloat16().float()
    torch.testing.assert_close(loss.detach(), expected.detach() + 0.01 * 4 * 3.5)
    # The tolerance is far below the rounding of a factor, up to 2^-8, so unrounded factors would fail.
    torch.testing.assert_close(found[0], rounded_inputs.mT @ rounded, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], rounded.sum(1), rtol=1e-5, atol=1e-6)


def test_two_epochs_equal_a_plain_training_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    data, config = toy_data(), dataclasses.replace(SMALL, max_epochs=2)
    fit = Fit(data, 3, config, backend="reference")
    model = EnsembleDynamics(3, 2, members=3, elites=2, hidden=config.hidden)
    model.load_state_dict(fit.model.state_dict())
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(parameters: Any, x: torch.Tensor, y: torch.Tensor, config: DynamicsConfig) -> torch.Tensor:
        batches.append((x.clone(), y.clone()))
        return negative_log_likelihood(parameters, x, y, config)

    monkeypatch.setattr("mopo_fast.fit.negative_log_likelihood", spy)
    records = [fit.run_epoch() for _ in range(2)]
    # Batches of 32 split 240 rows into seven full batches and a smaller one.
    assert [x.shape[1] for x, _ in batches] == [32] * 7 + [16] + [32] * 7 + [16]

    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    losses = []
    for x, y in batches:
        mean, logvar = model(x * model.input_std + model.input_mean)
        loss = ((mean - y).square() * (-logvar).exp()).mean((1, 2)).sum() + logvar.mean((1, 2)).sum()
        loss = loss + 0.01 * model.max_logvar.sum() - 0.01 * model.min_logvar.sum()
        losses.append(loss.item())
        for decay, weight in zip(config.weight_decay, model.weights, strict=True):
            loss = loss + 0.5 * decay * weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for value, reference in zip(fit.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)
    assert [record.train_loss for record in records] == pytest.approx(
        [np.mean(losses[:8]), np.mean(losses[8:])]
    )


# --- bookkeeping


def test_standardiser_is_of_the_training_split_and_spares_constants() -> None:
    data = toy_data()
    _, holdout = split_holdout(len(data), 0, SMALL)
    data.observations[holdout, 0] = 1e4
    data.observations[:, 2] = 123.456
    model = Fit(data, 0, SMALL, "cpu").model
    train, _ = split_holdout(len(data), 0, SMALL)
    inputs = dynamics_inputs_targets(data)[0][train].numpy().astype(np.float64)
    expected = inputs.std(0)
    expected[2] = 1.0
    np.testing.assert_allclose(model.input_mean.numpy(), inputs.mean(0), rtol=1e-6)
    np.testing.assert_allclose(model.input_std.numpy(), expected, rtol=1e-6)


def test_targets_are_delta_and_reward_in_raw_units() -> None:
    data = toy_data()
    inputs, targets = dynamics_inputs_targets(data)
    assert torch.equal(inputs, torch.cat([data.observations, data.actions], -1))
    assert torch.equal(targets[:, :3], data.next_observations - data.observations)
    assert torch.equal(targets[:, 3], data.rewards)


def test_each_member_has_its_own_bootstrap_and_a_new_order_each_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit = Fit(toy_data(1000), 0, SMALL, backend="reference")
    n = len(fit.inputs)
    assert fit.bootstrap().shape == (3, n)
    shares = [len(np.unique(rows)) / n for rows in fit.bootstrap()]
    # A bootstrap sample contains a share of 1 - 1/e of the rows.
    assert all(0.58 < share < 0.68 for share in shares)
    assert not np.array_equal(np.sort(fit.bootstrap()[0]), np.sort(fit.bootstrap()[1]))

    seen: list[torch.Tensor] = []

    def spy(self: PyTorchSteps, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(inputs.clone())
        return torch.zeros(())

    monkeypatch.setattr(PyTorchSteps, "__call__", spy)
    for _ in range(2):
        fit.run_epoch()
    half = len(seen) // 2
    first, second = torch.cat(seen[:half], 1), torch.cat(seen[half:], 1)
    for member, rows in enumerate(fit.bootstrap()):
        expected = fit.inputs[torch.from_numpy(rows)][:, 0].sort().values
        assert torch.equal(first[member, :, 0].sort().values, expected)
        assert torch.equal(second[member, :, 0].sort().values, expected)
    assert not torch.equal(first, second)


def test_it_learns_the_mean_and_the_noise() -> None:
    config = dataclasses.replace(
        SMALL, hidden=(32,), weight_decay=(0.0, 0.0), max_epochs=25, learning_rate=3e-3
    )
    data = toy_data(3000, noise=0.3)
    model = fit_dynamics(data, config=config)
    # The least possible MSE is the variance of the noise. The ensemble must get near it and predict it.
    assert 0.08 < float(holdout_mse(model, data, 0, config)[model.elites[0]]) < 0.14
    fresh = toy_data(2000, noise=0.3, seed=1)
    _, logvar = model(dynamics_inputs_targets(fresh)[0])
    assert logvar.exp().mean().sqrt().item() == pytest.approx(0.3, rel=0.15)


def test_stops_when_more_than_patience_epochs_brought_nothing() -> None:
    # No epoch after the first can improve the MSE by 99.99 %.
    config = dataclasses.replace(SMALL, improvement=0.9999, patience=2, max_epochs=None)
    records: list[FitEpoch] = []
    fit_dynamics(toy_data(), config=config, on_epoch=records.append)
    assert [record.epoch for record in records] == [0, 1, 2, 3]
    assert [all(record.improved) for record in records] == [True, False, False, False]


def test_max_epochs_caps() -> None:
    records: list[FitEpoch] = []
    fit_dynamics(toy_data(), config=SMALL, on_epoch=records.append)
    assert len(records) == 4


def test_best_weights_come_back_and_elites_are_the_best_first() -> None:
    # The learning rate is so high that the MSE rises and falls.
    config = dataclasses.replace(SMALL, learning_rate=0.1, max_epochs=None, patience=3, members=5, elites=3)
    data = toy_data()
    records: list[FitEpoch] = []
    model = fit_dynamics(data, seed=5, config=config, on_epoch=records.append)
    found = holdout_mse(model, data, 5, config)
    best = []
    for member in range(config.members):
        kept = [record.holdout_mse[member] for record in records if record.improved[member]]
        assert all(later < 0.99 * earlier for earlier, later in itertools.pairwise(kept))
        best.append(kept[-1])
    assert any(not record.improved[member] for record in records[-1:] for member in range(5))
    np.testing.assert_allclose(found.numpy(), best, rtol=1e-4)
    assert model.elites.tolist() == np.argsort(best)[:3].tolist()


def test_holdout_mse_is_over_rows_and_dims_in_raw_units() -> None:
    data = toy_data()
    fit = Fit(data, 0, SMALL, "cpu")
    np.testing.assert_allclose(fit._holdout_mse(), holdout_mse(fit.model, data, 0, SMALL).numpy(), rtol=1e-6)


def test_the_result_is_a_function_of_the_seed() -> None:
    first, again, other = (fit_dynamics(toy_data(), seed=seed, config=SMALL) for seed in (0, 0, 1))
    assert same_state(first, again)
    assert not torch.equal(first.weights[0], other.weights[0])


def test_float64_data_give_a_float32_model() -> None:
    data = toy_data()
    doubled = dataclasses.replace(
        data, **{name: array.double() for name, array in data.arrays().items() if array.is_floating_point()}
    )
    model = fit_dynamics(doubled, config=dataclasses.replace(SMALL, max_epochs=1))
    assert model.weights[0].dtype == torch.float32


def test_the_bar_shows_the_holdout_mse(capsys: pytest.CaptureFixture[str]) -> None:
    fit_dynamics(toy_data(), config=SMALL)
    assert "holdout MSE" in capsys.readouterr().err
    fit_dynamics(toy_data(), config=SMALL, quiet=True)
    assert capsys.readouterr().err == ""


# --- checkpoint


class _Stop(Exception):
    pass


def stop_after(epoch: int):
    def on_epoch(record: FitEpoch) -> None:
        if record.epoch == epoch:
            raise _Stop

    return on_epoch


def test_a_stopped_fit_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, max_epochs=None, patience=2, learning_rate=3e-3)
    data, path = toy_data(), tmp_path / "fit.safetensors"
    expected: list[FitEpoch] = []
    undisturbed = fit_dynamics(data, config=config, on_epoch=expected.append)
    assert len(expected) > 6
    for epoch in (0, 1, 5):
        with pytest.raises(_Stop):
            fit_dynamics(data, config=config, checkpoint=path, on_epoch=stop_after(epoch))
    records: list[FitEpoch] = []
    resumed = fit_dynamics(data, config=config, checkpoint=path, on_epoch=records.append)
    assert same_state(resumed, undisturbed)
    timeless = [dataclasses.replace(record, seconds=0.0) for record in records]
    assert timeless == [dataclasses.replace(record, seconds=0.0) for record in expected]

    again: list[FitEpoch] = []
    finished = fit_dynamics(data, config=config, checkpoint=path, on_epoch=again.append)
    assert same_state(finished, undisturbed)
    # The recorded seconds are equal too, so these epochs were read and not run again.
    assert again == records


def test_the_log_is_written_as_the_fit_goes_and_survives_a_stop(tmp_path: Path) -> None:
    """fit.csv and TensorBoard hold an epoch when it ends, and every epoch once after a resumed fit."""

    def logged() -> tuple[list[int], list[int]]:
        events = EventAccumulator(str(tmp_path / "tensorboard-fit"))
        events.Reload()
        with (tmp_path / "fit.csv").open() as file:
            rows = [int(row["epoch"]) for row in csv.DictReader(file)]
        return rows, [event.step for event in events.Scalars("holdout_mse/member_2")]

    def on_epoch(record: FitEpoch) -> None:
        epochs = list(range(record.epoch + 1))
        assert logged() == (epochs, epochs)
        stop_after(2)(record)

    with pytest.raises(_Stop):
        fit_and_save(toy_data(), tmp_path, config=SMALL, on_epoch=on_epoch)
    # A folder from elsewhere may hold links, which must not be followed.
    shutil.copy(tmp_path / "fit.csv", tmp_path / "elsewhere")
    (tmp_path / "fit.csv").unlink()
    (tmp_path / "fit.csv").symlink_to(tmp_path / "elsewhere")
    _, fit = fit_and_save(toy_data(), tmp_path, config=SMALL)
    assert logged() == ([0, 1, 2, 3], [0, 1, 2, 3])
    with (tmp_path / "fit.csv").open() as file:
        assert [float(row["train_loss"]) for row in csv.DictReader(file)] == fit["train_loss"]
    assert len((tmp_path / "elsewhere").read_text().splitlines()) == 4


def test_a_killed_fit_lets_nobody_in_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    script = """
import signal, sys
sys.path.insert(0, sys.argv[2])
from small_fits import SMALL, toy_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from mopo_fast.fit import fit_and_save

def wait(record):
    if record.epoch == 1:
        print("half way", flush=True)
        signal.pause()

fit_and_save(toy_data(), sys.argv[1], config=SMALL, on_epoch=wait)
"""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", script, str(folder), str(HELPERS)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"half way\n"
            before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
            with pytest.raises(InputError, match=f"another process is at work in {folder}"):
                fit_and_save(toy_data(), folder, config=SMALL)
            assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        finally:
            process.kill()
    assert not (folder / "fit.json").exists()
    model, record = fit_and_save(toy_data(), folder, config=SMALL)
    assert same_state(model, fit_dynamics(toy_data(), config=SMALL))
    assert record["epochs"] == 4


@pytest.mark.parametrize("what", ["data", "seed", "config"])
def test_a_checkpoint_of_another_fit_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "fit.safetensors"
    fit_dynamics(toy_data(), config=SMALL, checkpoint=path)
    data, seed, config = toy_data(), 0, SMALL
    if what == "data":
        data.rewards[-1] += 1e-3
    elif what == "seed":
        seed = 1
    else:
        config = dataclasses.replace(SMALL, learning_rate=2e-3)
    with pytest.raises(InputError, match="other data, another seed or another config"):
        fit_dynamics(data, seed=seed, config=config, checkpoint=path)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    fit_dynamics(toy_data(), config=SMALL, checkpoint=path)
    whole = path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_tensors(path).items()}

    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        fit_dynamics(toy_data(), config=SMALL, checkpoint=path)
    for lost in ("fingerprint", "best_1", "weights.0", "weights.2.exp_avg", "history.improved"):
        save_tensors(path, {name: tensor for name, tensor in tensors.items() if name != lost})
        with pytest.raises(InputError, match=str(path)):
            fit_dynamics(toy_data(), config=SMALL, checkpoint=path)
    for name in ("best_0", "history.seconds"):
        save_tensors(path, tensors | {name: torch.zeros(2)})
        with pytest.raises(InputError, match=f"{name} has shape"):
            fit_dynamics(toy_data(), config=SMALL, checkpoint=path)


# --- fit_and_save


def test_a_checkpoint_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    other, folder = tmp_path / "other", tmp_path / "fit"
    other.mkdir()
    (other / "fit.safetensors").write_bytes(b"another run's")
    folder.mkdir()
    (folder / "checkpoint").symlink_to(other)
    with pytest.raises(InputError, match=r"fit/checkpoint is a link or no folder"):
        fit_and_save(toy_data(), folder, config=SMALL)
    assert (other / "fit.safetensors").read_bytes() == b"another run's"


def test_fit_and_save_leaves_a_finished_folder(tmp_path: Path) -> None:
    data = toy_data()
    model, record = fit_and_save(data, tmp_path, seed=2, config=SMALL)
    (events,) = (tmp_path / "tensorboard-fit").iterdir()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and path != events) == [
        ".lock", "dynamics.json", "dynamics.safetensors", "fit.csv", "fit.json",
    ]  # fmt: skip
    assert same_state(EnsembleDynamics.load(tmp_path), model)
    assert same_state(model, fit_dynamics(data, seed=2, config=SMALL))
    assert json.loads((tmp_path / "fit.json").read_text()) == json.loads(json.dumps(record))
    assert record["dataset"] == "toy"
    assert record["data_sha256"] == data_sha256(data)
    assert (record["transitions"], record["holdout"], record["seed"], record["epochs"]) == (300, 60, 2, 4)
    assert np.shape(record["holdout_mse"]) == (4, 3)
    assert record["elites"] == model.elites.tolist()
    kept = np.where(record["improved"], record["holdout_mse"], np.inf).min(0)
    assert record["best_mse"] == kept.tolist()
    assert record["seconds"] > 0


def test_the_digest_sees_every_array() -> None:
    data = toy_data()
    digests = {data_sha256(data)}
    for name in ("observations", "actions", "rewards", "next_observations"):
        array = getattr(data, name).clone()
        array[-1] += 1.0
        digests.add(data_sha256(dataclasses.replace(data, **{name: array})))
    assert len(digests) == 5


def test_an_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match=f"cannot work in {blocked}"):
        fit_and_save(toy_data(), blocked, config=SMALL)


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(InputError, match="cannot write"):
            fit_and_save(toy_data(), tmp_path, config=SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # The log has its first rows.
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in left if not name.startswith("events.")} <= {".lock", "fit.csv"}


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_decay": (1e-3,)}, "hidden has 2 layers, so weight_decay needs 3 values"),
        ({"weight_decay": (1e-3, -1e-3, 0.0)}, "weight_decay must not be negative"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"members": 0}, "members must be"),
        ({"members": 257}, "members must be"),
        ({"elites": 4}, "elites must be"),
        ({"hidden": (16, 0)}, "sizes must be positive"),
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
        ({"patience": -1}, "patience must be"),
        ({"max_epochs": 0}, "max_epochs must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"improvement": 1.0}, "improvement must be in"),
        ({"holdout_fraction": 0.0}, r"holdout_fraction must be in \(0, 1\)"),
        ({"holdout_fraction": math.nan}, r"holdout_fraction must be in \(0, 1\)"),
        ({"holdout_max": 0}, "holdout_max must be at least 1"),
        ({"learning_rate": math.inf}, "learning_rate must be finite, got inf"),
        ({"weight_decay": (0.0, math.inf, 0.0)}, "weight_decay must be finite"),
        ({"logvar_bound_weight": math.nan}, "logvar_bound_weight must be finite, got nan"),
        ({"max_logvar": math.inf}, "max_logvar must be finite, got inf"),
        ({"min_logvar": -math.inf}, "min_logvar must be finite, got -inf"),
        ({"min_logvar": 0.5, "max_logvar": 0.5}, "min_logvar must be less than max_logvar, got 0.5 and 0.5"),
        (
            {"batch_size": 10**12},
            r"fit would take [\d,]+ GiB, cpu has .*; lower batch_size, members or hidden",
        ),
        ({"batch_size": 10**14, "hidden": (), "weight_decay": (0.0,)}, "lower batch_size"),
        ({"hidden": (10**7, 10**7)}, "lower batch_size, members or hidden"),
    ],
)
def test_bad_configs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_dynamics(toy_data(), config=dataclasses.replace(SMALL, **change))


def test_bad_data_are_refused() -> None:
    data = toy_data()
    data.rewards[7] = math.nan
    with pytest.raises(InputError, match="rewards is not finite at row 7"):
        fit_dynamics(data, config=SMALL)
    data = toy_data()
    with pytest.raises(InputError, match="next_observations has shape"):
        fit_dynamics(dataclasses.replace(data, next_observations=data.next_observations[:, :2]), config=SMALL)
    with pytest.raises(InputError, match="at least one transition"):
        fit_dynamics(toy_data(4), config=SMALL)


def test_only_an_ensemble_of_its_own_kind_can_be_fitted_further() -> None:
    initial, shape = fit_dynamics(toy_data(), config=SMALL), {"members": 3, "elites": 2, "hidden": (16, 12)}
    continued = fit_dynamics(
        toy_data(), config=dataclasses.replace(SMALL, learning_rate=1e-12), initial=initial
    )
    torch.testing.assert_close(continued.weights[0], initial.weights[0])
    for declared in ({"log_scale": "std"}, {"member_bounds": True}, {"absolute": [1]}):
        other = EnsembleDynamics(3, 2, **shape, **declared)
        with pytest.raises(InputError, match=r"a fit of .* cannot begin with an ensemble"):
            fit_dynamics(toy_data(), config=SMALL, initial=other)


def test_bad_seed_and_device_are_refused() -> None:
    with pytest.raises(InputError, match="seed must not be negative"):
        fit_dynamics(toy_data(), seed=-1, config=SMALL)
    with pytest.raises(InputError, match="device 'gpu'"):
        fit_dynamics(toy_data(), config=SMALL, device="gpu")
    with pytest.raises(InputError, match="device 'meta'"):
        fit_dynamics(toy_data(), config=SMALL, device="meta")


def test_a_fit_that_diverges_says_so() -> None:
    data = toy_data()
    data.rewards[:] = 1e30
    with pytest.raises(InputError, match="diverged in epoch 0"):
        fit_dynamics(data, config=SMALL)


# --- a checkpoint from elsewhere


def test_every_tensor_of_a_checkpoint_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    fit_dynamics(toy_data(), config=SMALL, checkpoint=path)
    fingerprint = Fit(toy_data(), 0, SMALL).fingerprint(data_sha256(toy_data()))
    check_tensors(path, lambda: Fit(toy_data(), 0, SMALL).restore(path, fingerprint))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weights.0.step", -1.0, "not those of whole epochs"),
        ("weights.0.step", 1e30, "not those of whole epochs"),
        ("every step", 1e30, "not those of whole epochs"),
        ("every step", -8.0, "not those of whole epochs"),
        ("every step", 0.5, "not those of whole epochs"),
        ("weights.1.exp_avg_sq", -1.0, "second moment of Adam is negative"),
        ("input_std", 0.0, "input_std must be positive everywhere"),
        ("history.improved", 0.0, "is inconsistent at epoch 0"),
        ("history.improved", 7.0, "is inconsistent at epoch 0"),
        ("history.holdout_mse", -1.0, "is inconsistent at epoch 0"),
        ("history.seconds", -1.0, "is inconsistent at epoch 0"),
    ],
)
def test_values_that_no_fit_has_are_refused(name: str, value: float, message: str, tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    fit_dynamics(toy_data(), config=SMALL, checkpoint=path)
    tensors, _ = read_tensors(path)
    for key, tensor in tensors.items():
        if key == name or (name == "every step" and key.endswith(".step")):
            tensor.fill_(value)
    save_tensors(path, tensors)
    with pytest.raises(InputError, match=rf"fit\.safetensors.*{message}; delete .*fit\.safetensors"):
        fit_dynamics(toy_data(), config=SMALL, checkpoint=path)


def test_a_refused_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    for data, options in ((toy_data(4), {}), (toy_data(), {"seed": -1}), (toy_data(), {"device": "gpu"})):
        with pytest.raises(InputError):
            fit_and_save(data, tmp_path / "a" / "b", config=SMALL, **options)
        assert list(tmp_path.iterdir()) == []
