"""Record the authors' own updates of small networks: `python tests/recorded/mopo_tf_updates.py CHECKOUT`.

CHECKOUT is one of tianheyu927/mopo. Recorded at its commit e5efe3e with TensorFlow 2.21.0 as
examples/mopo_tf.py sets it up, tf-keras 2.21.0, TensorFlow Probability 0.25.0 and NumPy 2.4.6 on Python 3.11.
"""

import contextlib
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

OBS, ACT, HIDDEN = 3, 2, (8, 6)
ROWS = {"pool": 60, "model_pool": 90}
BATCH, REAL_RATIO = 40, 0.15
# The updates of each kernel call. Call number i has the seed i.
UPDATES = (5, 3)
SETTINGS = {"lr": 1e-2, "tau": 0.1, "discount": 0.9, "target_entropy": -1.5, "real_ratio": REAL_RATIO}
COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals")
TARGET = Path(__file__).parent / "mopo_tf" / "updates.npz"


def variables_of(algorithm):
    """Return all variables of an update by name, the counts of its steps included."""
    found = {"log_alpha": algorithm._log_alpha, "global_step": algorithm.global_step}
    networks = {"policy": (algorithm._policy, algorithm._policy_optimizer)}
    for number, (critic, optimizer) in enumerate(zip(algorithm._Qs, algorithm._Q_optimizers, strict=True)):
        networks[f"critic{number}"] = critic, optimizer
        networks[f"target{number}"] = algorithm._Q_targets[number], None
    trained = {"log_alpha": (algorithm._alpha_optimizer, [algorithm._log_alpha])}
    for name, (network, optimizer) in networks.items():
        variables = network.trainable_variables
        found |= {f"{name}.{i}": variable for i, variable in enumerate(variables)}
        if optimizer is not None:
            trained[name] = optimizer, variables
    for name, (optimizer, variables) in trained.items():
        powers = optimizer._get_beta_accumulators()
        found |= {f"{name} power{i}": power for i, power in enumerate(powers)}
        for slot in ("m", "v"):
            found |= {f"{name}.{i} {slot}": optimizer.get_slot(one, slot) for i, one in enumerate(variables)}
    return found


def random_rows(count, seed):
    random = np.random.default_rng(seed)
    widths = {"observations": OBS, "actions": ACT, "rewards": 1, "next_observations": OBS}
    arrays = {name: random.normal(size=(count, width)).astype(np.float32) for name, width in widths.items()}
    arrays["actions"] = np.tanh(arrays["actions"])
    return arrays | {"terminals": random.random((count, 1)) < 0.2}


def batches(pools, updates, seed):
    """Return the batches that the kernel draws for one call, with the noise of their actions."""
    import torch

    from mopo_fast import Transitions
    from mopo_fast.config import SACConfig
    from mopo_fast.sac import SAC, Draws

    data, model = (
        Transitions(**{
            name: torch.from_numpy(array[:, 0] if array.shape[1] == 1 else array)
            for name, array in pool.items()
        })
        for pool in pools
    )  # fmt: skip
    real = int(BATCH * REAL_RATIO)
    draws = Draws(data, model, (len(data), len(model)), (real, BATCH - real), updates, seed)
    sac = SAC(OBS, ACT, SACConfig(hidden=HIDDEN))
    drawn = [array.numpy() for array in sac._draw(draws, 0, updates)]
    drawn[2:5:2] = (array[..., None] for array in drawn[2:5:2])
    for one in zip(*drawn, strict=True):
        yield dict(zip(COLUMNS, one[:5], strict=True)), one[5:]


class Feeding:
    """A session that always feeds the tensors in `fed` too."""

    def __init__(self, session):
        self.session, self.fed = session, {}

    def run(self, fetches, feed_dict=None):
        return self.session.run(fetches, {**(feed_dict or {}), **self.fed})


def pytorchs_epsilon(step):
    """Return the epsilon with which TensorFlow's Adam makes the step that PyTorch's makes with 1e-8."""
    return 1e-8 * np.sqrt(1.0 - 0.999**step)


def main(checkout):
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from examples.mopo_tf import imitate_tensorflow_1, make_algorithm

    tf = imitate_tensorflow_1(Path(checkout).resolve())
    import mopo.static

    np.random.seed(0)
    tf.set_random_seed(0)
    pools = [random_rows(count, seed) for seed, count in enumerate(ROWS.values())]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        algorithm = make_algorithm(
            tf, pools[0], mopo.static["halfcheetah"], hidden=HIDDEN, epoch_length=sum(UPDATES), **SETTINGS
        )
    algorithm._training_progress = SimpleNamespace(update=lambda: None, set_description=lambda: None)
    algorithm._init_training()
    variables = variables_of(algorithm)
    session = tf.keras.backend.get_session()
    before = session.run(variables)
    # In the order in which `_build` makes them. The first one is of the policy itself.
    operations = [one for one in session.graph.get_operations() if one.type == "RandomStandardNormal"]
    assert len(operations) == 3
    noises = [one.outputs[0] for one in operations[1:]]
    # Nothing in the graph orders the reads of a parameter and its step. With networks of 256 units all reads
    # come first; with networks this small some come later in some runs. So each read is fed its value.
    reads = {
        name: [
            one.outputs[0]
            for one in variable.handle.consumers()
            # Those with control inputs are read after a step.
            if one.type == "ReadVariableOp" and not one.control_inputs
        ]
        for name, variable in variables.items()
        if hasattr(variable, "handle")
    }
    optimizers = (algorithm._policy_optimizer, algorithm._alpha_optimizer, *algorithm._Q_optimizers)
    algorithm._session = Feeding(session)
    recorded = {f"before {name}": value for name, value in before.items()}
    for key in ("after", "with PyTorch's epsilon"):
        for name, variable in variables.items():
            variable.load(before[name], session)
        step = 0
        for seed, updates in enumerate(UPDATES):
            for batch, drawn in batches(pools, updates, seed):
                step += 1
                # The noise is drawn as one long row.
                fed = {tensor: noise.reshape(-1) for tensor, noise in zip(noises, drawn, strict=True)}
                values = session.run(variables)
                fed |= {tensor: values[name] for name, tensors in reads.items() for tensor in tensors}
                fed[algorithm._alpha] = np.exp(values["log_alpha"])
                if key != "after":
                    fed |= dict.fromkeys((one._epsilon_t for one in optimizers), pytorchs_epsilon(step))
                algorithm._session.fed = fed
                algorithm._do_training(0, batch)
        recorded |= {f"{key} {name}": value for name, value in session.run(variables).items()}
    np.savez_compressed(TARGET, **recorded)


if __name__ == "__main__":
    main(sys.argv[1])
