"""Test d3rlpy 1.x: comparison with the real package, built into a separate folder, and its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from own_packages import run_with
from places import TESTS

from mopo_fast import Actor, EnsembleDynamics, InputError, RolloutEngine
from mopo_fast.cli import main
from mopo_fast.compat import Checkpoint, d3rlpy

# The last NumPy with which d3rlpy's Cython code can be built.
PACKAGES = ["numpy==1.26.4", "d3rlpy==1.1.1"]
BUILT_WITH = ["numpy==1.26.4", "Cython==0.29.37", "setuptools==69.5.1", "wheel==0.45.1"]
PARITY = TESTS / "beside" / "d3rlpy.py"


@pytest.mark.slow
def test_beside_the_real_one(tmp_path: Path) -> None:
    printed = run_with(PACKAGES, PARITY.read_text(), tmp_path, built_with=BUILT_WITH)
    assert int(printed.split()[-1]) == 37


def test_an_algorithm_without_networks() -> None:
    with pytest.raises(InputError, match=r"no networks yet: build them first \(build_with_dataset\)"):
        d3rlpy.fuse_updates(type("MOPO", (), {"_impl": None})())


# --- files


def make_ensemble(**declared: Any) -> EnsembleDynamics:
    declared = {"log_scale": "std", "member_bounds": True} | declared
    ensemble = EnsembleDynamics(3, 2, members=3, elites=3, hidden=(8, 6), activation="relu", **declared)
    with torch.no_grad():
        for bias in ensemble.biases:
            bias.normal_()
        ensemble.max_logvar.add_(torch.rand_like(ensemble.max_logvar))
    return ensemble


def predictions(ensemble: EnsembleDynamics) -> tuple[torch.Tensor, torch.Tensor]:
    observations, actions = torch.linspace(-1, 1, 60).view(20, 3), torch.linspace(1, -1, 40).view(20, 2)
    made = RolloutEngine(ensemble).step(observations, actions, seed=0, distributions=True)
    assert made.mean is not None and made.std is not None
    return made.mean, made.std


@pytest.mark.parametrize("declared", [{}, {"member_bounds": False}])
def test_ours_to_its_and_back(tmp_path: Path, declared: dict[str, Any]) -> None:
    ensemble = make_ensemble(**declared)
    ensemble.input_mean.normal_()
    ensemble.input_std.uniform_(0.5, 2.0)
    ours, theirs, back = (str(tmp_path / name) for name in ("ours", "theirs.pt", "back"))
    ensemble.save(ours)
    assert main(["convert", ours, theirs, "--from", "mopo-fast", "--to", "d3rlpy"]) == 0
    assert main(["convert", theirs, back, "--from", "d3rlpy"]) == 0
    for found, expected in zip(predictions(EnsembleDynamics.load(back)), predictions(ensemble), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_policy(tmp_path: Path) -> None:
    actor = Actor(3, 2, hidden=(8, 6))
    state = {}
    for layer, (weight, bias) in enumerate(zip(actor.weights[:-1], actor.biases[:-1], strict=True)):
        state[f"_encoder._fcs.{layer}.weight"] = weight.detach().T.contiguous()
        state[f"_encoder._fcs.{layer}.bias"] = bias.detach() + 1.0
    for head, half in (("_mu", slice(0, 2)), ("_logstd", slice(2, 4))):
        state[f"{head}.weight"] = actor.weights[-1].detach()[:, half].T.contiguous()
        state[f"{head}.bias"] = actor.biases[-1].detach()[half] + 1.0
    torch.save({"_policy": state, "_q_func": {}}, tmp_path / "model.pt")
    found = d3rlpy.read(tmp_path / "model.pt").policy
    assert found is not None
    with torch.no_grad():
        for bias in actor.biases:
            bias.add_(1.0)
    observations = torch.linspace(-1, 1, 60).view(20, 3)
    for ours, theirs in zip(found(observations), actor(observations), strict=True):
        torch.testing.assert_close(ours, theirs)


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("open('ran', 'w')",)


def test_damaged_and_foreign_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    d3rlpy.write(Checkpoint(make_ensemble()), path)
    whole, content = path.read_bytes(), torch.load(path, weights_only=True)
    state = content["_dynamics"]

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            d3rlpy.read(path)

    for wrong, message in (
        ({"a": 1}, "holds neither dynamics nor a policy"),
        (Bomb(), "not a whole file of tensors"),
        ({"_dynamics": {}}, "lacks a tensor or holds a damaged one"),
        ({"_dynamics": {"a": torch.zeros(2)}}, "lacks a tensor or holds a damaged one"),
        (
            {"_dynamics": {k: v for k, v in state.items() if k != "_models.1._mu.bias"}},
            "one .'_mu.bias'",
        ),
        ({"_dynamics": state | {"_models.0._mu.bias": torch.full((4,), torch.nan)}}, "not finite"),
        ({"_policy": {}}, "lacks a tensor or holds a damaged one"),
    ):
        torch.save(wrong, path)
        refused(message)
    path.write_bytes(whole[:1000])
    refused("not a whole file of tensors")
    path.write_bytes(whole)
    (tmp_path / "params.json").write_text(json.dumps({"scaler": {"type": "pixel", "params": {}}}))
    refused("scaler pixel cannot be part of a model: only standard, min_max")
    assert not (tmp_path / "ran").exists()


def test_models_that_it_does_not_have(tmp_path: Path) -> None:
    for wrong in (make_ensemble(log_scale="variance"), make_ensemble(absolute=[0])):
        with pytest.raises(InputError, match="; these dynamics do"):
            d3rlpy.write(Checkpoint(wrong), tmp_path / "a.pt")
    with pytest.raises(InputError, match="no file for a policy without its critics"):
        d3rlpy.write(Checkpoint(make_ensemble(), Actor(3, 2)), tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())
