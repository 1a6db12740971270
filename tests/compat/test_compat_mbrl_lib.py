"""Test mbrl-lib: comparison with the real package, installed into a separate folder, and its files."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_packages import run_with
from places import TESTS

from mopo_fast import Actor, EnsembleDynamics, InputError
from mopo_fast.cli import main
from mopo_fast.compat import Checkpoint, mbrl_lib
from mopo_fast.config import Hints

PACKAGES = [
    "mbrl==0.2.0",
    "hydra-core==1.3.2",
    "omegaconf==2.3.0",
    "antlr4-python3-runtime==4.9.3",
    "termcolor==2.5.0",
]
PARITY = TESTS / "beside" / "mbrl_lib.py"


@pytest.mark.slow
def test_beside_the_real_one(tmp_path: Path) -> None:
    assert int(run_with(PACKAGES, PARITY.read_text(), tmp_path).split()[-1]) == 360


# --- files


def make_ensemble(**declared: Any) -> EnsembleDynamics:
    ensemble = EnsembleDynamics(3, 2, members=4, elites=2, hidden=(8, 6), **declared)
    ensemble.elites = torch.tensor([3, 1])
    ensemble.input_mean.normal_()
    return ensemble


def test_ours_to_its_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs, back = (tmp_path / name for name in ("ours", "theirs", "back"))
    ensemble = make_ensemble(absolute=[1])
    ensemble.save(ours)
    assert main(["convert", str(ours), str(theirs), "--from", "mopo-fast", "--to", "mbrl-lib"]) == 0
    command = ["convert", str(theirs), str(back), "--from", "mbrl-lib"]
    assert main(command) == 2
    assert "--activation silu" in capsys.readouterr().err
    assert main([*command, "--activation", "silu", "--absolute", "1"]) == 0
    again = EnsembleDynamics.load(back)
    assert again.elites.tolist() == [3, 1] and again.absolute.tolist() == [False, True, False]
    for name, value in ensemble.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("open('ran', 'w')",)


def test_damaged_and_foreign_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mbrl_lib.write(Checkpoint(make_ensemble()), tmp_path)
    whole = (tmp_path / "model.pth").read_bytes()
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    state = content["state_dict"]
    silu = Hints(activation="silu")

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            mbrl_lib.read(tmp_path, silu)

    for wrong, message in (
        ({"state_dict": {}}, "holds no ensemble GaussianMLP"),
        ([1], "holds no ensemble GaussianMLP"),
        (Bomb(), "not a whole file of tensors"),
        ({**content, "elite_models": [7]}, "elites must be distinct members"),
        ({**content, "elite_models": ["a"]}, "elites must be whole numbers"),
        (
            {**content, "state_dict": {k: v for k, v in state.items() if k != "hidden_layers.0.0.bias"}},
            "lacks hidden_layers.0.0.bias",
        ),
        (
            {**content, "state_dict": {**state, "max_logvar": torch.full((1, 4), torch.inf)}},
            "holds values that are not finite",
        ),
    ):
        torch.save(wrong, tmp_path / "model.pth")
        refused(message)
    (tmp_path / "model.pth").write_bytes(whole[:100])
    refused("not a whole file of tensors")
    (tmp_path / "model.pth").write_bytes(whole)
    for wrong, message in (
        (Bomb(), "the pickle asks for"),
        ({"mean": np.zeros(5)}, "must hold a dictionary of mean and std"),
        ({"mean": np.zeros(5), "std": np.full(5, np.nan)}, "mean and std must be finite"),
        ({"mean": np.zeros(4), "std": np.ones(4)}, "input_mean has 4 values"),
    ):
        (tmp_path / "env_stats.pickle").write_bytes(pickle.dumps(wrong))
        refused(message)
    assert not (tmp_path / "ran").exists()


def test_models_that_it_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="; these dynamics do"):
        mbrl_lib.write(Checkpoint(make_ensemble(log_scale="std")), tmp_path)
    for wrong in (Checkpoint(), Checkpoint(make_ensemble(), Actor(3, 2))):
        with pytest.raises(InputError, match=r"hold dynamics|no file for a policy"):
            mbrl_lib.write(wrong, tmp_path)
    with pytest.raises(InputError, match="OneDTransitionRewardModel around a GaussianMLP"):
        mbrl_lib.ModelEnv(None, object(), lambda *_: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match="penalty_coef must be finite and not negative, got -1"):
        mbrl_lib.ModelEnv(None, object(), lambda *_: None, penalty_coef=-1.0)  # type: ignore[arg-type,return-value]
    assert not list(tmp_path.iterdir())
