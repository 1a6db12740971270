"""Test the report: numbers in its figures, its page, and messages about missing parts."""

import base64
import dataclasses
import json
import os
import re
import resource
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from recorded_runs import SUMMARY
from small_fits import SMALL, toy_data

from mopo_fast.cli import main
from mopo_fast.config import PRESETS, Preset, SACConfig, TrainConfig, to_dict
from mopo_fast.data import Transitions
from mopo_fast.data.episodes import find_episodes
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.fit import data_sha256, fit_and_save, split_holdout
from mopo_fast.policy import Actor
from mopo_fast.presets import preset
from mopo_fast.report import (
    HeldOut,
    _Run,
    _states,
    _training_curves,
    coverage,
    write_report,
)
from mopo_fast.run.command import train_command
from mopo_fast.tasks import TASKS

PICTURES = (
    *("learning_curve", "training", "penalty_calibration", "coverage", "by_step", "states", "residuals"),
    *("fit", "time"),
)


class Page(HTMLParser):
    """Collect the texts and pictures of an HTML page, and check that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str | None] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.texts.append(data.strip())


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    fit_and_save(toy_data(600), folder, config=SMALL)
    return folder


@pytest.fixture
def run(fitted: Path, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "a run"
    folder.mkdir()
    for path in fitted.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    config = to_dict(TrainConfig("toy", task="hopper"))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    lines = ["epoch,updates,score_mean,score_std,return_mean,return_std,q,critic_loss,alpha,entropy,penalty"]
    for i in range(1, 8):
        evaluated = f"{2.5 * i},1.5,{100 * i},50" if i % 2 else ",,,"
        lines.append(f"{i},{1000 * i},{evaluated},{-i},{1 / i},{0.1 * i},{-2.5 - 0.1 * i},{3 + i}")
    (folder / "progress.csv").write_text("\n".join(lines) + "\n")
    yield folder


def joined(run: Path) -> Transitions:
    """Join the toy data's steps to two episodes, as the data that the run's ensemble was fitted to."""
    data = toy_data(600)
    drawn = Transitions(**data.arrays())
    drawn.next_observations = torch.cat([data.observations[1:], data.observations[:1]])
    drawn.terminals[299] = True
    fit = json.loads((run / "fit.json").read_text())
    (run / "fit.json").write_text(json.dumps(fit | {"data_sha256": data_sha256(drawn)}))
    return drawn


def add_policy(run: Path) -> Path:
    """Give the run a policy, and a task of a Python file, since the toy data are of no known task."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"task": "own.py"}))
    Actor(3, 2, generator=torch.Generator().manual_seed(0)).save(run)
    return run


def keep(run: Path, *names: str) -> Path:
    """Remove all files of the run but these, to save the time for drawing the others."""
    for path in run.iterdir():
        if path.name not in names:
            path.unlink()
    return run


def texts_of(run: Path, data: Transitions | None = None) -> list[str]:
    return Page(write_report(run, data=data).read_text()).texts


def missing(run: Path, data: Transitions | None = None) -> list[str]:
    return [text for text in texts_of(run, data) if text.startswith("Missing")]


# --- the whole page


def test_the_page_is_whole_and_self_contained(run: Path) -> None:
    path = write_report(add_policy(run), data=joined(run))
    assert path == run / "report.html"
    page = Page(path.read_text())
    assert not [text for text in page.texts if text.startswith("Missing")]
    assert len(page.images) == len(PICTURES)
    for name, image in zip(PICTURES, page.images, strict=True):
        kind, encoded = str(image["src"]).split(",")
        assert kind == "data:image/png;base64"
        picture = base64.b64decode(encoded)
        assert picture == (run / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and picture.endswith(b"IEND\xaeB\x60\x82")
        assert image["alt"]
    assert all(str(link).startswith("data:") for link in page.links)


def test_the_table_gives_the_run_in_short(run: Path) -> None:
    texts = texts_of(keep(run, "config.json", "summary.json"))
    for value in (
        "toy",
        "hopper",
        "26.1 ± 0.7",
        "2965.2 ± 89.0",
        "100,000",
        "41 min 40 s",
        "cpu, float32",
        "0.5",
    ):
        assert value in texts
    assert "mopo_fast 0.1.0, torch 2.13.0" in texts


def test_the_learning_curve_has_the_evaluated_epochs(run: Path) -> None:
    figure_text = next(text for text in texts_of(keep(run, "progress.csv")) if "normalised score (0" in text)
    assert "Last evaluation: 17.5 ± 1.5. Best: 17.5." in figure_text


def test_a_task_without_references_shows_returns(run: Path) -> None:
    (run / "progress.csv").write_text("updates,score_mean,score_std,return_mean,return_std\n1000,,,321.5,4\n")
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"score_mean": None, "score_std": None}))
    texts = texts_of(keep(run, "progress.csv", "summary.json"))
    assert any(text.startswith("Mean return of the policy") and "321.5 ± 4.0" in text for text in texts)
    assert not [text for text in texts if "is damaged" in text]


def test_everything_is_escaped(run: Path) -> None:
    evil = "<script>alert('&')</script>"
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"dataset": evil, "versions": {evil: evil}}))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"dataset": evil + ".hdf5"}))
    folder = keep(run, "config.json", "summary.json", "fit.json", "dynamics.json", "dynamics.safetensors")
    folder = folder.rename(run.parent / "<b>run")
    page = Page(write_report(folder).read_text())
    assert evil in page.texts
    assert any(evil in text for text in page.texts if text.startswith("Missing"))
    assert "MOPO run: <b>run" in page.texts
    assert "<script" not in (folder / "report.html").read_text()


def test_a_fit_alone_is_a_run(run: Path) -> None:
    lines = missing(keep(run, "fit.json", "dynamics.json", "dynamics.safetensors"), joined(run))
    assert len(lines) == 4
    assert all("progress.csv does not exist" in line for line in lines[:2])
    assert "policy.json does not exist" in lines[2] and "summary.json does not exist" in lines[3]


def test_the_command_and_all_settings_are_shown(run: Path) -> None:
    config = TrainConfig("my set.hdf5", task="hopper", steps=7, sac=SACConfig(order="critic_first"))
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    texts = texts_of(keep(run, "config.json"))
    command = "mopo-fast train 'my set.hdf5' --task hopper --steps 7 --sac.order critic_first"
    assert command in texts
    assert texts[texts.index("sac.polyak") + 1] == "0.005"
    assert texts[texts.index("dynamics.hidden") + 1] == "[200, 200, 200, 200]"
    assert any(re.fullmatch(r"All settings \(\d+\)", text) for text in texts)


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_the_command_gives_the_same_settings(name: Preset | None) -> None:
    config = (
        TrainConfig("toy.hdf5", seed=3, device="cuda", threads=2) if name is None else preset(name, "toy")
    )
    changed = dataclasses.replace(config.rollout, horizon=7, penalty_coef=0.25, penalty="ensemble_std")
    config = dataclasses.replace(config, rollout=changed)
    command = train_command(json.loads(json.dumps(to_dict(config))))
    words = shlex.split(command.replace("\\\n", ""))
    default = None
    if name is not None:
        assert words[3:5] == ["--preset", name]
        del words[3:5]
        default = preset(name, "toy")
    parsed = tyro.cli(TrainConfig, args=words[2:], default=default, config=(tyro.conf.FlagCreatePairsOff,))
    assert parsed == config


def test_a_long_setting_is_cut(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"other": ["x" * 5000], "task": "y" * 5000}))
    assert max(map(len, texts_of(keep(run, "config.json")))) < 2100


def test_the_learning_curve_has_the_returns_of_the_data(run: Path) -> None:
    data, task, drawn = toy_data(600), TASKS["hopper"], joined(run)
    found = find_episodes(drawn)
    assert found is not None and found.lengths.tolist() == [300, 300]
    folder = keep(run, "config.json", "fit.json", "progress.csv")
    line = next(text for text in texts_of(folder, drawn) if text.startswith("Mean normalised score"))
    mean, best = (
        task.normalized_score(float(value)) for value in (found.returns.mean(), found.returns.max())
    )
    assert f"The episodes of the data set have a mean of {mean:.1f} and a best of {best:.1f}." in line
    # Other data than those of the fit, and returns that a model predicts, are not compared.
    assert not any("The episodes of the data set" in text for text in texts_of(folder, data))
    rows = (folder / "progress.csv").read_text().splitlines()
    scored = [f"{row},{'scored_by' if i == 0 else 'model'}" for i, row in enumerate(rows)]
    (folder / "progress.csv").write_text("\n".join(scored) + "\n")
    assert not any("The episodes of the data set" in text for text in texts_of(folder, drawn))


def test_curves_that_a_run_lacks_are_left_out(run: Path) -> None:
    figure, _ = _training_curves(_Run(run))
    drawn = [axes.get_title() for axes in figure.axes if axes.lines]
    assert drawn == ["Q-value", "Critic loss", "Entropy weight α", "Entropy",
                     "Penalty u(s, a)"]  # fmt: skip
    assert figure.axes[3].lines[1].get_ydata()[0] == -3.0
    (run / "progress.csv").write_text("updates,score_mean,score_std,q\n1000,1,1,\n2000,5,1,-7\n")
    lines = [axes.lines[0].get_xydata().tolist() for axes in _training_curves(_Run(run))[0].axes]
    assert lines == [[[2000.0, -7.0]]]


# --- the numbers


def test_held_out_numbers_equal_those_by_hand(run: Path) -> None:
    data = toy_data(600)
    held_out = _Run(run, data).held_out
    tensors = data[split_holdout(600, 0, SMALL)[1]]
    model = EnsembleDynamics.load(run)
    with torch.no_grad():
        mean, logvar = model(torch.cat([tensors.observations, tensors.actions], -1))
    truth = torch.cat([tensors.next_observations - tensors.observations, tensors.rewards[:, None]], -1)
    variance, elites = logvar.exp(), model.elites.tolist()
    assert held_out.penalty == "max_aleatoric"
    np.testing.assert_allclose(held_out.penalties, variance.sum(-1).sqrt().max(0).values.numpy(), rtol=1e-4)
    errors = (sum(mean[e] for e in elites) / len(elites) - truth).norm(dim=-1)
    np.testing.assert_allclose(held_out.errors, errors.numpy(), rtol=1e-4, atol=1e-5)
    for position, elite in enumerate(elites):
        expected = (truth - mean[elite]) / variance[elite].sqrt()
        np.testing.assert_allclose(held_out.residuals[position], expected.numpy(), rtol=1e-3, atol=1e-4)


def test_the_truth_of_an_absolute_mean_is_the_next_observation(run: Path) -> None:
    data = toy_data(600)
    model, dims = EnsembleDynamics.load(run), [0, 2]
    changes = _Run(run, data).held_out
    model.absolute[dims] = True
    model.save(run)
    held_out = _Run(run, data).held_out
    rows = data[split_holdout(600, 0, SMALL)[1]]
    shift = torch.zeros(len(rows), data.obs_dim + 1)
    shift[:, dims] = rows.observations[:, dims]
    with torch.no_grad():
        _, logvar = model(torch.cat([rows.observations, rows.actions], -1))
    moved = shift / (0.5 * logvar[model.elites]).exp()
    np.testing.assert_allclose(held_out.residuals - changes.residuals, moved.numpy(), rtol=1e-3, atol=1e-3)


def test_the_penalty_is_the_one_of_the_run(run: Path) -> None:
    data = toy_data(600)
    path = run / "config.json"
    config = json.loads(path.read_text())

    def held_out(**rollout: str) -> HeldOut:
        path.write_text(json.dumps(config | {"rollout": config["rollout"] | rollout}))
        return _Run(run, data).held_out

    model = EnsembleDynamics.load(run)
    rows = data[split_holdout(600, 0, SMALL)[1]]
    with torch.no_grad():
        mean, logvar = model(torch.cat([rows.observations, rows.actions], -1))
    elites_only = logvar.exp()[model.elites].sum(-1).sqrt().max(0).values.numpy()
    np.testing.assert_allclose(held_out(penalty_members="elites").penalties, elites_only, rtol=1e-4)
    spread = mean[..., :-1].var(0, correction=0).mean(-1).sqrt().numpy()
    other = held_out(penalty="ensemble_std")
    np.testing.assert_allclose(other.penalties, spread, rtol=1e-3)
    assert other.penalty == "ensemble_std"


def test_coverage_by_hand() -> None:
    held_out = HeldOut(
        "max_aleatoric",
        penalties=np.array([1.0, 2.0, 4.0, 1.0]),
        errors=np.array([0.5, 2.0, 2.0, 9.0]),
        optimism=np.array([-1.0, 1.0, 4.0, 1.0]),
        residuals=np.zeros((1, 4, 2)),
    )
    whole, reward = coverage(held_out, np.array([0.0, 0.5, 1.0, 10.0]))
    # Errors over penalties are 0.5, 1, 0.5 and 9; the optimism over them -1, 0.5, 1 and 1.
    assert whole.tolist() == [0.0, 0.5, 0.75, 1.0]
    assert reward.tolist() == [0.25, 0.5, 1.0, 1.0]


def test_optimism_is_the_error_of_the_reward(run: Path) -> None:
    data = toy_data(600)
    rows = data[split_holdout(600, 0, SMALL)[1]]
    model = EnsembleDynamics.load(run)
    with torch.no_grad():
        mean, _ = model(torch.cat([rows.observations, rows.actions], -1))
    expected = mean[model.elites].mean(0)[:, -1] - rows.rewards
    np.testing.assert_allclose(_Run(run, data).held_out.optimism, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_rollouts_along_the_data_equal_single_steps(run: Path) -> None:
    data = joined(run)
    state = _Run(run, data)
    followed, engine = state.followed, state.engine
    ends = np.array([299, 599])
    rows = [int(row) for row in split_holdout(600, 0, SMALL)[1] if ends[ends >= int(row)][0] - int(row) >= 4]
    assert followed.errors.shape == followed.penalties.shape == (5, len(rows))
    observations = data.observations[rows]
    for step in range(5):
        at = [row + step for row in rows]
        made = engine.step(observations, data.actions[at], seed=state.seed, step=step)
        observations = made.next_observations
        errors = (observations.double() - data.next_observations[at]).norm(dim=-1)
        np.testing.assert_allclose(followed.errors[step], errors.numpy())
        assert made.penalties is not None
        np.testing.assert_allclose(followed.penalties[step], made.penalties.numpy())


def test_the_policys_rollouts_have_the_horizon_of_the_run(run: Path) -> None:
    data, path = joined(run), add_policy(run) / "config.json"
    config = json.loads(path.read_text())
    for horizon, steps in ((2, 5), (7, 7), (10**9, 100)):
        path.write_text(json.dumps(config | {"rollout": config["rollout"] | {"horizon": horizon}}))
        made = _Run(run, data).policy_rollouts
        assert made.step is not None and int(made.step.max()) == steps - 1
    # The states beside the data's are those that the training sees.
    path.write_text(json.dumps(config | {"rollout": config["rollout"] | {"horizon": 2}}))
    figure, caption = _states(_Run(run, data))
    assert "of up to 2 steps" in caption
    assert len(figure.axes[0].lines[1].get_xdata()) == 2000


def test_states_that_the_data_hold_are_inside(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = joined(run)
    inside = Transitions(**data.arrays(), step=torch.zeros(600, dtype=torch.int32))
    inside.next_observations = data.observations.clone()
    monkeypatch.setattr(_Run, "policy_rollouts", inside)
    figure, _ = _states(_Run(run, data))
    shares = [bar.get_height() for bar in figure.axes[1].patches]
    assert shares == pytest.approx([1.0] * 3, abs=0.01)
    inside.next_observations[:, 1] += 1000.0
    figure, caption = _states(_Run(run, data))
    shares = [bar.get_height() for bar in figure.axes[1].patches]
    assert shares == pytest.approx([1.0, 100.0, 1.0], abs=0.01) and "it is 34.0% for the rollouts" in caption


def test_shuffled_data_have_no_rollouts_to_follow(run: Path) -> None:
    lines = missing(add_policy(run), toy_data(600))
    assert len(lines) == 1 and "no held-out transition is followed by 4 more of its episode" in lines[0]


def test_the_residuals_of_a_normal_model_are_called_calibrated(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = _Run(run, toy_data(600)).held_out
    normal = np.random.default_rng(0).normal(size=(5, 20_000, 4))
    held_out = dataclasses.replace(held_out, residuals=normal)
    monkeypatch.setattr(_Run, "held_out", held_out)
    caption = next(text for text in texts_of(run) if text.startswith("Errors of the elites"))
    one, two = re.findall(r"([\d.]+)% (?:lie )?within", caption)
    assert float(one) == pytest.approx(68.3, abs=0.5)
    assert float(two) == pytest.approx(95.4, abs=0.3)


# --- what is missing or garbled


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("progress.csv", 2),
        ("summary.json", 1),
        ("fit.json", 6),
        ("dynamics.safetensors", 5),
        ("policy.safetensors", 2),
        ("config.json", 0),
    ],
)
def test_a_missing_file_is_one_line_per_section(run: Path, name: str, lines: int) -> None:
    for picture in PICTURES:
        (run / f"{picture}.png").write_bytes(b"from before")
    data = joined(add_policy(run))
    (run / name).unlink()
    found = missing(run, data)
    assert len(found) == lines
    assert all(f"{name} does not exist" in line for line in found)
    # A picture of an earlier report must not be left.
    assert len(list(run.glob("*.png"))) == len(PICTURES) - lines


def test_data_that_are_gone_or_changed_are_said(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"dataset": str(run / "gone.hdf5")}))
    keep(run, "config.json", "fit.json", "dynamics.json", "dynamics.safetensors")
    lines = [line for line in missing(run) if "gone.hdf5" in line]
    assert len(lines) == 5
    changed = toy_data(600)
    changed.rewards[0] += 1
    lines = [line for line in missing(run, changed) if "is not the data set that the ensemble" in line]
    assert len(lines) == 5


GARBLED = (
    "",
    "{",
    "[]",
    "null",
    "{}",
    "\x00\x01",
    '{"seconds": 3, "rollout": 3, "config": 3}',
    "updates\n1\n",
)


@pytest.mark.parametrize("content", GARBLED)
def test_garbled_files_never_stop_the_report(run: Path, content: str) -> None:
    for name in ("config.json", "summary.json", "fit.json", "progress.csv"):
        (run / name).write_text(content)
    assert len(missing(run, toy_data(600))) >= 5


@pytest.mark.parametrize("name", ["config.json", "summary.json", "fit.json", "progress.csv"])
def test_one_garbled_file_spares_the_other_sections(run: Path, name: str) -> None:
    data = joined(add_policy(run))
    (run / name).write_text('{"seconds": 3, "rollout": 3, "config": 3}')
    found = missing(run, data)
    assert {"config.json": 6, "summary.json": 2, "fit.json": 6, "progress.csv": 2}[name] == len(found), found


@pytest.mark.parametrize("value", ["nan", "inf", "x", "1e400"])
def test_scores_that_are_no_numbers_never_stop_the_report(run: Path, value: str) -> None:
    (run / "progress.csv").write_text(f"updates,score_mean,score_std\n1000,{value},1\n2000,5,1\n")
    write_report(keep(run, "progress.csv"))


@pytest.mark.parametrize(
    ("updates", "mean", "std"),
    [("1", "1", "1e308"), ("1", "-1e308", "1"), ("1e308", "1", "1"), ("1", "1e101", "0")],
)
def test_scores_that_cannot_be_drawn_are_one_line(run: Path, updates: str, mean: str, std: str) -> None:
    (run / "progress.csv").write_text(f"updates,score_mean,score_std\n0,1e99,1e99\n{updates},{mean},{std}\n")
    assert any("larger than 1e+100" in line for line in missing(keep(run, "progress.csv")))
    (run / "progress.csv").write_text("updates,score_mean,score_std,q\n1e-320,1e99,1e99,1\n1,-1e99,0,1\n")
    assert not any("progress.csv" in line for line in missing(run))


def test_a_picture_that_cannot_be_rendered_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("Image size is too large")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    assert sum("Image size is too large" in line for line in missing(keep(run, "progress.csv"))) == 2


def test_a_name_that_is_no_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = keep(run, "summary.json").rename(os.fsdecode(os.fsencode(run.parent) + b"/run\xff"))
    assert "run\\udcff" in write_report(folder).read_text()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{run.parent}/run\\udcff/report.html\n"


# --- bad input


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="is not a run folder"):
            write_report(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_error(run: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(InputError, match="cannot write"):
            write_report(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["hopper-medium-v2", "minari:a/b-v0", "/dev/zero", "/proc/self/mem"])
def test_a_report_downloads_nothing(
    run: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*arguments: object, **options: object) -> None:
        raise AssertionError("a report has begun a download")

    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setattr("mopo_fast.data.d4rl.fetch", fetched)
    monkeypatch.setattr("mopo_fast.data.minari.read", fetched)
    monkeypatch.setattr("mopo_fast.data.minari.path", lambda name: tmp_path / "minari" / "absent")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"dataset": name}))
    lines = missing(keep(run, "config.json", "fit.json", "dynamics.json", "dynamics.safetensors"))
    assert len([line for line in lines if name in line]) == 5


def test_a_picture_that_cannot_be_removed_is_one_sentence(run: Path) -> None:
    (run / "learning_curve.png").mkdir()
    with pytest.raises(InputError, match=r"learning_curve\.png"):
        write_report(keep_files(run))


def keep_files(run: Path) -> Path:
    """Remove all files of the run but its configuration, and keep its folders."""
    for path in run.iterdir():
        if path.is_file() and path.name != "config.json":
            path.unlink()
    return run


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"updates\n" + b"x" * 200_000, b'a,"b\n1\n', b"updates\n1,2\n"]
)
def test_a_log_that_is_no_csv_never_stops_the_report(run: Path, content: bytes) -> None:
    (run / "progress.csv").write_bytes(content)
    assert any("progress.csv" in line for line in missing(keep(run, "progress.csv")))


@pytest.mark.parametrize("content", ['{"env": "Hopper-v2", "algo": "cql"}', '{"dataset": ', "[]"])
def test_another_programs_folder_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_section_without_memory_leaves_the_others(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise MemoryError("init_gesdd failed init")

    monkeypatch.setattr(np.linalg, "eigh", exhausted)
    page = Page(write_report(add_policy(run), data=joined(run)).read_text())
    assert [text for text in page.texts if text.startswith("Missing")] == [
        "Missing: there is not enough memory; run `mopo-fast report` again with more of it."
    ]
    assert len(page.images) == len(PICTURES) - 1
