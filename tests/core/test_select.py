"""Test rankings of hand-made runs, whose returns are known, and what is said about them."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from linear_models import constant_actor, linear_ensemble
from rich.console import Console

from mopo_fast.cli import main
from mopo_fast.config import DataConfig, RolloutConfig, RunConfig, to_dict
from mopo_fast.data import Transitions, load_dataset
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.estimates import FittedQ
from mopo_fast.policy import Actor
from mopo_fast.run.folder import read_config
from mopo_fast.run.kept import keep_policy
from mopo_fast.select import mean_interval, ranking_quality, select, to_sentences, to_tables
from mopo_fast.tasks import TASKS, Task, make_box
from mopo_fast.utils.atomic import write_json

QUICK = dict(starts=3, horizon=20, fqe_updates=0, backend="reference", threads=1, quiet=True)
# Mean actions of the policies. With s' = s / 2 + a and the reward s + 1, a larger action is better.
ACTIONS = {"worst": -0.5, "middle": 0.0, "best": 0.5}


@pytest.fixture(autouse=True)
def line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "line", Task("line", "", 1, 1, make_box(1)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 100 episodes of ten steps with random actions."""
    generator = torch.Generator().manual_seed(0)
    observations = torch.empty(1000, 1)
    actions = torch.rand(1000, 1, generator=generator) * 2.0 - 1.0
    following = torch.empty(1000, 1)
    for row in range(1000):
        begins = row % 10 == 0
        observations[row] = torch.randn(1, generator=generator) if begins else following[row - 1]
        following[row] = 0.5 * observations[row] + actions[row]
    rewards, terminals = observations[:, 0] + 1.0, torch.zeros(1000, dtype=torch.bool)
    path = tmp_path_factory.mktemp("line") / "line.npz"
    Transitions(observations, actions, rewards, following, terminals).save(path)
    return path


def make_run(folder: Path, data: Path, raw: float, *, coef: float = 1.0, **options) -> Path:
    """Write a run whose policy always acts by tanh(raw), with an ensemble of a constant penalty of 0.25."""
    folder.mkdir(parents=True)
    rollout = RolloutConfig(penalty="max_deviation", penalty_coef=coef, horizon=5, dtype="float32")
    config = RunConfig(**{"dataset": str(data), "task": "line", "rollout": rollout, **options})
    write_json(folder / "config.json", to_dict(config))
    linear_ensemble(-0.5, 1.0, 0.25).save(folder)
    constant_actor(raw).save(folder)
    return folder


@pytest.fixture
def runs(data: Path, tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / "runs" / name, data, math.atanh(action)) for name, action in ACTIONS.items()]


def log_returns(run: Path, returns: dict[int, float | None], scored_by: str = "environment") -> None:
    """Write a progress.csv with an evaluation after each number of updates, and a summary."""
    with (run / "progress.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["updates", "return_mean", "scored_by"])
        writer.writeheader()
        for updates, value in returns.items():
            known = {} if value is None else {"return_mean": value, "scored_by": scored_by}
            writer.writerow({"updates": updates, **known})
    last, value = list(returns.items())[-1]
    seconds = dict.fromkeys(("fit", "rollout", "sac", "evaluate", "total"), 0.0)
    scores = {"score_mean": None, "score_std": None, "return_mean": value or 0.0, "return_std": 0.0}
    write_json(
        run / "summary.json",
        {**scores, "updates": last, "seconds": seconds, "seed": 0, "penalty_coef": 1.0},
    )


def by_hand(start: float, action: float, coef: float, steps: int = 20) -> float:
    """Return the sum over t of s_t + 1 - coef / 4 in s' = s / 2 + a."""
    total, state = 0.0, start
    for _ in range(steps):
        total += state + 1.0 - coef * 0.25
        state = state / 2.0 + action
    return total


def test_policies_are_ranked_by_their_penalised_returns(runs: list[Path], data: Path) -> None:
    selection = select(runs, **QUICK)
    assert [Path(selection.policies[i].run).name for i in selection.by_model] == ["best", "middle", "worst"]
    assert selection.by_fqe == () and all(one.fqe is None for one in selection.policies)
    assert (selection.starts, selection.rollouts, selection.starts_of_episodes) == (3, 3, True)
    # The return is linear in the start state, so the spread between policies is that by hand.
    best, middle, worst = (selection.policies[i].model for i in selection.by_model)
    for one, action in ((best, 0.5), (worst, -0.5)):
        expected = by_hand(0.0, action, 1.0) - by_hand(0.0, 0.0, 1.0)
        assert one.mean - middle.mean == pytest.approx(expected, rel=1e-5)
    assert middle.unpenalised - middle.mean == pytest.approx(20 * 0.25, rel=1e-5)
    assert middle.low < middle.mean < middle.high and middle.steps == 20
    assert middle.mean - middle.low == pytest.approx(middle.high - middle.mean)


def test_all_starts_give_the_mean_by_hand(runs: list[Path], data: Path) -> None:
    """There are 100 episodes, so 250 rollouts are three of each start state; the interval is that of 100."""
    selection = select([runs[0]], **QUICK | {"starts": 250})
    assert (selection.starts, selection.rollouts) == (100, 300)
    assert "100 episode starts, so each is rolled out 3 times" in selection.notes[0]
    first = load_dataset(data, quiet=True).observations[::10, 0].double()
    returns = torch.tensor([by_hand(start, -0.5, 1.0) for start in first.tolist()], dtype=torch.float64)
    mean, low, high = mean_interval(returns)
    model = selection.policies[0].model
    assert (model.mean, model.low, model.high) == pytest.approx((mean, low, high), rel=1e-5)


def test_the_interval_is_students() -> None:
    # The quantile of Student's t at 97.5 % with 3 degrees of freedom is 3.182446.
    values = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    mean, low, high = mean_interval(values)
    half = 3.182446 * math.sqrt(14.0 / 3.0) / 2.0
    assert (mean, low, high) == pytest.approx((3.0, 3.0 - half, 3.0 + half))
    assert mean_interval(values[:1]) == (1.0, None, None)
    assert mean_interval(torch.ones(5)) == (1.0, 1.0, 1.0)


def test_fitted_q_ranks_by_the_data_alone(runs: list[Path], data: Path) -> None:
    """V(s) = (s - 2a) / (1 - discount / 2) + (1 + 2a) / (1 - discount), with a discount of 1/2."""
    selection = select(runs, **QUICK | {"fqe_updates": 600}, fqe_discount=0.5)
    assert [Path(selection.policies[i].run).name for i in selection.by_fqe] == ["best", "middle", "worst"]
    start = selection.policies[1].model.unpenalised
    mean_start = (start - 20.0) / sum(0.5**t for t in range(20))
    for one, action in zip(selection.policies, ACTIONS.values(), strict=True):
        expected = (mean_start - 2 * action) / 0.75 + (1 + 2 * action) / 0.5
        assert one.fqe is not None and not one.fqe.diverged and one.fqe.is_still
        assert one.fqe.mean == pytest.approx(expected, abs=0.15)
        assert one.fqe.low < one.fqe.mean < one.fqe.high


def test_one_penalty_makes_runs_comparable(data: Path, tmp_path: Path) -> None:
    """By its own weights the worse policy wins, because it pays no penalty."""
    better = make_run(tmp_path / "better", data, math.atanh(0.1), coef=20.0)
    worse = make_run(tmp_path / "worse", data, 0.0, coef=0.0)
    own = select([better, worse], **QUICK)
    assert own.by_model == (1, 0)
    assert any("different weights (0, 20)" in note and "--penalty-coef" in note for note in own.notes)
    common = select([better, worse], **QUICK, penalty_coef=2.0)
    assert common.by_model == (0, 1)
    assert [one.model.penalty_coef for one in common.policies] == [2.0, 2.0]
    assert not any("weights" in note for note in common.notes)


def test_a_common_judge_is_read_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / name, data, 0.1) for name in ("one", "two")]
    load, read = EnsembleDynamics.load, []
    monkeypatch.setattr(EnsembleDynamics, "load", lambda *given: read.append(given[0]) or load(*given))
    select(runs, **QUICK, dynamics_from=runs[0])
    assert read == [runs[0]]


def test_different_judges_are_named(data: Path, tmp_path: Path) -> None:
    """The second run's ensemble promises more; judged by the first one's, its policy is the worse one."""
    sober = make_run(tmp_path / "sober", data, math.atanh(0.1))
    hopeful = make_run(tmp_path / "hopeful", data, 0.05)
    ensemble = linear_ensemble(-0.5, 1.0, 0.25)
    with torch.no_grad():
        ensemble.biases[0][:, 1] += 5.0
    ensemble.save(hopeful)
    own = select([sober, hopeful], **QUICK)
    assert own.by_model == (1, 0)
    assert any("judged by different ensembles" in note and "--dynamics-from" in note for note in own.notes)
    common = select([sober, hopeful], **QUICK, dynamics_from=sober)
    assert common.by_model == (0, 1)
    assert {one.model.judge for one in common.policies} == {str(sober)}
    assert not any("judged" in note for note in common.notes)


def test_policies_that_a_run_has_kept_are_ranked_too(runs: list[Path]) -> None:
    run = runs[1]
    for updates, action in ((1000, 0.9), (2000, -0.9), (3000, 0.0)):
        keep_policy(run, constant_actor(math.atanh(action) if action else 0.0), updates)
    unfinished = select([run], **QUICK)
    assert [one.updates for one in unfinished.policies] == [1000, 2000, 3000, None]
    # The last policy of a finished run is not listed twice.
    log_returns(run, {3000: 1.0})
    selection = select([run], **QUICK)
    assert [one.updates for one in selection.policies] == [1000, 2000, 3000]
    assert Path(selection.policies[-1].file).name == "policy.safetensors"
    assert selection.by_model == (0, 2, 1)
    assert [one.updates for one in select([run], **QUICK, last=True).policies] == [3000]


def test_true_returns_tell_the_quality_and_never_rank(runs: list[Path]) -> None:
    without = select(runs, **QUICK)
    for run, value in zip(runs, (300.0, 200.0, 100.0), strict=True):
        log_returns(run, {1000: value})
    selection = select(runs, **QUICK, truth=True)
    assert selection.by_model == without.by_model == (2, 1, 0)
    assert [one.true_return for one in selection.policies] == [300.0, 200.0, 100.0]
    quality = selection.model_quality
    assert quality is not None and without.model_quality is None
    assert (quality.policies, quality.rank_correlation) == (3, pytest.approx(-1.0))
    assert (quality.regret, quality.random_regret) == (200.0, 100.0)
    assert "rank correlation with the return in the model -1.00" in " ".join(to_sentences(selection))


def test_policies_without_a_true_return_are_left_out_of_the_quality(runs: list[Path]) -> None:
    log_returns(runs[0], {1000: 1.0})
    log_returns(runs[1], {500: 5.0, 1000: None})
    log_returns(runs[2], {1000: 9.0}, scored_by="model")
    with pytest.raises(InputError, match="fewer than two of the policies were evaluated"):
        select(runs, **QUICK, truth=True)
    keep_policy(runs[1], constant_actor(0.0), 500)
    quality = select(runs, **QUICK, truth=True).model_quality
    assert quality is not None and quality.policies == 2 and quality.regret == 0.0


def test_the_quality_of_a_ranking_by_hand() -> None:
    # Ranks 1, 3, 2, 4 and 1, 2, 3, 4: 1 - 6 * 2 / (4 * 15) = 0.8.
    quality = ranking_quality([1.0, 3.0, 2.0, -math.inf, 9.0], [10.0, 20.0, 30.0, None, 40.0])
    assert quality.rank_correlation == pytest.approx(0.8)
    assert (quality.policies, quality.regret, quality.random_regret) == (4, 0.0, 15.0)
    last = ranking_quality([-math.inf, 2.0, 1.0], [30.0, 10.0, 20.0])
    assert last.rank_correlation == pytest.approx(-1.0) and last.regret == 20.0
    assert ranking_quality([1.0, 1.0], [1.0, 2.0]).rank_correlation is None
    with pytest.raises(InputError, match="two true returns or more, got 1"):
        ranking_quality([1.0, 2.0], [1.0, None])
    with pytest.raises(InputError, match="1 estimates but 2 true returns"):
        ranking_quality([1.0], [1.0, 2.0])


def test_rollouts_that_are_not_finite_rank_last(data: Path, tmp_path: Path) -> None:
    """A state that grows without bounds has a huge return before it is not finite."""
    sound, wild = make_run(tmp_path / "sound", data, 0.0), make_run(tmp_path / "wild", data, 5.0)
    linear_ensemble(9.0, 1.0, 0.25).save(wild)
    selection = select([wild, sound], **QUICK | {"horizon": 100})
    assert selection.policies[0].model.non_finite > 0
    assert selection.by_model == (1, 0)
    assert any("not finite" in note and "rank behind" in note for note in selection.notes)
    assert "(!)" in printed(selection)


def printed(selection) -> str:
    console = Console(width=1000)
    with console.capture() as capture:
        for table in to_tables(selection):
            console.print(table)
    return capture.get()


def test_a_q_that_diverges_ranks_last(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fitted(policy: Actor, data: Transitions, starts: torch.Tensor, **options) -> FittedQ:
        huge = policy.biases[-1][0].item() > 0
        value = torch.full((len(starts),), math.inf if huge else 1.0, dtype=torch.float64)
        return FittedQ(value, 1.0, math.nan if huge else 0.0, huge)

    monkeypatch.setattr("mopo_fast.select.fitted_q", fitted)
    selection = select(runs, **QUICK | {"fqe_updates": 1})
    assert selection.by_fqe[-1] == 2
    fqe = selection.policies[2].fqe
    assert fqe is not None and (fqe.mean, fqe.low, fqe.change, fqe.loss) == (None, None, None, None)
    assert any("diverged for 1 of 3 policies" in note for note in selection.notes)
    assert "not finite (!)" in printed(selection)
    json.dumps(dataclasses.asdict(selection), allow_nan=False)


def test_a_q_that_still_moves_is_named(runs: list[Path]) -> None:
    selection = select(runs, **QUICK | {"fqe_updates": 200})
    assert any("Fitted Q of 3 of 3 policies still moved" in note for note in selection.notes)


def test_shuffled_data_give_any_states(runs: list[Path], data: Path) -> None:
    shuffled = load_dataset(data, quiet=True)[torch.randperm(1000)]
    selection = select(runs, **QUICK, data=shuffled)
    assert not selection.starts_of_episodes
    assert "no episodes in order, so the 3 start states are any of its states" in selection.notes[0]


def test_one_start_state_has_no_interval(runs: list[Path]) -> None:
    selection = select([runs[0]], **QUICK | {"starts": 1})
    assert selection.policies[0].model.low is None and "±" not in printed(selection)
    assert any("no interval" in note for note in selection.notes)


def test_the_horizon_is_that_of_the_tasks_episodes(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = QUICK | {"horizon": None}
    assert select([runs[0]], **whole).horizon == 1000
    monkeypatch.setitem(TASKS, "line", Task("line", "Pendulum-v1", 1, 1, make_box(1)))
    assert select([runs[0]], **whole).horizon == 200


def test_a_folder_of_runs_stands_for_them(runs: list[Path]) -> None:
    folder = runs[0].parent
    # A fit has settings but no policy.
    (folder / "fit").mkdir()
    write_json(folder / "fit" / "config.json", {})
    selection = select([folder, runs[0]], **QUICK)
    assert sorted(Path(one.run).name for one in selection.policies) == sorted(ACTIONS)


def test_what_cannot_be_compared_is_refused(
    runs: list[Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, *some: Path, **options) -> None:
        with pytest.raises(InputError, match=match):
            select(list(some), **QUICK | options)

    monkeypatch.setitem(TASKS, "plane", Task("plane", "", 2, 1, make_box(2)))
    refused(
        "is a run of the task plane, .* one of line",
        runs[0],
        make_run(tmp_path / "p", data, 0.0, task="plane"),
    )
    other = make_run(tmp_path / "other", data.with_name("other.npz"), 0.0)
    refused(r"was trained on other\.npz, .* on line\.npz; name one data set .* --dataset", runs[0], other)
    select([runs[0], other], **QUICK, data=data)
    few = make_run(tmp_path / "few", data, 0.0)
    config = dataclasses.replace(read_config(few), data=DataConfig(max_transitions=100))
    write_json(few / "config.json", to_dict(config))
    refused(
        "few was trained on rows with --data.compat None --data.max-transitions 100, .*"
        " on rows with --data.compat None --data.max-transitions all; name one data set",
        runs[0],
        few,
    )
    refused("the task plane has 2 and 1", tmp_path / "p")
    constant_actor(0.0, obs_dim=2).save(other)
    refused("the policy in .* is for 2 observation", other, data=data)
    (runs[1] / "dynamics.json").unlink()
    refused("holds no ensemble .*; name one with --dynamics-from", *runs)
    select(runs, **QUICK, dynamics_from=runs[0])
    (runs[2] / "policy.json").unlink()
    refused("has no policy yet", runs[2])
    refused("does not exist", tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("holds no run", empty)
    refused("there is no run with a policy")
    refused("fqe_updates must not be negative", runs[0], fqe_updates=-1)
    refused("the discount of fitted Q must be at least 0 and less than 1, got 1.0", runs[0], fqe_discount=1.0)
    refused("starts must be at least 1", runs[0], starts=0)
    refused("horizon must be at least 1", runs[0], horizon=0)
    refused("discount must be above 0", runs[0], discount=1.5)


def test_each_estimate_has_its_own_expected_time(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    log_returns(runs[0], {1000: None})
    select(runs, **QUICK | {"quiet": False, "fqe_updates": 10})
    shown = capsys.readouterr().err
    model, q = shown.index("model: about"), shown.index("fitted Q: about")
    # A line of fitted Q among those of rollouts would spoil the time that they tell.
    assert model < shown.index("model: 3/3 estimates") < q < shown.index("fitted Q: 3/3 estimates")
    assert f"{runs[0].name}, 1,000 updates" in shown


def test_the_command_prints_tables_and_writes_json(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, value in zip(runs, (1.0, 2.0, 3.0), strict=True):
        log_returns(run, {1000: value})
    out = tmp_path / "select.json"
    line = ["select", str(runs[0].parent), "--starts", "3", "--horizon", "20", "--fqe-updates", "100"]
    assert main([*line, "--truth", "--json", str(out), "--threads", "1", "--quiet"]) == 0
    shown = capsys.readouterr().out
    model, fqe = (
        shown.index("Penalised return in the model, at most 20 steps"),
        shown.index("Fitted Q evaluation"),
    )
    assert model < shown.index("1 best ") < shown.index("2 middle ") < shown.index("3 worst ") < fqe
    assert "Neither estimate can tell" in shown and "rank correlation" in shown
    written = json.loads(out.read_text())
    assert [Path(written["policies"][i]["run"]).name for i in written["by_model"]] == [
        "best",
        "middle",
        "worst",
    ]
    assert main([*line[:1], str(runs[0]), *line[2:], "--threads", "1", "--quiet"]) == 0
    # The title is wider than the table of a run with a short name.
    assert "Fitted Q evaluation, discount 0.99" in capsys.readouterr().out
    assert main(["select", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
