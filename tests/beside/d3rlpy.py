"""Compare our d3rlpy support with the real d3rlpy 1.1.1; run by test_compat_d3rlpy.py."""

import copy
import importlib
import importlib.machinery
import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from two_samples import differences

# Replace packages that d3rlpy imports but nothing here calls.
for name in ("gym", "sklearn", "structlog", "tensorboardX", "colorama", "click", "tqdm"):
    try:
        importlib.import_module(name)
    except ImportError:
        for part in ("", ".auto", ".spaces", ".wrappers", ".model_selection", ".neighbors", ".envs"):
            spec = importlib.machinery.ModuleSpec(name + part, None)
            sys.modules[name + part] = MagicMock(__spec__=spec)
from d3rlpy.algos import AWAC, COMBO, MOPO, SAC  # noqa: E402
from d3rlpy.dataset import Transition, TransitionMiniBatch  # noqa: E402
from d3rlpy.dynamics import ProbabilisticEnsembleDynamics  # noqa: E402
from d3rlpy.models.encoders import VectorEncoderFactory  # noqa: E402
from d3rlpy.models.optimizers import AdamFactory  # noqa: E402
from d3rlpy.models.q_functions import MeanQFunctionFactory  # noqa: E402
from d3rlpy.preprocessing import (  # noqa: E402
    MinMaxActionScaler,
    MinMaxScaler,
    StandardRewardScaler,
    StandardScaler,
)
from d3rlpy.torch_utility import get_state_dict  # noqa: E402
from kernel_noise import drawn_by_torch, noise_of, seen_draws  # noqa: E402

from mopo_fast import EnsembleDynamics, InputError, RolloutEngine  # noqa: E402
from mopo_fast.compat import convert_checkpoint, d3rlpy  # noqa: E402
from mopo_fast.config import Hints  # noqa: E402

OBS, ACT = 3, 2
random = np.random.default_rng(0)
SCALERS = {
    "standard": {"scaler": StandardScaler(mean=np.array([1.0, -2, 0.5]), std=np.array([2.0, 0.5, 1]))},
    "min_max": {"scaler": MinMaxScaler(minimum=np.full(3, -4.0), maximum=np.array([1.0, 2, 3]))},
    "all": {
        "scaler": StandardScaler(mean=np.array([1.0, -2, 0.5]), std=np.array([2.0, 0.5, 1])),
        "action_scaler": MinMaxActionScaler(minimum=np.full(2, -3.0), maximum=np.array([1.0, 2])),
        "reward_scaler": StandardRewardScaler(mean=3.0, std=2.0, multiplier=0.5),
    },
}


def make(variance="max", activation="relu", scalers=None, members=4):
    """Make a model unlike a fresh one: biases, variance bounds, separate means in the first dimension."""
    torch.manual_seed(1)
    made = ProbabilisticEnsembleDynamics(
        n_ensembles=members,
        variance_type=variance,
        encoder_factory=VectorEncoderFactory([16, 12], activation=activation),
        **(SCALERS[scalers] if scalers else {}),
    )
    made.create_impl((OBS,), ACT)
    with torch.no_grad():
        for number, member in enumerate(made._impl._dynamics._models):
            for layer in (*member._encoder._fcs, member._mu, member._logstd):
                layer.bias.normal_(0.0, 0.3)
            member._mu.bias[0] = 3.0 * number
            member._logstd.bias -= 2.0
            member._max_logstd.uniform_(-0.5, 0.5)
            member._min_logstd.uniform_(-4.0, -3.0)
    # Update the power iterations of spectral normalisation.
    made._impl._dynamics.train()
    made._impl._dynamics(torch.zeros(1, OBS), torch.zeros(1, ACT))
    return made


def assert_close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=3e-5, atol=3e-5)


observations = random.normal(size=(40, OBS)).astype(np.float32)
actions = random.uniform(-1, 1, size=(40, ACT)).astype(np.float32)
many, same = np.repeat(observations[:1], 6000, axis=0), np.repeat(actions[:1], 6000, axis=0)
compared = 0
for activation in ("relu", "tanh", "swish"):
    for scalers in (None, *SCALERS):
        theirs, ours = make("max", activation, scalers), d3rlpy.accelerate(make("max", activation, scalers))
        one, other = (each.predict(observations, actions, with_variance=True) for each in (theirs, ours))
        for x, y in zip(one, other, strict=True):
            assert type(x) is type(y) and x.dtype == y.dtype and x.shape == y.shape
        # Variances are deterministic and can be compared directly; the other results are random samples.
        assert_close(other[2], one[2])
        # Compare the means and spreads of each member.
        model = theirs._impl._dynamics.eval()
        inputs = torch.from_numpy(observations), torch.from_numpy(actions)
        ensemble = d3rlpy.ensemble_over(model)
        made = RolloutEngine(ensemble).step(*inputs, seed=0, distributions=True)
        for number, member in enumerate(model._models):
            mean, log = member.compute_stats(*inputs)
            assert_close(made.mean[number], mean.detach())
            assert_close(made.std[number], log.exp().detach())
        compared += 1

for variance in ("max", "data"):
    for scalers in (None, "all"):
        for indices in (None, np.full(6000, 2), np.arange(6000) % 4):
            torch.manual_seed(3)
            pair = make(variance, scalers=scalers), d3rlpy.accelerate(make(variance, scalers=scalers))
            one, other = (
                np.hstack(each.predict(many, same, with_variance=True, indices=indices)) for each in pair
            )
            columns = slice(None, -1) if variance == "max" else slice(None)
            assert differences(other[:, columns], one[:, columns]) == [], (variance, scalers, indices)
            compared += 1
            if indices is not None:
                # Each row was predicted by the member that was asked for.
                np.testing.assert_allclose(
                    *(made[indices == 2, 0].mean() for made in (one, other)), rtol=0.05
                )
loud = d3rlpy.accelerate(make())
with torch.no_grad():
    for member in loud._impl._dynamics._models:
        for shifted in (member._max_logstd, member._min_logstd, member._logstd.bias):
            shifted.add_(np.log(1.1))
one, other = (np.hstack(each.predict(many, same, indices=np.full(6000, 2))) for each in (make(), loud))
assert differences(other, one)
fewer = d3rlpy.accelerate(make(members=3))
assert differences(np.hstack(fewer.predict(many, same)), np.hstack(make().predict(many, same)))

# A change of the model's parameters has an effect at once.
ours = d3rlpy.accelerate(make())
before = ours.predict(observations, actions, True)[2]
with torch.no_grad():
    for member in ours._impl._dynamics._models:
        member._logstd.bias.add_(1.0)
assert (ours.predict(observations, actions, True)[2] > before).all()

for options in ({"use_batch_norm": True}, {"dropout_rate": 0.1}, {"use_dense": True}):
    other = ProbabilisticEnsembleDynamics(encoder_factory=VectorEncoderFactory([8], **options))
    try:
        d3rlpy.accelerate(other)
    except InputError as error:
        assert "fit or build them first" in str(error)
    other.create_impl((OBS,), ACT)
    try:
        d3rlpy.accelerate(other)
    except InputError as error:
        assert "batch norms, dropout or dense" in str(error)
    else:
        raise AssertionError(options)

# Convert files in both directions; the scalers become part of our model.
for scalers in (None, *SCALERS):
    folder = Path(f"files-{scalers}")
    folder.mkdir()
    model = make(scalers=scalers)
    model.save_model(folder / "model.pt")
    if scalers:
        # Write the scalers as d3rlpy's logger does.
        described = {
            key: {"type": scaler.get_type(), "params": scaler.get_params()}
            for key, scaler in SCALERS[scalers].items()
        }
        (folder / "params.json").write_text(json.dumps(described, default=np.ndarray.tolist))
    convert_checkpoint(folder / "model.pt", folder / "ours", "d3rlpy", "mopo-fast", Hints(activation="relu"))
    ensemble = EnsembleDynamics.load(folder / "ours")
    engine = RolloutEngine(ensemble)
    for number in range(4):
        # Compare the mean of many unscaled samples of d3rlpy with our predicted mean.
        own = model.predict(many, same, indices=np.full(6000, number))
        made = engine.step(torch.from_numpy(many[:1]), torch.from_numpy(same[:1]), seed=0, distributions=True)
        mean, std = made.mean[number, 0].numpy(), made.std[number, 0].numpy()
        sampled = np.hstack([own[0] - many, own[1]])
        assert (np.abs(sampled.mean(0) - mean) < 5 * std / 6000**0.5).all(), scalers
        assert (np.abs(sampled.std(0) / std - 1) < 0.06).all(), scalers
    if scalers is None:
        convert_checkpoint(folder / "ours", folder / "back.pt", "mopo-fast", "d3rlpy")
        again = make()
        again.load_model(folder / "back.pt")
        one, other = (d3rlpy.ensemble_over(each._impl._dynamics.eval()) for each in (model, again))
        for x, y in zip(one.parameters(), other.parameters(), strict=True):
            assert_close(y, x)
    compared += 1

# Updates with equal batches and noise.
UPDATED, BATCH = 5, 40


def make_algo(kind, **options):
    torch.manual_seed(2)
    algo = kind(
        actor_learning_rate=3e-3,
        critic_learning_rate=1e-2,
        temp_learning_rate=options.pop("temp_learning_rate", 1e-2),
        tau=0.1,
        gamma=0.9,
        initial_temperature=0.4,
        **{"actor_encoder_factory": WIDTHS, "critic_encoder_factory": WIDTHS} | options,
    )
    algo.create_impl((OBS,), ACT)
    with torch.no_grad():
        algo._impl._policy._mu.bias.copy_(torch.tensor([3.0, -1.0]))
    return algo


def make_batch(seed, n_steps=1):
    generator = np.random.default_rng(seed)
    steps = [
        Transition(
            (OBS,),
            ACT,
            generator.normal(size=OBS).astype(np.float32),
            np.tanh(generator.normal(size=ACT)).astype(np.float32),
            float(generator.normal()),
            generator.normal(size=OBS).astype(np.float32),
            float(generator.random() < 0.2),
        )
        for _ in range(BATCH)
    ]
    return TransitionMiniBatch(steps)


def both_updated(ours, theirs, updates, first=0):
    """Make the same updates in both; return the largest difference of a metric."""
    largest = 0.0
    for number in range(first, first + updates):
        batch = make_batch(number)
        temp = [torch.randn(BATCH, ACT, generator=torch.Generator().manual_seed(number))]
        temp = temp if theirs._temp_learning_rate > 0 else []
        with seen_draws() as seen, drawn_by_torch(temp):
            made = ours.update(batch)
        noise = noise_of(seen[0].seed, 1, BATCH, ACT)
        with drawn_by_torch(temp + noise if isinstance(theirs, SAC) else noise + temp):
            expected = theirs.update(batch)
        assert list(made) == list(expected)
        for name, value in expected.items():
            assert np.shape(made[name]) == np.shape(value)
            largest = max(largest, float(abs(made[name] - value)) / max(1.0, float(abs(value))))
    return largest


def difference(ours, theirs):
    """Return the largest difference of a parameter or moment, relative to the largest of its tensor."""
    largest = 0.0
    states = [get_state_dict(algo._impl) for algo in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    for name, mine in states[0].items():
        pairs = [(mine, states[1][name])]
        if name.endswith("_optim"):
            assert mine["param_groups"] == states[1][name]["param_groups"], name
            pairs = [(one, states[1][name]["state"][index]) for index, one in mine["state"].items()]
        for one, other in pairs:
            assert one.keys() == other.keys(), name
            for key, value in other.items():
                scale = value.abs().max().clamp_min(1e-30)
                largest = max(largest, float((one[key] - value).abs().max() / scale))
    return largest


WIDTHS = VectorEncoderFactory([16, 12])
worst = 0.0
for kind in (MOPO, SAC):
    for options in ({}, {"temp_learning_rate": 0.0}, {"n_critics": 3}, SCALERS["all"]):
        theirs = make_algo(kind, **options)
        ours = d3rlpy.fuse_updates(make_algo(kind, **options))
        worst = max(worst, both_updated(ours, theirs, UPDATED), difference(ours, theirs))
        assert worst < 5e-5, (kind, options, worst)
        compared += 1

# A saved model goes on in the original, a copy learns by itself, and a seed repeats an update.
ours.save_model("updated.pt")
theirs, other = make_algo(SAC, **SCALERS["all"]), d3rlpy.fuse_updates(make_algo(SAC, **SCALERS["all"]))
other.update(make_batch(9))
for algo in (theirs, other):
    algo.load_model("updated.pt")
assert difference(theirs, ours) == 0.0
assert both_updated(other, theirs, 3, first=UPDATED) < 5e-5 and difference(other, theirs) < 5e-5
copies = [copy.deepcopy(ours) for _ in range(2)]
for algo in copies:
    torch.manual_seed(3)
    algo.update(make_batch(9))
assert difference(copies[0], copies[1]) == 0.0 < difference(copies[0], ours)
assert "_mopo_fast" not in ours.get_params(deep=False)
compared += 1


def refused(message, make, **options):
    try:
        d3rlpy.fuse_updates(make(), **options)
    except InputError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)


wide = VectorEncoderFactory([16, 16])
refused("has no networks yet", MOPO)
refused("method _update of its own", lambda: make_algo(AWAC))
refused("method _update of its own", lambda: make_algo(COMBO))
refused("n_steps 1, got 3", lambda: make_algo(SAC, n_steps=3))
refused("update_actor_interval 1, got 2", lambda: make_algo(MOPO, update_actor_interval=2))
refused('the Q function "mean"', lambda: make_algo(MOPO, q_func_factory="qr"))
shared = MeanQFunctionFactory(share_encoder=True)
refused("share an encoder", lambda: make_algo(MOPO, q_func_factory=shared))
refused("hidden layers [16, 12], got [16, 16]", lambda: make_algo(MOPO, critic_encoder_factory=wide))
tanh = VectorEncoderFactory([16, 12], activation="tanh")
refused("encoders with ReLU", lambda: make_algo(MOPO, actor_encoder_factory=tanh))
norms = VectorEncoderFactory([16, 12], use_batch_norm=True)
refused("batch norms", lambda: make_algo(MOPO, critic_encoder_factory=norms))
refused(
    "optimizer of the actor is Adam with", lambda: make_algo(MOPO, actor_optim_factory=AdamFactory(eps=1e-4))
)


def another_version(*names):
    """Make an algorithm that lacks an attribute, which is the last of `names`."""
    made = owner = make_algo(MOPO)
    for name in names[:-1]:
        owner = owner[0] if name == 0 else getattr(owner, name)
    delattr(owner, names[-1])
    return made


for names in (
    ("_impl", "_log_temp"),
    ("_temp_learning_rate",),
    ("_impl", "_policy", "_min_logstd"),
    ("_impl", "_q_func", "_q_funcs", 0, "_fc"),
    ("_impl", "_policy", "_encoder", "_use_dense"),
):
    refused(f"has no {names[-1]}; this adapter was written for d3rlpy 1.1.1", lambda: another_version(*names))  # noqa: B023
dynamics = make()
del dynamics._impl._variance_type
try:
    d3rlpy.accelerate(dynamics)
    raise AssertionError("dynamics of another version were taken over")
except InputError as error:
    assert "has no _variance_type; this adapter was written for d3rlpy 1.1.1" in str(error), error
ours.create_impl((OBS,), ACT)
try:
    ours.update(make_batch(0))
    raise AssertionError("networks that are new were updated")
except InputError as error:
    assert "call fuse_updates again" in str(error), error
print(compared)
