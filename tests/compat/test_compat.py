"""Test the conversion of checkpoints in all formats. Tests of one format are in test_compat_NAME.py."""

import logging
from pathlib import Path
from typing import Literal

import pytest
import torch

from mopo_fast import Actor, EnsembleDynamics, InputError
from mopo_fast.cli import main
from mopo_fast.compat import convert_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    EnsembleDynamics(3, 2, members=4, elites=2, hidden=(8,)).save(tmp_path / "run")
    Actor(3, 2, hidden=(8,)).save(tmp_path / "run")
    return tmp_path / "run"


def test_ours_to_ours(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "copy"
    assert main(["convert", str(run), str(target), "--from", "mopo-fast", "--elites", "3", "1"]) == 0
    assert capsys.readouterr().out == f"{target}: dynamics and policy\n"
    assert EnsembleDynamics.load(target).elites.tolist() == [3, 1]
    for ours, copy in zip(Actor.load(run).parameters(), Actor.load(target).parameters(), strict=True):
        assert torch.equal(ours, copy)


@pytest.mark.parametrize("name", ["mbrl-lib", "d3rlpy", "unifloral"])
def test_code_without_files_for_policies(
    name: Literal["mbrl-lib", "d3rlpy", "unifloral"],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The written models are returned, and a warning says that the policy is left out."""
    run, scale = tmp_path / "run", "std" if name == "d3rlpy" else "variance"
    EnsembleDynamics(3, 2, members=2, elites=2, hidden=(8,), activation="relu", log_scale=scale).save(run)
    Actor(3, 2, hidden=(8,)).save(run)
    with caplog.at_level(logging.WARNING, "mopo_fast"):
        made = convert_checkpoint(run, tmp_path / "hopper.pkl", "mopo-fast", name)
    assert made.policy is None and made.dynamics is not None
    assert f"the policy is left out: {name} has no files for policies" in caplog.text
    for file in run.glob("dynamics.*"):
        file.unlink()
    with pytest.raises(InputError, match=f"holds a policy alone, and {name} has no files"):
        convert_checkpoint(run, tmp_path / "other.pkl", "mopo-fast", name)


def test_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: str) -> str:
        assert main(["convert", *arguments]) == 2
        return " ".join(capsys.readouterr().err.split())

    copy = str(tmp_path / "copy")
    assert "does not exist" in fails("nowhere", copy, "--from", "mopo-fast")
    assert "exists already" in fails(str(run), str(run), "--from", "mopo-fast")
    assert "elites must be distinct" in fails(str(run), copy, "--from", "mopo-fast", "--elites", "1", "9")
    assert "leave them out" in fails(str(run), copy, "--from", "mopo-fast", "--activation", "relu")
    assert "convert models; name the code of SRC with --from" in fails("a.hdf5", "b.npz", "--to", "polixir")
    (tmp_path / "empty").mkdir()
    assert "no mopo-fast dynamics and no mopo-fast policy" in fails(
        str(tmp_path / "empty"), copy, "--from", "mopo-fast"
    )
    assert not Path(copy).exists()
    with pytest.raises(InputError, match="unknown format 'keras'; there are: mopo-fast, mopo-tf"):
        convert_checkpoint(run, copy, "keras", "mopo-fast")  # type: ignore[arg-type]
