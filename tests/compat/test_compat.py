"""Test the conversion of checkpoints in all formats. Tests of one format are in test_compat_NAME.py."""

import logging
import re
from pathlib import Path
from typing import Literal

import pytest
import torch

from mopo_fast import Actor, EnsembleDynamics, InputError
from mopo_fast.cli import main
from mopo_fast.compat import Checkpoint, convert_checkpoint, get_format
from mopo_fast.config import Hints


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


def test_other_files_of_a_folder_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(name: str) -> str:
        command = ["convert", str(run), str(tmp_path / name), "--from", "mopo-fast", "--to", "offlinerl-kit"]
        assert main(command) == 0
        return " ".join(capsys.readouterr().err.split())

    assert "not converted" not in told("a")
    for name in ("progress.csv", ".lock", "notes.txt"):
        (run / name).touch()
    (run / "older").mkdir()
    assert f"not converted from {run}: notes.txt, older/" in told("b")
    for number in range(20):
        (run / f"policy_{number:02}.pth").touch()
    assert "policy_05.pth and 14 more" in told("c")


@pytest.mark.parametrize("name", ["mbrl-lib", "d3rlpy", "unifloral"])
def test_code_without_files_for_policies(
    name: Literal["mbrl-lib", "d3rlpy", "unifloral"],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Test that the written models are returned, and that a warning says that the policy is left out."""
    run, scale = tmp_path / "run", "std" if name == "d3rlpy" else "variance"
    EnsembleDynamics(3, 2, members=2, elites=2, hidden=(8,), activation="relu", log_scale=scale).save(run)
    Actor(3, 2, hidden=(8,)).save(run)
    with caplog.at_level(logging.WARNING, "mopo_fast"):
        made = convert_checkpoint(run, tmp_path / "hopper.pkl", "mopo-fast", name)
    assert made.policy is None and made.dynamics is not None
    assert "the policy is left out: " in caplog.text and "has no file for a policy" in caplog.text
    for file in run.glob("dynamics.*"):
        file.unlink()
    with pytest.raises(InputError, match=f"nothing in .* as {name}: the policy is left out: .* has no file"):
        convert_checkpoint(run, tmp_path / "other.pkl", "mopo-fast", name)


# For each format: models of a default run that it stores, and parts of the sentences about the others.
_CLIPPED = r"clips the policy's log standard deviations to \[-5, 2\], not to \[-20, 2\]: .*0\.0067"
_DEFAULT_RUNS = [
    ("mopo-fast", "dynamics and policy", []),
    ("mopo-tf", "dynamics and policy", ["do not store the elites: .* give --elites 0 1"]),
    ("offlinerl-kit", "dynamics and policy", [f"OfflineRL-Kit {_CLIPPED}.*sigma_min=-20"]),
    ("mbrl-lib", "dynamics", ["the policy is left out: mbrl-lib has no file"]),
    ("polixir", "policy", ["the dynamics are left out: .*no log-variances", f"Polixir's .*{_CLIPPED}"]),
    ("d3rlpy", "", ["the dynamics are left out: .*no log-variances", "the policy is left out"]),
    ("unifloral", "", ["the dynamics are left out: .*have ReLU", "the policy is left out"]),
]


@pytest.mark.parametrize(("target", "kept", "sentences"), _DEFAULT_RUNS, ids=lambda value: str(value)[:13])
def test_a_default_run_in_every_format(
    target: str,
    kept: str,
    sentences: list[str],
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Test that all that can be stored is converted, and that standard error tells the rest."""
    out = tmp_path / "out" / "hopper.pkl"
    command = ["convert", str(run), str(out), "--from", "mopo-fast", "--to", target]
    if sentences:
        assert main([*command, "--strict"]) == 2
        assert not out.parent.exists()
        refused = " ".join(capsys.readouterr().err.split())
        assert all(re.search(sentence, refused) for sentence in sentences)
    assert main(command if sentences else [*command, "--strict"]) == (0 if kept else 2)
    printed = capsys.readouterr()
    told = " ".join(printed.err.split())
    assert all(re.search(sentence, told) for sentence in sentences) and bool(told) == bool(sentences)
    assert printed.out == (f"{out}: {kept}\n" if kept else "")
    if not kept:
        assert told.startswith(f"error: nothing in {run} can be stored as {target}: ")
        assert not out.parent.exists()
        return
    hints = Hints(activation="silu") if target == "mbrl-lib" else Hints()
    found = get_format(target).read(out, hints)
    assert (found.dynamics is not None) == ("dynamics" in kept) and (found.policy is not None) == (
        "policy" in kept
    )
    if found.policy is not None:
        observations = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        assert torch.equal(found.policy.act(observations), Actor.load(run).act(observations))


def test_activations_that_a_file_does_not_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Test that other activations than the default of the code base are told."""
    dynamics = EnsembleDynamics(3, 2, members=2, elites=2, hidden=(8,), activation="tanh")
    for name in ("offlinerl-kit", "mbrl-lib"):
        get_format(name).write(Checkpoint(dynamics), tmp_path / name)
        assert "does not store the activation of the dynamics; build" in caplog.text and "tanh" in caplog.text
        caplog.clear()
    policy = Actor(3, 2, hidden=(8,), activation="tanh")
    with pytest.raises(InputError, match="OfflineRL-Kit's policies have ReLU, this one has tanh"):
        get_format("offlinerl-kit").write(Checkpoint(policy=policy), tmp_path / "policy")


def test_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: str) -> str:
        assert main(["convert", *arguments]) == 2
        return " ".join(capsys.readouterr().err.split())

    copy = str(tmp_path / "copy")
    assert "does not exist" in fails("nowhere", copy, "--from", "mopo-fast")
    assert "exists already" in fails(str(run), str(run), "--from", "mopo-fast")
    assert "elites must be distinct" in fails(str(run), copy, "--from", "mopo-fast", "--elites", "1", "9")
    assert "leave them out" in fails(str(run), copy, "--from", "mopo-fast", "--activation", "relu")
    for flags in (["--to", "polixir"], ["--strict"]):
        assert "convert models; name the code of SRC with --from" in fails("a.hdf5", "b.npz", *flags)
    (tmp_path / "empty").mkdir()
    assert "no mopo-fast dynamics and no mopo-fast policy" in fails(
        str(tmp_path / "empty"), copy, "--from", "mopo-fast"
    )
    assert not Path(copy).exists()
    with pytest.raises(InputError, match="unknown format 'keras'; there are: mopo-fast, mopo-tf"):
        convert_checkpoint(run, copy, "keras", "mopo-fast")  # type: ignore[arg-type]
