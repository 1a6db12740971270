"""Test ModelVectorEnv against RolloutEngine and gymnasium's SyncVectorEnv, and with other libraries."""

import copy
import importlib
import math
import pickle
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import (
    ClipAction,
    DictInfoToList,
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
)
from kernel_cases import inputs, make_ensemble
from linear_models import linear_ensemble
from one_row import OneRow
from small_fits import toy_data

import mopo_fast
from mopo_fast.backends.philox import BATCH_STREAM, random_choice
from mopo_fast.errors import InputError
from mopo_fast.model_env import ModelVectorEnv
from mopo_fast.rollout import RolloutEngine
from mopo_fast.tasks import make_box
from mopo_fast.utils.seeds import START, derive_seed

OBS, ACT = 5, 2
STARTS = np.random.default_rng(0).standard_normal((40, OBS)).astype(np.float32)
MODES = list(AutoresetMode)
NEXT_STEP, SAME_STEP, DISABLED = MODES
# Ends some episodes at random, before the horizon.
BOX = make_box(OBS, {0: (-1.5, 1.5)})


def engine(**options: Any) -> RolloutEngine:
    return RolloutEngine(make_ensemble(OBS, ACT), **{"threads": 1, "termination": BOX, **options})


def actions_of(envs: Any, count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, envs.num_envs, ACT)).astype(np.float32)


def play(envs: Any, actions: np.ndarray, **reset: Any) -> list[tuple[Any, ...]]:
    """Reset, then make a step with each of the actions; with DISABLED, reset what has ended."""
    made = [envs.reset(**reset)]
    for action in actions:
        made.append(envs.step(action))
        ended = made[-1][2] | made[-1][3]
        if envs.metadata["autoreset_mode"] is DISABLED and ended.any():
            made.append(envs.reset(options={"reset_mask": ended}))
    return made


def assert_same(ours: Any, theirs: Any) -> None:
    """Compare results of `play`, with the types of their arrays."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_same(ours[name], theirs[name])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(ours, np.ndarray) and ours.dtype == object:
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other)
    else:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_the_first_steps_are_those_of_a_rollout() -> None:
    model, envs = (
        engine(),
        ModelVectorEnv(engine(), STARTS, num_envs=30, horizon=4, autoreset_mode="Disabled"),
    )
    start, _ = envs.reset(seed=7)
    matrix = torch.randn(OBS, ACT, generator=torch.Generator().manual_seed(3))
    rollout = model.rollout(lambda observations: torch.tanh(observations @ matrix), start, 4, seed=7)
    assert rollout.terminals.any() and len(set(rollout.rollout_index.tolist())) == 30
    observations, alive = start, np.ones(30, bool)
    for step in range(4):
        now = rollout.step == step
        assert rollout.rollout_index[now].tolist() == np.flatnonzero(alive).tolist()
        action = torch.tanh(torch.from_numpy(observations) @ matrix).numpy()
        envs._ended[:] = False  # The rows that have ended go on, unlike in the rollout, and are not compared.
        observations, rewards, terminations, truncations, infos = envs.step(action)
        for ours, theirs in (
            (observations, rollout.next_observations),
            (rewards, rollout.rewards),
            (terminations, rollout.terminals),
            (infos["raw_reward"], rollout.raw_rewards),
            (infos["penalty"], rollout.penalties),
            (infos["member"], rollout.members),
        ):
            assert theirs is not None
            np.testing.assert_array_equal(ours[alive], theirs[now].numpy())
        assert truncations.tolist() == [step == 3] * 30
        alive &= ~terminations


@pytest.mark.filterwarnings("ignore:.*Box observation space maximum and minimum values are infinity")
@pytest.mark.filterwarnings("ignore:.*(m|M)inimum value is -infinity|.*maximum value is infinity")
def test_a_row_passes_gymnasiums_check() -> None:
    envs = ModelVectorEnv(engine(), STARTS, autoreset_mode=DISABLED)
    check_env(OneRow(envs), skip_render_check=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", [0.0, 1.8])
def test_ends_and_infos_are_those_of_gymnasium(mode: AutoresetMode, start: float) -> None:
    """Without noise and with one start state, single environments of gymnasium's give the same."""
    model = RolloutEngine(
        linear_ensemble(0.5, 1.0, deviation=0.25), termination=make_box(1, {0: (-1.5, 2.0)}), threads=1
    )
    options: dict[str, Any] = {"horizon": 3, "seed": 0}
    starts = np.full((1, 1), start, np.float32)
    ours = ModelVectorEnv(model, starts, num_envs=6, autoreset_mode=mode, **options)
    theirs = SyncVectorEnv(
        [lambda: OneRow(ModelVectorEnv(model, starts, autoreset_mode=DISABLED, **options))] * 6,
        autoreset_mode=mode,
    )
    actions = np.random.default_rng(1).uniform(-1, 1, (20, 6, 1)).astype(np.float32)
    # All end by the horizon at once, then some by the box.
    actions[:8] *= 0.01
    got, expected = play(ours, actions), play(theirs, actions)
    ends = [len(set(step[2] | step[3])) for step in expected if len(step) == 5]
    assert 2 in ends
    for one, other in zip(got, expected, strict=True):
        if len(one) == 5:
            # Gymnasium's rewards are float64.
            other = (other[0], other[1].astype(np.float32), *other[2:])
        assert_same(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_rows_do_not_depend_on_the_number_of_environments(mode: AutoresetMode) -> None:
    options: dict[str, Any] = {"horizon": 6, "seed": 5, "autoreset_mode": mode}
    whole = ModelVectorEnv(engine(), STARTS, num_envs=9, **options)
    actions = actions_of(whole, 25)
    expected = play(whole, actions)
    ends = [step[2] | step[3] for step in expected if len(step) == 5]
    # Some ends are in one part alone.
    assert any(end[:4].any() != end[4:].any() for end in ends)
    for first, last in ((0, 4), (4, 9)):
        part = ModelVectorEnv(engine(), STARTS, num_envs=last - first, first_row=first, **options)
        made = [part.reset()]
        for action in actions:
            made.append(part.step(action[first:last]))
            ended = made[-1][2] | made[-1][3]
            if mode is DISABLED and ended.any():
                part.reset(options={"reset_mask": ended})
        whole_made = [step for step in expected if len(step) == 5]
        for one, other in zip(made[1:], whole_made, strict=True):
            for ours, theirs in zip(one[:-1], other[:-1], strict=True):
                np.testing.assert_array_equal(ours, theirs[first:last])
        np.testing.assert_array_equal(made[0][0], expected[0][0][first:last])


def test_modes_that_reset_at_once_give_the_same() -> None:
    disabled, same = (
        ModelVectorEnv(engine(), STARTS, num_envs=6, horizon=4, seed=2, autoreset_mode=mode)
        for mode in (DISABLED, SAME_STEP)
    )
    actions = actions_of(same, 12)
    resets = [step for step in play(disabled, actions) if len(step) == 5]
    for one, other in zip(resets, play(same, actions)[1:], strict=True):
        for ours, theirs in zip(one[1:4], other[1:4], strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_repeats_everything(mode: AutoresetMode) -> None:
    options: dict[str, Any] = {"num_envs": 4, "horizon": 3, "autoreset_mode": mode}
    envs = ModelVectorEnv(engine(), STARTS, seed=3, **options)
    actions = actions_of(envs, 7)
    first, second, again = play(envs, actions), play(envs, actions), play(envs, actions, seed=3)
    assert_same(again, first)
    assert_same(play(ModelVectorEnv(engine(), STARTS, seed=4, **options), actions, seed=3), first)
    assert not np.array_equal(second[0][0], first[0][0])
    assert not np.array_equal(play(envs, actions, seed=4)[0][0], first[0][0])
    assert envs.np_random_seed == 4
    # A copy goes on where the original is.
    twin = pickle.loads(pickle.dumps(envs))
    assert_same(play(twin, actions), play(envs, actions))


def test_without_a_seed_one_is_drawn() -> None:
    first, second = (ModelVectorEnv(engine(), STARTS, num_envs=8).reset()[0] for _ in range(2))
    assert not np.array_equal(first, second)


def test_random_numbers_never_repeat() -> None:
    """One start state and one action: only the random numbers differ."""
    envs = ModelVectorEnv(engine(termination=None), STARTS[:1], horizon=2, seed=0, autoreset_mode=SAME_STEP)
    envs.reset()
    action, seen = np.zeros((1, ACT), np.float32), set()
    for step in range(20):
        if step % 3 == 2:
            envs.reset()
        before = envs._states.copy()
        observations, *_, infos = envs.step(action)
        if np.array_equal(before, STARTS[:1]):
            after = infos["final_obs"][0] if "final_obs" in infos else observations[0]
            seen.add(after.tobytes())
    assert len(seen) > 7


def test_the_counter_passes_32_bits() -> None:
    """The key changes with the 2^32nd step, so that counters 0 and 1 do not bring the same noise again."""
    options: dict[str, Any] = {"num_envs": 3, "horizon": 1, "autoreset_mode": SAME_STEP}
    envs = ModelVectorEnv(engine(), STARTS[:1], seed=0, **options)
    made = []
    for steps in (0, 2**32 - 2):
        envs.reset(seed=0)
        envs._steps = steps
        made += [np.stack(envs.step(np.zeros((3, ACT)))[4]["final_obs"]) for _ in range(4)]
    assert len({array.tobytes() for array in made}) == 8 and envs._steps == 2**32 + 2


@pytest.mark.parametrize("num_envs", [1, 700, 70_000])
def test_start_states_are_those_of_the_generator(num_envs: int) -> None:
    """Over more episodes than are drawn at once, which some environments begin more often than others."""
    states = np.arange(1000, dtype=np.float32)[:, None]
    model = RolloutEngine(linear_ensemble(0.0, 0.0), penalty_coef=0.0, threads=1)
    envs = ModelVectorEnv(model, states, num_envs=num_envs, seed=3, first_row=5, autoreset_mode=DISABLED)
    numbers = torch.arange(5, 5 + num_envs)
    envs.reset()
    episodes = np.zeros(num_envs, np.int64)
    for call in range(150 if num_envs < 1000 else 4):
        mask = np.arange(num_envs) % 3 <= call % 3
        episodes += mask
        expected = random_choice(
            numbers, torch.from_numpy(episodes), BATCH_STREAM, 1000, derive_seed(3, START)
        )
        observations, _ = envs.reset(options={"reset_mask": mask})
        np.testing.assert_array_equal(observations[:, 0], expected.numpy())


def test_start_states_are_drawn_from_all_rows() -> None:
    envs = ModelVectorEnv(engine(), STARTS, num_envs=4000, seed=0)
    observations, infos = envs.reset()
    rows = {row.tobytes() for row in STARTS}
    counts = [np.sum([one.tobytes() == row for one in observations]) for row in rows]
    assert sum(counts) == 4000 and min(counts) > 50 and infos == {}


def test_spaces_and_types() -> None:
    envs = ModelVectorEnv(engine(), STARTS, num_envs=3, seed=0)
    assert envs.metadata["autoreset_mode"] is envs.autoreset_mode is NEXT_STEP
    assert envs.single_observation_space.shape == (OBS,) and envs.observation_space.shape == (3, OBS)
    assert envs.single_action_space == gymnasium.spaces.Box(-1.0, 1.0, (ACT,), np.float32)
    envs.action_space.seed(0)
    observations, _ = envs.reset()
    for _ in range(8):
        assert observations in envs.observation_space
        action = envs.action_space.sample()
        assert action in envs.action_space
        observations, rewards, terminations, truncations, infos = envs.step(action)
        kinds = [array.dtype for array in (observations, rewards, terminations, truncations)]
        assert kinds == [np.float32, np.float32, bool, bool]
        if infos:
            kinds = [infos[name].dtype for name in ("raw_reward", "penalty", "member", "non_finite")]
            assert kinds == [np.float32, np.float32, np.int32, bool]
            expected = infos["raw_reward"] - envs.engine.penalty_coef * infos["penalty"]
            np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-5)
    assert "num_envs=3, horizon=5" in repr(envs)
    envs.close()
    assert envs.closed


def test_an_engine_in_float64() -> None:
    envs = ModelVectorEnv(engine(dtype="float64"), STARTS, num_envs=3, seed=0)
    envs.reset()
    observations, rewards, *_, infos = envs.step(np.zeros((3, ACT)))
    arrays = (observations, rewards, infos["raw_reward"], infos["penalty"])
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


def test_an_engine_without_penalties_and_noise() -> None:
    envs = ModelVectorEnv(engine(penalty_coef=0.0), STARTS, num_envs=2, seed=0, deterministic=True)
    envs.reset()
    before, action = envs._states.copy(), np.full((2, ACT), 0.5, np.float32)
    observations, rewards, *_, infos = envs.step(action)
    assert infos.keys() == {
        f"{mask}{name}" for name in ("raw_reward", "member", "non_finite") for mask in ("", "_")
    }
    result = envs.engine.step(before, action, seed=99, deterministic=True)
    np.testing.assert_array_equal(observations, result.next_observations)
    np.testing.assert_array_equal(rewards, infos["raw_reward"])
    assert infos["member"].tolist() == [-1, -1]


def read_only(array: np.ndarray) -> np.ndarray:
    copied = array.copy()
    copied.flags.writeable = False
    return copied


@pytest.mark.parametrize("give", [torch.from_numpy, np.asfortranarray, read_only, np.ndarray.tolist])
def test_kinds_of_actions(give: Any) -> None:
    made = []
    for convert in (give, np.asarray):
        envs = ModelVectorEnv(engine(), STARTS, num_envs=3, seed=0)
        envs.reset()
        made.append(envs.step(convert(actions_of(envs, 1)[0])))
    assert_same(*made)


@pytest.mark.parametrize("give", [torch.from_numpy, lambda rows: rows.astype(np.float64)])
def test_kinds_of_start_states(give: Any) -> None:
    expected, _ = ModelVectorEnv(engine(), STARTS, num_envs=3, seed=0).reset()
    got, _ = ModelVectorEnv(engine(), give(STARTS), num_envs=3, seed=0).reset()
    np.testing.assert_array_equal(got, expected)


def test_start_states_of_a_data_set() -> None:
    data = toy_data(20)
    observations, _ = ModelVectorEnv(RolloutEngine(make_ensemble(3, 2)), data, num_envs=3, seed=0).reset()
    assert all(row in data.observations.tolist() for row in observations.tolist())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_not_finite_is_never_handed_out(mode: AutoresetMode, dtype: str) -> None:
    """The action 1 leads beyond float32, in float64 only where the result becomes float32."""
    model = RolloutEngine(linear_ensemble(0.0, 3e38), dtype=dtype, penalty_coef=0.0, threads=1)
    starts = np.full((1, 1), 2e38, np.float32)
    envs = ModelVectorEnv(model, starts, num_envs=3, horizon=4, seed=0, autoreset_mode=mode)
    envs.reset()
    moved, rewards, terminations, truncations, infos = envs.step(np.array([[0.0], [1.0], [0.1]]))
    assert np.isfinite(moved).all() and np.isfinite(rewards).all()
    assert terminations.tolist() == [False, True, False] and not truncations.any()
    assert rewards.tolist() == [np.float32(2e38), 0.0, np.float32(2e38)]
    assert moved[:2].tolist() == [[np.float32(2e38)]] * 2
    if mode is SAME_STEP:
        assert infos["final_info"]["non_finite"].tolist() == [False, True, False]
        assert infos["final_obs"][1].tolist() == [np.float32(2e38)] and infos["final_obs"][0] is None
        assert not infos["non_finite"].any() and infos["_non_finite"].tolist() == [True, False, True]
    else:
        assert infos["non_finite"].tolist() == [False, True, False]
    assert infos["raw_reward"][1] == 0.0
    if mode is DISABLED:
        envs.reset(options={"reset_mask": np.array([False, True, False])})
    # The episodes go on, and the one that ended begins again.
    _, rewards, terminations, *_ = envs.step(np.zeros((3, 1)))
    assert not terminations.any() and np.isfinite(rewards).all()


def test_a_penalty_that_is_not_finite_ends_the_episode() -> None:
    ensemble = linear_ensemble(0.0, 0.1, deviation=1e38)
    model = RolloutEngine(ensemble, penalty="max_deviation", penalty_coef=10.0, threads=1)
    envs = ModelVectorEnv(model, np.ones((1, 1), np.float32), num_envs=2, seed=0)
    envs.reset()
    observations, rewards, terminations, _, infos = envs.step(np.zeros((2, 1)))
    assert terminations.all() and infos["non_finite"].all()
    assert rewards.tolist() == infos["penalty"].tolist() == [0.0, 0.0]
    assert observations.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("mode", MODES)
def test_arrays_that_were_handed_out_belong_to_the_caller(mode: AutoresetMode) -> None:
    first, second = (
        ModelVectorEnv(engine(), STARTS, num_envs=4, horizon=2, seed=0, autoreset_mode=mode) for _ in range(2)
    )
    actions = actions_of(first, 6)
    expected = copy.deepcopy(play(first, actions))

    def spoil(values: Any) -> None:
        if isinstance(values, dict):
            for one in values.values():
                spoil(one)
        else:
            values[...] = None if values.dtype == object else 1

    got = [second.reset()]
    got_copies = [copy.deepcopy(got[0])]
    spoil(got[0][0])
    for action in actions:
        made = second.step(action)
        got_copies.append(copy.deepcopy(made))
        ended = (made[2] | made[3]).copy()
        for values in made:
            spoil(values)
        if mode is DISABLED and ended.any():
            reset = second.reset(options={"reset_mask": ended})
            got_copies.append(copy.deepcopy(reset))
            spoil(reset[0])
        action[:] = 7.0
    assert_same(got_copies, expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_resets_some(mode: AutoresetMode) -> None:
    envs = ModelVectorEnv(
        engine(termination=None), STARTS, num_envs=4, horizon=3, seed=0, autoreset_mode=mode
    )
    envs.reset()
    before, *_ = envs.step(actions_of(envs, 1)[0])
    mask = np.array([True, False, False, True])
    options = {"reset_mask": mask}
    after, infos = envs.reset(options=options)
    assert options == {"reset_mask": mask} and infos == {}
    assert (after[1:3] == before[1:3]).all() and (after[mask] != before[mask]).all()
    # The others are truncated one step earlier.
    envs.step(np.zeros((4, ACT)))
    _, _, _, truncations, _ = envs.step(np.zeros((4, ACT)))
    if mode is DISABLED:
        assert truncations.tolist() == [False, True, True, False]
        with pytest.raises(InputError, match=r"2 environments have ended, the first is number 1; reset them"):
            envs.step(np.zeros((4, ACT)))
    envs.reset(options={"reset_mask": ~mask})
    assert envs.step(np.zeros((4, ACT)))[3].tolist() == mask.tolist()


def test_wrappers_of_gymnasium() -> None:
    envs = ModelVectorEnv(engine(termination=None), STARTS, num_envs=4, horizon=3, seed=0)
    actions = actions_of(envs, 11)
    plain = play(envs, actions, seed=0)
    recorded = RecordEpisodeStatistics(envs)
    made = play(recorded, actions, seed=0)
    returns = sum(step[1] for step in plain[1:4])
    np.testing.assert_allclose(made[3][-1]["episode"]["r"], returns, rtol=1e-6)
    assert made[3][-1]["episode"]["l"].tolist() == [3] * 4
    # The wrapper reads the mask after the environment.
    recorded.reset(options={"reset_mask": np.array([True, False, False, False])})
    recorded.step(actions[0])
    assert recorded.episode_lengths.tolist() == [1, 0, 0, 0]

    normalised = NormalizeReward(NormalizeObservation(ClipAction(envs)))
    observations, _ = normalised.reset(seed=0)
    for action in actions:
        observations, *_ = normalised.step(3.0 * action)
    assert observations.dtype == np.float32 and np.abs(observations).max() < 10.0

    _, _, _, _, infos = DictInfoToList(envs).step(actions[0])
    assert isinstance(infos, list) and len(infos) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "model"}, "engine must be a mopo_fast.RolloutEngine, got str"),
        ({"start_states": STARTS[:, :4]}, r"start_states must be \[n, 5\], got shape \[40, 4\]"),
        ({"start_states": STARTS[0]}, r"start_states must be \[n, 5\], got shape \[5\]"),
        ({"start_states": STARTS[:0]}, "start_states has no rows"),
        ({"start_states": STARTS.tolist()}, "start_states must be a tensor, a NumPy array or"),
        ({"start_states": np.ones((3, 5), int)}, "start_states must be dense floats, got torch.int64"),
        ({"start_states": toy_data(5)}, r"start_states must be \[n, 5\], got shape \[5, 3\]"),
        (
            {"start_states": np.where(np.arange(40)[:, None] == 3, np.nan, STARTS)},
            "start_states is not finite in float32 at row 3",
        ),
        ({"start_states": STARTS.astype(float) * 1e300}, "start_states is not finite in float32 at row 0"),
        ({"num_envs": 0}, "num_envs must be a whole number, 1 <= num_envs"),
        ({"horizon": 0}, "horizon must be a whole number, 1 <= horizon"),
        ({"horizon": 2.5}, "horizon must be a whole number"),
        ({"seed": -1}, "seed must be a whole number, 0 <= seed"),
        ({"first_row": -1}, "first_row must be a whole number, 0 <= first_row"),
        ({"autoreset_mode": "Later"}, "unknown autoreset_mode 'Later'; there are: NextStep, SameStep, Dis"),
        (
            {"action_space": gymnasium.spaces.Box(-1.0, 1.0, (3,))},
            r"action_space must be a gymnasium.spaces.Box of shape \(2,\)",
        ),
        ({"action_space": gymnasium.spaces.Discrete(2)}, "action_space must be a gymnasium.spaces.Box"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelVectorEnv(**{"engine": engine(), "start_states": STARTS, **arguments})


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros(ACT), r"actions must be \[num_envs, act_dim\] = \[3, 2\], got shape \[2\]"),
        (np.zeros((2, ACT)), r"actions must be .*, got shape \[2, 2\]"),
        (np.full((3, ACT), math.nan), r"the action of environment 0 is not finite: \[nan, nan\]"),
        (np.array([[0, 0], [0, math.inf], [0, 0]]), "the action of environment 1 is not finite"),
        (np.array([[0, 0], [0, 0], [0, 1e300]]), "the action of environment 2 is not finite"),
        (None, r"actions must be .*got shape \[\]"),
        ([["a", "b"]] * 3, "actions cannot be read as an array of floats"),
        (torch.zeros(3, ACT, requires_grad=True), "actions cannot be read as an array of floats"),
    ],
)
def test_bad_actions(actions: Any, message: str) -> None:
    envs = ModelVectorEnv(engine(), STARTS, num_envs=3, seed=0)
    with pytest.raises(InputError, match="there are no states yet; call reset before the first step"):
        envs.step(np.zeros((3, ACT)))
    expected = play(ModelVectorEnv(engine(), STARTS, num_envs=3, seed=0), np.zeros((1, 3, ACT)))[1]
    envs.reset()
    with pytest.raises(InputError, match=message):
        envs.step(actions)
    # A refused step changes nothing.
    assert_same(envs.step(np.zeros((3, ACT))), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must be a whole number, 0 <= seed"),
        ({"seed": [1, 2, 3]}, "seed must be a whole number"),
        ({"options": [1]}, "options must be a dictionary, got list"),
        ({"options": {"mask": 1}}, "unknown option 'mask'; there is: reset_mask"),
        ({"options": {"reset_mask": [True] * 3}}, r"reset_mask must be a NumPy array, bool \[3\], got list"),
        ({"options": {"reset_mask": np.ones(3)}}, r"reset_mask must be .*got float64 \[3\]"),
        ({"options": {"reset_mask": np.ones(2, bool)}}, r"reset_mask must be .*got bool \[2\]"),
        ({"options": {"reset_mask": np.zeros(3, bool)}}, "reset_mask has no True"),
        (
            {"options": {"reset_mask": np.arange(3) > 0}, "seed": 1},
            "seed is the key of all environments; give it without a reset_mask",
        ),
    ],
)
def test_bad_resets(arguments: dict[str, Any], message: str) -> None:
    envs = ModelVectorEnv(engine(), STARTS, num_envs=3, seed=0)
    with pytest.raises(InputError, match="the first reset must be of all environments"):
        envs.reset(options={"reset_mask": np.array([True, False, False])})
    envs.reset()
    with pytest.raises(InputError, match=message):
        envs.reset(**arguments)
    # A refused reset changes nothing.
    expected = ModelVectorEnv(engine(), STARTS, num_envs=3, seed=0)
    expected.reset()
    assert_same(envs.step(np.zeros((3, ACT))), expected.step(np.zeros((3, ACT))))


def test_a_termination_function_gets_tensors() -> None:
    seen = []

    def ends(observations: Any, actions: Any, successors: Any) -> Any:
        seen.append({type(array) for array in (observations, actions, successors)})
        return successors[:, 1] > 0.0

    envs = ModelVectorEnv(engine(termination=ends), STARTS, num_envs=16, seed=0)
    envs.reset()
    observations, _, terminations, _, _ = envs.step(np.zeros((16, ACT)))
    assert terminations.tolist() == (observations[:, 1] > 0.0).tolist() and len(set(terminations)) == 2
    assert seen == [{torch.Tensor}]


def test_it_is_a_name_of_the_package() -> None:
    assert mopo_fast.ModelVectorEnv is ModelVectorEnv


def test_the_adapter_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3.common.vec_env.base_vec_env", None)
    monkeypatch.delitem(sys.modules, "mopo_fast.compat.stable_baselines3", raising=False)
    with pytest.raises(
        ImportError, match=r"stable_baselines3 cannot be imported .*pip install '\.\[agents\]'"
    ):
        importlib.import_module("mopo_fast.compat.stable_baselines3")


@pytest.mark.parametrize("mode", [SAME_STEP, DISABLED])
@pytest.mark.filterwarnings("ignore")  # torchrl's own warnings, when it is imported.
def test_torchrl_collects(mode: AutoresetMode) -> None:
    envs = pytest.importorskip("torchrl.envs", reason="needs the extra `agents`")
    collectors = pytest.importorskip("torchrl.collectors", reason="needs the extra `agents`")
    wrapped = envs.GymWrapper(
        ModelVectorEnv(engine(), STARTS, num_envs=4, horizon=3, seed=0, autoreset_mode=mode)
    )
    envs.check_env_specs(wrapped)
    collector = collectors.Collector(wrapped, None, frames_per_batch=4 * 10, total_frames=4 * 20)
    for batch in collector:
        ended = batch["next", "done"][:, :-1, 0]
        assert batch.shape == (4, 10) and ended.any() and batch["next", "terminated"].any()
        # The next row begins with this row's next observation, unless the episode has ended.
        follows = (batch["next", "observation"][:, :-1] == batch["observation"][:, 1:]).all(-1)
        assert torch.equal(follows, ~ended)
        # Truncated after three steps: no episode is longer.
        assert not (~ended[:, :-2] & ~ended[:, 1:-1] & ~ended[:, 2:]).any()
    collector.shutdown()


@pytest.mark.parametrize("halt_reward", [None, -4.0])
def test_the_engines_penalties_truncate(halt_reward: float | None) -> None:
    data, actions = inputs(50, 5, 2)
    free = RolloutEngine(make_ensemble(5, 2))
    at = float(free.step(data, actions, seed=0).penalties.median())
    engine = RolloutEngine(free.ensemble, truncate_at=at, halt_reward=halt_reward)
    envs = ModelVectorEnv(engine, data, num_envs=50, horizon=9, seed=3, autoreset_mode="Disabled")
    envs.reset()
    _, rewards, terminations, truncations, infos = envs.step(actions.numpy())
    above = infos["penalty"] > engine.truncation.at
    assert np.array_equal(truncations, above) and 5 < above.sum() < 45
    assert "truncated" not in infos
    if halt_reward is None:
        assert not terminations.any()
    else:
        assert np.array_equal(terminations, above) and np.array_equal(rewards == halt_reward, above)


def test_members_are_drawn_for_each_step() -> None:
    engine = RolloutEngine(make_ensemble(5, 2), member="per_rollout")
    with pytest.raises(InputError, match="give an engine with member=\"per_step\", not 'per_rollout'"):
        ModelVectorEnv(engine, inputs(50, 5, 2)[0])
