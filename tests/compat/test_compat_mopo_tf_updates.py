"""Test the authors' updates on the kernels: equality with recorded ones, and their loop."""

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mopo_tf_parts
import numpy as np
import places
import pytest
from recorded.mopo_tf_updates import BATCH, HIDDEN, ROWS, SETTINGS, UPDATES, random_rows, variables_of

from mopo_fast import InputError
from mopo_fast.compat.mopo_tf import fuse_updates, updates

RECORDED = places.RECORDED / "mopo_tf" / "updates.npz"
HELPERS = Path(mopo_tf_parts.__file__).parent


def load_as(name: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HELPERS / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stand_ins() -> Iterator[ModuleType]:
    """Load the stand-ins as modules of the packages whose names the adapter looks at."""
    sys.modules["softlearning"] = ModuleType("softlearning")
    load_as("softlearning.parts", "mopo_tf_parts.py")
    yield load_as("mopo.algorithm", "mopo_tf_algorithm.py")
    for name in ("softlearning", "softlearning.parts", "mopo.algorithm"):
        del sys.modules[name]


@pytest.fixture(autouse=True)
def seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give kernel call number i the seed i, as in the recorded updates."""
    numbers = iter(range(10_000))
    monkeypatch.setattr(updates, "draw_seed", lambda: next(numbers))


@pytest.fixture
def algorithm(stand_ins: ModuleType) -> Any:
    """The algorithm that the recording began with."""
    pools = [random_rows(count, seed) for seed, count in enumerate(ROWS.values())]
    made = stand_ins.MOPO(pools, HIDDEN, SETTINGS, BATCH)
    with np.load(RECORDED) as file:
        for name, variable in variables_of(made).items():
            value = file[f"before {name}"]
            assert (value.shape, value.dtype) == (variable.value.shape, variable.value.dtype), name
            variable.value = value
    return made


def values_of(algorithm: Any) -> dict[str, Any]:
    return {name: variable.value.copy() for name, variable in variables_of(algorithm).items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all((one[name] == other[name]).all() for name in one)


def run(algorithm: Any, timesteps: range) -> None:
    for timestep in timesteps:
        algorithm._timestep_before_hook()
        algorithm._do_training_repeats(timestep=timestep)
        algorithm._timestep_after_hook()


# --- equality


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_updates_are_the_originals(algorithm: Any, backend: str) -> None:
    """Test two kernel calls: before a rollout, and at the end of an epoch."""
    algorithm._model_train_freq, algorithm._epoch_length = UPDATES[0], sum(UPDATES)
    assert fuse_updates(algorithm, backend=backend) is algorithm
    run(algorithm, range(algorithm._epoch_length))
    # Each call fetches once and assigns once.
    assert algorithm._session.runs == 2 * len(UPDATES) and algorithm.originals == 0
    after = values_of(algorithm)
    assert after["global_step"] == sum(UPDATES)
    with np.load(RECORDED) as file:
        for name, ours in after.items():
            assert (ours != file[f"before {name}"]).any(), name
            theirs, with_our_epsilon = file[f"after {name}"], file[f"with PyTorch's epsilon {name}"]
            if "power" in name:
                assert ours == theirs == with_our_epsilon, name
            scale = abs(theirs).max()
            np.testing.assert_allclose(ours, with_our_epsilon, rtol=0, atol=2e-5 * scale, err_msg=name)
            # TensorFlow's epsilon counts where gradients are very small.
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-3 * scale, err_msg=name)
            assert np.median(abs(ours - theirs)) < 2e-5 * scale, name


# --- the loop


def test_updates_are_made_together(algorithm: Any) -> None:
    """Test that a call makes up to 100 updates, and that the bar and the counts move at each one."""
    algorithm._n_train_repeat = 3
    fuse_updates(algorithm)
    run(algorithm, range(33))
    assert algorithm._session.runs == 0 and algorithm.shown == algorithm._num_train_steps == 99
    run(algorithm, range(33, 34))
    assert algorithm._session.runs == 2 and algorithm.global_step.value == 100
    # The original decides when it trains.
    algorithm._train_every_n_steps = 2
    run(algorithm, range(34, 36))
    assert algorithm.shown == 105


@pytest.mark.parametrize(
    "look",
    [
        lambda algorithm: algorithm._rollout_model(1)[0],
        lambda algorithm: algorithm._evaluation_paths()[0],
        lambda algorithm: algorithm.get_diagnostics(),
        lambda algorithm: algorithm._policy.get_weights()[0],
        lambda algorithm: algorithm._policy.actions_np(np.ones((1, 3), np.float32)),
    ],
)
def test_looks_see_exactly_the_updates_asked_for(stand_ins: ModuleType, algorithm: Any, look: Any) -> None:
    fuse_updates(algorithm)
    run(algorithm, range(2))
    before = values_of(algorithm)
    assert before["global_step"] == 0
    seen = look(algorithm)
    assert algorithm.global_step.value == 2
    # A look again sees the same; nothing is made twice.
    assert (seen == look(algorithm)).all() and algorithm._session.runs == 2


def test_a_direct_update_is_the_originals(algorithm: Any) -> None:
    fuse_updates(algorithm)
    run(algorithm, range(2))
    batch = algorithm._training_batch()
    assert len(batch["rewards"]) == BATCH
    algorithm._do_training(2, batch)
    assert algorithm.originals == 1 and algorithm.global_step.value == 2


def test_a_hook_of_ones_own_is_a_look(stand_ins: ModuleType, algorithm: Any) -> None:
    seen = []
    # A class of a user's module.
    algorithm.__class__ = type(
        "Own",
        (stand_ins.MOPO,),
        {"_timestep_after_hook": lambda self: seen.append(int(self.global_step.value))},
    )
    fuse_updates(algorithm)
    run(algorithm, range(3))
    assert seen == [1, 2, 3]


def test_continues_from_the_sessions_values(algorithm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that a call takes over what others have assigned, the steps of Adam included."""
    fuse_updates(algorithm)
    run(algorithm, range(4))
    algorithm.get_diagnostics()
    start = values_of(algorithm)
    results = []
    for power in (start["policy power1"], np.float32(0.0)):
        for name, variable in variables_of(algorithm).items():
            variable.value = start[name].copy() if "power1" not in name else np.array(power)
        monkeypatch.setattr(updates, "draw_seed", lambda: 77)
        run(algorithm, range(1))
        algorithm.get_diagnostics()
        results.append(values_of(algorithm))
    assert results[0]["global_step"] == results[1]["global_step"] == 5
    # With many steps behind it, the second moment's correction is gone, so that the step is larger.
    moves = [abs(one["policy.0"] - start["policy.0"]).max() for one in results]
    assert moves[1] > 2.0 * moves[0] and results[1]["policy power1"] == 0.0
    assert updates._steps(start["policy power1"]) == 4 and updates._steps(np.float32(0.999)) == 0


def test_hyperparameters_count_at_every_call(algorithm: Any) -> None:
    fuse_updates(algorithm)

    def step() -> dict[str, Any]:
        before = values_of(algorithm)
        run(algorithm, range(1))
        algorithm.get_diagnostics()
        return {name: abs(value - before[name]).max() for name, value in values_of(algorithm).items()}

    first = step()
    algorithm._tau = 1.0
    algorithm._policy_optimizer._lr_t.value = np.float32(0.0)
    second = step()
    assert first["policy.0"] > 0.0 == second["policy.0"] and second["critic0.0"] > 0.0
    values = values_of(algorithm)
    assert (values["critic0.0"] == values["target0.0"]).all()
    # All rows come from the data set, so the model pool may be empty.
    algorithm._real_ratio = 1.0
    del algorithm._model_pool
    step()
    algorithm._pool.size = 0
    algorithm._do_training_repeats(0)
    with pytest.raises(InputError, match="a batch takes 40 rows of a pool that is empty"):
        algorithm.get_diagnostics()


def test_fixed_temperature(algorithm: Any) -> None:
    del algorithm._training_ops["temperature_alpha"], algorithm._alpha_optimizer
    algorithm._target_entropy = None
    algorithm._log_alpha.value = np.array(np.float32(-1.0))
    fuse_updates(algorithm)
    policy = algorithm._policy.get_weights()
    run(algorithm, range(2))
    assert (algorithm._policy.get_weights()[0] != policy[0]).any() and algorithm._log_alpha.value == -1.0


def test_divergence_leaves_the_variables_alone(algorithm: Any) -> None:
    fuse_updates(algorithm)
    # From its first assignment on, a session may hold the arrays that it was fed.
    run(algorithm, range(1))
    algorithm.get_diagnostics()
    algorithm._pool.fields["rewards"][:] = np.inf
    before = values_of(algorithm)
    run(algorithm, range(1))
    with pytest.raises(InputError, match="SAC diverged before update"):
        algorithm.get_diagnostics()
    assert same(before, values_of(algorithm))


# --- refused


def settings(**values: Any) -> Any:
    return lambda algorithm: algorithm.__dict__.update(values)


REFUSED: dict[str, Callable[[Any], Any]] = {
    "action_prior 'uniform', got 'normal'": settings(_action_prior="normal"),
    "reward_scale 1.0, got 5.0": settings(_reward_scale=5.0),
    "target_update_interval 1, got 3": settings(_target_update_interval=3),
    "do not run the ops Qx": lambda algorithm: algorithm._training_ops.update(Qx=None),
    "a method _do_training of its own": settings(_do_training=lambda *_: None),
    "a method _do_training_repeats of its own": settings(_do_training_repeats=lambda *_: None),
    "MOPO has no _discount; this adapter was written for the MOPO authors' code at commit e5efe3e": (
        lambda algorithm: algorithm.__dict__.pop("_discount")
    ),
    "FeedforwardGaussianPolicy has no _squash; this adapter was written for the MOPO authors' code": (
        lambda algorithm: algorithm._policy.__dict__.pop("_squash")
    ),
    "AdamOptimizer has no _lr_t; this adapter was written for the MOPO authors' code": (
        lambda algorithm: algorithm._policy_optimizer.__dict__.pop("_lr_t")
    ),
    "takes? a FeedforwardGaussianPolicy, got SimpleNamespace": settings(_policy=SimpleNamespace()),
    "a policy with activation='relu', got 'tanh'": lambda algorithm: setattr(
        algorithm._policy, "_activation", "tanh"
    ),
    "critics with ReLU, got tanh, relu, linear": lambda algorithm: setattr(
        algorithm._Qs[1].layers[3].activation, "__name__", "tanh"
    ),
    "critics of dense layers on observations and actions": lambda algorithm: algorithm._Qs[0].layers.append(
        SimpleNamespace()
    ),
    r"with the policy's hidden layers, got a variable \[5, 9\] where they have \[5, 8\]": (
        lambda algorithm: setattr(
            algorithm._Qs[0].trainable_variables[0], "value", np.zeros((5, 9), np.float32)
        )
    ),
    "takes? critics with the policy's 2 hidden layers, got 1": lambda algorithm: setattr(
        algorithm._Qs[0], "trainable_variables", algorithm._Qs[0].trainable_variables[:4]
    ),
    "rewards are float32 .* got float64": lambda algorithm: algorithm._pool.fields.update(
        rewards=np.zeros((60, 1))
    ),
    "SimpleReplayPool has no size; this adapter was written for": lambda algorithm: (
        algorithm._pool.__dict__.pop("size")
    ),
    "a method random_batch of its own": lambda algorithm: setattr(algorithm._pool, "random_batch", len),
    "optimizer of the critic is AdamOptimizer with .*'_beta1': 0.5": lambda algorithm: setattr(
        algorithm._Q_optimizers[0], "_beta1", 0.5
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_before_training(algorithm: Any, message: str) -> None:
    REFUSED[message](algorithm)
    before = {name: value for name, value in vars(algorithm).items() if name in updates._REPLACED}
    with pytest.raises(InputError, match=message):
        fuse_updates(algorithm)
    assert before == {name: value for name, value in vars(algorithm).items() if name in updates._REPLACED}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a._model_pool.fields.update(rewards=np.zeros((90, 1))), "rewards are float32 .* float64"),
        (lambda a: setattr(a._Q_optimizers[0]._lr_t, "value", np.float32(1.0)), "different learning rates"),
        (lambda a: setattr(a._Q_optimizers[0].powers[1], "value", np.float32(0.5)), "different numbers of"),
    ],
)
def test_refused_at_a_call(algorithm: Any, change: Any, message: str) -> None:
    fuse_updates(algorithm)
    change(algorithm)
    run(algorithm, range(1))
    with pytest.raises(InputError, match=message):
        algorithm.get_diagnostics()


def test_a_refused_call_loses_no_update(algorithm: Any) -> None:
    fuse_updates(algorithm)
    rate = algorithm._Q_optimizers[0]._lr_t
    before, rate.value = rate.value, np.float32(1.0)
    run(algorithm, range(2))
    with pytest.raises(InputError, match="different learning rates"):
        algorithm.get_diagnostics()
    rate.value = before
    run(algorithm, range(2, 3))
    algorithm.get_diagnostics()
    assert algorithm.global_step.value == 3


def test_updates_left_by_a_refused_call_are_made_at_the_next(
    algorithm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "_UPDATES_AT_ONCE", 2)
    fuse_updates(algorithm)
    rate = algorithm._Q_optimizers[0]._lr_t
    before, rate.value = rate.value, np.float32(1.0)
    with pytest.raises(InputError, match="different learning rates"):
        run(algorithm, range(2))
    rate.value = before
    run(algorithm, range(2, 3))
    assert algorithm.global_step.value == 3


def test_steps_from_powers() -> None:
    power, made = np.float32(0.999), 0
    while made < 20_000:
        # A wrong number changes a step by no more than float32 does.
        correction, exact = (1.0 - 0.999**steps for steps in (updates._steps(power) + 1, made + 1))
        assert math.isclose(correction, exact, rel_tol=1e-6)
        power, made = power * np.float32(0.999), made + 1
