"""OfflineRL-Kit's `EnsembleDynamics` on the kernels."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mopo_fast.compat.models import activation_of, check_attributes, check_method, ensemble_of
from mopo_fast.compat.offlinerl_kit.files import VERSION, as_floats, load_array, save_files
from mopo_fast.compat.torch_files import load_state
from mopo_fast.config import DynamicsConfig, Penalty
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import EnsembleDynamics as Ensemble
from mopo_fast.errors import InputError
from mopo_fast.fit import FitEpoch, fit_dynamics
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.tasks import OFFLINERL_KIT_RULES, Box, make_box

Array = npt.NDArray[Any]
Termination = Callable[[Array, Array, Array], Array]

# Attributes of an EnsembleDynamicsModel that are read here.
_MODEL = ("backbones", "output_layer", "max_logvar", "min_logvar", "elites", "activation")
# OfflineRL-Kit's uncertainty_mode -> this package's name of the same penalty.
PENALTIES: dict[str, Penalty] = {
    "aleatoric": "max_aleatoric",
    "pairwise-diff": "max_deviation",
    "ensemble_std": "ensemble_std",
}


def termination_box(function: Any, obs_dim: int) -> Box | None:
    """Return the bounds that one of OfflineRL-Kit's termination functions checks, found by its name.

    A box can run inside the rollout kernel. A non-finite prediction always leaves the box; most of
    OfflineRL-Kit's functions, but not all, end an episode there too.

    Args:
        function: a termination function.
        obs_dim: size of an observation.

    Returns:
        The box, or None if `function` is not one of those in OfflineRL-Kit's `termination_fns` that this
        package knows.
    """
    module, name = getattr(function, "__module__", ""), getattr(function, "__name__", "")
    task = name.removeprefix("termination_fn_").removeprefix("terminaltion_fn_")
    if not module.endswith("termination_fns") or task == name or task not in OFFLINERL_KIT_RULES:
        return None
    return make_box(obs_dim, **OFFLINERL_KIT_RULES[task])


class EnsembleDynamics:
    """Replacement for `offlinerlkit.dynamics.EnsembleDynamics` with the same arguments, methods and results.

    The kernels read the weights of `model` where they are, without a copy, so a change to `model` takes
    effect at the next call. Every call draws a seed from NumPy's global generator. Seeding that generator
    therefore makes a run repeatable, but the random numbers are not those of the original.

    Args:
        model: OfflineRL-Kit's EnsembleDynamicsModel.
        optim: torch.optim.Adam over `model`. Only its learning rate is used, by `train`.
        scaler: OfflineRL-Kit's StandardScaler.
        terminal_fn: termination function (obs, action, next_obs) -> bool [n, 1] on NumPy arrays. A function
            from OfflineRL-Kit's `get_termination_fn` runs inside the kernel; any other is called after
            every step.
        penalty_coef: weight of the penalty in the reward. With 0, no penalty is computed.
        uncertainty_mode: penalty: "aleatoric", "pairwise-diff" or "ensemble_std".
        backend: backend of `RolloutEngine`.
        dtype: precision of the matrix products, see `RolloutEngine`. "bfloat16" is several times faster on
            CPUs with AMX.
        threads: number of CPU threads, see `RolloutEngine`.

    Raises:
        InputError: the kernels do not support the model, or an argument is unknown.
    """

    def __init__(
        self,
        model: Any,
        optim: torch.optim.Optimizer,
        scaler: Any,
        terminal_fn: Termination,
        penalty_coef: float = 0.0,
        uncertainty_mode: str = "aleatoric",
        *,
        backend: str = "auto",
        dtype: str = "float32",
        threads: int | None = None,
    ) -> None:
        if uncertainty_mode not in PENALTIES:
            raise InputError(
                f"unknown uncertainty_mode {uncertainty_mode!r}; there are: {', '.join(PENALTIES)}"
            )
        if not getattr(model, "_with_reward", True):
            raise InputError("the model predicts no reward; build it with with_reward=True")
        check_attributes(model, _MODEL, VERSION)
        check_attributes(scaler, ("mu", "std"), VERSION)
        check_method(model, "forward", "offlinerlkit", "use OfflineRL-Kit's EnsembleDynamics for this model")
        self.model, self.optim, self.scaler = model, optim, scaler
        self.terminal_fn = terminal_fn
        self._penalty_coef, self._uncertainty_mode = penalty_coef, uncertainty_mode
        self._options: dict[str, Any] = {"backend": backend, "dtype": dtype, "threads": threads}
        self._kept: tuple[Any, RolloutEngine] | None = None
        self._box = termination_box(terminal_fn, _layers(model)[-1].weight.shape[-1] // 2 - 1)

    def ensemble(self) -> Ensemble:
        """Return `model` as this package's ensemble, which shares the model's weights."""
        layers = _layers(self.model)
        mean, std = (
            None if value is None else as_floats(value) for value in (self.scaler.mu, self.scaler.std)
        )
        return ensemble_of(
            [layer.weight for layer in layers],
            [layer.bias.detach()[:, 0] for layer in layers],
            self.model.max_logvar,
            self.model.min_logvar,
            activation=activation_of(self.model.activation),
            input_mean=mean,
            input_std=std,
            elites=self.model.elites.tolist(),
        )

    def engine(self) -> RolloutEngine:
        """Return the engine that makes steps and rollouts with the model's current weights."""
        engine = self.kept_engine()
        engine.refresh()
        return engine

    def kept_engine(self) -> RolloutEngine:
        """Return `engine`, with weights that were read before where no change of them is noticed.

        Reading them takes as long as a step of a batch. `RolloutEngine` says what it notices; OfflineRL-Kit's
        `load_save` writes through `.data`, which may go unnoticed.
        """
        settings = (self._penalty_coef, self._uncertainty_mode, tuple(self._options.items()))
        sources = (settings, self.model.elites.tolist(), _layers_id(self.model), _bytes(self.scaler))
        if self._kept is None or self._kept[0] != sources:
            termination: Any = self._box if self._box is not None else self._terminal
            engine = RolloutEngine(
                self.ensemble(),
                penalty=PENALTIES[self._uncertainty_mode],
                penalty_coef=self._penalty_coef,
                termination=termination,
                **self._options,
            )
            self._kept = sources, engine
        return self._kept[1]

    def _terminal(self, *arrays: torch.Tensor) -> torch.Tensor:
        ended = self.terminal_fn(*(array.cpu().numpy() for array in arrays))
        return torch.as_tensor(np.asarray(ended, dtype=bool).reshape(-1))

    def step(self, obs: Array, action: Array) -> tuple[Array, Array, Array, dict[str, Array]]:
        """Predict one step for a batch of n states.

        Args:
            obs: observations [n, obs_dim].
            action: actions [n, act_dim].

        Returns:
            next_obs float32 [n, obs_dim], penalised reward float32 [n, 1], terminal bool [n, 1], and a
            dictionary with "raw_reward" float32 [n, 1] and, unless penalty_coef is 0, "penalty" of the same
            shape.
        """
        engine = self.engine()
        result = engine.step(*_tensors(engine, obs, action), seed=draw_seed())
        arrays = [
            array.cpu().numpy() for array in (result.next_observations, result.rewards, result.terminals)
        ]
        info = {"raw_reward": result.raw_rewards.cpu().numpy()[:, None]}
        if result.penalties is not None:
            info["penalty"] = result.penalties.cpu().numpy()[:, None]
        return arrays[0], arrays[1][:, None], arrays[2][:, None], info

    def rollout(
        self, actor: Actor, init_obss: Array, rollout_length: int
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Roll `actor` out with all steps fused into one kernel call.

        Transitions are ordered by step, then by start state, as in the original. A rollout ends at its first
        non-finite prediction, which is not returned; the original keeps it.

        Args:
            actor: policy.
            init_obss: start states [n, obs_dim].
            rollout_length: maximal number of steps of each rollout.

        Returns:
            The two results of `MOPOPolicy.rollout`: arrays "obss", "next_obss", "actions", "rewards" [m, 1]
            and "terminals" [m, 1] of m <= n * rollout_length transitions; and a dictionary with
            "num_transitions" (m) and "reward_mean".
        """
        engine = self.engine()
        (start,) = _tensors(engine, init_obss)
        rollouts = engine.rollout(actor, start, rollout_length, seed=draw_seed())
        assert rollouts.step is not None
        order = torch.argsort(rollouts.step, stable=True)
        rows = rollouts[order]
        transitions = {
            "obss": rows.observations,
            "next_obss": rows.next_observations,
            "actions": rows.actions,
            "rewards": rows.rewards[:, None],
            "terminals": rows.terminals[:, None],
        }
        arrays = {name: array.cpu().numpy() for name, array in transitions.items()}
        return arrays, {"num_transitions": len(rows), "reward_mean": arrays["rewards"].mean(dtype=np.float64)}

    @torch.no_grad()
    def sample_next_obss(self, obs: torch.Tensor, action: torch.Tensor, num_samples: int) -> torch.Tensor:
        """Sample next observations of every elite, with noise from torch's global generator.

        Args:
            obs: observations [n, obs_dim].
            action: actions [n, act_dim].
            num_samples: samples per observation and elite.

        Returns:
            Next observations [num_samples, elites, n, obs_dim].
        """
        engine = self.engine()
        result = engine.step(*_tensors(engine, obs, action), seed=0, distributions=True)
        assert result.mean is not None and result.std is not None
        elites = engine.ensemble.elites
        mean, std = result.mean[elites][..., :-1].to(obs.device), result.std[elites][..., :-1].to(obs.device)
        noise = torch.randn((num_samples, *std.shape), dtype=std.dtype, device=std.device)
        return obs + mean + noise * std

    def train(
        self,
        data: dict[str, Array],
        logger: Any,
        max_epochs: float | None = None,
        max_epochs_since_update: int = 5,
        batch_size: int = 256,
        holdout_ratio: float = 0.2,
        logvar_loss_coef: float = 0.01,
    ) -> None:
        """Fit the model to `data` with this package's fit, then save it to `logger.model_dir`.

        The fit starts from the current weights, writes the result into `model` and `scaler`, and logs under
        the original's keys.

        Args:
            data: "observations", "actions", "next_observations", "rewards" and, optionally, "terminals".
            logger: OfflineRL-Kit's Logger.
            max_epochs: maximal number of epochs; None or 0 sets no limit.
            max_epochs_since_update: number of epochs without improvement after which the fit stops.
            batch_size: rows per step of each member.
            holdout_ratio: share of the rows held out to stop early and to pick the elites.
            logvar_loss_coef: weight of the log-variance bounds in the loss.

        Raises:
            InputError: the optimizer is not plain Adam, or see `fit_dynamics`.
        """
        ensemble, layers = self.ensemble(), _layers(self.model)
        config = DynamicsConfig(
            members=ensemble.members,
            elites=len(ensemble.elites),
            hidden=ensemble.hidden,
            activation=activation_of(self.model.activation),
            learning_rate=_learning_rate(self.optim),
            batch_size=batch_size,
            weight_decay=tuple(float(layer.weight_decay) for layer in layers),
            logvar_bound_weight=logvar_loss_coef,
            holdout_fraction=holdout_ratio,
            # The original stops at the n-th epoch without improvement, `fit_dynamics` one epoch later.
            patience=max_epochs_since_update - 1,
            # The original takes 0 for "no limit", too.
            max_epochs=math.ceil(max_epochs) if max_epochs else None,
        )
        best = [1e10] * ensemble.members

        def report(record: FitEpoch) -> None:
            for member, (mse, improved) in enumerate(zip(record.holdout_mse, record.improved, strict=True)):
                best[member] = mse if improved else best[member]
            logger.logkv("loss/dynamics_train_loss", record.train_loss)
            logger.logkv(
                "loss/dynamics_holdout_loss", float(np.mean(sorted(record.holdout_mse)[: config.elites]))
            )
            logger.set_timestep(record.epoch + 1)
            logger.dumpkvs(exclude=["policy_training_progress"])

        logger.log("Training dynamics:")
        fitted = fit_dynamics(
            _transitions(data),
            seed=draw_seed(),
            config=config,
            device=ensemble.input_mean.device,
            threads=self._options["threads"],
            initial=ensemble,
            quiet=True,
            on_epoch=report,
        )
        with torch.no_grad():
            for layer, weight, bias in zip(layers, fitted.weights, fitted.biases, strict=True):
                for fitted_values, name in ((weight, "weight"), (bias[:, None], "bias")):
                    getattr(layer, name).copy_(fitted_values)
                    getattr(layer, f"saved_{name}").copy_(fitted_values)
            self.model.max_logvar.copy_(fitted.max_logvar)
            self.model.min_logvar.copy_(fitted.min_logvar)
        elites = fitted.elites.tolist()
        self.model.set_elites(elites)
        self.scaler.mu, self.scaler.std = (
            values.cpu().numpy()[None] for values in (fitted.input_mean, fitted.input_std)
        )
        self.save(logger.model_dir)
        self.model.eval()
        loss = float(np.mean(sorted(best)[: config.elites]))
        logger.log(f"elites:{elites} , holdout loss: {loss}")

    def save(self, save_path: str | os.PathLike[str]) -> None:
        """Write dynamics.pth, mu.npy and std.npy to the folder `save_path`, in the original's format."""
        save_files(Path(save_path), self.model.state_dict(), self.scaler.mu, self.scaler.std)

    def load(self, load_path: str | os.PathLike[str]) -> None:
        """Load the weights and the scaler from a folder that `save`, or the original's `save`, has written.

        Raises:
            InputError: a file is missing or damaged, or belongs to a model of another shape.
        """
        folder = Path(load_path)
        state = load_state(folder / "dynamics.pth")
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"{folder / 'dynamics.pth'} does not fit this model: {error}") from error
        self.scaler.mu, self.scaler.std = (load_array(folder / f"{name}.npy") for name in ("mu", "std"))


def _layers(model: Any) -> list[Any]:
    return [*model.backbones, model.output_layer]


def _layers_id(model: Any) -> list[Any]:
    """Return the addresses of a model's tensors, and its activation."""
    tensors = [one for layer in _layers(model) for one in (layer.weight, layer.bias)]
    addresses = [tensor.data_ptr() for tensor in (*tensors, model.max_logvar, model.min_logvar)]
    return [*addresses, activation_of(model.activation)]


def _bytes(scaler: Any) -> list[bytes]:
    return [np.asarray(values).tobytes() for values in (scaler.mu, scaler.std) if values is not None]


def draw_seed() -> int:
    """Draw a seed from NumPy's global generator."""
    return int(np.random.randint(2**63 - 1))


def _tensors(engine: RolloutEngine, *arrays: Any) -> list[torch.Tensor]:
    return [as_floats(array).to(engine.device) for array in arrays]


def _learning_rate(optim: torch.optim.Optimizer) -> float:
    group = optim.param_groups[0]
    betas, eps, decay = group.get("betas"), group.get("eps"), group.get("weight_decay")
    if type(optim) is not torch.optim.Adam or (betas, eps, decay) != ((0.9, 0.999), 1e-8, 0):
        raise InputError(
            "the fit takes torch.optim.Adam with its own defaults except for the learning rate, got"
            f" {type(optim).__name__} with betas {betas}, eps {eps}, weight_decay {decay}"
        )
    return float(group["lr"])


def _transitions(data: dict[str, Array]) -> Transitions:
    floats: dict[str, Any] = {
        name: as_floats(data[name]) for name in ("observations", "actions", "next_observations")
    }
    rewards = as_floats(data["rewards"]).reshape(-1)
    terminals = as_floats(data.get("terminals", np.zeros(len(rewards)))).reshape(-1) > 0
    return Transitions(**floats, rewards=rewards, terminals=terminals)
