"""OfflineRL-Kit: its `EnsembleDynamics` and `MOPOPolicy.rollout` by our kernels, and its files.

    from mopo_fast.compat.offlinerl_kit import EnsembleDynamics, fuse_rollout
    dynamics = EnsembleDynamics(dynamics_model, dynamics_optim, scaler, termination_fn, penalty_coef=2.5)
    policy = fuse_rollout(MOPOPolicy(dynamics, actor, ...))

Read at github.com/yihaosun1124/OfflineRL-Kit, commit e3ce697.
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
from mopo_fast.compat.models import activation_of, actor_of, check_kind, check_model, ensemble_of
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

PENALTIES: dict[str, Penalty] = {
    "aleatoric": "max_aleatoric",
    "pairwise-diff": "max_deviation",
    "ensemble_std": "ensemble_std",
}


def termination_box(function: Any, obs_dim: int) -> Box | None:
    """The box that one of its termination functions is, by the function's name; None for any other.

    A prediction that is not finite ends a rollout by each of ours, by most of theirs.
    """
    module, name = getattr(function, "__module__", ""), getattr(function, "__name__", "")
    task = name.removeprefix("termination_fn_").removeprefix("terminaltion_fn_")
    if not module.endswith("termination_fns") or task == name or task not in OFFLINERL_KIT_RULES:
        return None
    return make_box(obs_dim, **OFFLINERL_KIT_RULES[task])


class EnsembleDynamics:
    """`offlinerlkit.dynamics.EnsembleDynamics`, with the same arguments, methods and results.

    Its model's weights are ours, in place: each sees at once what the other has changed. Random numbers come
    from a seed that is drawn of NumPy's global generator at every call, so that seeding it makes runs
    repeatable, to other numbers than the original's.

    Args:
        model: its EnsembleDynamicsModel.
        optim: torch.optim.Adam over the model; of it, `train` takes the learning rate.
        scaler: its StandardScaler.
        terminal_fn: one of its `get_termination_fn`, which becomes part of the kernel, or any other
            (obs, action, next_obs) -> bool [n, 1] of NumPy arrays.
        penalty_coef: 0: no penalty is computed, as there.
        uncertainty_mode: aleatoric, pairwise-diff or ensemble_std.
        backend, dtype, threads: of `RolloutEngine`; "bfloat16" is several times faster on AMX.

    Raises:
        InputError: the model is none that the kernels have, or an argument is unknown.
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
            raise InputError("the model predicts no reward (with_reward=False); ours always do")
        self.model, self.optim, self.scaler = model, optim, scaler
        self.terminal_fn = terminal_fn
        self._penalty_coef, self._uncertainty_mode = penalty_coef, uncertainty_mode
        self._options: dict[str, Any] = {"backend": backend, "dtype": dtype, "threads": threads}
        self._box = termination_box(terminal_fn, _layers(model)[-1].weight.shape[-1] // 2 - 1)

    def ensemble(self) -> Ensemble:
        """The model as ours, on its own weights."""
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
        """What makes the steps and the rollouts."""
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
        """One step: next_obs [n, obs_dim], reward [n, 1], both float32, terminal bool [n, 1], and info.

        `info` has raw_reward and, unless penalty_coef is 0, penalty, float32 [n, 1].
        """
        engine = self.engine()
        made = engine.step(*_tensors(engine, obs, action), seed=_draw_seed())
        arrays = [array.cpu().numpy() for array in (made.next_observations, made.rewards, made.terminals)]
        info = {"raw_reward": made.raw_rewards.cpu().numpy()[:, None]}
        if self._penalty_coef:
            info["penalty"] = made.penalties.cpu().numpy()[:, None]
        return arrays[0], arrays[1][:, None], arrays[2][:, None], info

    def rollout(
        self, actor: Actor, init_obss: Array, rollout_length: int
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """What `MOPOPolicy.rollout` returns, all steps fused: rows step by step, without those that ended.

        A prediction that is not finite is left out too; the original stores it.
        """
        engine = self.engine()
        (start,) = _tensors(engine, init_obss)
        made = engine.rollout(actor, start, rollout_length, seed=_draw_seed())
        assert made.step is not None
        order = torch.argsort(made.step, stable=True)
        rows = made[order]
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
        """[num_samples, elites, n, obs_dim] next observations, drawn of torch's global generator."""
        engine = self.engine()
        made = engine.step(*_tensors(engine, obs, action), seed=0, distributions=True)
        assert made.mean is not None and made.std is not None
        elites = engine.ensemble.elites
        mean, std = made.mean[elites][..., :-1].to(obs.device), made.std[elites][..., :-1].to(obs.device)
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
        """Fit the model to `data` by our kernel, into the model itself; then `save` to `logger.model_dir`.

        Weights before are where the fit begins, as there.
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
            # There the fifth epoch without improvement is the last, here the one after.
            patience=max_epochs_since_update - 1,
            # 0 is no limit there, as None is.
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
            on_epoch=report,
        )
        with torch.no_grad():
            for layer, weight, bias in zip(layers, fitted.weights, fitted.biases, strict=True):
                for ours, name in ((weight, "weight"), (bias[:, None], "bias")):
                    getattr(layer, name).copy_(ours)
                    getattr(layer, f"saved_{name}").copy_(ours)
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
        """dynamics.pth, mu.npy and std.npy, as there."""
        _save_files(Path(save_path), self.model.state_dict(), self.scaler.mu, self.scaler.std)

    def load(self, load_path: str | os.PathLike[str]) -> None:
        """What `save`, or the original, has written.

        Raises:
            InputError: a file is missing or damaged, or of another model.
        """
        folder = Path(load_path)
        state = load_state(folder / "dynamics.pth")
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"{folder / 'dynamics.pth'} is of another model: {error}") from error
        self.scaler.mu, self.scaler.std = (_load_array(folder / f"{name}.npy") for name in ("mu", "std"))


def fuse_rollout(policy: Any) -> Any:
    """The same MOPOPolicy, with a `rollout` that makes all steps in one call of the kernel.

    Its actor must be an ActorProb of an MLP and a TanhDiagGaussian with unbounded mean and conditioned sigma,
    for actions in [-1, 1]: what its run_mopo.py makes.

    Raises:
        InputError: the actor is another, or the dynamics are not `EnsembleDynamics` of this module.
    """
    if not isinstance(policy.dynamics, EnsembleDynamics):
        raise InputError("the policy's dynamics must be mopo_fast.compat.offlinerl_kit.EnsembleDynamics")
    _actor(policy.actor)
    # Bound, so that a copy of the policy rolls out itself.
    policy.rollout = types.MethodType(_rollout, policy)
    return policy


def _rollout(policy: Any, init_obss: Array, rollout_length: int) -> tuple[dict[str, Array], dict[str, Any]]:
    result: tuple[dict[str, Array], dict[str, Any]] = policy.dynamics.rollout(
        _actor(policy.actor), init_obss, rollout_length
    )
    return result


def _layers(model: Any) -> list[Any]:
    return [*model.backbones, model.output_layer]


def _actor(actor: Any) -> Actor:
    """Its ActorProb as ours."""
    head, modules = actor.dist_net, list(actor.backbone.model)
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
    """float32 of any numbers that NumPy has, as the original takes them; shared where possible."""
    if isinstance(array, torch.Tensor):
        return array.to(torch.float32)
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))


def _learning_rate(optim: torch.optim.Optimizer) -> float:
    group = optim.param_groups[0]
    betas, eps, decay = group.get("betas"), group.get("eps"), group.get("weight_decay")
    if type(optim) is not torch.optim.Adam or (betas, eps, decay) != ((0.9, 0.999), 1e-8, 0):
        raise InputError(
            "the fit is by torch.optim.Adam with its own defaults but for the learning rate, got"
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
        # Mapped, so that nothing is allocated for a header which claims more than the file has.
        mapped = np.lib.format.open_memmap(path, mode="r")
        # Once more while it is checked.
        check_memory(f"{path}", 2 * mapped.nbytes, "cpu", "its size")
        array: Array = np.array(mapped)
    except InputError:
        raise
    # A damaged file fails in any way.
    except Exception as error:
        raise InputError(f"{path} is not a whole .npy file ({brief(error)}); get or make it again") from error
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


WRITES_POLICIES = True


def read(source: Path, hints: Hints = Hints()) -> Checkpoint:  # noqa: B008
    """dynamics.pth with mu.npy and std.npy, and policy.pth, of a folder; each pair may be missing.

    The activation is Swish unless `hints` say otherwise: the files do not.

    Raises:
        InputError: a file is damaged, or holds other models.
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
    # Activations lie between the linear layers.
    depth = sum(name.startswith("actor.backbone.model.") and name.endswith(".weight") for name in state)
    names = [f"actor.backbone.model.{2 * i}" for i in range(depth)]
    heads = [
        [take(path, state, f"actor.dist_net.{head}.{kind}", ndim) for head in ("mu", "sigma")]
        for kind, ndim in (("weight", 2), ("bias", 1))
    ]
    if any(mu.shape != sigma.shape for mu, sigma in heads):
        raise InputError(f"{path}: mu and sigma have layers of other shapes")
    weight, bias = map(torch.cat, heads)
    return actor_of(
        [take(path, state, f"{name}.weight", 2).T.contiguous() for name in names] + [weight.T.contiguous()],
        [take(path, state, f"{name}.bias", 1) for name in names] + [bias],
        activation="relu",
        log_std_min=-5.0,
        log_std_max=2.0,
    )


def write(checkpoint: Checkpoint, target: Path) -> None:
    """dynamics.pth, mu.npy, std.npy for `EnsembleDynamics.load`; policy.pth with the actor alone.

    The critics are not in a `Checkpoint`: `policy.load_state_dict(state, strict=False)` takes such a file.

    Raises:
        InputError: its code has no such model.
    """
    # All is refused that is to be refused before the first file is written.
    policy = None if checkpoint.policy is None else _policy_state(checkpoint.policy)
    ensemble = checkpoint.dynamics
    if ensemble is not None:
        scale = (values.numpy()[None] for values in (ensemble.input_mean, ensemble.input_std))
        _save_files(target, _dynamics_state(ensemble), *scale)
    if policy is not None:
        save(target / "policy.pth", policy)


def _dynamics_state(ensemble: Ensemble) -> dict[str, torch.Tensor]:
    check_kind(ensemble, "OfflineRL-Kit's models", log_scale="variance")
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
    if (policy.activation, policy.log_std_min, policy.log_std_max) != ("relu", -5.0, 2.0):
        raise InputError(
            "OfflineRL-Kit's actor has ReLU and log stds clipped to [-5, 2]; this policy has"
            f" {policy.activation} and [{policy.log_std_min:g}, {policy.log_std_max:g}]"
        )
    state = {}
    for i, (weight, bias) in enumerate(zip(policy.weights[:-1], policy.biases[:-1], strict=True)):
        state[f"actor.backbone.model.{2 * i}.weight"] = weight.detach().T.contiguous()
        state[f"actor.backbone.model.{2 * i}.bias"] = bias.detach()
    for kind, value in (("weight", policy.weights[-1].detach().T), ("bias", policy.biases[-1].detach())):
        for head, half in zip(("mu", "sigma"), value.chunk(2), strict=True):
            state[f"actor.dist_net.{head}.{kind}"] = half.contiguous()
    return state
