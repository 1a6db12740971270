"""Test the updates for Unifloral in JAX. Needs JAX and optax, but not Unifloral, Flax or distrax.

Run by tests/compat/test_compat_unifloral.py, or by: pytest tests/beside/unifloral_updates.py
"""

import dataclasses
import functools
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from mopo_fast import InputError
from mopo_fast.compat import unifloral
from mopo_fast.compat.unifloral import updates
from mopo_fast.sac import Draws

OBS, ACT, CRITICS, HIDDEN = 5, 2, 3, (16, 12)
Transition = namedtuple("Transition", "obs action reward next_obs next_action done")
AgentTrainState = namedtuple("AgentTrainState", "actor vec_q vec_q_target alpha")
ARGS = SimpleNamespace(
    lr=3e-3,
    batch_size=40,
    gamma=0.9,
    polyak_step_size=0.1,
    num_critics=CRITICS,
    rollout_interval=3,
    dataset_sample_ratio=0.25,
)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=["tx"]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Flax's, as far as Unifloral uses it."""

    step: Any
    params: Any
    opt_state: Any
    tx: Any

    def replace(self, **changes: Any) -> "TrainState":
        return dataclasses.replace(self, **changes)


class Squashed:
    """distrax's Normal that is transformed by tanh, as far as Unifloral uses it."""

    def __init__(self, mean: Any, std: Any) -> None:
        self.distribution = SimpleNamespace(loc=mean, scale=std)

    def sample(self, seed: Any) -> Any:
        return self.sample_and_log_prob(seed)[0]

    def sample_and_log_prob(self, seed: Any) -> tuple[Any, Any]:
        mean, std = self.distribution.loc, self.distribution.scale
        raw = mean + std * jax.random.normal(seed, mean.shape)
        log_prob = jax.scipy.stats.norm.logpdf(raw, mean, std)
        return jnp.tanh(raw), log_prob - 2.0 * (jnp.log(2.0) - raw - jax.nn.softplus(-2.0 * raw))


def hidden_outputs(layers: Any, x: Any, count: int, activation: Any) -> Any:
    for i in range(count):
        x = activation(x @ layers[f"Dense_{i}"]["kernel"] + layers[f"Dense_{i}"]["bias"])
    return x


def actor_apply(params: Any, obs: Any, activation: Any = jax.nn.relu, least: float = -5.0) -> Squashed:
    layers, depth = params["params"], len(HIDDEN)
    x = hidden_outputs(layers, obs, depth, activation)
    heads = (layers[f"Dense_{depth + i}"] for i in range(2))
    log_std, mean = (x @ head["kernel"] + head["bias"] for head in heads)
    return Squashed(mean, jnp.exp(jnp.clip(log_std, least, 2.0)))


def q_apply(params: Any, obs: Any, action: Any, activation: Any = jax.nn.relu) -> Any:
    def one(layers: Any) -> Any:
        x = hidden_outputs(layers, jnp.concatenate([obs, action], -1), len(HIDDEN), activation)
        return (x @ layers[f"Dense_{len(HIDDEN)}"]["kernel"] + layers[f"Dense_{len(HIDDEN)}"]["bias"])[..., 0]

    return jax.vmap(one, out_axes=-1)(params["params"]["VmapSoftQNetwork_0"])


def alpha_apply(params: Any) -> Any:
    return params["params"]["log_ent_coef"]


def layers(key: Any, sizes: list[tuple[int, int]], *leading: int) -> Any:
    keys = jax.random.split(key, len(sizes))
    return {
        f"Dense_{i}": {
            "kernel": jax.random.normal(key, (*leading, *size)) / size[0] ** 0.5,
            "bias": jnp.full((*leading, size[1]), 0.1),
        }
        for i, (key, size) in enumerate(zip(keys, sizes, strict=True))
    }


def adam(rate: float = ARGS.lr, epsilon: float = 1e-5) -> Any:
    return optax.adam(rate, eps=epsilon)


def make_agent(**optimizers: Any) -> AgentTrainState:
    keys = jax.random.split(jax.random.PRNGKey(1), 3)

    def state(part: str, params: Any) -> TrainState:
        tx = optimizers.get(part, adam())
        return TrainState(0, {"params": params}, tx.init({"params": params}), tx)

    critic_sizes = [(OBS + ACT, HIDDEN[0]), HIDDEN, (HIDDEN[1], 1)]
    actor_sizes = [(OBS, HIDDEN[0]), HIDDEN, (HIDDEN[1], ACT), (HIDDEN[1], ACT)]
    q, target = ({"VmapSoftQNetwork_0": layers(key, critic_sizes, CRITICS)} for key in keys[:2])
    actor = layers(keys[2], actor_sizes)
    return AgentTrainState(
        state("actor", actor),
        state("vec_q", q),
        state("vec_q_target", target),
        state("alpha", {"log_ent_coef": jnp.asarray(0.3)}),
    )


def make_rows(seed: int, count: int, kind: Any) -> Transition:
    keys = jax.random.split(jax.random.PRNGKey(seed), 4)
    obs, next_obs = (jax.random.normal(key, (count, OBS)) for key in keys[:2])
    action = jnp.tanh(jax.random.normal(keys[2], (count, ACT)))
    done = jax.random.bernoulli(keys[3], 0.3, (count,)).astype(kind)
    return Transition(obs, action, obs.sum(-1), next_obs, action, done)


DATA, BUFFER = make_rows(2, 50, bool), make_rows(3, 90, jnp.float32)


def nothing(rng: Any, policy: Any, buffer: Any) -> Any:
    return buffer


def make_step(args: Any = ARGS, rollout_fn: Any = nothing, dataset: Any = DATA, **options: Any) -> Any:
    functions = {"actor": actor_apply, "q": q_apply, "alpha": alpha_apply} | options.pop("functions", {})
    return unifloral.make_train_step(args, *functions.values(), dataset, rollout_fn, **options)


def run(step: Any, agent: Any = None, length: int = 4, seed: int = 5, buffer: Any = BUFFER) -> Any:
    return unifloral.scan(step, (jax.random.PRNGKey(seed), agent or make_agent(), buffer), None, length)


def walked(rng: Any, count: int) -> tuple[Any, Any, Any]:
    """Return the original's rng after some updates; of the last one, the keys of its rollout and its rows."""
    for _ in range(count):
        rng, rollout = jax.random.split(rng)
        rng, rows, _ = jax.random.split(rng, 3)
        rng, _ = jax.random.split(rng)
        rng, _ = jax.random.split(rng)
        rng, _ = jax.random.split(rng)
    return rng, rollout, rows


@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", "float32"), ("reference", "float32"), ("cpu", "bfloat16")]
)
def test_the_state_is_that_of_our_updates(backend: str, dtype: str) -> None:
    """The same as plain calls of our SAC, whose equality with the original's step is a recorded test."""
    step, agent = make_step(backend=backend, dtype=dtype), make_agent()
    before = jax.tree.map(np.array, agent)
    (rng, after, buffer), loss = run(step, agent, 3)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, agent))
    assert jnp.array_equal(rng, walked(jax.random.PRNGKey(5), 3)[0])
    assert jax.tree.all(jax.tree.map(jnp.array_equal, buffer, BUFFER))
    assert jax.tree.structure(after) == jax.tree.structure(agent)
    for name, state in after._asdict().items():
        assert (int(state.step), state.step.dtype) == (3, jnp.int32)
        moved = state.opt_state[0]
        assert int(moved.count) == (0 if name == "vec_q_target" else 3)
        assert moved.count.dtype == jnp.int32
    same_kind = jax.tree.map(
        lambda one, other: (one.shape, one.dtype) == (other.shape, other.dtype),
        *((state.params, state.opt_state[0].nu) for state in (after.vec_q, agent.vec_q)),
    )
    assert jax.tree.all(same_kind)

    other = make_step(backend=backend, dtype=dtype)
    sac = other.take_over(agent)
    words = np.array(jax.random.bits(walked(jax.random.PRNGKey(5), 1)[2], (2,), jnp.uint32))
    seed = int(words[1]) << 32 | int(words[0])
    sums = sac.make(Draws(other.data, updates._transitions("", BUFFER), (50, 90), (10, 30), 3, seed))
    expected = {name: value.clone() for name, value in sac.state().items()}
    ours = other.take_over(after).state()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert float(loss["critic_loss"][-1]) == pytest.approx(sums[0] / 3)
    assert float(loss["alpha"][0]) == pytest.approx(sums[4] / 3)
    assert {name: array.shape for name, array in loss.items()} == dict.fromkeys(LOSSES, (3,))
    batch, noise, *_ = sac.batch(
        Draws(other.data, updates._transitions("", BUFFER), (50, 90), (10, 30), 3, seed), 2
    )
    assert float(loss["terminations/num_done"][-1]) == float(batch.terminals.sum()) > 0
    assert float(loss["terminations/done_ratio"][-1]) == pytest.approx(float(batch.terminals.float().mean()))
    q = q_apply(
        after.vec_q.params,
        *map(jnp.asarray, (batch.observations, sac.actor.sample(batch.observations, noise)[0].detach())),
    )
    assert float(loss["q_min"][-1]) == pytest.approx(float(q.min(-1).mean()), rel=1e-4)
    assert float(loss["q_std"][-1]) == pytest.approx(float(q.std(-1).mean()), rel=1e-4)


LOSSES = (
    "critic_loss",
    "actor_loss",
    "alpha_loss",
    "entropy",
    "alpha",
    "q_min",
    "q_std",
    "terminations/num_done",
    "terminations/done_ratio",
)


def test_a_training_goes_on_and_repeats() -> None:
    """Many scans with one step give what each gives with a step of its own, and the seed decides."""
    step = make_step()
    carry = (jax.random.PRNGKey(5), make_agent(), BUFFER)
    again = carry
    for _ in range(3):
        carry, _ = unifloral.scan(step, carry, None, 2)
        again, _ = unifloral.scan(make_step(), again, None, 2)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, carry, again))
    assert int(carry[1].actor.opt_state[0].count) == int(carry[1].vec_q_target.step) == 6
    assert jnp.array_equal(carry[0], walked(jax.random.PRNGKey(5), 6)[0])
    other = run(step, seed=6)[0][1].actor.params
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, other, run(step)[0][1].actor.params))


def test_rollouts_come_at_the_multiples_of_the_interval() -> None:
    def mark(rng: Any, policy: Any, buffer: Any) -> Any:
        words = jax.random.key_data(rng).astype(jnp.float32) * 2.0**-32
        action = policy(buffer.obs[0], rng)
        added = jnp.concatenate([jnp.stack([words.sum(), action.sum()]), jnp.zeros(88)])
        return buffer._replace(reward=buffer.reward + added)

    step, agent = make_step(rollout_fn=mark), make_agent()
    carry, expected = (jax.random.PRNGKey(5), agent, BUFFER), BUFFER
    made = 0
    for length in (1, 7, 4):
        for number in range(made, made + length):
            if number % 3 == 0:
                _, key, _ = walked(jax.random.PRNGKey(5), number + 1)
                words = jax.random.key_data(key).astype(jnp.float32).sum() * 2.0**-32
                expected = expected._replace(reward=expected.reward.at[0].add(words))
        carry, _ = unifloral.scan(step, carry, None, length)
        made += length
        np.testing.assert_allclose(carry[2].reward[0], expected.reward[0], rtol=1e-5)
    # The policy is that of the update at which the rollout is made.
    _, key, _ = walked(jax.random.PRNGKey(5), 1)
    first = run(make_step(rollout_fn=mark), agent, 1)[0][2].reward[1] - BUFFER.reward[1]
    np.testing.assert_allclose(
        first, actor_apply(agent.actor.params, BUFFER.obs[0]).sample(key).sum(), rtol=1e-4
    )
    assert abs(carry[2].reward[1] - BUFFER.reward[1] - 4 * first) > 1e-6


def make_dynamics() -> Any:
    sizes = [(OBS + ACT, 8), (8, 2 * (OBS + 1))]
    bounds = {"max_logvar": jnp.full(OBS + 1, -1.0), "min_logvar": jnp.full(OBS + 1, -9.0)}
    return SimpleNamespace(
        params={"params": {"ensemble": layers(jax.random.PRNGKey(7), sizes, 2), **bounds}},
        termination_fn=lambda obs, action, next_obs: next_obs[0] > 1.0,
        discrepancy=1.0,
        min_r=-1.0,
        dataset=DATA,
    )


@pytest.mark.parametrize("by_steps", [False, True])
def test_our_rollouts_are_fused_or_by_steps(by_steps: bool) -> None:
    rollout_fn = unifloral.EnsembleDynamics(make_dynamics()).make_rollout_fn(30, 2, 0.5)
    agent = make_agent()
    step = make_step(rollout_fn=rollout_fn, by_steps=by_steps)
    (_, after, buffer), _ = run(step, agent, 2)
    params = agent.actor.params
    policy = (lambda obs, rng: actor_apply(params, obs).sample(seed=rng)) if by_steps else params
    expected = jax.jit(lambda key, buffer: rollout_fn(key, policy, buffer))(
        walked(jax.random.PRNGKey(5), 1)[1], BUFFER
    )
    for one, other in zip(buffer, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    assert not jnp.array_equal(buffer.obs, BUFFER.obs)
    # The updates draw from the new rows.
    (_, before, _), _ = run(make_step(), agent, 2)
    assert not jnp.array_equal(*(alpha_apply(some.alpha.params) for some in (after, before)))
    morel = unifloral.EnsembleDynamics(make_dynamics()).make_rollout_fn(30, 2, term_penalty_offset=-2.0)
    run(make_step(rollout_fn=morel), agent, 1)


def test_the_arrays_are_read_in_place() -> None:
    step = make_step()
    step.take_over(make_agent())
    assert step.data.observations.data_ptr() == DATA.obs.unsafe_buffer_pointer()
    model = updates._transitions("", BUFFER)
    assert model.next_observations.data_ptr() == BUFFER.next_obs.unsafe_buffer_pointer()


# --- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "learning rates must be positive"),
        ({"gamma": 1.0}, "discount must be in"),
        ({"polyak_step_size": 0.0}, "polyak must be in"),
        ({"dataset_sample_ratio": 2.0}, "real_ratio must be in"),
        ({"rollout_interval": 0}, "rollout_interval must be a whole number of at least 1, got 0"),
    ],
)
def test_hyperparameters_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_step(SimpleNamespace(**vars(ARGS) | change))


@pytest.mark.parametrize("name", vars(ARGS))
def test_hyperparameters_that_have_moved(name: str) -> None:
    args = SimpleNamespace(**{key: value for key, value in vars(ARGS).items() if key != name})
    message = (
        f"SimpleNamespace has no {name}; this adapter was written for Unifloral's commit f2dc127: use that"
    )
    with pytest.raises(InputError, match=message):
        make_step(args)


def test_parts_that_have_moved() -> None:
    agent = make_agent()
    for part in agent._fields:
        others = [name for name in agent._fields if name != part]
        moved = namedtuple("Agent", [*others, "renamed"])(
            **{name: getattr(agent, name) for name in others}, renamed=0
        )
        with pytest.raises(
            InputError, match=f"Agent has no {part}; this adapter was written for Unifloral's"
        ):
            run(make_step(), moved)
    bare = SimpleNamespace(step=0, params=agent.actor.params, tx=adam(), replace=None)
    with pytest.raises(InputError, match="has no opt_state; this adapter was written for Unifloral's commit"):
        run(make_step(), agent._replace(actor=bare))
    fewer = namedtuple("Rows", "obs action reward done")(DATA.obs, DATA.action, DATA.reward, DATA.done)
    with pytest.raises(InputError, match="Rows has no next_obs; this adapter was written for Unifloral's"):
        make_step(dataset=fewer)


@pytest.mark.parametrize(
    ("part", "optimizer"),
    [
        ("actor", adam(1e-3)),
        ("vec_q", adam(epsilon=1e-8)),
        ("alpha", optax.adam(ARGS.lr, eps=1e-5, b2=0.99)),
        ("vec_q", optax.adam(ARGS.lr, eps=1e-5, nesterov=True)),
        ("actor", optax.adamw(ARGS.lr, eps=1e-5)),
        ("actor", optax.adamw(ARGS.lr, eps=1e-5, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))),
    ],
)
def test_other_optimizers(part: str, optimizer: Any) -> None:
    message = (
        rf"take optax.adam\(0.003, eps=1e-05\), and the optimizer of {part} makes other steps; use mopo.py's"
    )
    with pytest.raises(InputError, match=message):
        run(make_step(), make_agent(**{part: optimizer}))


def test_schedules() -> None:
    """Test a schedule that hardly changes the first steps."""
    slow = optax.adam(optax.linear_schedule(ARGS.lr, 0.0, 1_000_000), eps=1e-5)
    with pytest.raises(InputError, match="the optimizer of vec_q has a state besides Adam's, as a schedule"):
        run(make_step(), make_agent(vec_q=slow))


def test_chains_of_optimizers() -> None:
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adam())
    with pytest.raises(InputError, match="EmptyState has no mu, nu; this adapter was written for optax"):
        run(make_step(), make_agent(vec_q=clipped))
    agent = make_agent()
    ahead = agent.alpha.opt_state[0]._replace(count=jnp.asarray(3))
    alpha = agent.alpha.replace(opt_state=(ahead, *agent.alpha.opt_state[1:]))
    message = "optimizers have made different numbers of steps: {'actor': 0, 'vec_q': 0, 'alpha': 3}"
    with pytest.raises(InputError, match=message):
        run(make_step(), agent._replace(alpha=alpha))


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        (
            "actor",
            functools.partial(actor_apply, activation=jnp.tanh),
            r"a TanhGaussianActor with ReLU and log",
        ),
        ("actor", functools.partial(actor_apply, least=-4.0), r"log-stds in \[-5, 2\], and this is another"),
        ("q", functools.partial(q_apply, activation=jax.nn.silu), "take a VectorQ with ReLU, and this is"),
        (
            "alpha",
            lambda params: 2.0 * alpha_apply(params),
            "take an EntropyCoef, and this is another network",
        ),
    ],
)
def test_other_networks(name: str, function: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(make_step(functions={name: function}))
    if "-5" in message:
        run(make_step(functions={name: function}, log_std_bounds=(-4.0, 2.0)))


def test_parameters_of_other_networks() -> None:
    agent = make_agent()
    flat = agent.vec_q.replace(params={"params": agent.actor.params["params"]})
    with pytest.raises(InputError, match="these are not the parameters of a VectorQ"):
        run(make_step(), agent._replace(vec_q=flat))
    with pytest.raises(
        InputError, match="critics and the actor's hidden layers, in float32: a parameter must be float32"
    ):
        run(make_step(SimpleNamespace(**vars(ARGS) | {"num_critics": 2})), agent)
    with pytest.raises(InputError, match="these are not the parameters of a TanhGaussianActor"):
        run(make_step(), agent._replace(actor=agent.alpha))


@pytest.mark.parametrize("part", ["actor", "vec_q", "alpha"])
def test_parameters_that_are_not_finite(part: str) -> None:
    agent = make_agent()
    state = getattr(agent, part)
    lost = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    with pytest.raises(InputError, match="outputs are not finite on the first rows of the dataset; check"):
        run(make_step(), agent._replace(**{part: lost}))


def test_data_of_another_width() -> None:
    wide = DATA._replace(obs=jnp.zeros((50, OBS + 1)), next_obs=jnp.zeros((50, OBS + 1)))
    message = "the networks take 5 observation and 2 action dimensions, the dataset has 6 and 2"
    with pytest.raises(InputError, match=message):
        run(make_step(dataset=wide))


def test_lengths_of_numpy_and_jax() -> None:
    losses = [run(make_step(), length=length)[1] for length in (3, np.int64(3), jnp.int32(3))]
    for some in losses[1:]:
        assert all(np.array_equal(losses[0][name], values) for name, values in some.items())


def test_other_mistakes() -> None:
    with pytest.raises(InputError, match="make_train_step returns, and no xs"):
        unifloral.scan(lambda carry, _: carry, (None, None, None), None, 3)
    with pytest.raises(InputError, match="length must be a whole number of at least 1, got None"):
        run(make_step(), length=None)
    with pytest.raises(InputError, match=r"length must be a whole number of at least 1, got 2\.5"):
        run(make_step(), length=2.5)
    nothing = jax.tree.map(lambda array: array[:0], DATA)
    with pytest.raises(InputError, match="the dataset has no transitions; give one with some"):
        run(make_step(dataset=nothing))
    with pytest.raises(InputError, match="so it cannot be compiled; call it outside"):
        jax.jit(lambda seed: run(make_step(), seed=seed))(3)
    halves = BUFFER._replace(done=jnp.full(90, 0.5))
    with pytest.raises(InputError, match="take the rollout buffer's done that are 0 or 1"):
        run(make_step(), buffer=halves)
    lost = BUFFER._replace(reward=jnp.full(90, jnp.nan))
    with pytest.raises(InputError, match="SAC diverged before update 3: critic_loss is not finite"):
        run(make_step(), buffer=lost)
