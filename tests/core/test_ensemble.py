"""Test the ensemble: forward pass, variance bounds, initialisation, files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from mopo_fast.config import LOG_SCALES, LogScale
from mopo_fast.ensemble import EnsembleDynamics, activate, soft_clamp_logvar, soft_clamp_variance
from mopo_fast.errors import InputError
from mopo_fast.rollout import RolloutEngine
from mopo_fast.utils.tensors import load_tensors, save_tensors


def make_ensemble(**changes: Any) -> EnsembleDynamics:
    """Make a small ensemble without any parameter or buffer at its default."""
    arguments = {"members": 3, "elites": 2, "hidden": (8, 6)} | changes
    generator = torch.Generator().manual_seed(0)
    model = EnsembleDynamics(4, 2, generator=generator, **arguments)
    with torch.no_grad():
        for bias in model.biases:
            bias.normal_(generator=generator)
        model.max_logvar.add_(torch.rand(5, generator=generator))
        model.min_logvar.sub_(torch.rand(5, generator=generator))
        model.input_mean.normal_(generator=generator)
        model.input_std.uniform_(0.5, 2.0, generator=generator)
        model.elites.copy_(torch.arange(model.members).flip(0)[: len(model.elites)])
    return model


# --- forward pass


@pytest.mark.parametrize("activation", ["silu", "relu", "tanh"])
def test_forward_equals_one_network_per_member(activation: str) -> None:
    model = make_ensemble(activation=activation).double()
    inputs = torch.randn(9, 6, dtype=torch.float64)
    mean, logvar = model(inputs)
    assert mean.shape == logvar.shape == (3, 9, 5)
    function = {"silu": functional.silu, "relu": functional.relu, "tanh": torch.tanh}[activation]
    for member in range(3):
        x = (inputs - model.input_mean) / model.input_std
        for layer in range(3):
            x = x @ model.weights[layer][member] + model.biases[layer][member]
            x = function(x) if layer < 2 else x
        torch.testing.assert_close(mean[member], x[:, :5], rtol=1e-12, atol=1e-12)
        bounded = model.max_logvar - functional.softplus(model.max_logvar - x[:, 5:])
        bounded = model.min_logvar + functional.softplus(bounded - model.min_logvar)
        torch.testing.assert_close(logvar[member], bounded, rtol=1e-12, atol=1e-12)


def test_each_member_can_have_its_own_inputs() -> None:
    model = make_ensemble()
    inputs = torch.randn(3, 7, 6)
    mean, _ = model(inputs)
    for member in range(3):
        torch.testing.assert_close(mean[member], model(inputs[member])[0][member])


def test_the_reference_predicts_mean_and_variance_of_the_forward_pass() -> None:
    model = make_ensemble().double()
    observations, actions = torch.randn(7, 4, dtype=torch.float64), torch.rand(7, 2, dtype=torch.float64)
    engine = RolloutEngine(model, backend="reference", dtype="float64")
    result = engine.step(observations, actions, seed=0, distributions=True)
    mean, logvar = model(torch.cat([observations, actions], -1))
    assert torch.equal(result.mean, mean)
    torch.testing.assert_close(result.std, (0.5 * logvar).exp(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("log_scale", LOG_SCALES)
@pytest.mark.parametrize("member_bounds", [False, True])
def test_what_other_code_declares(log_scale: LogScale, member_bounds: bool) -> None:
    """Options of other code follow their definitions: bounds by softplus, for each member, of log stds."""
    model = make_ensemble(log_scale=log_scale, member_bounds=member_bounds, absolute=[1, 3]).double()
    with torch.no_grad():
        model.max_logvar.uniform_(-1.0, 0.5)
        model.min_logvar.uniform_(-5.0, -3.0)
    observations, actions = torch.randn(7, 4, dtype=torch.float64), torch.rand(7, 2, dtype=torch.float64)
    inputs = torch.cat([observations, actions], -1)
    means, stds = [], []
    for member in range(3):
        mean, log = (heads[member] for heads in model.raw_heads(inputs))
        high, low = (
            bound[member] if member_bounds else bound for bound in (model.max_logvar, model.min_logvar)
        )
        log = high - functional.softplus(high - log)
        log = low + functional.softplus(log - low)
        means.append(mean)
        stds.append(log.exp() if log_scale == "std" else (0.5 * log).exp())
    mean, std = torch.stack(means), torch.stack(stds)
    found_mean, found_logvar = model(inputs)
    torch.testing.assert_close(found_mean, mean)
    torch.testing.assert_close((0.5 * found_logvar).exp(), std)
    engine = RolloutEngine(model, backend="reference", dtype="float64")
    result = engine.step(observations, actions, seed=0, distributions=True, deterministic=True)
    torch.testing.assert_close(result.mean, mean)
    torch.testing.assert_close(result.std, std)
    expected = mean.mean(0)[:, :4]
    expected[:, [0, 2]] += observations[:, [0, 2]]
    torch.testing.assert_close(result.next_observations, expected)
    torch.testing.assert_close(model.next_observations(observations, mean.mean(0)), expected)


def test_unknown_declarations_are_refused() -> None:
    with pytest.raises(InputError, match="unknown log_scale 'precision'; there are: variance, std"):
        make_ensemble(log_scale="precision")
    with pytest.raises(InputError, match=r"absolute must name observation dimensions 0\.\.3, got \[4\]"):
        make_ensemble(absolute=[4])


def test_activate_knows_three_functions() -> None:
    x = torch.linspace(-4, 4, 9)
    assert torch.equal(activate(x, "relu"), x.clamp_min(0))
    assert torch.equal(activate(x, "tanh"), x.tanh())
    torch.testing.assert_close(activate(x, "silu"), x * torch.sigmoid(x))


# --- bounds of the log-variance


def test_closed_form_variance_equals_the_definition() -> None:
    logvar = torch.linspace(-40, 30, 1001, dtype=torch.float64)
    for high, low in ((0.5, -10.0), (2.0, -3.0), (-1.0, -1.5)):
        bounds = torch.tensor(high, dtype=torch.float64), torch.tensor(low, dtype=torch.float64)
        definition = soft_clamp_logvar(logvar, *bounds).exp()
        torch.testing.assert_close(soft_clamp_variance(logvar, *bounds), definition, rtol=1e-12, atol=0)
        assert (definition >= math.exp(low)).all()
        assert (definition <= math.exp(high) + math.exp(low)).all()


def test_closed_form_variance_is_right_at_infinities() -> None:
    high, low = torch.tensor(0.5), torch.tensor(-10.0)
    found = soft_clamp_variance(torch.tensor([-math.inf, math.inf, -200.0, 200.0]), high, low)
    least, most = math.exp(-10.0), math.exp(-10.0) + math.exp(0.5)
    torch.testing.assert_close(found, torch.tensor([least, most, least, most]))


# --- initialisation


def test_weights_start_as_a_truncated_normal_and_biases_at_zero() -> None:
    model = EnsembleDynamics(17, 6, generator=torch.Generator().manual_seed(0))
    assert [tuple(weight.shape) for weight in model.weights] == [
        (7, 23, 200), (7, 200, 200), (7, 200, 200), (7, 200, 200), (7, 200, 36),
    ]  # fmt: skip
    for weight in model.weights:
        std = 1.0 / (2.0 * math.sqrt(weight.shape[1]))
        assert weight.abs().max() <= 2 * std
        # Cutting a normal distribution at two standard deviations reduces its standard deviation to 0.8796.
        assert weight.std().item() == pytest.approx(0.8796 * std, rel=0.02)
    assert all((bias == 0).all() for bias in model.biases)
    assert (model.max_logvar == 0.5).all()
    assert (model.min_logvar == -10.0).all()
    assert model.elites.tolist() == [0, 1, 2, 3, 4]
    assert model.hidden == (200, 200, 200, 200)


def test_the_generator_decides_the_weights() -> None:
    first, again, other = (
        EnsembleDynamics(4, 2, generator=torch.Generator().manual_seed(seed)).weights[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": 0}, "members must be 1 to 256, got 0"),
        ({"members": 257}, "members must be 1 to 256, got 257"),
        ({"elites": 0}, r"elites must be 1 to members \(3\), got 0"),
        ({"elites": 4}, r"elites must be 1 to members \(3\), got 4"),
        ({"hidden": (8, 0)}, "sizes must be positive"),
        ({"activation": "gelu"}, "unknown activation 'gelu'; there are: silu, relu, tanh"),
        ({"hidden": (10**7, 10**7)}, r"hidden \(10000000, 10000000\) would take 1,117,[\d,]+ GiB, .*; lower"),
    ],
)
def test_sizes_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_ensemble(**change)


def test_dimensions_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="sizes must be positive, got obs 0"):
        EnsembleDynamics(0, 2)


# --- files


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"members": 256, "elites": 7},
        {"layer_norm": True, "hidden": (7, 5)},
        {"members": 1, "elites": 1, "hidden": ()},
        {"activation": "tanh"},
        {"log_scale": "std", "member_bounds": True, "absolute": [0, 3]},
    ],
)
def test_load_gives_back_what_save_wrote(tmp_path: Path, change: dict[str, Any]) -> None:
    model = make_ensemble(**change)
    model.save(tmp_path / "new folder")
    loaded = EnsembleDynamics.load(tmp_path / "new folder")
    assert (loaded.obs_dim, loaded.act_dim, loaded.activation) == (4, 2, model.activation)
    assert loaded.hidden == model.hidden
    assert loaded.log_scale == model.log_scale and torch.equal(loaded.absolute, model.absolute)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


def test_the_file_has_the_names_that_other_code_reads(tmp_path: Path) -> None:
    make_ensemble().save(tmp_path)
    tensors = load_tensors(tmp_path / "dynamics.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "weight_0": (3, 6, 8), "weight_1": (3, 8, 6), "weight_2": (3, 6, 10),
        "bias_0": (3, 8), "bias_1": (3, 6), "bias_2": (3, 10),
        "input_mean": (6,), "input_std": (6,), "max_logvar": (5,), "min_logvar": (5,), "elites": (2,),
    }  # fmt: skip
    assert tensors["elites"].dtype == torch.int64
    assert json.loads((tmp_path / "dynamics.json").read_text()) == {
        "format_version": 3, "obs_dim": 4, "act_dim": 2, "activation": "silu", "log_scale": "variance",
        "layer_norm": False,
    }  # fmt: skip
    old = {"format_version": 1, "obs_dim": 4, "act_dim": 2, "activation": "silu"}
    (tmp_path / "dynamics.json").write_text(json.dumps(old))
    assert EnsembleDynamics.load(tmp_path).log_scale == "variance"


@pytest.mark.parametrize("name", ["dynamics.json", "dynamics.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    make_ensemble().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"{name} does not exist"):
        EnsembleDynamics.load(tmp_path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    make_ensemble().save(tmp_path)
    whole = (tmp_path / "dynamics.safetensors").read_bytes()
    for length in (0, 7, 200, len(whole) - 1):
        (tmp_path / "dynamics.safetensors").write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a whole safetensors file"):
            EnsembleDynamics.load(tmp_path)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "dynamics.json"),
        ("null", "dynamics.json"),
        ('{"format_version": 1, "obs_dim": 4}', "act_dim: Field required"),
        (
            '{"format_version": 1, "obs_dim": "x", "act_dim": 2, "activation": "silu"}',
            "obs_dim: Input",
        ),
        ('{"format_version": 4, "obs_dim": 4, "act_dim": 2, "activation": "silu"}', "has format_version 4"),
        (
            '{"format_version": 3, "obs_dim": 4, "act_dim": 2, "activation": "silu", "log_scale": "std"}',
            "lacks layer_norm",
        ),
        ('{"format_version": 2, "obs_dim": 4, "act_dim": 2, "activation": "silu"}', "lacks log_scale"),
        (
            '{"format_version": 2, "obs_dim": 4, "act_dim": 2, "activation": "silu", "log_scale": 1}',
            "log_scale: Input",
        ),
        (
            '{"format_version": 1, "obs_dim": 4, "act_dim": 2, "activation": "gelu"}',
            "activation: Input",
        ),
        (
            '{"format_version": 1, "obs_dim": 4, "act_dim": 2, "activation": ["silu"]}',
            "activation: Input",
        ),
        ('{"format_version": 1, "obs_dim": 5, "act_dim": 2, "activation": "silu"}', "weight_0 has shape"),
        ('{"format_version": 1, "obs_dim": -4, "act_dim": 2, "activation": "silu"}', "weight_0 has shape"),
        ('{"format_version": 1, "obs_dim": 6, "act_dim": 0, "activation": "silu"}', "weight_2 has shape"),
        ('{"format_version": 1, "obs_dim": 1e15, "act_dim": 2, "activation": "silu"}', "obs_dim: Input"),
        ('{"format_version": 1, "obs_dim": true, "act_dim": 2, "activation": "silu"}', "obs_dim: Input"),
        (
            '{"format_version": 1, "obs_dim": 1000000000000000, "act_dim": 2, "activation": "silu"}',
            "weight_0 has shape",
        ),
    ],
)
def test_wrong_metadata_are_refused(tmp_path: Path, meta: str, message: str) -> None:
    make_ensemble().save(tmp_path)
    (tmp_path / "dynamics.json").write_text(meta)
    with pytest.raises(InputError, match=message):
        EnsembleDynamics.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_1": None}, "lacks weight_1"),
        ({"weight_0": None, "weight_1": None, "weight_2": None}, "lacks weight_0"),
        ({"weight_0": torch.zeros(6, 8)}, "weight_0 must have 3 dimensions"),
        ({"weight_1": torch.tensor(1.0)}, "weight_1 must have 3 dimensions"),
        ({"weight_0": torch.zeros(0, 6, 8)}, "the one before has"),
        ({"bias_1": torch.zeros(3, 7)}, "bias_1 has shape"),
        ({"elites": None}, "no elites"),
        ({"elites": torch.tensor([], dtype=torch.int64)}, "elites"),
        ({"elites": torch.tensor([0, 0])}, "distinct members"),
        ({"elites": torch.tensor([0, 3])}, "distinct members 0..2"),
        ({"elites": torch.tensor([0, -1])}, "distinct members"),
        ({"elites": torch.tensor([0, 1, 2, 0])}, "elites must be 1 to members"),
        ({"input_std": torch.tensor([1.0, 1, 1, 0, 1, 1])}, "input_std must be positive"),
        ({"input_mean": torch.full((6,), math.nan)}, "input_mean holds values that are not finite"),
        ({"max_logvar": torch.zeros(4)}, "max_logvar has shape"),
        ({"max_logvar": torch.zeros(3, 5)}, "min_logvar has shape"),
        ({"absolute": torch.ones(3, dtype=torch.bool)}, "absolute has shape"),
        ({"absolute": torch.ones(4)}, "absolute is of torch.float32, expected torch.bool"),
        ({"elites": torch.tensor([0.0, 1.0])}, "elites is of torch.float32"),
        ({"elites": torch.tensor([[0], [1]])}, "elites has shape"),
        ({"elites": torch.tensor(0)}, "elites has shape"),
        ({"bias_0": torch.zeros(3, 8, dtype=torch.int64)}, "bias_0 is of torch.int64"),
        ({"bias_0": torch.zeros(3, 8, dtype=torch.complex64)}, "bias_0 is of torch.complex64"),
        ({"bias_0": torch.zeros(3, 8, dtype=torch.float8_e4m3fn)}, "bias_0 is of torch.float8"),
        (
            {"bias_0": torch.full((3, 8), 1e300, dtype=torch.float64)},
            "bias_0 holds values that are not",
        ),
    ],
)
def test_wrong_tensors_are_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    make_ensemble().save(tmp_path)
    path = tmp_path / "dynamics.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_tensors(path).items()} | change
    save_tensors(path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(InputError, match=message):
        EnsembleDynamics.load(tmp_path)


def test_an_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        make_ensemble().save(tmp_path / "file")


@pytest.mark.parametrize("change", [{"layer_norm": False}, {"format_version": 2}])
def test_norms_that_are_not_announced_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    make_ensemble(layer_norm=True).save(tmp_path)
    path = tmp_path / "dynamics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="norm_scale_0, which dynamics"):
        EnsembleDynamics.load(tmp_path)
