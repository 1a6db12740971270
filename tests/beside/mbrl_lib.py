"""Compare our mbrl-lib support with the real mbrl-lib; run by test_compat_mbrl_lib.py."""

from pathlib import Path
from types import SimpleNamespace

import mbrl.models
import numpy as np
import torch
from two_samples import differences

from mopo_fast import InputError
from mopo_fast.compat import convert_checkpoint, mbrl_lib
from mopo_fast.config import Hints

OBS, ACT = 3, 2
torch.manual_seed(0)
random = np.random.default_rng(0)
space = SimpleNamespace(observation_space=None, action_space=None)


def process(observations):
    """Return one dimension more than the observations have, as mbrl-lib's cartpole does."""
    angle = observations[..., 1:2]
    return torch.cat([angle.sin(), angle.cos(), observations[..., :1], observations[..., 2:]], dim=-1)


OPTIONS = (
    {},
    {"no_delta_list": [1]},
    {"target_is_delta": False},
    {"learned_rewards": False},
    {"obs_process_fn": process, "no_delta_list": [0]},
)


def reward_of(actions, next_observations):
    return next_observations[:, :1] + actions[:, :1]


def ends(actions, next_observations):
    return next_observations[:, 1:2] > 0.5


def make(method, activation="SiLU", double=False, elites=(3, 0, 2), **options):
    """Make a model unlike a fresh one: biases, an input scale and separate means in the first dimension."""
    torch.manual_seed(1)
    rewards, inputs = options.get("learned_rewards", True), OBS + ACT + ("obs_process_fn" in options)
    mlp = mbrl.models.GaussianMLP(
        inputs,
        OBS + rewards,
        "cpu",
        num_layers=3,
        ensemble_size=4,
        hid_size=16,
        propagation_method=method,
        activation_fn_cfg={"_target_": f"torch.nn.{activation}"},
    )
    with torch.no_grad():
        for layer in [layer[0] for layer in mlp.hidden_layers] + [mlp.mean_and_logvar]:
            layer.bias.normal_(0.0, 0.3)
        mlp.mean_and_logvar.bias[:, 0, 0] = 3.0 * torch.arange(4)
        mlp.mean_and_logvar.bias[:, 0, OBS + rewards] = -6.0
        mlp.max_logvar.uniform_(-0.5, 0.5)
        mlp.min_logvar.uniform_(-7.0, -5.0)
    if elites:
        mlp.set_elite(elites)
    model = mbrl.models.OneDTransitionRewardModel(
        mlp, normalize=True, normalize_double_precision=double, **options
    )
    data = random.normal(0.3, 2.0, size=(100, inputs)).astype(np.float64 if double else np.float32)
    model.input_normalizer.update_stats(data)
    return model


def both(model, reward_fn=None, **options):
    for kind in (mbrl.models.ModelEnv, mbrl_lib.ModelEnv):
        extra = options if kind is mbrl_lib.ModelEnv else {}
        yield kind(space, model, ends, reward_fn, torch.Generator().manual_seed(5), **extra)


def step(env, observations, actions, sample, as_np=True):
    torch.manual_seed(7)
    state = env.reset(observations, return_as_np=as_np)
    *made, after = env.step(actions if as_np else torch.from_numpy(actions), state, sample=sample)
    assert after is state and after["obs"].shape == observations.shape
    return made


observations = random.normal(size=(60, OBS)).astype(np.float32)
actions = random.uniform(-1, 1, size=(60, ACT)).astype(np.float32)
compared = 0

# Deterministic steps: both draw elites from torch's generator alike, so each row uses the same elite.
for method in ("random_model", "fixed_model", "expectation"):
    for activation in ("SiLU", "ReLU", "Tanh"):
        for double in (False, True):
            for options in OPTIONS:
                for elites in ((3, 0, 2), None):
                    model = make(method, activation, double, elites, **options)
                    reward = None if options.get("learned_rewards", True) else reward_of
                    for as_np in (True, False):
                        theirs, ours = (
                            step(env, observations, actions, False, as_np) for env in both(model, reward)
                        )
                        for one, other in zip(theirs, ours, strict=True):
                            assert type(one) is type(other) and one.dtype == other.dtype
                            assert one.shape == other.shape, (one.shape, other.shape)
                        for one, other in zip(theirs[:2], ours[:2], strict=True):
                            np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-5)
                        assert (np.asarray(theirs[2]) == np.asarray(ours[2])).mean() > 0.98
                        compared += 1

# Random steps: samples have the same distribution, and each elite predicts the same number of rows.
many, same = np.repeat(observations[:1], 9999, axis=0), np.repeat(actions[:1], 9999, axis=0)
for method in ("random_model", "fixed_model", "expectation"):
    for penalty in (0.0, 1.0):
        theirs, ours = (step(env, many, same, True) for env in both(make(method), penalty_coef=penalty))
        if penalty:
            env = list(both(make(method), penalty_coef=1.0))[1]
            ours = step(env, many, same, True)
            assert env.penalties.shape == (9999, 1) and np.allclose(env.penalties, env.penalties[0])
            ours[1] = ours[1] + env.penalties.numpy()
        assert differences(np.hstack(ours[:2]), np.hstack(theirs[:2])) == [], method
    if method == "expectation":
        continue
    # The members' means differ in the first dimension, which identifies the elite of a row.
    for made in (theirs, ours):
        middle = np.sort(made[0][:, 0])[[1666, 4999, 8332]]
        nearest = np.abs(made[0][:, :1] - middle).argmin(1)
        assert np.bincount(nearest).tolist() == [3333] * 3, np.bincount(nearest)
independent = list(both(make("random_model"), partition="independent"))[1]
made = step(independent, many, same, True)
nearest = np.abs(made[0][:, :1] - middle).argmin(1)
counts = np.bincount(nearest)
assert counts.tolist() != [3333] * 3 and np.abs(counts - 3333).max() < 250, counts

# The comparison detects more noise and another elite.
theirs, ours = both(make("random_model"))
loud = make("random_model")
with torch.no_grad():
    for bound in (loud.model.max_logvar, loud.model.min_logvar, loud.model.mean_and_logvar.bias[..., 4:]):
        bound.add_(2 * np.log(1.1))
truth = np.hstack(step(theirs, many, same, True)[:2])
assert differences(np.hstack(step(list(both(loud))[1], many, same, True)[:2]), truth)
other = make("random_model", elites=(3, 0, 1))
assert differences(np.hstack(step(list(both(other))[1], many, same, True)[:2]), truth)

# Training the model has an effect at once.
model = make("expectation")
env = list(both(model))[1]
before = step(env, observations, actions, False)[0]
with torch.no_grad():
    model.model.mean_and_logvar.bias.add_(1.0)
assert np.allclose(step(env, observations, actions, False)[0], before + 1.0, atol=1e-5)
ensemble = mbrl_lib.ensemble_over(model)
assert ensemble.weights[0].data_ptr() == model.model.hidden_layers[0][0].weight.data_ptr()

# Both evaluate sequences of actions.
sequences = torch.from_numpy(random.uniform(-1, 1, size=(4, 3, ACT)).astype(np.float32))
values = [
    env.evaluate_action_sequences(sequences, observations[0], 3000) for env in both(make("random_model"))
]
assert values[0].shape == values[1].shape and torch.allclose(values[0], values[1], atol=0.1), values

# Rows that are not finite stay in the batch, as in mbrl-lib, and do not affect other rows.
broken = observations.copy()
broken[4, 1], broken[9] = np.inf, np.nan
for options in OPTIONS:
    model = make("random_model", **options)
    reward = None if options.get("learned_rewards", True) else reward_of
    theirs, ours = (step(env, broken, actions, False) for env in both(model, reward))
    for one, other in zip(theirs, ours, strict=True):
        assert np.array_equal(np.isfinite(one), np.isfinite(other)), options
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-5)
    assert np.isnan(ours[0]).any(1).nonzero()[0].tolist() == [4, 9], options
    ours = list(both(model, reward, penalty_coef=1.0))[1]
    step(ours, broken, actions, True)
    assert ours.penalties.isnan()[:, 0].nonzero()[:, 0].tolist() == [4, 9]

# An attribute that another version may lack is named.
for owner, name in (("model", "elite_models"), (None, "no_delta_list")):
    model = make("random_model")
    delattr(model if owner is None else getattr(model, owner), name)
    try:
        list(both(model))
        raise AssertionError(f"a model without {name} was taken")
    except InputError as error:
        assert f"has no {name}; this adapter was written for mbrl-lib 0.2.0" in str(error), error

# Convert files in both directions.
model = make("random_model", double=True)
Path("theirs").mkdir()
model.save("theirs")
convert_checkpoint("theirs", "ours", "mbrl-lib", "mopo-fast", Hints(activation="silu"))
convert_checkpoint("ours", "back", "mopo-fast", "mbrl-lib")
again = make("random_model", elites=None)
again.load("back")
assert again.model.elite_models == [3, 0, 2]
for name, value in model.model.state_dict().items():
    assert torch.equal(again.model.state_dict()[name], value), name
theirs, ours = (step(next(both(some)), observations, actions, False)[0] for some in (model, again))
np.testing.assert_allclose(ours, theirs, atol=1e-5)
print(compared)
