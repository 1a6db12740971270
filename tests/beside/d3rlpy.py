"""Compare our d3rlpy support with the real d3rlpy 1.1.1; run by test_compat_d3rlpy.py."""

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
from d3rlpy.dynamics import ProbabilisticEnsembleDynamics  # noqa: E402
from d3rlpy.models.encoders import VectorEncoderFactory  # noqa: E402
from d3rlpy.preprocessing import (  # noqa: E402
    MinMaxActionScaler,
    MinMaxScaler,
    StandardRewardScaler,
    StandardScaler,
)

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
print(compared)
