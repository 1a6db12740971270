import dataclasses
import json
import os
from pathlib import Path

import pytest

from mopo_fast import backends, doctor


def test_it_tells_what_this_machine_has() -> None:
    report = doctor.examine()
    assert report.machine.cores == len(os.sched_getaffinity(0))
    assert report.packages["torch"] is not None
    assert report.extension is not None and Path(report.extension).is_file()
    assert [status.name for status in report.backends] == [status.name for status in backends.available()]
    assert json.loads(json.dumps(dataclasses.asdict(report)))["machine"]["isa"] == report.machine.isa


def test_the_text_has_every_backend_with_its_reason() -> None:
    report = doctor.examine()
    text = report.text()
    for status in report.backends:
        assert status.reason
        assert f"backend {status.name}" in text and status.reason in text


def test_an_unknown_instruction_set_is_told_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", "avx9")
    report = doctor.examine()
    status = {status.name: status for status in report.backends}["cpu"]
    assert not status.available and "MOPO_FAST_ISA=avx9" in status.reason
    assert "avx9" in (report.machine.isa or "")


def test_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing renderer or encoder is told, and one that hangs is not waited for."""
    monkeypatch.setenv("MUJOCO_GL", "osmosis")
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    report = doctor.examine()
    assert not report.rendering.available and not report.mp4.available
    lines = {line[:17].strip(): line[19:] for line in report.text().splitlines()}
    assert lines["rendering"].startswith("no: MUJOCO_GL=osmosis fails (")
    assert lines["MP4 videos"].startswith("no: install an encoder with `pip install")
    monkeypatch.setattr(doctor, "_RENDER", "print('a picture')")
    assert doctor._rendering() == doctor.Ability(True, "MuJoCo without a window, MUJOCO_GL=osmosis")
    monkeypatch.setattr(doctor, "_RENDER", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "_RENDER_SECONDS", 0.1)
    assert "no picture within" in doctor._rendering().reason


def test_data_folders_are_those_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_DATA_DIR", str(tmp_path / "local"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "nowhere"))
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "hopper_random-local.hdf5").touch()
    folders = doctor.examine().folders
    assert folders["local"] == doctor.Folder(str(tmp_path / "local"), ["hopper_random-local.hdf5"])
    assert folders["D4RL"] == doctor.Folder(str(tmp_path / "nowhere"), [])


def test_a_package_that_is_missing_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "surely_not_installed"))
    report = doctor.examine()
    assert report.packages["surely_not_installed"] is None
    assert "surely_not_installed missing" in report.text()
