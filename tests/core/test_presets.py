"""Test the presets, which hold the hyperparameters of other code."""

import dataclasses
from typing import Any

import pytest

from mopo_fast import InputError, cli
from mopo_fast.config import PRESETS, TrainConfig
from mopo_fast.presets import preset
from mopo_fast.run.resolve import resolve
from mopo_fast.tasks import BOXES, get_task, termination_of


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dataset", ["hopper-medium-v2", "halfcheetah-medium-replay-v2"])
def test_every_preset_can_be_trained(name: str, dataset: str) -> None:
    config = preset(name, dataset)
    resolve(config)
    assert config != TrainConfig(dataset=dataset)


def test_offlinerl_kit() -> None:
    config, task = resolve(preset("offlinerl-kit", "hopper-medium-v2"))
    assert (config.rollout.horizon, config.rollout.penalty_coef, config.steps) == (5, 5.0, 3_000_000)
    assert (config.sac.alpha_max, config.sac.actor_schedule, config.dynamics.patience) == (1.0, "cosine", 4)
    assert termination_of(task, config.rollout.termination) == BOXES["hopper-offlinerl-kit"]
    assert termination_of(get_task("ant"), "offlinerl-kit") == get_task("ant").box


def test_unknown() -> None:
    with pytest.raises(InputError, match="unknown preset 'mine'; there are: mopo-tf, offlinerl-kit"):
        preset("mine", "hopper-medium-v2")


@pytest.mark.parametrize("flags", [["--preset", "unifloral"], ["--preset=unifloral"]])
def test_flags_count_beside_a_preset(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainConfig] = []

    def train(config: TrainConfig, *_: object, **__: object) -> dict[str, Any]:
        seen.append(config)
        return {"return_mean": 0.0, "return_std": 0.0, "score_mean": None}

    monkeypatch.setattr("mopo_fast.train.train", train)
    for arguments in (["hopper-medium-v2", *flags], [*flags, "hopper-medium-v2"]):
        assert cli.main(["train", *arguments, "--sac.critics", "3"]) == 0
    expected = preset("unifloral", "hopper-medium-v2")
    expected = dataclasses.replace(expected, sac=dataclasses.replace(expected.sac, critics=3))
    assert seen == [expected, expected]


def test_a_preset_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "hopper-medium-v2", "--preset", "mine"])
    assert "mine" in capsys.readouterr().err
