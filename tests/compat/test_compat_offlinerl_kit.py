"""Test OfflineRL-Kit: comparison with results recorded by recorded/offlinerl_kit.py, and its files."""

import copy
import functools
import pickle
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from offlinerl_kit_model import FOLDER, Model, load, make_dynamics, termination
from torch import nn
from two_samples import differences

from mopo_fast import Actor, EnsembleDynamics, InputError, RolloutEngine
from mopo_fast.cli import main
from mopo_fast.compat import Checkpoint
from mopo_fast.compat import offlinerl_kit as kit
from mopo_fast.compat.offlinerl_kit import dynamics as kit_dynamics
from mopo_fast.compat.offlinerl_kit import policy as kit_policy


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "recorded.npz") as file:
        return dict(file)


# --- stand-ins with the attributes that its objects have


class TanhDiagGaussian(nn.Module):
    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.mu, self.sigma = linear(state, "actor.dist_net.mu"), linear(state, "actor.dist_net.sigma")
        self._unbounded = self._c_sigma = True
        self._max, self._sigma_min, self._sigma_max = 1.0, -5.0, 2.0


def linear(state: dict[str, torch.Tensor], name: str) -> nn.Linear:
    weight = state[f"{name}.weight"]
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": state[f"{name}.bias"]})
    return layer


def make_policy(dynamics: Any) -> Any:
    state = load("policy.pth")
    backbone = nn.Sequential(
        linear(state, "actor.backbone.model.0"), nn.ReLU(), linear(state, "actor.backbone.model.2"), nn.ReLU()
    )
    actor = types.SimpleNamespace(
        backbone=types.SimpleNamespace(model=backbone), dist_net=TanhDiagGaussian(state)
    )
    return types.SimpleNamespace(dynamics=dynamics, actor=actor)


# --- equality


def assert_close(ours: Any, theirs: np.ndarray) -> None:
    """Compare two float32 forward passes of the same weights."""
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=2e-5, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_means_variances_and_penalties(recorded: dict[str, np.ndarray], backend: str) -> None:
    observations, actions = recorded["observations"], recorded["actions"]
    for mode in ("aleatoric", "pairwise-diff", "ensemble_std"):
        dynamics = make_dynamics(mode, backend=backend)
        _, reward, terminal, info = dynamics.step(observations, actions)
        assert_close(info["penalty"], recorded[f"penalty {mode}"])
        np.testing.assert_allclose(reward, info["raw_reward"] - 0.7 * info["penalty"], rtol=1e-5, atol=1e-5)
        assert not terminal.any()
    made = dynamics.engine().step(observations, actions, seed=0, distributions=True)
    assert_close(made.mean, recorded["mean"])
    assert_close(np.log(np.asarray(made.std) ** 2), recorded["logvar"])


def test_samples_are_of_the_same_distribution(recorded: dict[str, np.ndarray]) -> None:
    np.random.seed(1)
    many = [np.repeat(recorded[name][:1], 20_000, axis=0) for name in ("observations", "actions")]

    def sample(dynamics: kit.EnsembleDynamics) -> np.ndarray:
        next_obs, _, _, info = dynamics.step(*many)
        return np.concatenate([next_obs, info["raw_reward"]], 1)

    theirs, dynamics = recorded["samples"], make_dynamics()
    assert differences(sample(dynamics), theirs) == []
    with torch.no_grad():
        # Increase the standard deviation by 10 %, which adds 2 log 1.1 to the log-variance.
        for bound in (dynamics.model.max_logvar, dynamics.model.min_logvar):
            bound.add_(2 * np.log(1.1))
        dynamics.model.output_layer.bias[:, 0, 4:].add_(2 * np.log(1.1))
    assert len(differences(sample(dynamics), theirs)) >= 2
    dynamics = make_dynamics()
    dynamics.model.set_elites([3, 0])
    assert any("of 0" in line for line in differences(sample(dynamics), theirs))


@pytest.mark.parametrize("task", ["halfcheetah", "hopper", "walker2d", "ant", "antangle", "humanoid", "pen"])
def test_termination(recorded: dict[str, np.ndarray], task: str) -> None:
    box = kit.termination_box(termination(task), 27)
    assert box is not None
    ended = ~box.contains(torch.from_numpy(recorded["states"])).numpy()
    assert np.array_equal(ended, recorded[f"ended {task}"][:, 0])
    assert 0 < ended.sum() < len(ended)


def test_rules_without_an_end_and_functions_of_others() -> None:
    assert kit.termination_box(termination("pendulum"), 3) == kit.termination_box(termination("door"), 3)
    assert kit.termination_box(termination("chess"), 3) is None
    assert kit.termination_box(lambda *_: None, 3) is None


# --- as its loop uses it


def test_step_gives_what_its_loop_takes(recorded: dict[str, np.ndarray]) -> None:
    def ends(obs: np.ndarray, action: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
        assert all(isinstance(array, np.ndarray) and array.ndim == 2 for array in (obs, action, next_obs))
        return next_obs[:, 1:2] > 0

    observations, actions = recorded["observations"], recorded["actions"]
    dynamics = make_dynamics(terminal_fn=ends)
    np.random.seed(0)
    next_obs, reward, terminal, info = dynamics.step(observations, actions)
    for array, columns, dtype in (
        (next_obs, 3, np.float32), (reward, 1, np.float32), (terminal, 1, np.bool_),
        (info["raw_reward"], 1, np.float32), (info["penalty"], 1, np.float32),
    ):  # fmt: skip
        assert isinstance(array, np.ndarray) and array.shape == (32, columns) and array.dtype == dtype
    assert np.array_equal(terminal, next_obs[:, 1:2] > 0)
    np.random.seed(0)
    assert np.array_equal(dynamics.step(observations, actions)[0], next_obs)
    assert not np.array_equal(dynamics.step(observations, actions)[0], next_obs)
    _, reward, _, info = make_dynamics(coef=0.0).step(observations, actions)
    assert info.keys() == {"raw_reward"} and np.array_equal(reward, info["raw_reward"])


def test_the_models_memory_is_shared(recorded: dict[str, np.ndarray]) -> None:
    dynamics = make_dynamics()
    ensemble = dynamics.ensemble()
    for layer, weight, bias in zip(
        (*dynamics.model.backbones, dynamics.model.output_layer),
        ensemble.weights,
        ensemble.biases,
        strict=True,
    ):
        assert layer.weight.data_ptr() == weight.data_ptr() and layer.bias.data_ptr() == bias.data_ptr()
    before = dynamics.step(recorded["observations"], recorded["actions"])[3]["penalty"]
    with torch.no_grad():
        dynamics.model.max_logvar.add_(1.0)
        dynamics.model.output_layer.bias.add_(0.5)
    assert (dynamics.step(recorded["observations"], recorded["actions"])[3]["penalty"] > before).all()


def test_weights_written_past_pytorchs_counters(recorded: dict[str, np.ndarray]) -> None:
    """Test that a step sees what OfflineRL-Kit's load_save writes through `.data`, in any layer."""
    dynamics = make_dynamics(coef=0.0)
    np.random.seed(0)
    before = dynamics.step(recorded["observations"], recorded["actions"])[0]
    dynamics.model.backbones[0].weight.data.mul_(2.0)
    np.random.seed(0)
    assert not np.array_equal(dynamics.step(recorded["observations"], recorded["actions"])[0], before)


def test_fused_rollout(recorded: dict[str, np.ndarray]) -> None:
    def ends(obs: np.ndarray, action: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
        return np.abs(next_obs[:, 1:2]) > 1.5

    policy = kit.fuse_rollout(make_policy(make_dynamics(terminal_fn=ends)))
    start = np.repeat(recorded["observations"], 8, axis=0)
    rows, info = policy.rollout(start, 3)
    assert info["num_transitions"] == len(rows["obss"]) < 3 * 256
    assert np.isclose(info["reward_mean"], rows["rewards"].mean(), rtol=1e-5)
    shapes = {"obss": 3, "next_obss": 3, "actions": 2, "rewards": 1, "terminals": 1}
    assert {name: array.shape[1] for name, array in rows.items()} == shapes
    assert np.array_equal(rows["terminals"], ends(rows["obss"], rows["actions"], rows["next_obss"]))
    # Rows are ordered by step: first all start states, then the rollouts that continue, in order.
    assert np.array_equal(rows["obss"][:256], start)
    going_on = rows["next_obss"][:256][~rows["terminals"][:256, 0]]
    assert np.array_equal(rows["obss"][256 : 256 + len(going_on)], going_on)


def test_a_copied_policy_rolls_out_itself(recorded: dict[str, np.ndarray]) -> None:
    policy = kit.fuse_rollout(make_policy(make_dynamics()))
    copied = copy.deepcopy(policy)
    with torch.no_grad():
        copied.actor.dist_net.mu.bias.fill_(20.0)
    assert (copied.rollout(recorded["observations"], 1)[0]["actions"] > 0.9).all()
    assert (policy.rollout(recorded["observations"], 1)[0]["actions"] < 0.9).any()


def test_the_policys_actions(recorded: dict[str, np.ndarray]) -> None:
    actor = kit_policy._actor(make_policy(make_dynamics()).actor)
    observations = torch.from_numpy(recorded["observations"])
    assert_close(actor.act(observations), recorded["deterministic"])
    assert_close(actor(observations)[1].exp(), recorded["policy std"])
    assert np.isclose(recorded["policy std"].min(), np.exp(-5.0))
    assert np.isclose(recorded["policy std"].max(), np.exp(2.0))


def test_actors_that_cannot_be_fused() -> None:
    policy = make_policy(make_dynamics())
    policy.actor.dist_net._unbounded = False
    with pytest.raises(InputError, match="unbounded=True"):
        kit.fuse_rollout(policy)
    policy = make_policy(make_dynamics())
    policy.actor.backbone.model.append(nn.Dropout())
    with pytest.raises(InputError, match="one activation after each"):
        kit.fuse_rollout(policy)
    with pytest.raises(InputError, match="must be mopo_fast"):
        kit.fuse_rollout(types.SimpleNamespace(dynamics=None))


# --- policies that roll out in their own way


def original(name: str, *bases: type, **methods: Any) -> type:
    """Make a class that looks like one of OfflineRL-Kit's policies."""
    return type(name, bases, {"__module__": "offlinerlkit.policy", **methods})


SAC = original("SACPolicy", select_action=None, actforward=None)


def uniform(policy: Any, init_obss: np.ndarray, rollout_length: int) -> Any:
    """Roll out one step with uniform actions, as COMBOPolicy does."""
    actions = np.random.uniform(-1, 1, (len(init_obss), 2))
    return policy.dynamics.step(init_obss, actions)[0], actions


of_package = types.FunctionType(uniform.__code__, globals() | {"__name__": "offlinerlkit.policy"})
MOPO = original("MOPOPolicy", SAC, rollout=None)
COMBO = original("COMBOPolicy", SAC, rollout=of_package)
RAMBO = original("RAMBOPolicy", MOPO, rollout=None, select_action=None)
MOBILE = original("MOBILEPolicy", rollout=None, select_action=None, actforward=None)


def policy_of(kind: type, **attributes: Any) -> Any:
    policy = kind()
    vars(policy).update(vars(make_policy(make_dynamics())), **attributes)
    return policy


@pytest.mark.parametrize("kind", [MOPO, COMBO, RAMBO, MOBILE])
def test_policies_that_roll_their_actor_out(kind: type, recorded: dict[str, np.ndarray]) -> None:
    policy = kit.fuse_rollout(kit.fuse_rollout(policy_of(kind)))
    assert len(policy.rollout(recorded["observations"], 2)[0]["obss"]) == 2 * 32


def test_combos_uniform_actions(recorded: dict[str, np.ndarray]) -> None:
    """Test that uniform_rollout=True is honoured, also if it is set later."""
    policy = kit.fuse_rollout(policy_of(COMBO, _uniform_rollout=False))
    rows, _ = policy.rollout(recorded["observations"], 1)
    assert set(rows) == {"obss", "next_obss", "actions", "rewards", "terminals"}
    policy._uniform_rollout = True
    np.random.seed(0)
    next_observations, actions = policy.rollout(recorded["observations"], 1)
    np.random.seed(0)
    assert np.array_equal(actions, np.random.uniform(-1, 1, (32, 2)))
    assert np.array_equal(next_observations, policy.dynamics.step(recorded["observations"], actions)[0])


@pytest.mark.parametrize("method", ["rollout", "select_action", "actforward"])
def test_policies_of_ones_own(method: str) -> None:
    """Test that a method of one's own, which the kernels would replace, is refused by its class's name."""
    message = f"MyPolicy has a method {method} of its own"
    mine = type("MyPolicy", (MOPO,), {"__module__": "my", method: None})
    with pytest.raises(InputError, match=message):
        kit.fuse_rollout(policy_of(mine))
    assigned = type("MyPolicy", (MOPO,), {"__module__": "my"})
    kit.fuse_rollout(policy_of(assigned))
    with pytest.raises(InputError, match=message):
        kit.fuse_rollout(policy_of(assigned, **{method: lambda *_: None}))
    with pytest.raises(InputError, match="NewPolicy has a method rollout of its own"):
        kit.fuse_rollout(policy_of(original("NewPolicy", SAC, rollout=None)))


def test_a_method_assigned_to_the_class_or_wrapped() -> None:
    """Test that a method in the place of the package's own is refused, also if it takes its name."""
    with pytest.raises(InputError, match="COMBOPolicy has a method rollout of its own"):
        kit.fuse_rollout(policy_of(original("COMBOPolicy", SAC, rollout=uniform)))
    wrapped = functools.wraps(of_package)(lambda *arguments: of_package(*arguments))
    with pytest.raises(InputError, match="COMBOPolicy has a method rollout of its own"):
        kit.fuse_rollout(policy_of(original("COMBOPolicy", SAC, rollout=wrapped)))
    policy = kit.fuse_rollout(policy_of(MOPO))
    policy.rollout = functools.wraps(policy.rollout)(lambda *_: None)
    with pytest.raises(InputError, match="MOPOPolicy has a method rollout of its own"):
        kit.fuse_rollout(policy)


def test_networks_of_ones_own() -> None:
    """Test that the forward pass of a subclass is not replaced by the kernels' own."""
    policy = policy_of(MOPO)
    policy.actor.dist_net.__class__ = type("TanhDiagGaussian", (TanhDiagGaussian,), {"forward": None})
    with pytest.raises(InputError, match="TanhDiagGaussian has a method forward of its own"):
        kit.fuse_rollout(policy)
    dynamics = make_dynamics()
    dynamics.model.__class__ = type("MyModel", (Model,), {"forward": None})
    with pytest.raises(InputError, match="MyModel has a method forward of its own"):
        kit.EnsembleDynamics(dynamics.model, dynamics.optim, dynamics.scaler, dynamics.terminal_fn)


def test_next_observations_of_every_elite(recorded: dict[str, np.ndarray]) -> None:
    observations, actions = (torch.from_numpy(recorded[name]) for name in ("observations", "actions"))
    torch.manual_seed(0)
    made = make_dynamics().sample_next_obss(observations, actions, 500)
    assert made.shape == (500, 3, 32, 3)
    expected = observations + torch.from_numpy(recorded["mean"])[[3, 0, 2], :, :3]
    std = torch.from_numpy(recorded["logvar"]).mul(0.5).exp()[[3, 0, 2], :, :3]
    assert ((made.mean(0) - expected).abs() < 5 * std / 500**0.5).all()
    assert (made.std(0) / std - 1).abs().max() < 0.2


class Log:
    def __init__(self, folder: Path) -> None:
        self.model_dir, self.values, self.lines = str(folder), [], []

    def log(self, line: str) -> None:
        self.lines.append(line)

    def logkv(self, name: str, value: float) -> None:
        self.values.append((name, value))

    def set_timestep(self, step: int) -> None:
        self.step = step

    def dumpkvs(self, exclude: list[str]) -> None:
        assert exclude == ["policy_training_progress"]


def test_train(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    data = {
        "observations": random.normal(size=(2000, 3)).astype(np.float32),
        "actions": random.uniform(-1, 1, size=(2000, 2)).astype(np.float32),
        "terminals": np.zeros((2000, 1), np.float32),
    }
    data["next_observations"] = data["observations"] + 0.1 * data["actions"][:, :1]
    data["rewards"] = data["observations"][:, :1] * data["actions"][:, 1:]
    dynamics, log = make_dynamics(), Log(tmp_path)
    before = [layer.weight.detach().clone() for layer in kit_dynamics._layers(dynamics.model)]
    bounds = {name: getattr(dynamics.model, name).detach().clone() for name in ("max_logvar", "min_logvar")}
    np.random.seed(0)
    dynamics.train(data, log, max_epochs=40)
    losses = [value for name, value in log.values if name == "loss/dynamics_holdout_loss"]
    # The initial loss is high because the members' parameters are far apart, unlike fresh ones.
    assert log.step == len(losses) == 40 and losses[0] > 2.0 and losses[-1] < 0.2
    assert len([name for name, _ in log.values if name == "loss/dynamics_train_loss"]) == 40
    layers = kit_dynamics._layers(dynamics.model)
    assert not any(torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True))
    assert all(torch.equal(layer.weight, layer.saved_weight) for layer in layers)
    assert not any(torch.equal(getattr(dynamics.model, name), old) for name, old in bounds.items())
    np.testing.assert_allclose(dynamics.scaler.mu[0, :3], data["observations"].mean(0), atol=0.05)
    fitted = kit.read(tmp_path).dynamics
    assert fitted is not None and fitted.elites.tolist() == dynamics.model.elites.tolist()
    inputs = torch.from_numpy(np.concatenate([data["observations"], data["actions"]], 1))
    mean = fitted(inputs)[0][fitted.elites].mean(0)
    targets = np.concatenate([data["next_observations"] - data["observations"], data["rewards"]], 1)
    assert (mean - torch.from_numpy(targets)).square().mean() < 2 * losses[-1]
    # Another call continues the fit.
    dynamics.train(data, log, max_epochs=1)
    assert log.values[-1][1] < 2 * losses[-1]


def test_a_fit_of_0_epochs_at_most_has_no_limit(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    data = {
        name: random.normal(size=(100, size)).astype(np.float32)
        for name, size in (("observations", 3), ("actions", 2), ("next_observations", 3), ("rewards", 1))
    }
    dynamics, log = make_dynamics(), Log(tmp_path)
    np.random.seed(0)
    dynamics.train(data, log, max_epochs=0)
    assert log.step > 1


def test_fits_that_are_not_by_plain_adam(tmp_path: Path) -> None:
    dynamics = make_dynamics()
    dynamics.optim = torch.optim.AdamW(dynamics.model.parameters())
    with pytest.raises(InputError, match=r"torch\.optim\.Adam with its own defaults.*got AdamW"):
        dynamics.train({}, Log(tmp_path))


def test_arguments_that_it_refuses() -> None:
    with pytest.raises(InputError, match="unknown uncertainty_mode 'total'; there are: aleatoric"):
        make_dynamics("total")
    dynamics = make_dynamics()
    dynamics.model.activation = nn.GELU()
    with pytest.raises(InputError, match="activation is GELU"):
        dynamics.ensemble()


# --- files


def test_its_files_become_ours_and_back(
    recorded: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert main(["convert", str(FOLDER), ours, "--from", "offlinerl-kit"]) == 0
    assert main(["convert", ours, back, "--from", "mopo-fast", "--to", "offlinerl-kit"]) == 0
    assert capsys.readouterr().out == f"{ours}: dynamics and policy\n{back}: dynamics and policy\n"
    engine = RolloutEngine(EnsembleDynamics.load(ours))
    made = engine.step(recorded["observations"], recorded["actions"], seed=0, distributions=True)
    assert_close(made.mean, recorded["mean"])
    assert engine.ensemble.elites.tolist() == [3, 0, 2]
    assert_close(Actor.load(ours).act(torch.from_numpy(recorded["observations"])), recorded["deterministic"])
    state = torch.load(tmp_path / "back" / "dynamics.pth", weights_only=True)
    assert state.keys() == load("dynamics.pth").keys()
    for name, value in load("dynamics.pth").items():
        assert torch.equal(state[name], value), name
    policy = torch.load(tmp_path / "back" / "policy.pth", weights_only=True)
    theirs = {name: value for name, value in load("policy.pth").items() if name.startswith("actor.")}
    assert policy.keys() == theirs.keys()
    assert all(torch.equal(policy[name], value) for name, value in theirs.items())
    for name in ("mu", "std"):
        scale, original = np.load(tmp_path / "back" / f"{name}.npy"), np.load(FOLDER / f"{name}.npy")
        assert scale.shape == original.shape and np.array_equal(scale, original.astype(np.float32))


def test_save_and_load(tmp_path: Path) -> None:
    dynamics = make_dynamics()
    with torch.no_grad():
        dynamics.model.output_layer.weight.add_(1.0)
    dynamics.save(tmp_path)
    other = make_dynamics()
    other.load(tmp_path)
    assert torch.equal(other.model.output_layer.weight, dynamics.model.output_layer.weight)
    with pytest.raises(InputError, match=r"dynamics\.pth does not exist"):
        other.load(tmp_path / "nowhere")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "dynamics.pth")
    with pytest.raises(InputError, match="does not fit this model"):
        other.load(tmp_path)


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("open('ran', 'w')",)


def test_damaged_and_foreign_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    whole = (FOLDER / "dynamics.pth").read_bytes()
    for name in ("mu.npy", "std.npy"):
        (folder / name).write_bytes((FOLDER / name).read_bytes())
    torch.save({"a": Bomb()}, folder / "bomb.pth")
    state = load("dynamics.pth")
    torch.save(state | {"elites": torch.tensor([9])}, folder / "elites.pth")
    torch.save({k: v for k, v in state.items() if k != "max_logvar"}, folder / "lacking.pth")
    torch.save(state | {"max_logvar": torch.full((4,), torch.nan)}, folder / "nan.pth")
    torch.save(state | {"backbones.1.weight": torch.zeros(4, 9, 6)}, folder / "shape.pth")
    for content, message in (
        (b"", "not a whole file of tensors"),
        (whole[: len(whole) // 2], "not a whole file of tensors"),
        (pickle.dumps(Bomb()), "not a whole file of tensors"),
        ((folder / "bomb.pth").read_bytes(), "not a whole file of tensors"),
        ((folder / "elites.pth").read_bytes(), "elites must be distinct members"),
        ((folder / "lacking.pth").read_bytes(), "lacks max_logvar"),
        ((folder / "nan.pth").read_bytes(), "max_logvar holds values that are not finite"),
        ((folder / "shape.pth").read_bytes(), r"has shape \[4, 9, 6\]"),
    ):
        (folder / "dynamics.pth").write_bytes(content)
        with pytest.raises(InputError, match=message):
            kit.read(folder)
    assert not (tmp_path / "ran").exists()
    (folder / "dynamics.pth").write_bytes(whole)
    (folder / "mu.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match=r"mu\.npy is not a whole \.npy file"):
        kit.read(folder)


def test_models_that_it_does_not_have(tmp_path: Path) -> None:
    for declared in ({"log_scale": "std"}, {"member_bounds": True}, {"absolute": [0]}):
        ensemble = EnsembleDynamics(3, 2, members=2, elites=1, hidden=(8,), **declared)
        with pytest.raises(InputError, match="; these dynamics do"):
            kit.write(Checkpoint(ensemble), tmp_path)
    with pytest.raises(InputError, match="policies have ReLU, this one has tanh"):
        kit.write(Checkpoint(policy=Actor(3, 2, activation="tanh")), tmp_path)
    assert not list(tmp_path.iterdir())
