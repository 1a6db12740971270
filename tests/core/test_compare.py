"""Test the comparison of runs: groups, means, differences, what is left out, and its page."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from recorded_runs import CONFIG, record_run
from rich.console import Console
from test_report import Page

from mopo_fast.cli import main
from mopo_fast.compare import (
    Comparison,
    _letters,
    compare_runs,
    find_runs,
    to_json,
    to_tables,
    write_comparison,
)
from mopo_fast.config import EvaluationConfig, SACConfig
from mopo_fast.errors import InputError


def notes_of(comparison: Comparison) -> str:
    return "\n".join(comparison.notes)


# --- the numbers


def test_a_run_counts_by_the_mean_of_its_last_ten_evaluations(tmp_path: Path) -> None:
    record_run(tmp_path / "a", [100, 100, *range(10)])
    (section,) = compare_runs([tmp_path]).sections
    (group,) = section.groups
    assert (section.dataset, section.metric) == ("hopper-medium-local", "score")
    assert group.values == {0: 4.5} and group.last == {0: 9.0}
    assert group.mean is not None and (group.mean.value, group.mean.low) == (4.5, None)
    assert group.name == "horizon 5, penalty_coef 1" and section.differences == []


def test_groups_means_and_paired_differences_by_hand(tmp_path: Path) -> None:
    """Differences are taken within each seed, so they vary less than the groups do."""
    for seed, level in enumerate((10.0, 20.0, 30.0)):
        record_run(tmp_path / f"runs/a{seed}", [level] * 10, seed=seed, coef=0.0)
        record_run(tmp_path / f"runs/b{seed}", [level + 4 + seed] * 10, seed=seed, coef=5.0)
    (section,) = compare_runs([tmp_path / "runs"]).sections
    low, high = section.groups
    assert (low.name, high.name) == ("penalty_coef 0", "penalty_coef 5")
    assert high.settings == {"rollout.penalty_coef": 5.0} and sorted(high.runs) == [0, 1, 2]
    # For 10, 20 and 30, s is 10, and t with two degrees of freedom 4.302653.
    half = 4.302653 * 10 / 3**0.5
    assert low.mean is not None and low.mean.value == pytest.approx(20.0)
    assert (low.mean.low, low.mean.high) == (pytest.approx(20 - half), pytest.approx(20 + half))
    (one,) = section.differences
    assert (one.first, one.second) == (high.name, low.name) and one.values == {0: 4.0, 1: 5.0, 2: 6.0}
    half = 4.302653 / 3**0.5
    assert one.mean is not None and one.mean.value == pytest.approx(5.0) and one.mean.excludes_zero
    assert (one.mean.low, one.mean.high) == (pytest.approx(5 - half), pytest.approx(5 + half))


def test_five_seeds_have_interquartile_means(tmp_path: Path) -> None:
    for seed, level in enumerate((1.0, 2.0, 3.0, 4.0, 90.0)):
        record_run(tmp_path / f"a{seed}", [level] * 10, seed=seed)
    comparison = compare_runs([tmp_path])
    mean = comparison.sections[0].groups[0].mean
    assert mean is not None and (mean.kind, mean.value) == ("iqm", 3.0)
    assert "stratified bootstrap, as in rliable" in notes_of(comparison)
    assert "fewer than 5 runs" not in notes_of(comparison)


def test_a_seed_that_one_group_lacks(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        record_run(tmp_path / f"a{seed}", [10.0 + seed] * 10, seed=seed, coef=0.0)
    for seed in (1, 2, 7):
        record_run(tmp_path / f"b{seed}", [20.0 + 2 * seed] * 10, seed=seed, coef=1.0)
    comparison = compare_runs([tmp_path])
    (section,) = comparison.sections
    assert [len(group.values) for group in section.groups] == [3, 3]
    assert section.differences[0].values == {1: 11.0, 2: 12.0}
    assert "not every group has a finished run of the seeds 0, 7" in notes_of(comparison)


def test_groups_without_a_common_seed(tmp_path: Path) -> None:
    record_run(tmp_path / "a", [1.0] * 10, seed=0, coef=0.0)
    record_run(tmp_path / "b", [2.0] * 10, seed=1, coef=1.0)
    comparison = compare_runs([tmp_path])
    (one,) = comparison.sections[0].differences
    assert one.values == {} and one.mean is None
    assert "penalty_coef 1 and penalty_coef 0 have no seed of a finished run in common" in notes_of(
        comparison
    )
    write_comparison(comparison, tmp_path)


def test_several_data_sets(tmp_path: Path) -> None:
    """A group that all data sets have gets a mean over all of them; settings are compared within each."""
    for name, level in (("hopper", 0.0), ("walker2d", 100.0)):
        for seed in range(5):
            for coef in (0.0, 1.0) if name == "hopper" else (0.0, 5.0):
                where = tmp_path / f"{name}-{seed}-{coef}"
                scores = [level + coef] * 10
                record_run(
                    where, scores, seed=seed, coef=coef, dataset=f"/elsewhere/{name}-random-local.hdf5"
                )
    comparison = compare_runs([tmp_path])
    assert [section.dataset for section in comparison.sections] == [
        "hopper-random-local",
        "walker2d-random-local",
    ]
    assert [[group.name for group in section.groups] for section in comparison.sections] == [
        ["penalty_coef 0", "penalty_coef 1"],
        ["penalty_coef 0", "penalty_coef 5"],
    ]
    assert list(comparison.overall) == ["penalty_coef 0"]
    assert (comparison.overall["penalty_coef 0"].value, comparison.overall["penalty_coef 0"].count) == (
        50.0,
        10,
    )


# --- groups


def test_what_has_no_effect_makes_no_group(tmp_path: Path) -> None:
    workers = EvaluationConfig(workers=3)
    record_run(
        tmp_path / "a", [1.0], seed=0, threads=1, horizon_from="given", dynamics_from="fits/seed0", fit={}
    )
    record_run(
        tmp_path / "b",
        [1.0],
        seed=1,
        threads=2,
        evaluation=workers,
        dataset="x/hopper-medium-local.hdf5",
        fit={},
    )
    (section,) = compare_runs([tmp_path]).sections
    assert len(section.groups) == 1


def test_a_run_of_an_earlier_version_is_in_the_group_of_its_settings(tmp_path: Path) -> None:
    record_run(tmp_path / "a", [1.0], seed=0, sac=SACConfig(dtype="float32", order="critic_first"))
    path = record_run(tmp_path / "b", [1.0], seed=1) / "config.json"
    config = json.loads(path.read_text())
    del config["sac"]["order"], config["sac"]["dtype"]
    config["sac"]["simultaneous"] = False
    path.write_text(json.dumps(config))
    (section,) = compare_runs([tmp_path]).sections
    assert [sorted(group.runs) for group in section.groups] == [[0, 1]]


def test_every_setting_that_differs_is_named(tmp_path: Path) -> None:
    record_run(tmp_path / "a", [1.0], coef=0.0)
    record_run(tmp_path / "b", [1.0], coef=0.0, sac=SACConfig(dtype="bfloat16", hidden=(8, 8)))
    record_run(tmp_path / "c", [1.0], coef=10.0)
    record_run(tmp_path / "d", [1.0], coef=2.0)
    (section,) = compare_runs([tmp_path]).sections
    assert [group.name for group in section.groups] == [
        "penalty_coef 0, sac.hidden [256, 256], sac.dtype float32",
        "penalty_coef 0, sac.hidden [8, 8], sac.dtype bfloat16",
        "penalty_coef 2, sac.hidden [256, 256], sac.dtype float32",
        "penalty_coef 10, sac.hidden [256, 256], sac.dtype float32",
    ]


def test_settings_of_one_name_keep_their_part(tmp_path: Path) -> None:
    record_run(tmp_path / "a", [1.0])
    rollout = dataclasses.replace(CONFIG.rollout, dtype="bfloat16")
    record_run(tmp_path / "b", [1.0], rollout=rollout, sac=SACConfig(dtype="bfloat16"))
    names = [group.name for group in compare_runs([tmp_path]).sections[0].groups]
    assert names[0] == "rollout.dtype bfloat16, sac.dtype bfloat16"


def test_many_settings_become_letters_or_presets(tmp_path: Path) -> None:
    """Names of many settings would fill the pictures; the notes say what they stand for."""
    for number in range(2):
        rollout = {"horizon": number + 1, "penalty_coef": float(number), "batch_size": 100 + number}
        config = dataclasses.replace(CONFIG.rollout, **rollout)
        sac = dataclasses.replace(CONFIG.sac, discount=0.9 + number / 100)
        record_run(tmp_path / f"letters/{number}", [1] * 10, rollout=config, sac=sac)
        preset = ("unifloral", None)[number]
        record_run(tmp_path / f"presets/{number}", [1] * 10, rollout=config, sac=sac, preset=preset)
    comparison = compare_runs([tmp_path / "letters"])
    assert [group.name for group in comparison.sections[0].groups] == ["A", "B"]
    assert "B stands for: horizon 2, penalty_coef 1, rollout.batch_size 101, discount 0.91." in notes_of(
        comparison
    )
    names = [group.name for group in compare_runs([tmp_path / "presets"]).sections[0].groups]
    assert sorted(names) == ["no preset", "preset unifloral"]


def test_letters_go_on_after_z() -> None:
    assert [_letters(number) for number in (0, 25, 26, 27, 52)] == ["A", "Z", "AA", "AB", "BA"]


def test_the_fit_counts_and_not_the_unused_settings(tmp_path: Path) -> None:
    other = {"config": {"holdout_fraction": 0.2, "holdout_max": 1000, "members": 3}}
    record_run(tmp_path / "a", [1.0], fit={})
    record_run(tmp_path / "b", [1.0], fit=other, dynamics_from="elsewhere")
    names = [group.name for group in compare_runs([tmp_path]).sections[0].groups]
    assert names == ["members 3", "members 7"]


def test_ensembles_tell_runs_of_one_seed_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        for fit in "ab":
            record_run(tmp_path / f"{fit}{seed}", [1.0], seed=seed, dynamics_from=f"{fit}/seed{seed}", fit={})
    groups = compare_runs([tmp_path]).sections[0].groups
    assert [group.name for group in groups] == ["dynamics_from a/seed*", "dynamics_from b/seed*"]
    assert [sorted(group.runs) for group in groups] == [[0, 1], [0, 1]]


def test_the_same_settings_and_seed_twice_are_refused(tmp_path: Path) -> None:
    first, second = record_run(tmp_path / "a", [1.0]), record_run(tmp_path / "b", [2.0])
    with pytest.raises(
        InputError, match=f"{re.escape(str(first))} and {re.escape(str(second))} have the same"
    ):
        compare_runs([tmp_path])
    # The same folder by two names is one run.
    (tmp_path / "c").symlink_to(first)
    assert find_runs([first, tmp_path / "c", first]) == [first]


# --- what limits a comparison


def test_unfinished_runs_are_left_out_and_said(tmp_path: Path) -> None:
    record_run(tmp_path / "a", [10.0] * 12, seed=0)
    record_run(tmp_path / "b", [90.0] * 3, seed=1, finished=False)
    record_run(tmp_path / "c", [], seed=2, finished=False)
    (tmp_path / "c" / "progress.csv").unlink()
    comparison = compare_runs([tmp_path])
    (group,) = comparison.sections[0].groups
    assert group.values == {0: 10.0} and [run.seed for run in group.unfinished] == [1, 2]
    assert f"not finished: {tmp_path / 'b'}, with 3,000 of 12,000 updates" in notes_of(comparison)
    assert f"not finished: {tmp_path / 'c'}, with 0 of 12,000 updates" in notes_of(comparison)
    assert "not finished" in write_comparison(comparison, tmp_path / "out").read_text()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    record_run(tmp_path / "a", [10.0] * 12)
    file = tmp_path / "page.html"
    file.write_text("")
    for out in (file, file / "below"):
        with pytest.raises(
            InputError, match=r"cannot make the folder .*page\.html.*; choose another for --out"
        ):
            write_comparison(compare_runs([tmp_path / "a"]), out)


def test_no_finished_run(tmp_path: Path) -> None:
    record_run(tmp_path / "a", [10.0], finished=False)
    comparison = compare_runs([tmp_path])
    assert comparison.sections[0].groups[0].mean is None
    write_comparison(comparison, tmp_path)
    (table,) = to_tables(comparison, plain=True)
    assert table.row_count == 1


def test_unequal_lengths_are_said(tmp_path: Path) -> None:
    record_run(tmp_path / "a", [1.0] * 3, seed=0)
    record_run(tmp_path / "b", [float(i) for i in range(20)], seed=1)
    comparison = compare_runs([tmp_path])
    assert comparison.sections[0].groups[0].values == {0: 1.0, 1: 14.5}
    assert "from 3,000 to 20,000 updates" in notes_of(comparison)
    assert "1 of 2 runs have fewer than 10 evaluations" in notes_of(comparison)
    # The band ends where the shorter run does.
    write_comparison(comparison, tmp_path)


def test_damaged_runs_are_left_out_and_said(tmp_path: Path) -> None:
    record_run(tmp_path / "a", [1.0])
    for name, file, text in (
        ("b", "config.json", "{"),
        ("c", "progress.csv", "updates,score_mean,return_mean\n1,x,1\n"),
        ("d", "progress.csv", "updates,score_mean,return_mean\n1,1e200,1\n"),
        ("e", "fit.json", "[]"),
        ("f", "progress.csv", "epoch\n1\n"),
    ):
        (record_run(tmp_path / name, [1.0], seed=ord(name)) / file).write_text(text)
    comparison = compare_runs([tmp_path])
    assert len(comparison.sections[0].groups[0].runs) == 1
    for name in "bcdef":
        assert f"cannot be read: {tmp_path / name}/" in notes_of(comparison)
    with pytest.raises(InputError, match="no run can be read"):
        compare_runs([tmp_path / "b", tmp_path / "c"])


def test_runs_that_share_a_fit_or_have_other_data(tmp_path: Path) -> None:
    for seed in range(3):
        record_run(tmp_path / f"a{seed}", [1.0], seed=seed, fit={"seed": min(seed, 1)})
    assert "the 3 runs of horizon 5, penalty_coef 1 share 2 fits" in notes_of(compare_runs([tmp_path]))
    record_run(tmp_path / "a3", [1.0], seed=3, fit={"data_sha256": "b"})
    assert "not all runs were trained on the same data" in notes_of(compare_runs([tmp_path]))


def test_without_scores_returns_are_compared(tmp_path: Path) -> None:
    record_run(tmp_path / "a", [None] * 10, seed=0, scored_by="model")
    record_run(tmp_path / "b", [3.0] * 10, seed=1)
    comparison = compare_runs([tmp_path])
    (section,) = comparison.sections
    assert section.metric == "return" and section.groups[0].values == {0: 10.0, 1: 30.0}
    assert "the learned model evaluates the policies" in notes_of(comparison)


def test_many_differences_are_warned_of(tmp_path: Path) -> None:
    for coef in range(3):
        for seed in (0, 1):
            record_run(tmp_path / f"{coef}-{seed}", [1.0 + seed], coef=float(coef), seed=seed)
    comparison = compare_runs([tmp_path])
    assert len(comparison.sections[0].differences) == 3
    assert "There are 3 differences." in notes_of(comparison)


# --- finding runs


def test_runs_are_found_at_any_depth(tmp_path: Path) -> None:
    deep, other = record_run(tmp_path / "x/y/z", [1.0]), record_run(tmp_path / "x/a", [1.0], seed=1)
    # A run's own folders are not searched, and neither a fit alone nor another program's folder is a run.
    record_run(deep / "copy", [1.0])
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "config.json").write_text('{"dataset": "d", "dynamics": {}, "seed": 0}')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"env": "Hopper-v2"}')
    assert find_runs([tmp_path]) == [other, deep]
    assert find_runs([deep, tmp_path]) == [deep, other]


@pytest.mark.parametrize("name", ["fit", "empty", "absent", "file"])
def test_a_folder_without_runs(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fit").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "fit" / "config.json").write_text('{"dataset": "d", "seed": 0}')
    run = record_run(tmp_path / "run", [1.0])
    assert main(["report", str(run), str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / name} ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- what is printed and written


def test_the_page_is_whole_and_self_contained(tmp_path: Path) -> None:
    for seed in (0, 1):
        record_run(tmp_path / f"a{seed}", [1.0, 2.0], seed=seed, coef=0.0)
        record_run(
            tmp_path / f"<b>{seed}",
            [3.0, 4.0 + seed],
            seed=seed,
            dataset="$x_{hopper}<i>.hdf5",
            task="hopper",
        )
        record_run(tmp_path / f"c{seed}", [3.0, 4.0 + seed], seed=seed, coef=2.0)
    path = write_comparison(compare_runs([tmp_path]), tmp_path / "out")
    page = Page(path.read_text())
    assert path == tmp_path / "out" / "comparison.html" and len(page.images) == 3
    assert all(str(link).startswith("data:") for link in page.links)
    for name in ("curves", "means", "differences"):
        assert (path.parent / f"comparison_{name}.png").read_bytes().startswith(b"\x89PNG")
    row = page.texts.index("hopper-medium-local: penalty_coef 2 minus penalty_coef 0")
    # The mean of 2 and 2.5 is 2.25, and half of the interval 12.7062 * 0.25.
    assert page.texts[row + 1 : row + 5] == ["2", "+2.25", "-0.93 to +5.43", "no"]
    assert f"{tmp_path}/<b>1" in page.texts and "<b>" not in path.read_text()
    # A picture of an earlier comparison must not be left.
    write_comparison(compare_runs([tmp_path / "a0"]), tmp_path / "out")
    assert not (path.parent / "comparison_differences.png").exists()


def test_the_command_prints_tables_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(5):
        record_run(tmp_path / f"a{seed}", [10.0 + seed] * 10, seed=seed, coef=0.0)
        record_run(tmp_path / f"b{seed}", [13.0 + seed] * 10, seed=seed, coef=0.5)
    assert main(["report", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "hopper-medium-local: settings"
    assert re.fullmatch(r"penalty_coef 0 +5 +12\.00 IQM +\d+\.\d\d to \d+\.\d\d +12\.00 IQM", lines[1])
    assert re.fullmatch(
        r"penalty_coef 0\.5 minus penalty_coef 0 +5 +\+3\.00 IQM +\+3\.00 to \+3\.00 +yes", lines[4]
    )
    assert lines[-1] == str(tmp_path / "comparison.html") and "┃" not in "".join(lines)
    out = tmp_path / "elsewhere"
    assert main(["report", *map(str, find_runs([tmp_path])), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(to_json(compare_runs([tmp_path]))))
    (section,) = found["datasets"]
    assert [run["mean"] for run in section["groups"][1]["runs"]] == [13.0, 14.0, 15.0, 16.0, 17.0]
    assert section["differences"][0]["pairs"][4] == {"seed": 4, "difference": 3.0}
    assert (out / "comparison.html").exists()


def test_a_terminal_gets_frames_and_no_marks_of_a_file(tmp_path: Path) -> None:
    record_run(tmp_path / "a", [1.0], dataset="[bold]x\x1b[31m.hdf5", task="hopper")
    console = Console(width=80, record=True, force_terminal=True)
    for table in to_tables(compare_runs([tmp_path]), plain=False):
        console.print(table)
    text = console.export_text()
    assert "┃" in text and r"[bold]x\x1b[31m" in text
