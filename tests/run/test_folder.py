"""Test a run's summary: any content is read or gives one error."""

import json
from pathlib import Path
from typing import Any

from garbled import check_json

from mopo_fast.run.folder import read_summary

SUMMARY = {
    "score_mean": 26.14, "score_std": 0.72, "return_mean": 2965.2, "return_std": 89.0, "updates": 100_000,
    "seconds": {"fit": 700.0, "rollout": 310.0, "sac": 1400.0, "evaluate": 45.0, "total": 2500.0},
    "seed": 0, "penalty_coef": 0.5, "versions": {"mopo_fast": "0.1.0"}, "more": [1],
}  # fmt: skip


def test_a_summary_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert read_summary(tmp_path) == SUMMARY


def test_a_garbled_summary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))

    def may_pass(where: tuple[Any, ...], other: Any) -> bool:
        return where[0] in ("more", "versions") or isinstance(other, (int, float)) or other is None

    check_json(tmp_path / "summary.json", lambda: read_summary(tmp_path), may_pass)
