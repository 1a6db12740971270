"""Test the policies that a training keeps on its way."""

import dataclasses
from pathlib import Path

import pytest
import torch
from small_runs import assert_same_results

from mopo_fast.config import TrainConfig
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.run.kept import kept_policies
from mopo_fast.train import train


def test_kept_policies_are_those_of_shorter_runs(config: TrainConfig, tmp_path: Path) -> None:
    """The run has 25 updates in epochs of 10, and keeping its policies changes nothing else."""
    train(dataclasses.replace(config, keep_policies=1), tmp_path / "long", quiet=True)
    train(dataclasses.replace(config, steps=10), tmp_path / "short", quiet=True)
    train(config, tmp_path / "plain", quiet=True)
    kept = kept_policies(tmp_path / "long")
    assert list(kept) == [10, 20, 25]
    first, short = Actor.load(tmp_path / "long", tensors_from=kept[10]), Actor.load(tmp_path / "short")
    assert all(map(torch.equal, first.parameters(), short.parameters()))
    assert kept[25].read_bytes() == (tmp_path / "long" / "policy.safetensors").read_bytes()
    assert not (tmp_path / "plain" / "policies").exists()
    assert_same_results(tmp_path / "long", tmp_path / "plain")


def test_a_run_may_begin_to_keep_policies_when_it_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(config, steps=20), tmp_path, quiet=True)
    train(dataclasses.replace(config, steps=40, keep_policies=2), tmp_path, resume=True, quiet=True)
    assert list(kept_policies(tmp_path)) == [40]


def test_a_link_in_place_of_the_folder_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "policies").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="policies is a link"):
        train(dataclasses.replace(config, keep_policies=1), tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match="policies is a link"):
        kept_policies(tmp_path / "run")


def test_the_number_of_epochs_is_checked(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keep_policies must be at least 1, got 0"):
        train(dataclasses.replace(config, keep_policies=0), tmp_path, quiet=True)
