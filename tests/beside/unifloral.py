"""Compare rollouts in JAX with recorded results of Unifloral's own code. Needs JAX but not Unifloral.

Run by tests/compat/test_compat_unifloral.py, or by: pytest tests/beside/unifloral.py
"""

import functools
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from recorded.unifloral import ACT, OBS, ROLLOUTS, actor_params, healthy, policy

from mopo_fast import InputError, RolloutEngine
from mopo_fast.compat import unifloral
from mopo_fast.compat.unifloral import arrays

RECORDED = Path(__file__).parents[1] / "recorded"
Transition = namedtuple("Transition", "obs action reward next_obs next_action done")


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    with np.load(RECORDED / "unifloral.npz") as file:
        return {name: jnp.array(file[name]) for name in file.files}


def fallen(obs: Any, action: Any, next_obs: Any) -> Any:
    """Return whether one row is terminal by Unifloral's hopper rule, which has no lower bound of -100."""
    assert obs.shape == next_obs.shape == (OBS,)
    assert action.shape == (ACT,)
    stands = (next_obs[0] > 0.7) & (jnp.abs(next_obs[1]) < 0.2) & (next_obs[1:] < 100).all()
    return ~(stands & jnp.isfinite(next_obs).all())


def make_theirs(states: Any) -> Any:
    """Make the object that Unifloral's loader returns, with the parameters of the recorded pickle."""
    model = unifloral.read(RECORDED / "unifloral.pkl").dynamics
    layers = {
        f"Dense_{i}": {"kernel": jnp.array(w.detach().numpy()), "bias": jnp.array(b.detach().numpy())}
        for i, (w, b) in enumerate(zip(model.weights, model.biases, strict=True))
    }
    bounds = {name: jnp.array(getattr(model, name).detach().numpy()) for name in ("max_logvar", "min_logvar")}
    rows = len(states)
    dataset = Transition(
        states, jnp.zeros((rows, ACT)), jnp.zeros(rows), states, jnp.zeros((rows, ACT)), jnp.zeros(rows, bool)
    )
    return SimpleNamespace(
        params={"params": {"ensemble": layers, **bounds}},
        termination_fn=fallen,
        discrepancy=3.0,
        min_r=-1.5,
        dataset=dataset,
    )


@pytest.fixture
def theirs(recorded: dict[str, Any]) -> Any:
    return make_theirs(recorded["states"])


def make_buffer(rows: int, filling: float = 0.0) -> Transition:
    widths = Transition((OBS,), (ACT,), (), (OBS,), (ACT,), ())
    return Transition(*(jnp.full((rows, *width), filling) for width in widths))


@pytest.fixture(params=["in place", "copied"])
def callback(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test both kinds of callbacks, since versions of JAX before 0.6 have none that work in place."""
    if request.param == "copied":
        monkeypatch.setitem(sys.modules, "jax.experimental.buffer_callback", None)


@pytest.mark.usefixtures("callback")
@pytest.mark.parametrize("name", ROLLOUTS)
def test_same_rollouts_row_by_row(name: str, theirs: Any, recorded: dict[str, Any]) -> None:
    arguments, rows = ROLLOUTS[name]
    rollout = unifloral.EnsembleDynamics(theirs).make_rollout_fn(**arguments)
    act = policy(recorded["weights"])
    assert recorded["short_done"].any()
    assert not recorded["short_done"].all()
    assert 0.3 < (recorded["morel_reward"] == -3.5).mean() < 0.9

    # Call the rollout as mopo.py does: under a condition in a compiled loop.
    def call(buffer: Transition, i: Any) -> tuple[Transition, None]:
        key = jax.random.PRNGKey(i)
        return jax.lax.cond(i < 2, lambda: rollout(key, act, buffer), lambda: buffer), None

    made, _ = jax.lax.scan(call, make_buffer(rows, -7.0), jnp.arange(3))
    for field, array in made._asdict().items():
        expected = recorded[f"{name}_{field}"]
        assert array.dtype == expected.dtype == jnp.float32
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-5, err_msg=field)


def test_not_compiled(theirs: Any, recorded: dict[str, Any]) -> None:
    arguments, rows = ROLLOUTS["short"]
    rollout = unifloral.EnsembleDynamics(theirs).make_rollout_fn(**arguments)
    made = rollout(jax.random.PRNGKey(1), policy(recorded["weights"]), make_buffer(rows))
    for field, array in made._asdict().items():
        np.testing.assert_allclose(array, recorded[f"short_{field}"], rtol=0, atol=1e-5, err_msg=field)


def compiled(rollout: Any, act: Any) -> Any:
    return jax.jit(lambda key, buffer: rollout(key, act, buffer))


def test_first_in_first_out(theirs: Any) -> None:
    dynamics = unifloral.EnsembleDynamics(theirs)
    plain, fifo = (
        compiled(dynamics.make_rollout_fn(12, 3, first_in_first_out=choice), actor_params())
        for choice in (False, True)
    )
    new = [plain(jax.random.PRNGKey(i), make_buffer(36)) for i in range(2)]
    buffer = make_buffer(80, -7.0)
    for i in range(2):
        buffer = fifo(jax.random.PRNGKey(i), buffer)
    for old, *rows, made in zip(make_buffer(8, -7.0), *new, buffer, strict=True):
        assert jnp.array_equal(made, jnp.concatenate([old, *rows]))


def test_keys_of_the_new_kind(theirs: Any, recorded: dict[str, Any]) -> None:
    rollout = unifloral.EnsembleDynamics(theirs).make_rollout_fn(12, 3)
    for act in (policy(recorded["weights"]), actor_params()):
        run = compiled(rollout, act)
        old, new = (run(key(5), make_buffer(36)) for key in (jax.random.PRNGKey, jax.random.key))
        assert jax.tree.all(jax.tree.map(jnp.array_equal, old, new))


def test_no_copies(theirs: Any) -> None:
    dynamics = unifloral.EnsembleDynamics(theirs)
    for i, layer in enumerate(theirs.params["params"]["ensemble"].values()):
        assert dynamics.ensemble.weights[i].data_ptr() == layer["kernel"].unsafe_buffer_pointer()
        assert dynamics.ensemble.biases[i].data_ptr() == layer["bias"].unsafe_buffer_pointer()
    seen: list[int] = []

    def add(out: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
        seen[:] = [array.data_ptr() for array in (one, other, out)]
        torch.add(one, other, out=out)

    def run(one: Any, other: Any) -> Any:
        return arrays.on_host(add, jax.ShapeDtypeStruct(one.shape, one.dtype), one, other)

    one, other = jnp.arange(4096.0), jnp.ones(4096)
    for function in (run, jax.jit(run)):
        made = jax.block_until_ready(function(one, other))
        assert seen == [array.unsafe_buffer_pointer() for array in (one, other, made)]
        assert jnp.array_equal(made, one + other)


def test_what_is_not_finite_stays(theirs: Any, recorded: dict[str, Any]) -> None:
    """A row that is not finite continues as NaN; the other rows are not affected."""
    dynamics, states = unifloral.EnsembleDynamics(theirs), recorded["states"]

    def run(states: Any) -> Transition:
        dynamics.dataset = dynamics.dataset._replace(obs=states)
        rollout = dynamics.make_rollout_fn(12, 2)
        return compiled(rollout, policy(recorded["weights"]))(jax.random.PRNGKey(0), make_buffer(24))

    sound = run(states)
    start = sound.obs[5]
    made = run(jnp.where((states == start).all(1, keepdims=True), jnp.nan, states))
    lost = jnp.tile((sound.obs[:12] == start).all(1), 2)
    for array, expected in zip(made[:-1], sound[:-1], strict=True):
        assert jnp.isnan(array[lost]).all()
        assert jnp.array_equal(array[~lost], expected[~lost])
    assert (made.done[lost] == 1.0).all()


def test_fused_what_is_not_finite_is_nan(theirs: Any, recorded: dict[str, Any]) -> None:
    dynamics = unifloral.EnsembleDynamics(theirs)
    sound = compiled(dynamics.make_rollout_fn(12, 2), actor_params())(jax.random.PRNGKey(0), make_buffer(24))
    # From this state the first layer overflows.
    start = sound.obs[5]
    states = jnp.where((recorded["states"] == start).all(1, keepdims=True), 3e38, recorded["states"])
    dynamics.dataset = dynamics.dataset._replace(obs=states)
    made = compiled(dynamics.make_rollout_fn(12, 2), actor_params())(jax.random.PRNGKey(0), make_buffer(24))
    lost = jnp.tile((sound.obs[:12] == start).all(1), 2)
    for array, expected in zip(made[:4], sound[:4], strict=True):
        assert jnp.isnan(array[lost]).all()
        assert jnp.array_equal(array[~lost], expected[~lost])
    assert jnp.isfinite(made.next_action[~lost]).all()
    assert (made.done[lost] == 1.0).all()
    broken = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan), actor_params())
    nothing = compiled(dynamics.make_rollout_fn(12, 2), broken)(jax.random.PRNGKey(0), make_buffer(24))
    assert all(jnp.isnan(array).all() for array in nothing[:-1])


# --- the policy's parameters


def test_same_actor(recorded: dict[str, Any]) -> None:
    actor = unifloral.make_actor(actor_params())
    mean, log_std = actor(torch.tensor(np.asarray(recorded["obs"])))
    np.testing.assert_allclose(mean.detach(), recorded["actor_mean"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(log_std.exp().detach(), recorded["actor_std"], rtol=1e-4)
    assert {-5.0, 2.0} < set(log_std.flatten().tolist())


def act_as_theirs(params: Any, obs: Any, rng: Any) -> Any:
    x = obs
    for i in range(3):
        layer = params["params"][f"Dense_{i}"]
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    heads = (params["params"][name] for name in ("Dense_3", "Dense_4"))
    log_std, mean = (x @ head["kernel"] + head["bias"] for head in heads)
    return jnp.tanh(mean + jnp.exp(jnp.clip(log_std, -5.0, 2.0)) * jax.random.normal(rng, (ACT,)))


def columns(buffer: Transition, length: int) -> np.ndarray:
    """Return all numbers of a rollout, and random sums of them that depend on their correlations.

    The numbers are rounded, because one implementation of tanh reaches 1 at a smaller input than another.
    """
    steps = np.concatenate([np.asarray(x).reshape(length, len(x) // length, -1) for x in buffer], axis=-1)
    table = np.moveaxis(steps, 0, 1).reshape(steps.shape[1], -1)
    sums = table @ np.random.RandomState(0).uniform(-1, 1, (table.shape[1], 16))
    return np.concatenate([table, sums], axis=1).round(4).T


def distance(one: Any, other: Any) -> float:
    """Return the Kolmogorov-Smirnov distance of two samples."""
    both = np.concatenate([one, other])
    below = [np.searchsorted(np.sort(x), both, side="right") / len(x) for x in (one, other)]
    return float(np.abs(below[0] - below[1]).max())


BATCH, LENGTH = 40_000, 2
# Two samples of this size from one distribution exceed this distance once in 10,000 times.
LIMIT = 2.23 * (2 / BATCH) ** 0.5


@pytest.fixture(scope="module")
def expected(recorded: dict[str, Any]) -> tuple[Any, Any]:
    """Return the model with many start states, and its rollouts by Unifloral's own policy function."""
    theirs = make_theirs(jnp.array(healthy(np.random.RandomState(2), 5000)))
    rollout = unifloral.EnsembleDynamics(theirs).make_rollout_fn(BATCH, LENGTH, 0.7)
    run = compiled(rollout, functools.partial(act_as_theirs, actor_params()))
    return theirs, columns(run(jax.random.PRNGKey(0), make_buffer(BATCH * LENGTH)), LENGTH)


def fused(dynamics: Any) -> Any:
    run = compiled(dynamics.make_rollout_fn(BATCH, LENGTH, 0.7), actor_params())
    return columns(run(jax.random.PRNGKey(0), make_buffer(BATCH * LENGTH)), LENGTH)


def furthest(expected: Any, made: Any) -> float:
    return max(map(distance, expected, made))


def test_fused_rollouts_are_of_the_same_distribution(expected: tuple[Any, Any]) -> None:
    theirs, samples = expected
    dynamics = unifloral.EnsembleDynamics(theirs)
    assert furthest(samples, fused(dynamics)) < LIMIT


def test_the_two_samples_tell_more_noise(expected: tuple[Any, Any]) -> None:
    theirs, samples = expected
    dynamics = unifloral.EnsembleDynamics(theirs)
    with torch.no_grad():
        for bound in (dynamics.ensemble.max_logvar, dynamics.ensemble.min_logvar):
            bound.data = bound + 2 * np.log(1.1)
        bias = dynamics.ensemble.biases[-1]
        bias.data = bias + torch.where(torch.arange(2 * OBS + 2) > OBS, 2 * np.log(1.1), 0.0)
    assert furthest(samples, fused(dynamics)) > 1.2 * LIMIT


def test_the_two_samples_tell_another_draw_of_members(expected: tuple[Any, Any]) -> None:
    theirs, samples = expected
    dynamics = unifloral.EnsembleDynamics(theirs)
    dynamics.ensemble.elites = torch.tensor([2, 0])
    assert furthest(samples, fused(dynamics)) > 1.2 * LIMIT


def test_fused_rollouts_are_repeatable(theirs: Any) -> None:
    dynamics = unifloral.EnsembleDynamics(theirs)
    rollout = dynamics.make_rollout_fn(12, 3, 0.7)
    made = [
        rollout_fn(jax.random.PRNGKey(seed), actor_params(), make_buffer(36))
        for rollout_fn, seed in ((rollout, 0), (jax.jit(rollout), 0), (rollout, 1))
    ]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, made[0], made[1]))
    assert not jnp.array_equal(made[0].action, made[2].action)
    # Each step continues from the previous one, and the first begins at the same start states.
    assert jnp.array_equal(made[0].next_obs[:-12], made[0].obs[12:])
    by_steps = compiled(rollout, lambda obs, rng: jnp.zeros(ACT))
    start = by_steps(jax.random.PRNGKey(0), make_buffer(36)).obs[:12]
    assert jnp.array_equal(made[0].obs[:12], start)
    assert jnp.array_equal(made[0].done, jax.vmap(fallen)(*made[0][:2], made[0].next_obs))
    # Terminal rows continue.
    assert made[0].done[:12].any()
    assert jnp.isfinite(made[0].obs).all()


def test_fused_noise_is_of_the_key_and_of_each_use(theirs: Any) -> None:
    dynamics = unifloral.EnsembleDynamics(theirs)
    dynamics.dataset = dynamics.dataset._replace(obs=dynamics.dataset.obs[:1])
    run = compiled(dynamics.make_rollout_fn(2000, 1), actor_params())
    one, other = (run(jax.random.PRNGKey(seed), make_buffer(2000)) for seed in (0, 1))
    assert jnp.array_equal(one.obs, other.obs)
    for uses in ((one.action, other.action), (one.action, one.next_action)):
        first, second = (jnp.arctanh(array[:, 1]) for array in uses)
        assert abs(jnp.corrcoef(first, second)[0, 1]) < 0.2


def test_fused_rewards_are_penalised(theirs: Any) -> None:
    dynamics = unifloral.EnsembleDynamics(theirs)
    plain, penalised = (
        dynamics.make_rollout_fn(12, 3, coef)(jax.random.PRNGKey(0), actor_params(), make_buffer(36))
        for coef in (0.0, 2.0)
    )
    inputs = (torch.tensor(np.asarray(array)) for array in (plain.obs, plain.action))
    penalties = RolloutEngine(dynamics.ensemble).step(*inputs, seed=0).penalties
    np.testing.assert_allclose(plain.reward - penalised.reward, 2.0 * penalties, rtol=0, atol=1e-5)


def test_mistakes(theirs: Any) -> None:
    dynamics = unifloral.EnsembleDynamics(theirs)
    rollout = dynamics.make_rollout_fn(12, 3, term_penalty_offset=-1.0)
    with pytest.raises(InputError, match="give the policy as a function"):
        rollout(jax.random.PRNGKey(0), actor_params(), make_buffer(36))
    dynamics.discrepancy = None
    with pytest.raises(InputError, match="needs discrepancy and min_r; fit with --precompute_term_stats"):
        dynamics.make_rollout_fn(12, 3, term_penalty_offset=-1.0)
    with pytest.raises(InputError, match="penalty_coef must be finite and not negative"):
        dynamics.make_rollout_fn(12, 3, -1.0)
    with pytest.raises(InputError, match="no backend can serve float16"):
        dynamics.make_rollout_fn(12, 3, dtype="float16", backend="cpu")
