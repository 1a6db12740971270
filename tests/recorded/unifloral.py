"""Record what Unifloral does, for tests/compat/test_compat_unifloral.py and tests/beside/unifloral.py.

    python tests/recorded/unifloral.py CHECKOUT
    python tests/recorded/unifloral.py CHECKOUT updates

The second command records the updates alone, in unifloral_updates.npz.
CHECKOUT is github.com/EmptyJackson/unifloral at f2dc127. Recorded with jax and jaxlib 0.5.3, flax 0.10.4,
distrax 0.1.5, tensorflow-probability 0.25.0, optax 0.2.4, numpy 2.4.6; d4rl, gym and wandb are not called and
stand-ins serve. It then sees that their loader reads what we write.
"""

import pickle
import sys
import tempfile
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

HERE = Path(__file__).parent
OBS, ACT, MEMBERS = 11, 3, 7
ELITES = [4, 1, 6]


def import_theirs(checkout: Path):
    """Their modules dynamics, mopo, termination_fns."""
    for absent in ("d4rl", "gym", "wandb"):
        sys.modules.setdefault(absent, types.ModuleType(absent))
    sys.path.insert(0, str(checkout / "algorithms"))
    warnings.filterwarnings("ignore", "jax.tree_map is deprecated")
    import dynamics
    import mopo
    import termination_fns

    return dynamics, mopo, termination_fns


def make_model(dynamics, termination_fns):
    """An EnsembleDynamics of hopper with no parameter left at its start."""
    net = dynamics.EnsembleDynamicsModel(
        obs_dim=OBS, action_dim=ACT, num_ensemble=MEMBERS, n_layers=2, layer_size=16
    )
    params = net.init(jax.random.PRNGKey(0), jnp.zeros(OBS + ACT))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.PRNGKey(1), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, leaves)
    # Noise that varies, and mostly less than members are apart: it then shows which one is drawn.
    params["params"]["max_logvar"] -= 2.0
    last = params["params"]["ensemble"]["Dense_2"]
    last["kernel"] *= jnp.where(jnp.arange(2 * (OBS + 1)) > OBS, 8.0, 1.0)
    # Height and angle move less, so that some stand.
    last["kernel"] = last["kernel"].at[..., :2].multiply(0.1)
    last["bias"] = last["bias"].at[..., :2].multiply(0.1).at[..., OBS + 1 : OBS + 3].add(-5.0)
    hopper = termination_fns.get_termination_fn("hopper-medium-v2")
    return dynamics.EnsembleDynamics(net, params, jnp.array(ELITES), hopper, discrepancy=3.0, min_r=-1.5)


def actor_params():
    """Make parameters of a TanhGaussianActor, too large to be kept; some log-stds are out of bounds."""
    random = np.random.RandomState(0)
    sizes = [(OBS, 256), (256, 256), (256, 256), (256, ACT), (256, ACT)]
    layers = {}
    for i, (fan_in, fan_out) in enumerate(sizes):
        kernel = 2.0 * random.uniform(-1, 1, (fan_in, fan_out)) / fan_in**0.5
        layers[f"Dense_{i}"] = {"kernel": kernel, "bias": random.uniform(-0.5, 0.5, fan_out)}
    layers["Dense_3"]["bias"] = np.array([-5.0, -1.0, 2.0])
    return {"params": jax.tree.map(np.float32, layers)}


def policy(weights):
    """A function as their rollouts take it."""
    return lambda obs, rng: jnp.tanh(obs @ weights + 0.3 * jax.random.normal(rng, (ACT,)))


# name: make_rollout_fn's arguments, rows of the buffer; MOReL's threshold parts the rows in two.
ROLLOUTS = {
    "mopo": ({"batch_size": 12, "rollout_length": 3, "step_penalty_coef": 0.7}, 80),
    "short": ({"batch_size": 12, "rollout_length": 3, "step_penalty_coef": 0.7}, 30),
    "morel": (
        {"batch_size": 12, "rollout_length": 3, "term_penalty_offset": -2.0, "threshold_coef": 0.85},
        36,
    ),
}


def healthy(random, rows):
    """Observations of a hopper, most of which stands."""
    obs = random.uniform(-1, 1, (rows, OBS))
    obs[:, 0] = 1.2 + 0.4 * obs[:, 0]
    obs[:, 1] *= 0.15
    return obs.astype(np.float32)


def at_the_bounds(random, dims, height, bounds):
    """Rows on and beside every bound (dimension, value), and some that are not finite."""
    below, above = np.float32(-np.inf), np.float32(np.inf)
    places = [(2, x) for x in (np.nan, below, above)]
    for dim, value in bounds:
        value = np.float32(value)
        places += [(dim, x) for x in (np.nextafter(value, below), value, np.nextafter(value, above))]
    rows = random.uniform(-0.1, 0.1, (len(places), dims)).astype(np.float32)
    rows[:, 0] = height
    for row, (dim, x) in zip(rows, places, strict=True):
        row[dim] = x
    return rows


# The updates are those of Unifloral's networks with layers of another width.
WIDTH, UPDATES, SEED = 16, 5, 11
UPDATE_ARGS = {
    "num_critics": 3,
    "batch_size": 64,
    "dataset_sample_ratio": 0.25,
    "lr": 3e-3,
    "gamma": 0.95,
    "polyak_step_size": 0.1,
}


def random_rows(transition, seed, count, kind):
    """Transitions, three in ten of them terminal; `kind` is the type of `done`."""
    keys = jax.random.split(jax.random.PRNGKey(seed), 5)
    obs, next_obs = (jax.random.normal(key, (count, OBS)) for key in keys[:2])
    action = jnp.tanh(jax.random.normal(keys[2], (count, ACT)))
    reward, done = jax.random.normal(keys[3], (count,)), jax.random.bernoulli(keys[4], 0.3, (count,))
    return transition(obs, action, reward, next_obs, action, done.astype(kind))


def with_noise(actor_apply):
    """Their actor, of observations that end with the noise of the action."""

    class Given:
        def __init__(self, pi, noise):
            self.pi, self.noise = pi, noise

        def sample_and_log_prob(self, seed):
            raw = self.pi.distribution.loc + self.pi.distribution.scale * self.noise
            action, slope = self.pi.bijector.forward_and_log_det(raw)
            return action, self.pi.distribution.log_prob(raw) - slope

    return lambda params, obs: Given(actor_apply(params, obs[..., :OBS]), obs[..., OBS:])


def record_updates(checkout: Path) -> None:
    """Some of their updates on batches and noise that our SAC draws, and their state before and after.

    Their step draws noise for the temperature and again for the actor; here both get the same.
    """
    from mopo_fast.compat import unifloral
    from mopo_fast.compat.unifloral import updates
    from mopo_fast.sac import Draws

    dynamics, *_ = import_theirs(checkout)
    mopo = types.ModuleType("narrow_mopo")
    sys.modules["narrow_mopo"] = mopo
    source = (checkout / "algorithms" / "mopo.py").read_text().replace("nn.Dense(256", f"nn.Dense({WIDTH}")
    exec(compile(source, "mopo.py", "exec"), mopo.__dict__)
    args = mopo.Args(**UPDATE_ARGS)
    dataset = random_rows(dynamics.Transition, 2, 50, bool)
    buffer = random_rows(dynamics.Transition, 3, 90, jnp.float32)
    actor, q, alpha = mopo.TanhGaussianActor(ACT), mopo.VectorQ(args.num_critics), mopo.EntropyCoef()
    keys, pair = jax.random.split(jax.random.PRNGKey(4), 4), [dataset.obs[0], dataset.action[0]]
    start = mopo.AgentTrainState(
        mopo.create_train_state(args, keys[0], actor, pair[:1]),
        mopo.create_train_state(args, keys[1], q, pair),
        mopo.create_train_state(args, keys[2], q, pair),
        mopo.create_train_state(args, keys[3], alpha, []),
    )
    rest = dataset, lambda rng, policy, buffer: buffer
    step = unifloral.make_train_step(args, actor.apply, q.apply, alpha.apply, *rest)
    # Two updates by ours, so that the moments are not zero.
    carry = jax.random.PRNGKey(5), start, buffer
    (rng, agent, _), losses = unifloral.scan(step, carry, None, 2)
    (their_rng, theirs, _), their_losses = jax.lax.scan(
        mopo.make_train_step(args, actor.apply, q.apply, alpha.apply, *rest), carry, None, 2
    )
    assert jnp.array_equal(rng, their_rng)
    assert jax.tree.structure(agent) == jax.tree.structure(theirs)
    for one, other in zip(*map(jax.tree.leaves, ((agent, losses), (theirs, their_losses))), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    arrays = {f"before.{name}": value.numpy().copy() for name, value in step.take_over(agent).state().items()}
    sac, model = step.take_over(agent), updates._transitions("", buffer)
    draws = Draws(step.data, model, (len(step.data), len(model)), sac.batch_rows, UPDATES, SEED)
    parts = []
    mopo.sample_from_buffer = lambda buffer, size, rng: parts.pop(0)
    functions = (
        with_noise(actor.apply),
        lambda params, obs, action: q.apply(params, obs[..., :OBS], action),
        alpha.apply,
    )
    losses = []
    for number in range(UPDATES):
        batch, noise, next_noise, _ = sac.batch(draws, number)
        obs, next_obs = (
            jnp.concatenate([jnp.array(one.numpy()) for one in some], axis=1)
            for some in ((batch.observations, noise), (batch.next_observations, next_noise))
        )
        action, reward, done = (
            jnp.array(one.numpy()) for one in (batch.actions, batch.rewards, batch.terminals.float())
        )
        rows = dynamics.Transition(obs, action, reward, next_obs, action, done)
        parts += [jax.tree.map(lambda x, part=part: x[part], rows) for part in (slice(16), slice(16, 64))]
        # Compiled anew, because the batch is a constant of the compiled function.
        their_step = jax.jit(mopo.make_train_step(args, *functions, *rest))
        (_, agent, _), loss = their_step((jax.random.PRNGKey(0), agent, buffer), None)
        losses.append(loss)
    arrays |= {f"after.{name}": value.numpy() for name, value in step.take_over(agent).state().items()}
    arrays |= {f"loss.{name}": np.array([loss[name] for loss in losses]) for name in losses[0]}
    arrays |= {f"data.{name}": x.numpy() for name, x in step.data.arrays().items()}
    arrays |= {f"model.{name}": x.numpy() for name, x in model.arrays().items()}
    np.savez_compressed(HERE / "unifloral_updates.npz", **{name: np.asarray(x) for name, x in arrays.items()})
    print("unifloral_updates.npz", (HERE / "unifloral_updates.npz").stat().st_size)
    print({name: float(arrays[f"loss.{name}"][-1]) for name in losses[0]})


def main(checkout: Path) -> None:
    dynamics, mopo, termination_fns = import_theirs(checkout)
    model = make_model(dynamics, termination_fns)
    with open(HERE / "unifloral.pkl", "wb") as file:
        pickle.dump(model, file)
    random = np.random.RandomState(1)
    arrays = {"obs": healthy(random, 40), "action": random.uniform(-1, 1, (40, ACT)).astype(np.float32)}
    inputs = jnp.concatenate([arrays["obs"], arrays["action"]], axis=-1)
    mean, logvar = model.dynamics_model.apply(model.params, inputs)
    arrays |= {"mean": mean, "std": jnp.exp(0.5 * logvar)}

    pi = jax.vmap(lambda obs: mopo.TanhGaussianActor(ACT).apply(actor_params(), obs))(arrays["obs"])
    arrays |= {"actor_mean": pi.distribution.loc, "actor_std": pi.distribution.scale}

    hundred = [(7, -100.0), (7, 100.0)]
    bounds = {
        "halfcheetah": (17, 0.0, hundred),
        "hopper": (11, 1.2, [(0, 0.7), (1, -0.2), (1, 0.2), *hundred]),
        "walker2d": (17, 1.2, [(0, 0.8), (0, 2.0), (1, -1.0), (1, 1.0), *hundred]),
        "ant": (27, 0.5, [(0, 0.2), (0, 1.0), *hundred]),
    }
    for task, case in bounds.items():
        rows = at_the_bounds(random, *case)
        done = jax.vmap(termination_fns.get_termination_fn(f"{task}-medium-v2"))(rows, rows, rows)
        arrays |= {f"{task}_rows": rows, f"{task}_done": done}

    arrays |= {"states": healthy(random, 50), "weights": random.uniform(-1, 1, (OBS, ACT)).astype(np.float32)}
    states, actions, scalars = jnp.array(arrays["states"]), jnp.zeros((50, ACT)), jnp.zeros(50)
    model.dataset = dynamics.Transition(states, actions, scalars, states, actions, scalars)
    for name, (arguments, rows) in ROLLOUTS.items():
        rollout = jax.jit(model.make_rollout_fn(**arguments), static_argnums=1)
        buffer = dynamics.Transition(*(jnp.full((rows, *x.shape[1:]), -7.0) for x in model.dataset))
        for call in range(2):
            buffer = rollout(jax.random.PRNGKey(call), policy(arrays["weights"]), buffer)
        arrays |= {f"{name}_{field}": array for field, array in buffer._asdict().items()}
    np.savez_compressed(HERE / "unifloral.npz", **{name: np.asarray(x) for name, x in arrays.items()})
    for name in ("pkl", "npz"):
        print(name, (HERE / f"unifloral.{name}").stat().st_size)
    print("done", {name: float(arrays[f"{name}_done"].mean()) for name in (*ROLLOUTS, *bounds)})

    from mopo_fast.compat import unifloral

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ensemble_dynamics_model_hopper-medium-v2.pkl"
        unifloral.write(unifloral.read(HERE / "unifloral.pkl"), path)
        back = dynamics.load_dynamics_model(path)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, dict(back.params), dict(model.params)))
    assert back.termination_fn is model.termination_fn
    again, _ = back.dynamics_model.apply(back.params, inputs)
    assert jnp.array_equal(again, mean)
    print("written, and read by theirs")


if __name__ == "__main__":
    (record_updates if "updates" in sys.argv[2:] else main)(Path(sys.argv[1]).resolve())
