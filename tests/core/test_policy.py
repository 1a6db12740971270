"""Test actor and critic: distributions, shapes, files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributions
from torch.nn import functional

from mopo_fast.errors import InputError
from mopo_fast.policy import Actor, Critic
from mopo_fast.utils.tensors import load_tensors, save_tensors


def make_actor(**changes: Any) -> Actor:
    generator = torch.Generator().manual_seed(0)
    actor = Actor(4, 2, generator=generator, **({"hidden": (16, 8)} | changes))
    with torch.no_grad():
        for bias in actor.biases:
            bias.normal_(generator=generator)
    return actor


# --- actor


@pytest.mark.parametrize("activation", ["silu", "relu", "tanh"])
def test_forward_equals_the_layers_by_hand(activation: str) -> None:
    actor = make_actor(activation=activation).double()
    observations = torch.randn(9, 4, dtype=torch.float64)
    mean, log_std = actor(observations)
    function = {"silu": functional.silu, "relu": functional.relu, "tanh": torch.tanh}[activation]
    x = observations
    for layer in range(3):
        x = x @ actor.weights[layer] + actor.biases[layer]
        x = function(x) if layer < 2 else x
    torch.testing.assert_close(mean, x[:, :2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_std, x[:, 2:].clamp(-20, 2), rtol=1e-12, atol=1e-12)


def test_log_std_is_clipped() -> None:
    actor = make_actor(log_std_min=-0.1, log_std_max=0.1)
    with torch.no_grad():
        _, log_std = actor(100 * torch.randn(50, 4))
    assert log_std.min() == pytest.approx(-0.1)
    assert log_std.max() == pytest.approx(0.1)


def test_sample_has_the_log_probability_of_a_squashed_gaussian() -> None:
    actor = make_actor().double()
    observations, noise = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
    actions, log_prob = actor.sample(observations, noise)
    mean, log_std = actor(observations)
    raw = mean + log_std.exp() * noise
    torch.testing.assert_close(actions, torch.tanh(raw))
    near = raw.abs().max(dim=-1).values < 4  # beyond, the oracle's log(1 - tanh^2) is inaccurate
    assert near.any()
    squashed = distributions.TransformedDistribution(
        distributions.Normal(mean, log_std.exp()), distributions.TanhTransform()
    )
    expected = squashed.log_prob(actions).sum(-1)
    torch.testing.assert_close(log_prob[near], expected[near], rtol=1e-7, atol=1e-7)


def test_log_probability_is_finite_and_right_far_out_in_the_tails() -> None:
    actor = make_actor().float()
    with torch.no_grad():
        actor.weights[-1].zero_()
        actor.biases[-1].copy_(torch.tensor([50.0, -50.0, 0.0, 0.0]))
    _, log_prob = actor.sample(torch.zeros(1, 4), torch.zeros(1, 2))
    # log N(0) - log(1 - tanh(50)^2), where 1 - tanh(x)^2 = 4 exp(-2 |x|).
    expected = 2 * (-0.5 * math.log(2 * math.pi) - (math.log(4.0) - 100.0))
    assert log_prob.item() == pytest.approx(expected, rel=1e-6)


def test_act_is_tanh_of_the_mean_or_of_a_sample() -> None:
    actor = make_actor()
    observations, noise = torch.randn(20, 4), torch.randn(20, 2)
    mean, log_std = actor(observations)
    assert torch.equal(actor.act(observations), torch.tanh(mean))
    torch.testing.assert_close(actor.act(observations, noise), actor.sample(observations, noise)[0])
    torch.testing.assert_close(actor.act(observations, noise), torch.tanh(mean + log_std.exp() * noise))
    assert not actor.act(observations, noise).requires_grad


def test_actor_starts_from_xavier_uniform() -> None:
    actor = Actor(17, 6, generator=torch.Generator().manual_seed(0))
    assert [tuple(weight.shape) for weight in actor.weights] == [(17, 256), (256, 256), (256, 12)]
    for weight in actor.weights:
        bound = math.sqrt(6.0 / sum(weight.shape))
        assert 0.97 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert all((bias == 0).all() for bias in actor.biases)
    assert actor.hidden == (256, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": (8, 0)}, "sizes must be whole numbers, 1 or more"),
        ({"activation": "gelu"}, "unknown activation 'gelu'; there are"),
        ({"log_std_min": 2.0, "log_std_max": 2.0}, "log_std_min 2.0 must be below"),
        ({"log_std_min": math.nan}, "log_std_min nan must be below"),
        ({"hidden": (10**7, 10**7)}, r"hidden \(10000000, 10000000\) would take 372,[\d,]+ GiB, .*; lower"),
    ],
)
def test_arguments_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_actor(**change)


# --- files


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"hidden": ()},
        {"activation": "silu", "hidden": (8, 8, 8)},
        {"log_std_min": -5.0, "log_std_max": 1.5},
    ],
)
def test_load_gives_back_what_save_wrote(tmp_path: Path, change: dict[str, Any]) -> None:
    actor = make_actor(**change)
    actor.save(tmp_path / "new folder")
    loaded = Actor.load(tmp_path / "new folder")
    assert loaded.hidden == actor.hidden
    for name in ("obs_dim", "act_dim", "activation", "log_std_min", "log_std_max"):
        assert getattr(loaded, name) == getattr(actor, name), name
    state = loaded.state_dict()
    assert state.keys() == actor.state_dict().keys()
    for name, value in actor.state_dict().items():
        assert torch.equal(state[name], value), name


def test_the_file_has_the_names_that_other_code_reads(tmp_path: Path) -> None:
    make_actor().save(tmp_path)
    tensors = load_tensors(tmp_path / "policy.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "weight_0": (4, 16), "weight_1": (16, 8), "weight_2": (8, 4),
        "bias_0": (16,), "bias_1": (8,), "bias_2": (4,),
    }  # fmt: skip
    meta = json.loads((tmp_path / "policy.json").read_text())
    assert meta == META


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    make_actor().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"{name} does not exist"):
        Actor.load(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    make_actor().save(tmp_path)
    path = tmp_path / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        Actor.load(tmp_path)


META = {
    "format_version": 1, "obs_dim": 4, "act_dim": 2, "activation": "relu",
    "log_std_min": -20.0, "log_std_max": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ([], "policy.json: the whole: "),
        ({}, "format_version: Field required"),
        (META | {"format_version": 2}, "not of format_version 1"),
        ({name: value for name, value in META.items() if name != "act_dim"}, "act_dim: Field required"),
        (META | {"obs_dim": None}, "obs_dim: Input should be"),
        (META | {"obs_dim": True}, "obs_dim: Input should be"),
        (META | {"log_std_min": 3.0}, "must be below"),
        (META | {"activation": "gelu"}, "activation: Input should be"),
        (META | {"obs_dim": 5}, "weight_0 has shape"),
        (META | {"act_dim": 10**30}, "weight_2 has shape"),
    ],
)
def test_wrong_metadata_are_refused(tmp_path: Path, meta: Any, message: str) -> None:
    make_actor().save(tmp_path)
    (tmp_path / "policy.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=message):
        Actor.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_0": None, "weight_1": None, "weight_2": None}, "lacks weight_0"),
        ({"weight_1": None}, "lacks weight_1"),
        ({"weight_0": torch.tensor(1.0)}, "weight_0 must have 2 dimensions"),
        ({"bias_2": None}, "lacks bias_2"),
        ({"bias_0": torch.zeros(3)}, "bias_0 has shape"),
        ({"weight_1": torch.full((16, 8), math.nan)}, "weight_1 holds values that are not finite"),
        ({"weight_1": torch.zeros(16, 8, dtype=torch.int32)}, "weight_1 is of torch.int32"),
        ({"bias_0": torch.zeros(16, dtype=torch.complex64)}, "bias_0 is of torch.complex64"),
        ({"weight_0": torch.zeros(4, 7)}, r"shape \[16, 8\], the one before has \[4, 7\]"),
    ],
)
def test_wrong_tensors_are_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    make_actor().save(tmp_path)
    path = tmp_path / "policy.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_tensors(path).items()} | change
    save_tensors(path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(InputError, match=message):
        Actor.load(tmp_path)


def test_an_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        make_actor().save(tmp_path / "file")


# --- critic


def test_critics_are_independent_networks() -> None:
    critic = Critic(4, 2, critics=3, hidden=(16, 8), generator=torch.Generator().manual_seed(0)).double()
    observations, actions = torch.randn(9, 4, dtype=torch.float64), torch.rand(9, 2, dtype=torch.float64)
    values = critic(observations, actions)
    assert values.shape == (3, 9)
    for which in range(3):
        x = torch.cat([observations, actions], -1)
        for layer in range(3):
            x = x @ critic.weights[layer][which] + critic.biases[layer][which]
            x = x.relu() if layer < 2 else x
        torch.testing.assert_close(values[which], x[:, 0], rtol=1e-12, atol=1e-12)
    assert not torch.equal(critic.weights[0][0], critic.weights[0][1])


def test_critics_larger_than_the_memory_are_refused() -> None:
    with pytest.raises(InputError, match=r"hidden \(10000000, 10000000\) would take .*; lower critics or"):
        Critic(4, 2, hidden=(10**7, 10**7))
    with pytest.raises(InputError, match="; lower critics or"):
        Critic(4, 2, critics=10**12)


def test_critic_starts_from_xavier_uniform_per_network() -> None:
    critic = Critic(17, 6, generator=torch.Generator().manual_seed(0))
    assert [tuple(weight.shape) for weight in critic.weights] == [(2, 23, 256), (2, 256, 256), (2, 256, 1)]
    for weight in critic.weights[:2]:
        bound = math.sqrt(6.0 / (weight.shape[1] + weight.shape[2]))
        assert 0.97 * bound < weight.abs().max() <= bound


class TestPredict:
    def test_one_observation_and_many(self) -> None:
        actor = Actor(3, 2, generator=torch.Generator().manual_seed(0))
        many = np.linspace(-1, 1, 12).reshape(4, 3)
        expected = actor.act(torch.from_numpy(many).float()).numpy()
        found = actor.predict(many)
        assert isinstance(found, np.ndarray) and found.dtype == np.float32
        assert np.array_equal(found, expected)
        assert actor.predict(many[0]).shape == (2,)
        assert np.allclose(actor.predict(many[0]), expected[0])
        assert np.array_equal(actor.predict(torch.from_numpy(many)), expected)
        assert np.array_equal(actor.predict(many[::-1]), expected[::-1])
        assert actor.predict([0, 1, 2]).shape == (2,)

    def test_samples_on_request(self) -> None:
        actor, one = Actor(3, 2), np.zeros(3)
        drawn = [
            actor.predict(one, deterministic=False, generator=torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)
        ]
        assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
        assert np.abs(drawn).max() <= 1.0

    @pytest.mark.parametrize(
        ("observations", "message"),
        [
            (np.zeros(4), r"observations must be \[3\] or \[n, 3\], got shape \[4\]"),
            (np.zeros((1, 1, 3)), r"got shape \[1, 1, 3\]"),
            (0.0, r"got shape \[\]"),
            (["a", "b", "c"], "observations must be numbers"),
            ([0.0, np.nan, 0.0], "observations must be finite"),
        ],
    )
    def test_refusals(self, observations: object, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Actor(3, 2).predict(observations)


def test_repr_is_short() -> None:
    assert repr(Actor(3, 2)) == (
        "Actor(obs_dim=3, act_dim=2, hidden=(256, 256), activation='relu', log_std_min=-20.0,"
        " log_std_max=2.0, device='cpu')"
    )
