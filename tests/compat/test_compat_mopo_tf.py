"""Test the authors' code: comparison with results recorded by recorded/mopo_tf.py, and its files."""

import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import places
import pytest
import torch
from recorded.mopo_tf import RULES, ends, random_states
from two_samples import kolmogorov_smirnov, second_moments, shares

from mopo_fast import Actor, EnsembleDynamics, InputError, RolloutEngine
from mopo_fast.cli import main
from mopo_fast.compat import Checkpoint
from mopo_fast.compat.mopo_tf import FakeEnv, from_bnn, read, write
from mopo_fast.config import Hints
from mopo_fast.tasks import BOXES

RECORDED = places.RECORDED / "mopo_tf"
TYPES = json.loads((RECORDED / "types.json").read_text())
CONFIG = SimpleNamespace(termination_fn=ends)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    with np.load(RECORDED / "record.npz") as file:
        return dict(file)


def model_with(heads: int, record: dict[str, Any]) -> EnsembleDynamics:
    elites = tuple(record[f"elites{heads}"].tolist())
    dynamics = read(RECORDED / f"heads{heads}_0.mat", Hints(elites=elites)).dynamics
    assert dynamics is not None
    return dynamics


@pytest.fixture(scope="module")
def model(record: dict[str, Any]) -> EnsembleDynamics:
    return model_with(2, record)


class Session:
    """Stand-in for a BNN that needs no TensorFlow. `fetched` counts how often its weights are read."""

    def __init__(self, heads: int) -> None:
        from scipy.io import loadmat

        arrays = loadmat(RECORDED / f"heads{heads}_0.mat")
        numbers = [arrays[str(i)] for i in range(sum(name.isdecimal() for name in arrays))]
        self.sess, self.fetched = self, 0
        self.nonoptvars, self.optvars = numbers[:2], numbers[2:]
        layer = SimpleNamespace(get_activation=lambda as_func: "swish")
        last = SimpleNamespace(get_activation=lambda as_func: None)
        self.layers, self.end_act = [*[layer] * 4, last], None

    def run(self, values: list[Any]) -> list[Any]:
        self.fetched += 1
        return [value.copy() for value in values]


@pytest.mark.parametrize("heads", [1, 2])
def test_means_and_variances(heads: int, record: dict[str, Any]) -> None:
    model = model_with(heads, record)
    inputs = torch.from_numpy(np.concatenate((record["obs"], record["act"]), -1)).double()
    mean, logvar = model.double()(inputs)
    exact = {"mean": mean.detach().numpy(), "var": logvar.exp().detach().numpy()}
    exact = {name: np.roll(array, 1, -1) for name, array in exact.items()}
    engine = RolloutEngine(model.float(), penalty_coef=0.0)
    result = engine.step(record["obs"], record["act"], seed=0, distributions=True)
    assert result.mean is not None and result.std is not None
    ours = {"mean": np.roll(result.mean, 1, -1), "var": np.roll(np.square(result.std), 1, -1)}
    for name, values in exact.items():
        scale = np.abs(values).max()
        theirs = np.abs(record[f"{name}{heads}"] - values).max()
        assert theirs < 3e-6 * scale
        assert np.abs(ours[name] - values).max() <= 2.0 * theirs


@pytest.mark.parametrize("case", list(TYPES))
def test_step(case: str, record: dict[str, Any], model: EnsembleDynamics) -> None:
    coeff, learned, deterministic, single = (json.loads(word.lower()) for word in case.split())
    env = FakeEnv(model, CONFIG, penalty_coeff=coeff, penalty_learned_var=learned)
    obs, act = record["obs"], record["act"]
    next_obs, rewards, terminals, info = env.step(
        *((obs[0], act[0]) if single else (obs, act)), deterministic=deterministic
    )
    outputs = {"next_obs": next_obs, "rewards": rewards, "terminals": terminals, **info}
    types = {n: None if a is None else [str(a.dtype), list(a.shape)] for n, a in outputs.items()}
    assert types == TYPES[case] and list(types) == list(TYPES[case])
    for name, array in outputs.items():
        if f"{case} {name}" in record:
            np.testing.assert_allclose(array, record[f"{case} {name}"], rtol=2e-5, atol=2e-6)
    assert (deterministic and not single) == (f"{case} next_obs" in record)


def test_log_prob_of_a_draw(record: dict[str, Any], model: EnsembleDynamics) -> None:
    np.random.seed(4)
    obs = record["obs"].astype(np.float64)
    next_obs, rewards, terminals, info = FakeEnv(model, CONFIG).step(obs, record["act"])
    # Entries of `info` read later use the same draw, even if the input arrays have changed.
    obs[:] = 7.0
    means, variances = record["mean2"].astype(np.float64), record["var2"].astype(np.float64)
    means[..., 1:] += record["obs"]
    sample = np.concatenate((rewards, next_obs), -1)
    normal = torch.distributions.Normal(torch.from_numpy(means), torch.from_numpy(np.sqrt(variances)))
    expected = normal.log_prob(torch.from_numpy(sample)).sum(-1).exp().sum(0).log()
    np.testing.assert_allclose(info["log_prob"], expected, rtol=1e-4)
    np.testing.assert_allclose(info["dev"], means.std(0).mean(-1), rtol=1e-5)
    member = np.abs(means[:, :, 0] - info["mean"][:, 0]).argmin(0)
    assert set(member) == set(model.elites.tolist())
    rows = np.arange(len(member))
    np.testing.assert_allclose(np.delete(info["mean"], 1, -1), means[member, rows], rtol=1e-5, atol=1e-6)
    assert (info["mean"][:, 1] == terminals[:, 0]).all() and (info["std"][:, 1] == 0).all()
    np.testing.assert_allclose(
        np.delete(info["std"], 1, -1), np.sqrt(variances)[member, rows], rtol=1e-5, atol=1e-6
    )


def test_same_distribution(record: dict[str, Any], model: EnsembleDynamics) -> None:
    np.random.seed(5)
    means, variances = record["mean2"][:, 0].astype(np.float64), record["var2"][:, 0]
    means[:, 1:] += record["obs"][0]
    theirs, drawn = record["samples"], record["drawn"]
    rows = np.repeat(record["obs"][:1], 20_000, 0), np.repeat(record["act"][:1], 20_000, 0)
    next_obs, rewards, _, info = FakeEnv(model, CONFIG).step(*rows)
    ours = np.concatenate((rewards, next_obs), -1)
    member = np.abs(info["mean"][:, :1] - means[:, 0]).argmin(1)
    for mine, other in zip(ours.T, theirs.T, strict=True):
        assert kolmogorov_smirnov(mine, other) < 1.95
    assert abs(shares(member == model.elites[0].item(), drawn == model.elites[0].item())) < 3.3
    noise = [
        (sample - means[who]) / np.sqrt(variances[who]) for sample, who in ((ours, member), (theirs, drawn))
    ]
    assert abs(second_moments(*noise)) < 3.3


def test_seeded_by_numpy(record: dict[str, Any], model: EnsembleDynamics) -> None:
    env = FakeEnv(model, CONFIG)
    np.random.seed(1)
    first, second = (env.step(record["obs"], record["act"])[0] for _ in range(2))
    np.random.seed(1)
    again = env.step(record["obs"], record["act"])[0]
    assert (first == again).all() and (first != second).all()


def test_of_a_session(record: dict[str, Any]) -> None:
    bnn = Session(2)
    env = FakeEnv(bnn, CONFIG, penalty_coeff=1.5, penalty_learned_var=True)
    rows = record["obs"], record["act"]
    # Before training, the BNN has no elites and its weights may change at any time.
    env.step(*rows)
    env.step(*rows)
    assert bnn.fetched == 2 and env.dynamics.elites.tolist() == [0, 1, 2, 3]
    bnn._model_inds = record["elites2"].tolist()
    info, _, _ = (env.step(*rows)[3] for _ in range(3))
    assert bnn.fetched == 4 and env.dynamics.elites.tolist() == record["elites2"].tolist()
    np.testing.assert_allclose(info["penalty"], record["1.5 True False False penalty"], rtol=1e-5)
    # Training assigns a new list of elites, even if it holds the same members.
    bnn._model_inds = list(bnn._model_inds)
    bnn.optvars[-3][..., 0] += 1.0
    assert (env.step(*rows, deterministic=True)[0] > 0).any() and bnn.fetched == 5
    # `info` of an earlier step is computed with the model of that step.
    np.testing.assert_allclose(info["dev"], record["0.0 False True False dev"], rtol=1e-5)


def test_models_that_ours_cannot_be() -> None:
    bnn = Session(1)
    assert from_bnn(bnn).hidden == (8, 8, 8, 8)
    bnn.layers[1] = SimpleNamespace(get_activation=lambda as_func: "sigmoid")
    with pytest.raises(InputError, match="the BNN has hidden layers of swish, sigmoid, swish"):
        from_bnn(bnn)
    bnn = Session(1)
    del bnn.end_act
    with pytest.raises(
        InputError, match="Session has no end_act; this adapter was written for the MOPO authors"
    ):
        from_bnn(bnn)
    bnn = Session(1)
    bnn.end_act = abs
    with pytest.raises(InputError, match="activation on its outputs"):
        from_bnn(bnn)
    bnn = Session(2)
    bnn.optvars.insert(10, np.ones((4, 5, 8), np.float32))
    with pytest.raises(InputError, match="the BNN cannot be read as an ensemble"):
        from_bnn(bnn)
    bnn = Session(2)
    bnn.nonoptvars[1][0, 2] = 0.0
    with pytest.raises(InputError, match="deviations must be positive"):
        from_bnn(bnn)


@pytest.mark.parametrize("name", RULES)
def test_rules_by_name(name: str, record: dict[str, Any]) -> None:
    states = random_states(RULES[name], len(name))
    expected = np.unpackbits(record[f"ends {name}"], count=len(states)).astype(bool)
    assert expected.any() == (name != "halfcheetah")
    config = SimpleNamespace(termination_fn=static_rule(name))
    ensemble = EnsembleDynamics(RULES[name], 2, members=1, elites=1, hidden=(4,))
    box = FakeEnv(ensemble, config)._termination()
    contained = np.ones(len(states), bool) if box is None else box.contains(torch.from_numpy(states)).numpy()
    assert (contained == ~expected).all()


def static_rule(name: str) -> Callable[..., Any]:
    """Make a termination function named like mopo/static/NAME.py that fails if it is called."""
    module = ModuleType(f"mopo.static.{name}")
    exec("def termination_fn(obs, act, next_obs):\n    raise AssertionError", module.__dict__)
    return module.termination_fn  # type: ignore[no-any-return]


def weights_of(actor: Actor) -> list[Any]:
    return [t.detach().numpy() for pair in zip(actor.weights, actor.biases, strict=True) for t in pair]


def test_rollout(record: dict[str, Any], model: EnsembleDynamics) -> None:
    actor = Actor(3, 2, hidden=(8,))
    policy = SimpleNamespace(get_weights=lambda: weights_of(actor), _activation="relu", _squash=True)
    env = FakeEnv(model, CONFIG, penalty_coeff=1.5)
    obs = record["obs"].astype(np.float64)
    np.random.seed(2)
    samples = env.rollout(policy, obs, 3)
    np.random.seed(2)
    ours = env.rollout(actor, obs, 3)
    assert all((samples[name] == ours[name]).all() for name in samples)
    # Keys and shapes are those of the authors' pool, and no rollout continues after a terminal.
    count = len(samples["rewards"])
    shapes = {name: array.shape for name, array in samples.items()}
    assert shapes == {
        "observations": (count, 3),
        "actions": (count, 2),
        "next_observations": (count, 3),
        "rewards": (count, 1),
        "terminals": (count, 1),
    }
    assert samples["terminals"].dtype == bool
    assert (samples["terminals"] == ends(None, None, samples["next_observations"])).all()
    assert len(obs) < count < 3 * len(obs)
    # Each reward is that of a step of the authors' code, less the penalty.
    info = env.step(samples["observations"], samples["actions"])[3]
    error = samples["rewards"] + 1.5 * info["penalty"] - info["mean"][:, :1]
    assert abs(error.mean()) < 0.3 and error.std() < 1.0
    fused = FakeEnv(model, SimpleNamespace(termination_fn=static_rule("halfcheetah"))).rollout(actor, obs, 3)
    assert len(fused["rewards"]) == 3 * len(obs)
    with pytest.raises(InputError, match="the fused rollout has no rollout_random; keep the authors' loop"):
        env.rollout(policy, obs, 3, rollout_random=True)
    with pytest.raises(InputError, match="the fused rollout has no deterministic"):
        env.rollout(policy, obs, 3, deterministic=True)
    for settings, message in (
        ({"_deterministic": True}, "is set to be deterministic"),
        ({"_output_activation": "tanh"}, "output activation tanh"),
        ({"actions_np": lambda _: None}, "SimpleNamespace has a method actions_np of its own"),
    ):
        with pytest.raises(InputError, match=message):
            env.rollout(SimpleNamespace(get_weights=lambda: weights_of(actor), **settings), obs, 3)
    with pytest.raises(InputError, match="not squashed"):
        env.rollout(SimpleNamespace(get_weights=lambda: weights_of(actor), _squash=False), obs, 3)


def test_files_there_and_back(record: dict[str, Any], tmp_path: Path) -> None:
    from scipy.io import loadmat

    source = tmp_path / "source"
    shutil.copytree(RECORDED, source)
    (source / "heads1_0.mat").unlink()
    elites = [str(member) for member in record["elites2"]]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    arguments = ["convert", str(source), str(ours), "--from", "mopo-tf", "--elites", *elites]
    assert main(arguments) == 0
    assert EnsembleDynamics.load(ours).elites.tolist() == record["elites2"].tolist()
    assert main(["convert", str(ours), str(theirs), "--from", "mopo-fast", "--to", "mopo-tf"]) == 0
    expected, got = loadmat(source / "heads2_0.mat"), loadmat(theirs / "BNN_0.mat")
    numbers = [name for name in expected if name.isdecimal()]
    assert len(numbers) == 16 and numbers == [name for name in got if name.isdecimal()]
    for name in numbers:
        assert got[name].dtype == np.float32 and got[name].shape == expected[name].shape
        assert (got[name] == expected[name]).all()
    for end in (".nns", "_var.nns"):
        assert (theirs / f"BNN_0{end}").read_text() == (source / f"heads2_0{end}").read_text()
    # The classes named in the checkpoint are not installed.
    policies = [read(folder / "checkpoint.pkl").policy for folder in (source, theirs)]
    assert policies[0] is not None and policies[1] is not None
    assert policies[0].hidden == (8, 8)
    for before, after in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
        assert torch.equal(before, after)
    content = (theirs / "checkpoint.pkl").read_bytes()
    assert b"numpy.core.multiarray" in content and b"numpy._core" not in content
    weights = pickle.loads(content)["policy_weights"]
    assert all((a == b).all() for a, b in zip(weights, weights_of(policies[0]), strict=True))


def test_one_head(record: dict[str, Any], tmp_path: Path) -> None:
    model = model_with(1, record)
    write(Checkpoint(model), tmp_path)
    again = read(tmp_path).dynamics
    assert again is not None
    assert again.elites.tolist() == [0, 1, 2, 3]
    for name, tensor in model.state_dict().items():
        if name != "elites":
            assert torch.equal(tensor, again.state_dict()[name]), name


def test_without_the_structure(tmp_path: Path) -> None:
    shutil.copy(RECORDED / "heads2_0.mat", tmp_path)
    activations = []
    for hints in (Hints(), Hints(activation="relu")):
        dynamics = read(tmp_path, hints).dynamics
        assert dynamics is not None
        activations.append(dynamics.activation)
    assert activations == ["silu", "relu"]


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("pwned",)


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(path: Path, hints: Hints = Hints()) -> str:  # noqa: B008
        with pytest.raises(InputError) as error:
            read(path, hints)
        return str(error.value)

    assert "holds several models: heads1_0.mat, heads2_0.mat; name one" in fails(RECORDED)
    two = RECORDED / "heads2_0.mat"
    assert "stores the activation" in fails(two, Hints(activation="relu"))
    assert "leave absolute out" in fails(two, Hints(absolute=(0,)))
    assert "elites must be distinct" in fails(two, Hints(elites=(1, 9)))
    for size in (0, 100, 3000):
        (tmp_path / "cut.mat").write_bytes(two.read_bytes()[:size])
        assert "cut.mat is not a whole MATLAB file" in fails(tmp_path / "cut.mat")
    from scipy.io import savemat

    # These are valid MATLAB files with other content.
    savemat(tmp_path / "other.mat", {"weights": np.ones(3)})
    assert "other.mat cannot be read as an ensemble" in fails(tmp_path / "other.mat")
    savemat(tmp_path / "gap.mat", {"0": np.ones(3), "2": np.ones(3)})
    assert "gap.mat lacks the array 1" in fails(tmp_path / "gap.mat")
    shutil.copy(two, tmp_path / "tanh.mat")
    text = (RECORDED / "heads2_0.nns").read_text()
    (tmp_path / "tanh.nns").write_text(text.replace("'swish'", "'tanh'", 1))
    assert "hidden layers of tanh, swish, swish" in fails(tmp_path / "tanh.mat")
    (tmp_path / "tanh.nns").write_text(text.replace("None", "'tanh'"))
    assert "does not end in a layer without activation" in fails(tmp_path / "tanh.mat")
    checkpoint = tmp_path / "checkpoint.pkl"
    for content in (Malicious(), {"policy_weights": Malicious()}, {"Qs": []}):
        checkpoint.write_bytes(pickle.dumps(content))
        assert "holds no list of policy_weights" in fails(checkpoint)
    for weights in ([], [np.ones(3)], [Malicious(), Malicious()], [np.ones((3, 4)), np.ones(5)]):
        checkpoint.write_bytes(pickle.dumps({"policy_weights": weights}))
        assert "holds no feed-forward Gaussian policy" in fails(checkpoint)
    checkpoint.write_bytes(b"nothing")
    assert "not a whole pickle file" in fails(checkpoint)
    assert "pwned" not in capsys.readouterr().out
    with pytest.raises(InputError, match="have no log standard deviations; these dynamics do"):
        write(Checkpoint(EnsembleDynamics(3, 2, hidden=(4,), log_scale="std")), tmp_path)
    with pytest.raises(InputError, match="policies have ReLU, this one has tanh"):
        write(Checkpoint(policy=Actor(3, 2, activation="tanh")), tmp_path)


def test_of_a_folder(tmp_path: Path, record: dict[str, Any], model: EnsembleDynamics) -> None:
    model.save(tmp_path)
    for source in (tmp_path, RECORDED / "heads2_0.mat"):
        env = FakeEnv(source, CONFIG)
        next_obs = env.step(record["obs"], record["act"], deterministic=True)[0]
        np.testing.assert_allclose(next_obs, record["0.0 False True False next_obs"], rtol=2e-5, atol=2e-6)
    with pytest.raises(InputError, match="holds no dynamics"):
        FakeEnv(str(RECORDED / "checkpoint.pkl"), CONFIG)
    assert "hopper-authors" in BOXES


BESIDE_TENSORFLOW = """
import importlib.machinery, sys, types
import numpy as np
tensorflow = types.ModuleType("tensorflow")
tensorflow.__spec__ = importlib.machinery.ModuleSpec("tensorflow", None)
if "tensorflow" in sys.argv:
    sys.modules["tensorflow"] = tensorflow
from mopo_fast import EnsembleDynamics, InputError
from mopo_fast.compat.mopo_tf import FakeEnv, do_without_triton
static = types.SimpleNamespace(termination_fn=lambda obs, act, next_obs: next_obs[:, :1] > 0)
try:
    env = FakeEnv(EnsembleDynamics(3, 2, hidden=(4,)), static)
except InputError as error:
    assert "call mopo_fast.compat.mopo_tf.do_without_triton() first" in str(error)
    assert "triton" not in sys.modules
    do_without_triton()
    env = FakeEnv(EnsembleDynamics(3, 2, hidden=(4,)), static)
before = sys.modules.get("triton", "not there")
env.step(np.zeros((5, 3)), np.zeros((5, 2)))
print(before is None, sys.modules.get("triton", "not there") is before)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not there")
@pytest.mark.parametrize(("loaded", "blocked"), [("tensorflow", "True"), ("", "False")])
def test_triton_comes_before_tensorflow_or_never(loaded: str, blocked: str) -> None:
    command = [sys.executable, "-c", BESIDE_TENSORFLOW, loaded]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == [blocked, "True"], done.stderr
