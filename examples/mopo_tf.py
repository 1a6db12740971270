"""Train with the MOPO authors' code on this package's model steps and SAC updates.

    pip install scipy tensorflow-cpu tf-keras tensorflow-probability gtimer
    python examples/mopo_tf.py CHECKOUT

CHECKOUT is an unchanged checkout of https://github.com/tianheyu927/mopo. That code was written for TensorFlow
1.14 and Python 3.7; `imitate_tensorflow_1` lets it run on TensorFlow 2. The data set is made by random
actions at the start. `--theirs` runs the authors' own FakeEnv and their own updates, for comparison.
"""

import argparse
import contextlib
import importlib.machinery
import os
import pickle
import sys
import tempfile
import types
from pathlib import Path

import numpy as np


def stand_in(name, **attributes):
    """Register an otherwise empty module with these attributes."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(attributes)
    sys.modules[name] = module


def imitate_tensorflow_1(checkout):
    """Provide the modules that the authors' code imports, and return the TensorFlow that it uses."""
    # Triton crashes a process that has loaded TensorFlow before it, and torch loads it sooner or later.
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401

    # Keras 2 must be chosen before TensorFlow is imported.
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import gymnasium
    import tensorflow.compat.v1 as tf
    import tensorflow_probability as tfp

    tf.disable_v2_behavior()
    sys.modules["tensorflow"] = tf

    def optimize_loss(loss, step, *, optimizer, variables, **_):
        return optimizer.minimize(loss, var_list=variables)

    def affine(shift, scale_diag):
        return tfp.bijectors.Chain([tfp.bijectors.Shift(shift), tfp.bijectors.Scale(scale_diag)])

    class Serializable:
        def _Serializable__initialize(self, arguments):
            pass

    tf.contrib = types.SimpleNamespace(
        layers=types.SimpleNamespace(optimize_loss=optimize_loss),
        checkpoint=types.SimpleNamespace(Checkpointable=object),
    )
    tfp.bijectors.Affine = affine
    tfp.distributions.ConditionalTransformedDistribution = tfp.distributions.TransformedDistribution
    sys.modules["gym"], sys.modules["gym.spaces"] = gymnasium, gymnasium.spaces
    stand_in("serializable", Serializable=Serializable)
    # Modules for videos, event files and normalising flows, which are not used here.
    stand_in("cv2")
    stand_in("tensorboardX", SummaryWriter=lambda folder: None)
    stand_in("softlearning.distributions.real_nvp_flow", ConditionalRealNVPFlow=None)
    sys.path.insert(0, str(checkout))
    # This import lists a folder relative to the checkout.
    with contextlib.chdir(checkout):
        import mopo.static  # noqa: F401
    return tf


def make_algorithm(tf, data, static_fns, hidden=(256, 256), **options):
    """Make the authors' MOPO as their configurations and examples/development/main.py do.

    Args:
        tf: TensorFlow, from `imitate_tensorflow_1`.
        data: observations, actions, next_observations, rewards and terminals as NumPy arrays.
        static_fns: class of mopo/static with the task's termination function.
        hidden: widths of the hidden layers of the policy and of the critics.
        options: arguments of MOPO that replace the authors'.
    """
    from gymnasium.spaces import Box, Dict
    from mopo.algorithms.mopo import MOPO
    from softlearning.misc.utils import initialize_tf_variables
    from softlearning.policies.gaussian_policy import FeedforwardGaussianPolicy
    from softlearning.replay_pools.simple_replay_pool import SimpleReplayPool
    from softlearning.samplers import SimpleSampler
    from softlearning.value_functions.utils import get_Q_function_from_variant

    names = ("observations", "actions", "next_observations", "rewards", "terminals")
    columns = [data[name].reshape(len(data["rewards"]), -1).astype(np.float32) for name in names]
    np.save("pool.npy", np.concatenate(columns, axis=1))
    obs_dim, act_dim = columns[0].shape[1], columns[1].shape[1]
    observations, actions = (Box(-1.0, 1.0, (dim,), np.float32) for dim in (obs_dim, act_dim))
    environment = types.SimpleNamespace(
        active_observation_shape=(obs_dim,), action_space=actions, close=lambda: None
    )
    layers = {"hidden_layer_sizes": hidden}
    q_params = {"type": "double_feedforward_Q_function", "kwargs": layers}
    settings = {
        "epoch_length": 1000,
        "eval_n_episodes": 0,
        "reparameterize": True,
        "model_train_freq": options.get("epoch_length", 1000),
        "model_retain_epochs": 5,
        "rollout_batch_size": 50e3,
        "rollout_length": 5,
        "real_ratio": 0.05,
        "target_entropy": -3,
        "separate_mean_var": True,
        "penalty_learned_var": True,
        "penalty_coeff": 1.0,
    }
    algorithm = MOPO(
        training_environment=environment,
        evaluation_environment=environment,
        policy=FeedforwardGaussianPolicy(input_shapes=((obs_dim,),), output_shape=(act_dim,), **layers),
        Qs=get_Q_function_from_variant({"Q_params": q_params}, environment),
        pool=SimpleReplayPool(Dict({"observations": observations}), actions, len(data["rewards"])),
        static_fns=static_fns,
        sampler=SimpleSampler(max_path_length=1000, min_pool_size=1, batch_size=256),
        pool_load_path="pool.npy",
        **{**settings, **options},
    )
    session = tf.keras.backend.get_session()
    algorithm._model.sess.run(tf.global_variables_initializer())
    initialize_tf_variables(session, only_uninitialized=True)
    return algorithm


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="SAC updates per epoch")
    parser.add_argument("--batch", type=int, default=5000, help="start states per rollout")
    parser.add_argument("--theirs", action="store_true", help="use the authors' own FakeEnv and updates")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    tf = imitate_tensorflow_1(checkout)

    import mopo.algorithms.mopo as algorithms
    import mopo.static

    import mopo_fast
    from mopo_fast.collect import collect
    from mopo_fast.compat import mopo_tf
    from mopo_fast.evaluate import evaluate
    from mopo_fast.tasks import TASKS

    if not arguments.theirs:
        # The first line that changes; in mopo/algorithms/mopo.py it would be
        # from mopo_fast.compat.mopo_tf import FakeEnv, fuse_updates
        algorithms.FakeEnv = mopo_tf.FakeEnv

    np.random.seed(0)
    tf.set_random_seed(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        rows = mopo_fast.load_dataset(collect("hopper-random", 10_000, out="data.hdf5", quiet=True))
        data = {name: array.numpy() for name, array in rows.arrays().items()}
        algorithm = make_algorithm(
            tf,
            data,
            mopo.static["hopper"],
            n_epochs=arguments.epochs,
            epoch_length=arguments.steps,
            rollout_batch_size=arguments.batch,
            max_model_t=20.0,
        )
        if not arguments.theirs:
            # The second line; in mopo/algorithms/mopo.py it would be fuse_updates(self), after self._build().
            mopo_tf.fuse_updates(algorithm)
        times = []
        for diagnostics in algorithm.train():
            if not diagnostics.get("done"):
                times.append(
                    {name: diagnostics[f"times/{name}"] for name in ("epoch_rollout_model", "train")}
                )
        # The file in which main.py stores a policy. On the command line, it is read by
        # `mopo-fast convert checkpoint.pkl RUN --from mopo-tf`.
        with open("checkpoint.pkl", "wb") as file:
            pickle.dump({"policy_weights": algorithm._policy.get_weights()}, file)
        policy = mopo_tf.read(Path("checkpoint.pkl")).policy
    print(*times, sep="\n")
    print("return", evaluate(policy, TASKS["hopper"], episodes=5, seed=0).return_mean)


if __name__ == "__main__":
    main()
