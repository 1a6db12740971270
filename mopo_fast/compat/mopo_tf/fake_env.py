"""The authors' `FakeEnv` on the kernels."""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mopo_fast.compat.models import check_attributes
from mopo_fast.compat.mopo_tf.files import (
    VERSION,
    Array,
    actor_from,
    common_activation,
    ensemble_from,
    read,
)
from mopo_fast.config import Penalty
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.tasks import BOXES, Box, TerminationFunction

# Modules of mopo/static/ that end episodes, and this package's name of the same rule ("hopper-authors" keeps
# their slip). The other modules never end an episode.
_BOXES = {
    "ant": "ant",
    "antangle": "ant-angle",
    "hopper": "hopper-authors",
    "humanoid": "humanoid",
    "walker2d": "walker2d",
}
_INFO = ("mean", "std", "log_prob", "dev", "unpenalized_rewards", "penalty", "penalized_rewards")
# Attributes of a BNN that are read here.
_MODEL = ("sess", "nonoptvars", "optvars", "layers", "end_act")


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
        check_triton()
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
        draw: dict[str, Any] = {"deterministic": deterministic, "seed": 0 if deterministic else draw_seed()}
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
        actor = policy if isinstance(policy, Actor) else actor_from(policy.get_weights(), policy)
        engine = self._engine(self._termination())
        start = torch.tensor(obs, dtype=engine.dtype, device=engine.device)
        rollouts = engine.rollout(actor, start, rollout_length, seed=draw_seed())
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


def check_triton() -> None:
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


def draw_seed() -> int:
    """Draw a seed from NumPy's global generator."""
    return int(np.random.randint(2**63, dtype=np.uint64))


def from_bnn(model: Any) -> EnsembleDynamics:
    """Convert the authors' BNN, with its current weights, to this package's ensemble.

    Args:
        model: finalized BNN with one head or two. An untrained BNN has no elites, so all its members become
            elites.

    Raises:
        InputError: `EnsembleDynamics` cannot represent its layers, or an attribute is missing.
    """
    check_attributes(model, _MODEL, VERSION)
    names = [layer.get_activation(as_func=False) for layer in model.layers]
    if names[-1] is not None or model.end_act is not None:
        raise InputError("the BNN has an activation on its outputs; the kernels have none")
    return ensemble_from(
        model.sess.run(model.nonoptvars + model.optvars),
        common_activation(names[:-1], "the BNN"),
        getattr(model, "_model_inds", None),
        "the BNN",
    )


def _load(source: Path) -> EnsembleDynamics:
    if (source / "dynamics.json").exists():
        return EnsembleDynamics.load(source)
    dynamics = read(source).dynamics
    if dynamics is None:
        raise InputError(f"{source} holds no dynamics")
    return dynamics
