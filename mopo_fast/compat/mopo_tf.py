"""Adapter for the MOPO authors' code (TensorFlow 1): its `FakeEnv` on fused kernels, and its files.

In the authors' `mopo/algorithms/mopo.py`, import `FakeEnv` from here:

    from mopo_fast.compat.mopo_tf import FakeEnv

Source: github.com/tianheyu927/mopo: mopo/models/fake_env.py, bnn.py, constructor.py, mopo/static/,
softlearning/policies.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mopo_fast.compat import Checkpoint, matlab_files
from mopo_fast.compat.models import (
    activation_of,
    check_activation,
    check_kind,
    check_method,
    clipped_log_stds,
    warn_of_changes,
)
from mopo_fast.config import Activation, DynamicsConfig, Hints, Penalty
from mopo_fast.ensemble import EnsembleDynamics, elites_of
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.tasks import BOXES, Box, TerminationFunction
from mopo_fast.utils.atomic import atomic_path
from mopo_fast.utils.pickles import Pickler, as_array, load
from mopo_fast.utils.tensors import check_layers

logger = logging.getLogger("mopo_fast")

Array = npt.NDArray[Any]

# Names in the authors' .nns files.
_ACTIVATION_NAMES: dict[Activation, str] = {"silu": "swish", "relu": "ReLU", "tanh": "tanh"}
# Modules of mopo/static/ that end episodes, and this package's name of the same rule ("hopper-authors" keeps
# their slip). The other modules never end an episode.
_BOXES = {
    "ant": "ant",
    "antangle": "ant-angle",
    "hopper": "hopper-authors",
    "humanoid": "humanoid",
    "walker2d": "walker2d",
}
# Bytes of a .nns file; those of the authors have a few hundred.
_MAX_TEXT = 1 << 20
_INFO = ("mean", "std", "log_prob", "dev", "unpenalized_rewards", "penalty", "penalized_rewards")


class StepInfo(Mapping[str, Any]):
    """Info of `FakeEnv.step`, a mapping whose expensive entries are computed when first read."""

    def __init__(self, known: dict[str, Any], predict: Callable[[], dict[str, Any]]) -> None:
        self._known, self._predict = known, predict

    def __getitem__(self, name: str) -> Any:
        if name in _INFO and name not in self._known:
            self._known |= self._predict()
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_INFO)

    def __len__(self) -> int:
        return len(_INFO)


class FakeEnv:
    """Replacement for the authors' `FakeEnv` whose steps and rollouts run on this package's kernels.

    Args:
        model: the authors' BNN, an `EnsembleDynamics`, or a file or folder that holds one of them. The
            weights of a BNN are fetched from its session at the first step, and again after each training.
        config: object with `termination_fn(obs, act, next_obs)` -> bool [batch, 1], such as the classes of
            mopo/static/*.py.
        penalty_coeff: lambda >= 0, the weight of the penalty; 0 for no penalty.
        penalty_learned_var: True, as in the authors' configurations, for the largest norm of a member's
            standard deviations; False for the largest distance of a member's mean from the mean of all
            members.
        penalty_learned_var_random: not used, as in the authors' code.
        backend: backend of `RolloutEngine`.
        dtype: precision of the matrix products, see `RolloutEngine`.
        threads: number of CPU threads, see `RolloutEngine`.

    Raises:
        InputError: `EnsembleDynamics` cannot represent the model; TensorFlow was loaded before Triton; or see
            `RolloutEngine`.
    """

    def __init__(
        self,
        model: Any,
        config: Any,
        penalty_coeff: float = 0.0,
        penalty_learned_var: bool = False,
        penalty_learned_var_random: bool = False,
        *,
        backend: str = "auto",
        dtype: str = "float32",
        threads: int | None = None,
    ) -> None:
        _check_triton()
        self.model = _load(Path(model)) if isinstance(model, str | os.PathLike) else model
        self.config = config
        self.penalty_coeff = penalty_coeff
        self.penalty_learned_var = penalty_learned_var
        self.penalty_learned_var_random = penalty_learned_var_random
        self._options: dict[str, Any] = {"backend": backend, "dtype": dtype, "threads": threads}
        self._fetched: EnsembleDynamics | None = None
        self._trained: Any = None

    @property
    def dynamics(self) -> EnsembleDynamics:
        """The model as this package's ensemble."""
        if isinstance(self.model, EnsembleDynamics):
            return self.model
        # BNN.train ends by assigning a new list of elites; an untrained BNN has none.
        trained = getattr(self.model, "_model_inds", None)
        if self._fetched is None or trained is None or trained is not self._trained:
            self._fetched, self._trained = from_bnn(self.model), trained
        return self._fetched

    def step(
        self, obs: Array, act: Array, deterministic: bool = False
    ) -> tuple[Array, Array, Array, Mapping[str, Any]]:
        """Predict one step for a batch, or for a single row without the batch dimension.

        Each call draws one seed from numpy.random, so seeding that generator repeats the step. Values have
        float32 precision. Arrays have the types of the authors' code: float64, or float32 if `deterministic`.

        Args:
            obs: observations [batch, obs_dim], finite.
            act: actions [batch, act_dim], finite.
            deterministic: return the mean over all members, without noise.

        Returns:
            next_obs [batch, obs_dim], penalised rewards [batch, 1], terminals [batch, 1], and an info with
            the keys of the authors' dictionary: "mean" and "std" [batch, obs_dim + 2] of the drawn member,
            over (reward, terminal, next_obs); "log_prob" and "dev" [batch]; "unpenalized_rewards",
            "penalty" and "penalized_rewards" [batch, 1]. "mean", "std", "log_prob" and "dev" are computed
            when one of them is first read, from the same random draw. An `EnsembleDynamics` given as `model`
            must not change before that.

        Raises:
            InputError: see `RolloutEngine.step`.
        """
        single = obs.ndim == 1
        if single:
            obs, act = obs[None], act[None]
        engine = self._engine()
        draw: dict[str, Any] = {"deterministic": deterministic, "seed": 0 if deterministic else _draw_seed()}
        result = engine.step(obs, act, **draw)
        kind = np.float32 if deterministic else np.float64
        next_obs = result.next_observations.astype(kind)
        raw_rewards = result.raw_rewards.astype(kind)[:, None]
        terminals = self.config.termination_fn(obs, act, next_obs)
        penalty = None if result.penalties is None else result.penalties[:, None]
        rewards = raw_rewards if penalty is None else raw_rewards - self.penalty_coeff * penalty
        inputs = obs.copy(), act.copy()

        def first(array: Array) -> Array:
            return array[0] if single else array

        def predict() -> dict[str, Any]:
            predictions = engine.step(*inputs, **draw, distributions=True)
            added = np.where(engine.ensemble.absolute.cpu().numpy(), 0.0, inputs[0])
            mean, std, log_prob, dev = _mixture(predictions, added, raw_rewards, next_obs, deterministic)
            return {
                "mean": first(np.concatenate((mean[:, :1], terminals, mean[:, 1:]), axis=-1)),
                "std": first(np.insert(std.astype(np.float64), 1, 0.0, axis=-1)),
                "log_prob": log_prob,
                "dev": dev,
            }

        info = {
            "unpenalized_rewards": first(raw_rewards),
            "penalty": penalty,
            "penalized_rewards": first(rewards),
        }
        return first(next_obs), first(rewards), first(terminals), StepInfo(info, predict)

    def rollout(
        self,
        policy: Any,
        obs: Array,
        rollout_length: int,
        *,
        rollout_random: bool = False,
        deterministic: bool = False,
    ) -> dict[str, Array]:
        """Make all steps of the authors' `_rollout_model` in one call, with the policy inside the kernel.

        Termination rules of mopo/static run inside the kernel. Any other `config.termination_fn` is called
        after every step.

        Args:
            policy: the authors' Gaussian policy, read through `get_weights`, or an `Actor`.
            obs: start states [batch, obs_dim], finite.
            rollout_length: maximal number of steps of each rollout, at least 1.
            rollout_random: must be False; the authors' loop takes uniform actions if it is True.
            deterministic: must be False; the authors' loop takes the model's means if it is True.

        Returns:
            The samples that `_rollout_model` would add to the model pool: "observations", "actions",
            "next_observations", "rewards" [rows, 1] and "terminals" [rows, 1], ordered by start state, then
            step. A rollout ends at its first non-finite prediction, which is not returned.

        Raises:
            InputError: see `RolloutEngine.rollout`; `Actor` cannot represent the policy, or a subclass has an
                `actions_np` of its own; or `rollout_random` or `deterministic` is True.
        """
        for name, given in (("rollout_random", rollout_random), ("deterministic", deterministic)):
            if given:
                raise InputError(f"the fused rollout has no {name}; keep the authors' loop over FakeEnv.step")
        actor = policy if isinstance(policy, Actor) else _actor(policy.get_weights(), policy)
        engine = self._engine(self._termination())
        start = torch.tensor(obs, dtype=engine.dtype, device=engine.device)
        rollouts = engine.rollout(actor, start, rollout_length, seed=_draw_seed())
        names = ("observations", "actions", "next_observations", "rewards", "terminals")
        arrays = {name: getattr(rollouts, name).cpu().numpy() for name in names}
        return {name: array if array.ndim == 2 else array[:, None] for name, array in arrays.items()}

    def close(self) -> None:
        """Do nothing, as in the authors' code."""

    def _engine(self, termination: Box | TerminationFunction | None = None) -> RolloutEngine:
        penalty: Penalty = "max_aleatoric" if self.penalty_learned_var else "max_deviation"
        return RolloutEngine(
            self.dynamics,
            penalty=penalty,
            penalty_coef=self.penalty_coeff,
            termination=termination,
            **self._options,
        )

    def _termination(self) -> Box | TerminationFunction | None:
        function = self.config.termination_fn
        package, _, name = function.__module__.rpartition(".")
        if package == "mopo.static":
            box = BOXES.get(_BOXES.get(name, ""))
            if box is None or box.obs_dim == self.dynamics.obs_dim:
                return box
        return lambda *tensors: torch.from_numpy(
            np.asarray(function(*(tensor.cpu().numpy() for tensor in tensors)), bool)
        )


def _mixture(
    predictions: Any, added: Array, rewards: Array, next_obs: Array, deterministic: bool
) -> tuple[Array, ...]:
    """Compute the entries of `StepInfo` that need every member's prediction.

    Args:
        predictions: `StepResult` with `mean` and `std`.
        added: observations [batch, obs_dim] to add to the means; 0 in absolute dimensions.
        rewards: sampled rewards [batch, 1].
        next_obs: sampled next observations [batch, obs_dim].
        deterministic: average mean and std over the members instead of taking those of the drawn one.

    Returns:
        Mean and std over (reward, next_obs), log-probability of the sample under the members' mixture, and
        standard deviation of the members' means.
    """
    mean, std = np.roll(predictions.mean, 1, axis=-1), np.roll(predictions.std, 1, axis=-1)
    mean[..., 1:] += added
    sample = np.concatenate((rewards, next_obs), axis=-1)
    distance = np.square((sample - mean) / std) + 2 * np.log(std) + np.log(2 * np.pi)
    # Far from every mean the sum underflows to 0, as in the authors' code.
    with np.errstate(divide="ignore"):
        log_prob = np.log(np.exp(-0.5 * distance.sum(-1)).sum(0))
    chosen = predictions.members, np.arange(len(sample))
    own = [array.mean(0) if deterministic else array[chosen] for array in (mean, std)]
    return *own, log_prob, mean.std(0).mean(-1)


def do_without_triton() -> None:
    """Keep torch from loading Triton in this process; call it before `FakeEnv` if TensorFlow is loaded.

    torch loads Triton with its first operator, and Triton crashes a process that loaded TensorFlow before. To
    use both, import Triton before TensorFlow.
    """
    sys.modules["triton"] = None  # type: ignore[assignment]


def _check_triton() -> None:
    """Load Triton while this is safe.

    Raises:
        InputError: TensorFlow was loaded before Triton, so that torch would crash the process.
    """
    if "tensorflow" not in sys.modules:
        with contextlib.suppress(ImportError):
            importlib.import_module("triton")
    elif "triton" not in sys.modules and importlib.util.find_spec("triton") is not None:
        raise InputError(
            "TensorFlow was loaded before Triton, which torch would load next and which would then crash this"
            " process; import triton before tensorflow, or call"
            " mopo_fast.compat.mopo_tf.do_without_triton() first"
        )


def _draw_seed() -> int:
    return int(np.random.randint(2**63, dtype=np.uint64))


def from_bnn(model: Any) -> EnsembleDynamics:
    """Convert the authors' BNN, with its current weights, to this package's ensemble.

    Args:
        model: finalized BNN with one head or two. An untrained BNN has no elites, so all its members become
            elites.

    Raises:
        InputError: `EnsembleDynamics` cannot represent its layers.
    """
    names = [layer.get_activation(as_func=False) for layer in model.layers]
    if names[-1] is not None or model.end_act is not None:
        raise InputError("the BNN has an activation on its outputs; the kernels have none")
    return _dynamics(
        model.sess.run(model.nonoptvars + model.optvars),
        _activation(names[:-1], "the BNN"),
        getattr(model, "_model_inds", None),
        "the BNN",
    )


def _activation(names: Sequence[str | None], what: str) -> Activation:
    if len(set(names)) > 1:
        raise InputError(
            f"{what} has hidden layers of {', '.join(map(str, names))}; the kernels take one activation"
        )
    return activation_of(str(names[0])) if names else "silu"


def _dynamics(
    arrays: Sequence[Any], activation: Activation, elites: Sequence[int] | None, what: str
) -> EnsembleDynamics:
    """Build the ensemble from a BNN's arrays in its order: scaler, weights and biases by layer, bounds."""
    try:
        mean, std, *layers, high, low = map(_floats, arrays)
        weights, biases = layers[0::2], [bias.squeeze(1) for bias in layers[1::2]]
        outputs = high.numel()
        if weights[-1].shape[-1] == outputs:
            # Two heads become one layer.
            *weights, mean_weight, std_weight = weights
            *biases, mean_bias, std_bias = biases
            weights.append(torch.cat((mean_weight, std_weight), -1))
            biases.append(torch.cat((mean_bias, std_bias), -1))
        # The BNN predicts the reward first, `EnsembleDynamics` last.
        order = torch.arange(outputs).roll(-1)
        for tensors in (weights, biases):
            tensors[-1] = torch.cat([head[..., order] for head in tensors[-1].chunk(2, -1)], -1)
        check_layers(weights, ndim=3)
        if weights[-1].shape[-1] != 2 * outputs or mean.numel() != weights[0].shape[1]:
            raise InputError("its scaler and its bounds do not fit its layers")
        model = EnsembleDynamics(
            outputs - 1,
            mean.numel() - outputs + 1,
            members=len(weights[0]),
            elites=len(weights[0]) if elites is None else len(elites),
            hidden=tuple(weight.shape[-1] for weight in weights[:-1]),
            activation=activation,
            generator=torch.Generator(),
        )
        pairs = [*zip(model.weights, weights, strict=True), *zip(model.biases, biases, strict=True)]
        pairs += [(model.input_mean, mean[0]), (model.input_std, std[0])]
        pairs += [(model.max_logvar, high[0, order]), (model.min_logvar, low[0, order])]
        with torch.no_grad():
            for target, values in pairs:
                if target.shape != values.shape:
                    raise InputError(
                        f"a layer has shape {tuple(values.shape)}, expected {tuple(target.shape)}"
                    )
                if not bool(torch.isfinite(values).all()):
                    raise InputError("there are numbers that are not finite")
                target.copy_(values)
            if elites is not None:
                model.elites = torch.tensor(elites_of(list(elites), model.members))
    except (InputError, ValueError, IndexError, TypeError, RuntimeError) as error:
        raise InputError(f"{what} cannot be read as an ensemble: {error}") from error
    if not bool((model.input_std > 0).all()):
        raise InputError(f"{what}: the scaler's deviations must be positive")
    return model


def _floats(array: Any) -> torch.Tensor:
    array = as_array(array)
    if array.dtype.kind != "f":
        raise InputError(f"it holds {array.dtype}, expected floats")
    with np.errstate(over="ignore"):
        return torch.from_numpy(array.astype(np.float32))


def _actor(weights: Sequence[Any], policy: Any = None, what: str = "the policy") -> Actor:
    """Build an actor from Keras' list of weights: kernel, bias, kernel, bias, ...

    Args:
        weights: result of `get_weights`, or its copy in a file.
        policy: policy that the weights belong to, if there is one; its activation and squashing are read.
        what: name of the policy in messages.
    """
    activation: Activation = getattr(policy, "_activation", "relu")
    if not getattr(policy, "_squash", True):
        raise InputError(f"{what} is not squashed by tanh, as the kernels need it")
    if getattr(policy, "_deterministic", False):
        raise InputError(f"{what} is set to be deterministic; the kernels sample its actions")
    if (output := getattr(policy, "_output_activation", "linear")) != "linear":
        raise InputError(f"{what} has the output activation {output}; the kernels have none")
    check_method(policy, "actions_np", "softlearning", "keep the authors' loop over FakeEnv.step")
    try:
        arrays = [_floats(array) for array in weights]
        kernels, biases = arrays[0::2], arrays[1::2]
        check_layers(kernels, ndim=2)
        actor = Actor(
            kernels[0].shape[0],
            kernels[-1].shape[1] // 2,
            hidden=tuple(kernel.shape[1] for kernel in kernels[:-1]),
            activation=activation,
        )
        pairs = [*zip(actor.weights, kernels, strict=True), *zip(actor.biases, biases, strict=True)]
        with torch.no_grad():
            for target, values in pairs:
                if target.shape != values.shape or not bool(torch.isfinite(values).all()):
                    raise InputError(
                        f"a layer must have finite numbers of shape {tuple(target.shape)}, got shape"
                        f" {tuple(values.shape)}"
                    )
                target.copy_(values)
    except (InputError, ValueError, IndexError, TypeError, RuntimeError) as error:
        raise InputError(f"{what} holds no feed-forward Gaussian policy: {error}") from error
    return actor


def _load(source: Path) -> EnsembleDynamics:
    if (source / "dynamics.json").exists():
        return EnsembleDynamics.load(source)
    dynamics = read(source).dynamics
    if dynamics is None:
        raise InputError(f"{source} holds no dynamics")
    return dynamics


def _scipy_io() -> Any:
    try:
        import scipy.io
    except ImportError as error:
        raise InputError(f"MATLAB files take SciPy ({error}); install it with: pip install scipy") from error
    return scipy.io


def _only(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"{folder} holds several models: {names}; name one of them")
    return found[0] if found else None


FILES = ("*.mat", "*.nns", "*.pkl")
"""Names of the files that `read` looks for in a folder."""


def read(source: Path, hints: Hints = Hints()) -> Checkpoint:  # noqa: B008
    """Read a model's NAME_STEP.mat, a checkpoint's .pkl, or a folder with at most one of each.

    The files do not store the elites: all members are elites unless `hints` names them. The activation is
    read from NAME_STEP.nns beside the .mat file. Without that file it is the one that `hints` names, or SiLU,
    the authors' default. Nothing in a pickle is run; only arrays are read from it.

    Raises:
        InputError: a file is missing or damaged, holds another kind of model, or the folder holds several.
    """
    if hints.absolute is not None:
        raise InputError("the authors' models predict changes of the observation; leave absolute out")
    if source.is_dir():
        mat, pkl = _only(source, "*.mat"), _only(source, "*.pkl")
    else:
        mat, pkl = (source, None) if source.suffix == ".mat" else (None, source)
    return Checkpoint(
        None if mat is None else _read_dynamics(mat, hints),
        None if pkl is None else _read_policy(pkl),
    )


def _read_dynamics(path: Path, hints: Hints) -> EnsembleDynamics:
    arrays = _load_mat(path)
    activation = hints.activation or "silu"
    structure = path.with_suffix(".nns")
    if structure.exists():
        if hints.activation is not None:
            raise InputError(f"{structure} stores the activation; leave it out")
        names = re.findall(r"activation='?(\w+)'?", _read_text(structure))
        if names[-1:] != ["None"]:
            raise InputError(f"{structure} does not end in a layer without activation")
        # The file of a model with one head repeats the last layer after every other one.
        activation = _activation([name for name in names if name != "None"], str(structure))
    if hints.elites is None:
        logger.warning("%s does not store which members are elites: taking all of them", path)
    return _dynamics(arrays, activation, hints.elites, str(path))


def _load_mat(path: Path) -> list[Array]:
    """Read the matrices named 0, 1, ... in a MATLAB file."""
    found = {name: array for name, array in matlab_files.load(path).items() if name.isdecimal()}
    for i in range(len(found)):
        if str(i) not in found:
            raise InputError(f"{path} lacks the array {i}")
        if found[str(i)] is None:
            raise InputError(f"{path}: the array {i} is no matrix of real floats")
    return [found[str(i)] for i in range(len(found))]


def _read_text(path: Path) -> str:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_TEXT:
            raise InputError(f"{path} must be a text file of at most {_MAX_TEXT:,} bytes")
        return path.read_text(errors="replace")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _read_policy(path: Path) -> Actor:
    content = load(path, inert=None)
    if not isinstance(content, dict) or not isinstance(content.get("policy_weights"), list):
        raise InputError(f"{path} holds no list of policy_weights")
    return _actor(content["policy_weights"], what=str(path))


def write(checkpoint: Checkpoint, target: Path) -> None:
    """Write a folder with BNN_0.mat, BNN_0.nns, BNN_0_var.nns and checkpoint.pkl.

    The authors' `construct_model(name="BNN_0", load_dir=target, separate_mean_var=True)` loads the model, and
    their simulate_policy.py the policy. The elites are not stored: the BNN chooses them at its next training.

    Raises:
        InputError: the authors' code cannot represent one of the models, SciPy is missing, or the folder
            cannot be written.
    """
    if checkpoint.dynamics is not None:
        _scipy_io()
    warn_of_changes(checkpoint, check_dynamics, check_policy)
    if checkpoint.dynamics is not None:
        _write_dynamics(checkpoint.dynamics, target)
    if checkpoint.policy is not None:
        _write_policy(checkpoint.policy, target / "checkpoint.pkl")


def check_dynamics(ensemble: EnsembleDynamics) -> list[str]:
    """Return a sentence about the elites if they are not all members.

    Raises:
        InputError: the authors' models lack a property of these dynamics.
    """
    check_kind(ensemble, "the authors' models", log_scale="variance")
    if len(ensemble.elites) == ensemble.members:
        return []
    elites = ensemble.elites.tolist()
    return [
        "the authors' files do not store the elites: the BNN chooses its own at its next training; to read"
        f" the files here, give --elites {' '.join(map(str, elites))}"
    ]


def check_policy(policy: Actor) -> list[str]:
    """Return a sentence about the bounds of the log-stds if they are not [-20, 2].

    Raises:
        InputError: the policy's activation is not ReLU.
    """
    check_activation(policy, "the authors' policies", "relu")
    return clipped_log_stds(policy, -20.0, 2.0, "the authors' code")


def _write_dynamics(model: EnsembleDynamics, folder: Path) -> None:
    io, outputs = _scipy_io(), model.obs_dim + 1
    order = torch.arange(outputs).roll(1)

    def heads(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [head[..., order] for head in tensor.chunk(2, -1)]

    weights = [*model.weights[:-1], *heads(model.weights[-1])]
    biases = [*model.biases[:-1], *heads(model.biases[-1])]
    tensors = [model.input_mean[None], model.input_std[None]]
    tensors += [t for w, b in zip(weights, biases, strict=True) for t in (w, b[:, None])]
    tensors += [model.max_logvar[None, order], model.min_logvar[None, order]]
    with atomic_path(folder / "BNN_0.mat") as temporary, open(temporary, "wb") as file:
        io.savemat(file, {str(i): tensor.detach().cpu().numpy() for i, tensor in enumerate(tensors)})
    names = [_ACTIVATION_NAMES[model.activation]] * len(model.hidden)
    decays: Sequence[float | None] = DynamicsConfig().weight_decay
    if len(decays) != len(model.weights):
        decays = [None] * len(model.weights)
    lines = [
        f"FC(output_dim={weight.shape[2]}, input_dim={weight.shape[1]}, activation={name!r},"
        f" weight_decay={decay!r}, ensemble_size={model.members})\n"
        for weight, name, decay in zip(weights, [*names, None, None], [*decays, decays[-1]], strict=True)
    ]
    for file_name, text in (("BNN_0.nns", lines[:-1]), ("BNN_0_var.nns", lines[-1:])):
        with atomic_path(folder / file_name) as temporary:
            temporary.write_text("".join(text))


def _write_policy(policy: Actor, path: Path) -> None:
    layers = zip(policy.weights, policy.biases, strict=True)
    weights = [tensor.detach().cpu().numpy() for layer in layers for tensor in layer]
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        # The newest protocol that Python 3.7, which the authors' code needs, can read.
        Pickler(file, protocol=4).dump({"policy_weights": weights})
