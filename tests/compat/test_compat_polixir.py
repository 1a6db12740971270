"""Test Polixir's OfflineRL: comparison with results recorded by recorded/polixir.py, and its files."""

import copy
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import places
import pytest
import torch
from recorded.polixir import ACT, MODES, OBS
from two_samples import kolmogorov_smirnov, second_moments, shares

from mopo_fast import Actor, EnsembleDynamics, InputError
from mopo_fast.cli import main
from mopo_fast.compat import Checkpoint, polixir
from mopo_fast.compat.polixir import FastTransition, read, write
from mopo_fast.config import Hints

RECORDED = places.RECORDED / "polixir"


@pytest.fixture(scope="module")
def record() -> dict[str, torch.Tensor]:
    with np.load(RECORDED / "record.npz") as file:
        return {name: torch.from_numpy(array) for name, array in file.items()}


def dynamics_of(path: Path) -> EnsembleDynamics:
    dynamics = read(path).dynamics
    assert dynamics is not None
    return dynamics


class _StandIns(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("offlinerl."):
            return getattr(polixir, f"_{name}")
        return super().find_class(module, name)


class _Plain(pickle.Unpickler):
    """Unpickler that turns modules into plain objects, to compare their whole content."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(("offlinerl.", "torch.nn.modules.")):
            return type(name, (), {"kind": f"{module}.{name}"})
        return super().find_class(module, name)


def load(path: Path, unpickler: type[pickle.Unpickler]) -> Any:
    module = type("PickleModule", (), {"Unpickler": unpickler})
    return torch.load(path, weights_only=False, pickle_module=module)


def theirs_of(mode: str) -> Any:
    """Load a recorded Polixir module as a stand-in with its attributes but without its methods."""
    return load(RECORDED / f"{mode}.pt", _StandIns)


@pytest.mark.parametrize("mode", MODES)
def test_a_call(mode: str, record: dict[str, torch.Tensor]) -> None:
    theirs = theirs_of(mode)
    inputs = record["inputs"]
    with torch.no_grad():
        normal = FastTransition(theirs)(inputs)
    model = dynamics_of(RECORDED / f"{mode}.pt").double()
    mean, logvar = (tensor[model.elites] for tensor in model(inputs.double()))
    mean[..., :-1] = model.next_observations(inputs[:, :OBS].double(), mean)
    for name, ours, exact in (("mean", normal.mean, mean), ("std", normal.stddev, (0.5 * logvar).exp())):
        recorded = record[f"{mode} {name}"]
        assert ours.shape == recorded.shape == (2, len(inputs), OBS + 1)
        assert ours.dtype == recorded.dtype
        error = (recorded - exact).abs().max()
        assert error < 1e-6 * exact.abs().max()
        assert (ours - exact).abs().max() <= 2.0 * error


def test_samples(record: dict[str, torch.Tensor]) -> None:
    # The samples were recorded together with "global", the last mode.
    torch.manual_seed(5)
    np.random.seed(5)
    state = torch.get_rng_state()
    fast = FastTransition(theirs_of("global"))
    with torch.no_grad():
        normal = fast(record["inputs"][:1].repeat(20_000, 1))
    assert torch.equal(torch.get_rng_state(), state)
    drawn = np.random.randint(0, len(normal.mean), size=20_000)
    ours = normal.sample()[drawn, np.arange(20_000)].numpy()
    mean, std = record["global mean"][:, 0].numpy(), record["global std"][:, 0].numpy()
    theirs, who = record["samples"].numpy(), record["drawn"].numpy()
    for mine, other in zip(ours.T, theirs.T, strict=True):
        assert kolmogorov_smirnov(mine, other) < 1.95
    assert abs(shares(drawn == 0, who == 0)) < 3.3
    assert abs(second_moments((ours - mean[drawn]) / std[drawn], (theirs - mean[who]) / std[who])) < 3.3


def test_what_changes_is_seen(record: dict[str, torch.Tensor]) -> None:
    theirs = theirs_of("local")
    fast, inputs = FastTransition(theirs), record["inputs"]
    with torch.no_grad():
        before = fast(inputs).mean
        # Select other members, as set_select does: one, and as many as before.
        for members in ([3], [0, 1]):
            for layer in (*theirs.backbones, theirs.output_layer):
                layer.select = members
            model = dynamics_of(RECORDED / "local.pt")
            mean = model(inputs)[0][members]
            mean[..., :-1] += inputs[:, :OBS]
            torch.testing.assert_close(fast(inputs).mean, mean)
        theirs.output_layer.bias.data += 1.0
        torch.testing.assert_close(fast(inputs).mean, mean + 1.0)
    assert before.shape == mean.shape
    assert fast.mode == "local" and fast.transition is theirs
    assert copy.deepcopy(fast).transition.mode == "local"


def test_training_is_theirs(record: dict[str, torch.Tensor]) -> None:
    theirs = theirs_of("local")
    fast, inputs = FastTransition(theirs), record["inputs"]
    theirs.forward = lambda inputs: "theirs"
    with pytest.raises(InputError, match="has a method forward of its own"):
        FastTransition(theirs)
    assert fast(inputs) == fast.forward(inputs) == "theirs"
    with torch.no_grad():
        assert fast(inputs.expand(4, -1, -1)) == "theirs"
        assert isinstance(fast(inputs), torch.distributions.Normal)
    theirs.requires_grad_(False)
    assert isinstance(fast(inputs), torch.distributions.Normal)
    # A gradient may be needed by the inputs, for example by the actions.
    assert fast(inputs.clone().requires_grad_()) == "theirs"
    del theirs.forward
    theirs.with_reward = False
    with pytest.raises(InputError, match="predicts no reward"):
        FastTransition(theirs)


def test_policy(record: dict[str, torch.Tensor]) -> None:
    policy = read(RECORDED / "policy.pt").policy
    assert policy is not None and policy.hidden == (8, 8) and policy.act_dim == ACT
    observations = record["inputs"][:, :OBS]
    mean, log_std = policy(observations)
    torch.testing.assert_close(mean, record["policy mean"])
    torch.testing.assert_close(log_std.exp(), record["policy std"])
    assert (log_std == 2.0).any() and (log_std == -5.0).any()
    torch.testing.assert_close(policy.act(observations), record["actions"])


@pytest.mark.parametrize("mode", MODES)
def test_files_there_and_back(mode: str, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert main(["convert", str(RECORDED / f"{mode}.pt"), str(ours), "--from", "polixir"]) == 0
    assert EnsembleDynamics.load(ours).elites.tolist() == [2, 0]
    assert main(["convert", str(ours), str(theirs), "--from", "mopo-fast", "--to", "polixir"]) == 0
    first, second = contents_of(RECORDED / f"{mode}.pt"), contents_of(theirs / "dynamics.pt")
    if mode != "normalize":
        # The file keeps these arrays, but the model does not use them.
        assert first.pop("obs_mean") is not None and first.pop("obs_std") is not None
        assert second.pop("obs_mean") is None and second.pop("obs_std") is None
    assert_same(first, second)


def test_a_policy_there_and_back(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert main(["convert", str(RECORDED / "policy.pt"), str(ours), "--from", "polixir"]) == 0
    assert main(["convert", str(ours), str(theirs), "--from", "mopo-fast", "--to", "polixir"]) == 0
    assert_same(contents_of(RECORDED / "policy.pt"), contents_of(theirs / "policy.pt"))


def test_a_folder(tmp_path: Path) -> None:
    checkpoint = Checkpoint(
        read(RECORDED / "normalize.pt").dynamics,
        Actor(OBS, ACT, hidden=(4,), activation="tanh", log_std_min=-5),
    )
    write(checkpoint, tmp_path)
    again = read(tmp_path, Hints(elites=(1, 3)))
    assert again.dynamics is not None and again.policy is not None and checkpoint.policy is not None
    assert again.dynamics.elites.tolist() == [1, 3]
    assert again.policy.settings() == checkpoint.policy.settings()
    for before, after in zip(checkpoint.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(before, after)


def contents_of(path: Path) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if hasattr(value, "kind"):
            return {"kind": value.kind, **{name: plain(v) for name, v in vars(value).items()}}
        return {name: plain(v) for name, v in value.items()} if isinstance(value, dict) else value

    content = plain(load(path, _Plain))
    assert isinstance(content, dict)
    return content


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("pwned",)


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(path: Path, hints: Hints = Hints()) -> str:  # noqa: B008
        with pytest.raises(InputError) as error:
            read(path, hints)
        return str(error.value)

    local = RECORDED / "local.pt"
    assert "leave them out" in fails(local, Hints(activation="relu"))
    assert "elites must be distinct" in fails(local, Hints(elites=(1, 9)))
    path = tmp_path / "a.pt"
    assert "a.pt does not exist" in fails(path)
    whole = local.read_bytes()
    for size in (0, 100, 9000):
        path.write_bytes(whole[:size])
        assert "a.pt is not a whole file of tensors" in fails(path)
    torch.save({"weight": torch.ones(3)}, path)
    assert "a.pt is no EnsembleTransition" in fails(path)
    for content in (Malicious(), {"a": Malicious()}):
        torch.save(content, path)
        assert "a.pt is no EnsembleTransition" in fails(path)
    path.write_bytes(pickle.dumps(Malicious()))
    assert "load one of torch before 1.6 there" in fails(path)
    torch.save(torch.nn.Linear(2, 3), path)
    assert "it holds a Linear" in fails(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/constants.pkl", b"")
    assert "it holds a/constants.pkl, as a scripted module may" in fails(path)
    assert "pwned" not in capsys.readouterr().out

    def changed(model: EnsembleDynamics) -> str:
        write(Checkpoint(model), tmp_path)
        return fails(tmp_path / "dynamics.pt")

    model = dynamics_of(local)
    model.max_logvar.data[1] = float("nan")
    assert "max_logvar holds values that are not finite" in changed(model)
    model = dynamics_of(local)
    model.elites = torch.tensor([1, 7])
    assert "elites must be distinct members" in changed(model)
    model = dynamics_of(local)
    model.biases[0] = torch.nn.Parameter(torch.ones(4, 3))
    assert "is no EnsembleTransition" in changed(model)


def renamed(path: Path, old: bytes, new: bytes) -> Path:
    """Replace names in the pickle of a saved module."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)
    path.write_bytes(content.getvalue())
    return path


def test_models_that_the_other_cannot_be(tmp_path: Path) -> None:
    write(read(RECORDED / "local.pt"), tmp_path)
    with pytest.raises(InputError, match="hidden layers of Swash, not Swish"):
        read(renamed(tmp_path / "dynamics.pt", b"Swish", b"Swash"))
    write(read(RECORDED / "policy.pt"), tmp_path)
    with pytest.raises(InputError, match="activation is CELU"):
        read(renamed(tmp_path / "policy.pt", b"\nReLU", b"\nCELU"))

    def refused(model: EnsembleDynamics | Actor) -> str:
        checkpoint = Checkpoint(policy=model) if isinstance(model, Actor) else Checkpoint(model)
        with pytest.raises(InputError) as error:
            write(checkpoint, tmp_path)
        return str(error.value)

    assert "have no log-variances; these dynamics do" in refused(EnsembleDynamics(3, 2, hidden=(4,)))
    tanh = EnsembleDynamics(3, 2, hidden=(4,), log_scale="std", activation="tanh")
    assert "models have SiLU, this one has tanh" in refused(tanh)
    model = EnsembleDynamics(3, 2, hidden=(4,), log_scale="std")
    model.input_std[4] = 2.0
    assert "do not scale actions" in refused(model)
    for absolute, scale in (((0,), 1.0), ((0, 1, 2), 2.0)):
        model = EnsembleDynamics(3, 2, hidden=(4,), log_scale="std", absolute=absolute)
        model.input_std[0] = scale
        assert "changes of all dimensions, or next values of all" in refused(model)
    assert "have ReLU or tanh, this one has silu" in refused(Actor(3, 2, activation="silu"))


@pytest.mark.parametrize("name", ["max_logstd", "obs_mean", "output_layer", "select"])
def test_another_version_is_named(name: str) -> None:
    theirs = theirs_of("normalize")
    owner = theirs.output_layer if name == "select" else theirs
    # A module keeps its parameters and its submodules in dictionaries of their own.
    for part in (vars(owner), owner._parameters, owner._buffers, owner._modules):
        part.pop(name, None)
    message = f"has no {name}; this adapter was written for Polixir's OfflineRL at commit a7db458: use that"
    with pytest.raises(InputError, match=message):
        FastTransition(theirs)
