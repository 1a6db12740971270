"""Train with Unifloral's MOPO on this package's rollouts and SAC updates.

    pip install 'jax<0.6' flax optax distrax tyro
    python examples/unifloral.py CHECKOUT

CHECKOUT is an unchanged checkout of https://github.com/EmptyJackson/unifloral. Stand-ins replace d4rl, gym
and wandb, which are not used. Unifloral's functions fit and train in the order of its scripts, on a data set
made by random actions at the start. `--rollouts` fuses the rollouts alone and keeps Unifloral's updates.
`--by-steps` wraps the dynamics only, which keeps Unifloral's random numbers. `--theirs` changes no line, for
comparison.
"""

import argparse
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp

import mopo_fast
from mopo_fast.collect import collect
from mopo_fast.compat import unifloral
from mopo_fast.evaluate import evaluate
from mopo_fast.tasks import TASKS


def import_theirs(checkout, fused):
    """Import Unifloral's modules dynamics and mopo; with `fused`, fuse the rollouts in its own train step."""
    for absent in ("d4rl", "gym", "wandb"):
        sys.modules.setdefault(absent, types.ModuleType(absent))
    sys.path.insert(0, str(checkout / "algorithms"))
    warnings.filterwarnings("ignore", "jax.tree_map is deprecated")
    import dynamics

    source = (checkout / "algorithms" / "mopo.py").read_text()
    if fused:
        # The line that changes in Unifloral's make_train_step: pass the parameters of the policy.
        shipped = "rollout_fn(rng_buffer, policy_fn, rollout_buffer)"
        assert shipped in source
        source = source.replace(shipped, "rollout_fn(rng_buffer, params, rollout_buffer)")
    mopo = types.ModuleType("mopo")
    sys.modules["mopo"] = mopo
    exec(compile(source, "mopo.py", "exec"), mopo.__dict__)
    return dynamics, mopo


def make_dataset(dynamics, data):
    """Return a data set as Unifloral's Transition."""
    arrays = {name: jnp.array(array.numpy()) for name, array in data.arrays().items()}
    return dynamics.Transition(
        obs=arrays["observations"],
        action=arrays["actions"],
        reward=arrays["rewards"],
        next_obs=arrays["next_observations"],
        next_action=jnp.roll(arrays["actions"], -1, axis=0),
        done=arrays["terminals"],
    )


def make_dynamics(dynamics, dataset, task, epochs):
    """Fit Unifloral's EnsembleDynamics for some epochs, as the main part of dynamics.py does."""
    args = dynamics.Args(dataset=task, num_epochs=epochs)
    obs_dim, act_dim = dataset.obs.shape[1], dataset.action.shape[1]
    net = dynamics.EnsembleDynamicsModel(
        obs_dim, act_dim, args.num_ensemble, n_layers=args.n_layers, layer_size=args.layer_size
    )
    key, fit_key = jax.random.split(jax.random.PRNGKey(0))
    state = dynamics.create_train_state(args, key, net, [jnp.zeros(obs_dim + act_dim)])
    elites = jnp.arange(args.num_elites)
    if epochs:
        state, elites = dynamics.train_dynamics_model(state, args, dataset, fit_key)
    return dynamics.EnsembleDynamics(net, state.params, elites, dynamics.get_termination_fn(task))


def make_training(mopo, dynamics_model, dataset, args, make_train_step=None, **options):
    """Make a train step, its initial state and its rollout, as the main part of mopo.py does.

    `make_train_step` is Unifloral's by default; `options` are those of `make_rollout_fn`.
    """
    obs, action = dataset.obs[0], dataset.action[0]
    actor_net, q_net, alpha_net = (
        mopo.TanhGaussianActor(len(action)),
        mopo.VectorQ(args.num_critics),
        mopo.EntropyCoef(),
    )
    key, actor_key, q_key, alpha_key = jax.random.split(jax.random.PRNGKey(args.seed), 4)
    agent = mopo.AgentTrainState(
        actor=mopo.create_train_state(args, actor_key, actor_net, [obs]),
        vec_q=mopo.create_train_state(args, q_key, q_net, [obs, action]),
        vec_q_target=mopo.create_train_state(args, q_key, q_net, [obs, action]),
        alpha=mopo.create_train_state(args, alpha_key, alpha_net, []),
    )
    dynamics_model.dataset = dataset
    rows = args.rollout_batch_size * args.rollout_length * args.model_retain_epochs
    buffer = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:])), dataset)
    rollout_fn = dynamics_model.make_rollout_fn(
        batch_size=args.rollout_batch_size,
        rollout_length=args.rollout_length,
        step_penalty_coef=args.step_penalty_coef,
        **options,
    )
    make_train_step = make_train_step or mopo.make_train_step
    step = make_train_step(args, actor_net.apply, q_net.apply, alpha_net.apply, dataset, rollout_fn)
    return step, (key, agent, buffer), rollout_fn


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--fit-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="SAC updates per epoch")
    parser.add_argument("--batch", type=int, default=5000, help="start states per rollout")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--rollouts", action="store_true", help="keep Unifloral's updates, fuse the rollouts")
    ways.add_argument(
        "--by-steps",
        action="store_true",
        help="keep Unifloral's updates, and the policy a JAX function, with Unifloral's random numbers",
    )
    ways.add_argument("--theirs", action="store_true", help="use Unifloral's own rollouts and updates")
    options = parser.parse_args()
    dynamics, mopo = import_theirs(options.checkout.resolve(), options.rollouts)
    with tempfile.TemporaryDirectory() as folder:
        path = collect("hopper-random", 10_000, out=Path(folder, "data.hdf5"), quiet=True)
        dataset = make_dataset(dynamics, mopo_fast.load_dataset(path))
    started = time.perf_counter()
    dynamics_model = make_dynamics(dynamics, dataset, "hopper-random-v2", options.fit_epochs)
    print(f"fit: {time.perf_counter() - started:.1f} s")

    if not options.theirs:
        # First of the lines that change: wrap what load_dynamics_model returns.
        dynamics_model = unifloral.EnsembleDynamics(dynamics_model)

    # The other lines that change: the train step, and the loop around it.
    make_train_step, scan = unifloral.make_train_step, unifloral.scan
    if options.rollouts or options.by_steps or options.theirs:
        make_train_step, scan = mopo.make_train_step, jax.lax.scan

    args = mopo.Args(rollout_interval=options.steps, rollout_batch_size=options.batch)
    step, carry, _ = make_training(mopo, dynamics_model, dataset, args, make_train_step)
    for epoch in range(options.epochs):
        started = time.perf_counter()
        carry, loss = jax.block_until_ready(scan(step, carry, None, options.steps))
        seconds = time.perf_counter() - started
        policy = unifloral.make_actor(carry[1].actor.params)
        returned = evaluate(policy, TASKS["hopper"], episodes=5, seed=0).return_mean
        critic_loss = loss["critic_loss"][-1]
        print(f"epoch {epoch}: {seconds:.1f} s, critic loss {critic_loss:.3f}, return {returned:.1f}")


if __name__ == "__main__":
    main()
