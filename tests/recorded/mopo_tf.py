"""Record the authors' code on small models: `python tests/recorded/mopo_tf.py CHECKOUT` writes mopo_tf/.

CHECKOUT is one of tianheyu927/mopo. Recorded at its commit e5efe3e with TensorFlow 2.21.0 (as
tensorflow.compat.v1), NumPy 2.4.6 and SciPy 1.17.1 on Python 3.11.
"""

import importlib.util
import json
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

OBS, ACT, ROWS, DRAWS = 3, 2, 24, 2000
TARGET = Path(__file__).parent / "mopo_tf"
RULES = {"ant": 27, "antangle": 27, "halfcheetah": 17, "hopper": 11, "humanoid": 376, "walker2d": 17}


def random_states(dims, seed):
    """States around every bound of mopo/static."""
    states = np.random.default_rng(seed).uniform(-1.5, 2.5, (1000, dims)).astype(np.float32)
    states[::4, -1], states[1::4, -1] = -150.0, 150.0
    return states


def ends(obs, act, next_obs):
    return next_obs[:, :1] > 0.3


def train(construct_model, separate, folder):
    random = np.random.default_rng(1)
    inputs = random.normal(2.0, [0.5, 3.0, 1.0, 1.0, 0.2], (800, OBS + ACT))
    change = np.tanh(inputs @ random.normal(0.0, 0.4, (OBS + ACT, OBS + 1)))
    targets = change + random.normal(0.0, [0.5, 0.05, 0.2, 0.1], change.shape)
    model = construct_model(
        obs_dim=OBS, act_dim=ACT, hidden_dim=8, num_networks=4, num_elites=2, separate_mean_var=separate,
        name=f"heads{1 + separate}",
    )  # fmt: skip
    model.train(inputs, targets, batch_size=32, max_epochs=25, holdout_ratio=0.2)
    model.save(folder, 0)
    return model


def main(checkout):
    import tensorflow.compat.v1 as tf

    tf.disable_v2_behavior()
    sys.modules["tensorflow"] = tf
    sys.path.insert(0, checkout)
    TARGET.mkdir(exist_ok=True)
    np.random.seed(0)
    tf.set_random_seed(0)
    from mopo.models.constructor import construct_model
    from mopo.models.fake_env import FakeEnv

    random = np.random.default_rng(2)
    obs = random.normal(2.0, [0.5, 3.0, 1.0], (ROWS, OBS)).astype(np.float32)
    act = random.uniform(-1.0, 1.0, (ROWS, ACT)).astype(np.float32)
    arrays, types = {"obs": obs, "act": act}, {}
    config = SimpleNamespace(termination_fn=ends)
    for heads in (1, 2):
        model = train(construct_model, heads == 2, TARGET)
        arrays[f"elites{heads}"] = np.array(model._model_inds)
        inputs = np.concatenate((obs, act), -1)
        arrays[f"mean{heads}"], arrays[f"var{heads}"] = model.predict(inputs, factored=True)
    for coeff, learned in ((0.0, False), (1.5, False), (1.5, True)):
        env = FakeEnv(model, config, penalty_coeff=coeff, penalty_learned_var=learned)
        for deterministic in (False, True):
            for single in (False, True):
                rows = (obs[0], act[0]) if single else (obs, act)
                next_obs, rewards, terminals, info = env.step(*rows, deterministic=deterministic)
                outputs = {"next_obs": next_obs, "rewards": rewards, "terminals": terminals, **info}
                key = f"{coeff} {learned} {deterministic} {single}"
                types[key] = {
                    name: None if array is None else [str(array.dtype), list(array.shape)]
                    for name, array in outputs.items()
                }
                if deterministic and not single:
                    arrays |= {f"{key} {name}": a for name, a in outputs.items() if a is not None}
                elif coeff and not single:
                    arrays[f"{key} penalty"] = info["penalty"]
    # Many draws at one row, and which member each is of.
    env = FakeEnv(model, config)
    rows = np.repeat(obs[:1], DRAWS, 0), np.repeat(act[:1], DRAWS, 0)
    next_obs, rewards, _, info = env.step(*rows)
    means = arrays["mean2"][:, 0, 0]
    arrays["drawn"] = np.abs(info["mean"][:, :1] - means).argmin(1).astype(np.uint8)
    arrays["samples"] = np.concatenate((rewards, next_obs), -1).astype(np.float32)
    for name, dims in RULES.items():
        # mopo/static/__init__.py works in the checkout's folder alone.
        spec = importlib.util.spec_from_file_location(name, Path(checkout) / f"mopo/static/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        states = random_states(dims, len(name))
        function = module.StaticFns.termination_fn
        arrays[f"ends {name}"] = np.packbits(function(states, states, states))
    np.savez_compressed(TARGET / "record.npz", **arrays)
    (TARGET / "types.json").write_text(json.dumps(types))

    # As main.py's _save: a policy's weights beside objects of classes that are not here.
    weights = [random.normal(0.0, 0.3, s).astype(np.float32) for s in ((OBS, 8), 8, (8, 8), 8, (8, 4), 4)]
    picklables = {"variant": OrderedDict(run_params={"seed": 1}), "Qs": (tf.Dimension(3),)}
    picklables["policy_weights"] = weights
    with open(TARGET / "checkpoint.pkl", "wb") as file:
        pickle.dump(picklables, file)


if __name__ == "__main__":
    main(sys.argv[1])
