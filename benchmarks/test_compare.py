"""Test which work the comparison of contenders times, and the file that its results go to."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare as module
from mopo_fast.errors import InputError


@pytest.mark.parametrize(
    ("arguments", "name", "updates"),
    [
        ({}, "sac-cpu", 500),
        ({"dtype": "bfloat16"}, "sac-bfloat16-cpu", 500),
        ({"critics": 10, "batch_size": 2048}, "sac-10x2048-cpu", 12),
        (
            {"critics": 10, "target_critics": 2, "actor_q": "mean", "dtype": "bfloat16"},
            "sac-10x256-target2-mean-bfloat16-cpu",
            100,
        ),
        ({"critics": 1, "batch_size": 8}, "sac-1x8-cpu", 500),
    ],
)
def test_settings_of_sac(
    arguments: dict[str, Any], name: str, updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    paths: list[Path] = []

    def bench(kernel: str, **options: Any) -> list[Any]:
        given.update(options)
        return []

    monkeypatch.setattr(module, "bench", bench)
    monkeypatch.setattr(module, "write_record", lambda path, *_: paths.append(path))
    monkeypatch.setattr(module, "to_table", lambda rows: "")
    monkeypatch.setattr(module.os, "sched_setaffinity", lambda *_: None)
    module.compare("sac", quiet=True, **arguments)
    assert given["updates"] == updates
    assert paths[0].name.startswith(f"{name}-")
    for key in ("critics", "batch_size", "target_critics", "actor_q"):
        if key in arguments:
            assert getattr(given["config"], key) == arguments[key]


def test_settings_of_sac_are_not_those_of_others() -> None:
    with pytest.raises(InputError, match="critics and batches are settings of sac, not of fit"):
        module.compare("fit", critics=10)
    with pytest.raises(InputError, match="target_critics must be 1 to the number of critics, 2"):
        module.compare("sac", target_critics=3)
