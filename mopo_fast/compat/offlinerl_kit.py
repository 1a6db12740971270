"""Adapter for OfflineRL-Kit: its `EnsembleDynamics` and `MOPOPolicy.rollout` on fused kernels, and its files.

In OfflineRL-Kit's `run_mopo.py`, import `EnsembleDynamics` from here and wrap the policy:

    from mopo_fast.compat.offlinerl_kit import EnsembleDynamics, fuse_rollout
    dynamics = EnsembleDynamics(dynamics_model, dynamics_optim, scaler, termination_fn, penalty_coef=2.5)
    policy = fuse_rollout(MOPOPolicy(dynamics, actor, ...))

The trainer, buffers, logger and SAC updates stay OfflineRL-Kit's. In this module, "the original" is
OfflineRL-Kit's own class or method of the same name.

Source: github.com/yihaosun1124/OfflineRL-Kit, commit e3ce697.
"""

import io
import logging
import math
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mopo_fast.compat import Checkpoint
from mopo_fast.compat.models import (
    activation_of,
    actor_of,
    check_activation,
    check_kind,
    check_method,
    check_model,
    clipped_log_stds,
    ensemble_of,
    unstored_activation,
    warn_of_changes,
)
from mopo_fast.compat.torch_files import load_state, save, take
from mopo_fast.config import DynamicsConfig, Hints, Penalty
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import EnsembleDynamics as Ensemble
from mopo_fast.errors import InputError
from mopo_fast.fit import FitEpoch, fit_dynamics
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.tasks import OFFLINERL_KIT_RULES, Box, make_box
from mopo_fast.utils.atomic import atomic_path
from mopo_fast.utils.machine import check_memory
from mopo_fast.utils.pickles import brief

logger = logging.getLogger("mopo_fast")

Array = npt.NDArray[Any]
Termination = Callable[[Array, Array, Array], Array]

# OfflineRL-Kit's uncertainty_mode -> this package's name of the same penalty.
PENALTIES: dict[str, Penalty] = {
    "aleatoric": "max_aleatoric",
    "pairwise-diff": "max_deviation",
    "ensemble_std": "ensemble_std",
}

# Default bounds of the log-stds in OfflineRL-Kit's TanhDiagGaussian.
_LOG_STD_BOUNDS = (-5.0, 2.0)
# Policies whose `rollout` and `select_action` are known. Each rolls its actor out, but for COMBO's uniform
# actions, which `_rollout` leaves to the original.
_ADVICE = "leave fuse_rollout out, the model's steps run on the kernels without it"
_POLICIES = ("MOPOPolicy", "COMBOPolicy", "RAMBOPolicy", "MOBILEPolicy", "SACPolicy")


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
        check_method(model, "forward", "offlinerlkit", "use OfflineRL-Kit's EnsembleDynamics for this model")
        self.model, self.optim, self.scaler = model, optim, scaler
        self.terminal_fn = terminal_fn
        self._penalty_coef, self._uncertainty_mode = penalty_coef, uncertainty_mode
        self._options: dict[str, Any] = {"backend": backend, "dtype": dtype, "threads": threads}
        self._box = termination_box(terminal_fn, _layers(model)[-1].weight.shape[-1] // 2 - 1)

    def ensemble(self) -> Ensemble:
        """Return `model` as this package's ensemble, which shares the model's weights."""
        layers = _layers(self.model)
        mean, std = (None if value is None else _floats(value) for value in (self.scaler.mu, self.scaler.std))
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
        termination: Any = self._box if self._box is not None else self._terminal
        return RolloutEngine(
            self.ensemble(),
            penalty=PENALTIES[self._uncertainty_mode],
            penalty_coef=self._penalty_coef,
            termination=termination,
            **self._options,
        )

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
        result = engine.step(*_tensors(engine, obs, action), seed=_draw_seed())
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
        rollouts = engine.rollout(actor, start, rollout_length, seed=_draw_seed())
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
            seed=_draw_seed(),
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
        _save_files(Path(save_path), self.model.state_dict(), self.scaler.mu, self.scaler.std)

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
        self.scaler.mu, self.scaler.std = (_load_array(folder / f"{name}.npy") for name in ("mu", "std"))


def fuse_rollout(policy: Any) -> Any:
    """Replace a policy's `rollout` by one that makes all steps in one kernel call.

    A COMBOPolicy with uniform_rollout=True keeps its own `rollout`, which draws uniform actions. Its model
    steps run on the kernels through `EnsembleDynamics.step`.

    Args:
        policy: MOPOPolicy, COMBOPolicy, RAMBOPolicy or MOBILEPolicy whose dynamics are this module's
            `EnsembleDynamics` and whose actor is built as in OfflineRL-Kit's `run_mopo.py`: an ActorProb of
            an MLP and a TanhDiagGaussian with unbounded=True, conditioned_sigma=True and max_mu=1.

    Returns:
        `policy` itself.

    Raises:
        InputError: the dynamics or the actor are of another kind; or a subclass has a `rollout`,
            `select_action` or `actforward` of its own.
    """
    if not isinstance(policy.dynamics, EnsembleDynamics):
        raise InputError("the policy's dynamics must be mopo_fast.compat.offlinerl_kit.EnsembleDynamics")
    for method in ("rollout", "select_action", "actforward"):
        check_method(policy, method, "offlinerlkit", _ADVICE, _POLICIES)
    _actor(policy.actor)
    # A bound method, so that copy.deepcopy of the policy rolls the copy out.
    policy.rollout = types.MethodType(_rollout, policy)
    return policy


def _rollout(policy: Any, init_obss: Array, rollout_length: int) -> tuple[dict[str, Array], dict[str, Any]]:
    result: tuple[dict[str, Array], dict[str, Any]]
    if getattr(policy, "_uniform_rollout", False):
        result = type(policy).rollout(policy, init_obss, rollout_length)
    else:
        result = policy.dynamics.rollout(_actor(policy.actor), init_obss, rollout_length)
    return result


def _layers(model: Any) -> list[Any]:
    return [*model.backbones, model.output_layer]


def _actor(actor: Any) -> Actor:
    """Return an ActorProb as this package's actor."""
    head, modules = actor.dist_net, list(actor.backbone.model)
    for module in (actor, actor.backbone, head):
        check_method(module, "forward", "offlinerlkit", _ADVICE)
    if type(head).__name__ != "TanhDiagGaussian" or not (head._unbounded and head._c_sigma) or head._max != 1:
        raise InputError(
            "the rollout can be fused for a TanhDiagGaussian with unbounded=True, conditioned_sigma=True and"
            " max_mu=1; leave fuse_rollout out for any other actor"
        )
    linears = [module for module in modules if isinstance(module, torch.nn.Linear)]
    activations = {type(module) for module in modules if not isinstance(module, torch.nn.Linear)}
    if len(activations) != 1 or len(modules) != 2 * len(linears):
        raise InputError(
            "the rollout can be fused for a backbone of linear layers with one activation after each;"
            " leave fuse_rollout out for any other actor"
        )
    return actor_of(
        [layer.weight.T for layer in linears] + [torch.cat([head.mu.weight, head.sigma.weight]).T],
        [layer.bias for layer in linears] + [torch.cat([head.mu.bias, head.sigma.bias])],
        activation=activation_of(activations.pop()()),
        log_std_min=head._sigma_min,
        log_std_max=head._sigma_max,
    )


def _draw_seed() -> int:
    return int(np.random.randint(2**63 - 1))


def _tensors(engine: RolloutEngine, *arrays: Any) -> list[torch.Tensor]:
    return [_floats(array).to(engine.device) for array in arrays]


def _floats(array: Any) -> torch.Tensor:
    """Return any numeric array as a float32 tensor, on the same memory where possible."""
    if isinstance(array, torch.Tensor):
        return array.to(torch.float32)
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))


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
        name: _floats(data[name]) for name in ("observations", "actions", "next_observations")
    }
    rewards = _floats(data["rewards"]).reshape(-1)
    terminals = _floats(data.get("terminals", np.zeros(len(rewards)))).reshape(-1) > 0
    return Transitions(**floats, rewards=rewards, terminals=terminals)


# --- files


def _load_array(path: Path) -> Array:
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        # Mapped, so that a header that claims more data than the file has allocates nothing.
        mapped = np.lib.format.open_memmap(path, mode="r")
        # Twice: the array, and the temporary of its check.
        check_memory(f"{path}", 2 * mapped.nbytes, "cpu", "its size")
        array: Array = np.array(mapped)
    except InputError:
        raise
    # A damaged file can raise anything.
    except Exception as error:
        raise InputError(
            f"{path} is not a whole .npy file ({brief(error)}); download or make it again"
        ) from error
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise InputError(f"{path} must hold finite floats")
    return array


def _save_files(folder: Path, state: dict[str, torch.Tensor], mu: Any, std: Any) -> None:
    save(folder / "dynamics.pth", state)
    for name, value in (("mu", mu), ("std", std)):
        content = io.BytesIO()
        np.save(content, np.asarray(value), allow_pickle=False)
        with atomic_path(folder / f"{name}.npy") as temporary:
            temporary.write_bytes(content.getbuffer())


FILES = ("dynamics.pth", "mu.npy", "std.npy", "policy.pth")
"""Names of the files that `read` looks for in a folder."""


def read(source: Path, hints: Hints = Hints()) -> Checkpoint:  # noqa: B008
    """Read the dynamics and the policy in a folder; either may be missing.

    The dynamics are dynamics.pth, mu.npy and std.npy; the policy is policy.pth, of which only the actor is
    read. The files do not store the activation of the dynamics: it is SiLU (Swish) unless `hints` names
    another.

    Raises:
        InputError: a file is damaged, or holds another kind of model.
    """
    dynamics = policy = None
    if (source / "dynamics.pth").exists():
        dynamics = _read_dynamics(source, hints)
    if (source / "policy.pth").exists():
        policy = _read_policy(source / "policy.pth")
    return Checkpoint(dynamics, policy)


def _read_dynamics(source: Path, hints: Hints) -> Ensemble:
    path = source / "dynamics.pth"
    state = load_state(path)
    depth = sum(name.startswith("backbones.") and name.endswith(".weight") for name in state)
    names = [*(f"backbones.{i}" for i in range(depth)), "output_layer"]
    mean, std = (_floats(_load_array(source / f"{name}.npy")) for name in ("mu", "std"))
    biases = [take(path, state, f"{name}.bias", 3) for name in names]
    if any(bias.shape[1] != 1 for bias in biases):
        raise InputError(f"{path}: biases must be [members, 1, out]")
    if hints.elites is None and "elites" not in state:
        raise InputError(f"{path} lacks elites")
    dynamics = ensemble_of(
        [take(path, state, f"{name}.weight", 3) for name in names],
        [bias[:, 0] for bias in biases],
        take(path, state, "max_logvar", 1),
        take(path, state, "min_logvar", 1),
        activation=hints.activation or "silu",
        input_mean=mean,
        input_std=std,
        elites=state["elites"].tolist() if hints.elites is None else hints.elites,
        absolute=hints.absolute or (),
    )
    check_model(path, dynamics)
    return dynamics


def _read_policy(path: Path) -> Actor:
    state = load_state(path)
    # Linear layers have even numbers; the odd ones are activations.
    depth = sum(name.startswith("actor.backbone.model.") and name.endswith(".weight") for name in state)
    names = [f"actor.backbone.model.{2 * i}" for i in range(depth)]
    heads = [
        [take(path, state, f"actor.dist_net.{head}.{kind}", ndim) for head in ("mu", "sigma")]
        for kind, ndim in (("weight", 2), ("bias", 1))
    ]
    if any(mu.shape != sigma.shape for mu, sigma in heads):
        raise InputError(f"{path}: mu and sigma must have layers of the same shape")
    weight, bias = map(torch.cat, heads)
    return actor_of(
        [take(path, state, f"{name}.weight", 2).T.contiguous() for name in names] + [weight.T.contiguous()],
        [take(path, state, f"{name}.bias", 1) for name in names] + [bias],
        activation="relu",
        log_std_min=_LOG_STD_BOUNDS[0],
        log_std_max=_LOG_STD_BOUNDS[1],
    )


def write(checkpoint: Checkpoint, target: Path) -> None:
    """Write dynamics.pth, mu.npy and std.npy for `EnsembleDynamics.load`, and policy.pth.

    A `Checkpoint` has no critics, so policy.pth holds the actor alone. Load it by
    `policy.load_state_dict(state, strict=False)`.

    Raises:
        InputError: OfflineRL-Kit cannot represent one of the models.
    """
    warn_of_changes(checkpoint, check_dynamics, check_policy)
    ensemble = checkpoint.dynamics
    if ensemble is not None:
        scale = (values.numpy()[None] for values in (ensemble.input_mean, ensemble.input_std))
        _save_files(target, _dynamics_state(ensemble), *scale)
    if checkpoint.policy is not None:
        save(target / "policy.pth", _policy_state(checkpoint.policy))


def check_dynamics(ensemble: Ensemble) -> list[str]:
    """Return a sentence about the activation if it is not SiLU, which dynamics.pth does not store.

    Raises:
        InputError: OfflineRL-Kit's models lack a property of these dynamics.
    """
    check_kind(ensemble, "OfflineRL-Kit's models", log_scale="variance")
    return unstored_activation(ensemble, "dynamics.pth", "EnsembleDynamicsModel", "silu")


def check_policy(policy: Actor) -> list[str]:
    """Return a sentence about the bounds of the log-stds if they are not [-5, 2].

    Raises:
        InputError: the policy's activation is not ReLU.
    """
    check_activation(policy, "OfflineRL-Kit's policies", "relu")
    low, high = policy.log_std_min, policy.log_std_max
    advice = f"; to keep the bounds, build TanhDiagGaussian with sigma_min={low:g} and sigma_max={high:g}"
    return clipped_log_stds(policy, *_LOG_STD_BOUNDS, "OfflineRL-Kit", advice)


def _dynamics_state(ensemble: Ensemble) -> dict[str, torch.Tensor]:
    names = [*(f"backbones.{i}" for i in range(len(ensemble.hidden))), "output_layer"]
    state: dict[str, torch.Tensor] = {
        "max_logvar": ensemble.max_logvar.detach(),
        "min_logvar": ensemble.min_logvar.detach(),
        "elites": ensemble.elites,
    }
    for name, weight, bias in zip(names, ensemble.weights, ensemble.biases, strict=True):
        for prefix in ("", "saved_"):
            state[f"{name}.{prefix}weight"] = weight.detach()
            state[f"{name}.{prefix}bias"] = bias.detach()[:, None]
    return state


def _policy_state(policy: Actor) -> dict[str, torch.Tensor]:
    state = {}
    for i, (weight, bias) in enumerate(zip(policy.weights[:-1], policy.biases[:-1], strict=True)):
        state[f"actor.backbone.model.{2 * i}.weight"] = weight.detach().T.contiguous()
        state[f"actor.backbone.model.{2 * i}.bias"] = bias.detach()
    for kind, value in (("weight", policy.weights[-1].detach().T), ("bias", policy.biases[-1].detach())):
        for head, half in zip(("mu", "sigma"), value.chunk(2), strict=True):
            state[f"actor.dist_net.{head}.{kind}"] = half.contiguous()
    return state
