"""Test Unifloral: results recorded by tests/recorded/unifloral.py, and its files.

Tests that need JAX are in tests/beside/unifloral.py, run here with JAX in a separate folder.
"""

import dataclasses
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from own_packages import run_with
from places import RECORDED, TESTS

from mopo_fast import Actor, EnsembleDynamics, InputError, RolloutEngine
from mopo_fast.cli import main
from mopo_fast.compat import Checkpoint, unifloral
from mopo_fast.compat.unifloral import files
from mopo_fast.config import Hints
from mopo_fast.data import Transitions
from mopo_fast.presets import preset
from mopo_fast.sac import SAC, Draws
from mopo_fast.tasks import BOXES

PICKLE = RECORDED / "unifloral.pkl"
# Packages that JAX needs in addition to NumPy.
PACKAGES = [
    *("jax==0.10.2", "jaxlib==0.10.2", "ml_dtypes==0.6.0", "opt_einsum==3.4.0", "scipy==1.17.1"),
    *("optax==0.2.8", "absl-py==2.5.1"),
]


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    with np.load(RECORDED / "unifloral.npz") as file:
        return {name: torch.tensor(file[name]) for name in file.files}


def read(path: Path, **hints: Any) -> EnsembleDynamics:
    dynamics = unifloral.read(path, Hints(**hints)).dynamics
    assert dynamics is not None
    return dynamics


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_same_predictions(backend: str, recorded: dict[str, torch.Tensor]) -> None:
    dynamics = read(PICKLE)
    assert (dynamics.obs_dim, dynamics.act_dim, dynamics.hidden) == (11, 3, (16, 16))
    assert dynamics.members == 3
    assert dynamics.elites.tolist() == [0, 1, 2]

    def predict(**options: Any) -> list[torch.Tensor]:
        engine = RolloutEngine(dynamics, **options)
        made = engine.step(recorded["obs"], recorded["action"], seed=0, distributions=True)
        return [made.mean.double(), made.std.double(), made.penalties.double()]

    exact = predict(backend="reference", dtype="float64")
    ours, plain = predict(backend=backend), predict(backend="reference")
    theirs = [recorded["mean"], recorded["std"], recorded["std"].norm(dim=-1).amax(0)]
    for truth, our, their, reference in zip(exact, ours, theirs, plain, strict=True):
        rounding = float((reference - truth).abs().max())
        assert 0 < rounding < 1e-6 < 1e-2 < float(truth.std())
        assert float((our - truth).abs().max()) <= 2 * rounding
        # Unifloral bounds a log-variance and ours a variance, which gives more rounding in float32.
        assert float((their - truth).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("task", "box"),
    [
        ("halfcheetah", "halfcheetah-offlinerl-kit"),
        ("hopper", "hopper-authors"),
        ("walker2d", "walker2d-offlinerl-kit"),
        ("ant", "ant"),
    ],
)
def test_same_terminations(task: str, box: str, recorded: dict[str, torch.Tensor]) -> None:
    done = recorded[f"{task}_done"]
    assert 0 < done.sum() < len(done)
    assert torch.equal(~BOXES[box].contains(recorded[f"{task}_rows"]), done)


# --- updates

# As recorded: widths, UPDATE_ARGS, UPDATES and SEED of tests/recorded/unifloral.py.
UPDATED = dataclasses.replace(
    preset("unifloral", "").sac,
    hidden=(16, 16, 16),
    critics=3,
    batch_size=64,
    real_ratio=0.25,
    actor_learning_rate=3e-3,
    critic_learning_rate=3e-3,
    alpha_learning_rate=3e-3,
    discount=0.95,
    polyak=0.1,
)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_same_updates(backend: str) -> None:
    """Unifloral's own updates of the same parameters on the same batches and noise."""
    with np.load(RECORDED / "unifloral_updates.npz") as file:
        arrays = {name: torch.tensor(file[name]) for name in file.files}

    def part(name: str) -> dict[str, Any]:
        beginning = f"{name}."
        return {
            key.removeprefix(beginning): value for key, value in arrays.items() if key.startswith(beginning)
        }

    before, after, losses = part("before"), part("after"), part("loss")
    sac = SAC(11, 3, UPDATED, backend=backend)
    sac.load_state(before)
    draws = Draws(Transitions(**part("data")), Transitions(**part("model")), (50, 90), (16, 48), 5, 11)
    sums = sac.make(draws)
    assert sac.updates == int(before["updates"]) + 5 == 7
    ours = sac.state()
    for name, expected in after.items():
        moved = float((expected - before[name]).abs().max())
        assert moved > 0.0, name
        # A few units in the last place of a number, and of the changes that Adam makes of gradients.
        bound = 1e-6 * float(expected.abs().max()) + 1e-4 * moved
        assert float((ours[name] - expected).abs().max()) < bound, name
    means = sac.means(sums, 5)
    for name in ("critic_loss", "actor_loss", "alpha_loss", "entropy", "alpha"):
        assert means[name] == pytest.approx(float(losses[name].mean()), rel=1e-4)


@pytest.mark.parametrize("change", [{"order": "critic_first"}, {"adam_epsilon": 1e-8}, {"polyak": 0.09}])
def test_other_settings_are_other_updates(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above tells a difference."""
    monkeypatch.setitem(globals(), "UPDATED", dataclasses.replace(UPDATED, **change))
    with pytest.raises(AssertionError):
        test_same_updates("reference")


# --- files


def same(one: EnsembleDynamics, other: EnsembleDynamics) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_files_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = tmp_path / "run", tmp_path / "ensemble_dynamics_model_hopper-medium-v2.pkl"
    assert main(["convert", str(PICKLE), str(ours), "--from", "unifloral"]) == 0
    assert main(["convert", str(ours), str(theirs), "--from", "mopo-fast", "--to", "unifloral"]) == 0
    assert capsys.readouterr().out == f"{ours}: dynamics\n{theirs}: dynamics\n"
    assert same(read(theirs), read(PICKLE))
    assert same(EnsembleDynamics.load(ours), read(PICKLE))
    hinted = read(theirs, activation="tanh", elites=(2, 0))
    assert (hinted.activation, hinted.elites.tolist()) == ("tanh", [2, 0])


def test_what_python_makes_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read it with stand-ins for the pickled classes; tests/recorded/unifloral.py uses the real ones."""

    class Theirs:
        pass

    def stand_in(name: str, **contents: Any) -> None:
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    stand_in("dynamics", EnsembleDynamics=Theirs, EnsembleDynamicsModel=lambda *arguments: arguments)
    stand_in("termination_fns", termination_fn_walker2d="walker2d")
    for package in ("flax", "flax.core", "jax"):
        stand_in(package)
    stand_in("flax.core.frozen_dict", FrozenDict=lambda tree: tree)
    stand_in("jax.numpy", asarray=lambda array: array)
    path = tmp_path / "walker2d-medium-v2.pkl"
    dynamics = read(PICKLE)
    unifloral.write(Checkpoint(dynamics), path)
    made = pickle.loads(path.read_bytes())
    assert type(made) is Theirs
    assert made.dynamics_model == (11, 3, 3, 2, 16)
    assert (made.num_ensemble, made.termination_fn) == (3, "walker2d")
    assert made.discrepancy is made.min_r is made.dataset is None
    params = made.params["params"]
    assert list(params["ensemble"]) == ["Dense_0", "Dense_1", "Dense_2"]
    for i, layer in enumerate(params["ensemble"].values()):
        assert np.array_equal(layer["kernel"], dynamics.weights[i].detach())
        assert np.array_equal(layer["bias"], dynamics.biases[i].detach())
    assert np.array_equal(params["max_logvar"], dynamics.max_logvar.detach())
    assert np.array_equal(params["min_logvar"], dynamics.min_logvar.detach())


def standardised() -> EnsembleDynamics:
    generator = torch.Generator().manual_seed(0)
    model = EnsembleDynamics(4, 2, members=4, elites=2, hidden=(8, 8), activation="relu", generator=generator)
    model.elites = torch.tensor([3, 1])
    model.input_mean.normal_(generator=generator)
    model.input_std.uniform_(0.5, 2.0, generator=generator)
    return model


def test_standardised_inputs_go_into_the_first_layer(tmp_path: Path) -> None:
    model, path = standardised(), tmp_path / "ant-medium-v2.pkl"
    unifloral.write(Checkpoint(model), path)
    back, inputs = read(path), torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    mean, logvar = back(inputs)
    expected_mean, expected_logvar = model(inputs)
    torch.testing.assert_close(mean, expected_mean[[3, 1]], rtol=0, atol=1e-6)
    torch.testing.assert_close(logvar, expected_logvar[[3, 1]], rtol=0, atol=1e-6)
    assert mean.std() > 0.01


def test_what_theirs_cannot_hold(tmp_path: Path) -> None:
    def refused(
        name: str, dynamics: EnsembleDynamics | None, message: str, policy: Actor | None = None
    ) -> None:
        with pytest.raises(InputError, match=message):
            unifloral.write(Checkpoint(dynamics, policy), tmp_path / name)
        assert not list(tmp_path.iterdir())

    refused("hopper.pkl", None, "hold dynamics, and there are none")
    refused("hopper.pkl", standardised(), "no file for a policy alone", Actor(4, 2))
    refused("dynamics.pkl", standardised(), "must name the data set, .*_hopper-medium-v2.pkl")
    silu = EnsembleDynamics(4, 2, members=2, elites=2, hidden=(8, 8))
    refused("hopper.pkl", silu, r"of one width; these have silu and widths \(8, 8\)")
    for declared in ({"log_scale": "std"}, {"member_bounds": True}, {"absolute": [1]}):
        other = EnsembleDynamics(4, 2, hidden=(8,), activation="relu", **declared)
        refused("hopper.pkl", other, "have no .*; these dynamics do")
    uneven = EnsembleDynamics(4, 2, members=2, elites=2, hidden=(8, 6), activation="relu")
    refused("hopper.pkl", uneven, r"these have relu and widths \(8, 6\)")


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pkl"

    def refused(content: bytes, message: str, **hints: Any) -> None:
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            unifloral.read(path, Hints(**hints))

    content = PICKLE.read_bytes()
    refused(content[:-500], "model.pkl is not a whole pickle file")
    refused(pickle.dumps([1, 2]), "model.pkl holds no EnsembleDynamics of Unifloral")
    refused(pickle.dumps(Malicious()), "asks for posix.mkdir; only things that such a file holds")
    assert not Path("pwned").exists()
    refused(content, "predict changes of the observation", absolute=(0,))
    refused(content, "elites must be distinct members 0..2", elites=(0, 3))

    def encoded(change: Any) -> bytes:
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        encode = files._encode

        def changed(value: Any) -> bytes:
            if isinstance(value, dict) and "params" in value and "num_ensemble" in value:
                change(value["params"].arguments[0]["params"])
            return encode(value)

        monkeypatch.setattr(files, "_encode", changed)
        target = tmp_path / "hopper.pkl"
        unifloral.write(Checkpoint(read(PICKLE)), target)
        return target.read_bytes()

    def without_a_layer(params: Any) -> None:
        del params["ensemble"]["Dense_1"]

    def of_another_shape(params: Any) -> None:
        params["ensemble"]["Dense_1"]["bias"] = torch.zeros(3, 15)

    def not_finite(params: Any) -> None:
        params["max_logvar"] = torch.full((12,), torch.nan)

    not_theirs = "model.pkl: these are not the parameters of an EnsembleDynamicsModel"
    refused(encoded(without_a_layer), not_theirs + r": KeyError\('Dense_1'\)")
    refused(encoded(of_another_shape), r"model.pkl: a layer's tensor has shape \[3, 15\], expected \[3, 16\]")
    refused(encoded(lambda params: params.clear()), not_theirs)
    refused(encoded(lambda params: params.update(ensemble=5)), not_theirs)
    refused(encoded(not_finite), "model.pkl: max_logvar holds values that are not finite")


def test_parameters_of_something_else() -> None:
    with pytest.raises(InputError, match="these are not the parameters of an EnsembleDynamicsModel"):
        unifloral.EnsembleDynamics(
            SimpleNamespace(params={}, termination_fn=None, discrepancy=None, min_r=None, dataset=None)
        )
    with pytest.raises(InputError, match="these are not the parameters of a TanhGaussianActor"):
        unifloral.make_actor({"params": {"LayerNorm_0": {}}})


# --- in JAX


@pytest.mark.slow
def test_in_jax(tmp_path: Path) -> None:
    tests = [str(TESTS / "beside" / f"{file}.py") for file in ("unifloral", "unifloral_updates")]
    code = f"import pytest, sys; sys.exit(pytest.main(['-p', 'no:cacheprovider', *{tests!r}]))"
    outcome = run_with(PACKAGES, code, tmp_path)
    assert "passed" in outcome and "skipped" not in outcome
