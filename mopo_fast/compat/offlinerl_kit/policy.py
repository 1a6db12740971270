"""OfflineRL-Kit's policies: their rollouts and their updates on the kernels."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch

from mopo_fast.compat.models import activation_of, actor_of, check_attributes, check_method
from mopo_fast.compat.offlinerl_kit.dynamics import EnsembleDynamics, draw_seed
from mopo_fast.compat.offlinerl_kit.files import VERSION
from mopo_fast.compat.torch_sac import Losses, Modules, SharedSAC, as_flags, draw_all, shared_with, start_over
from mopo_fast.config import SACConfig, TrainingDtype
from mopo_fast.data.transitions import Transitions
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.sac import Draws
from mopo_fast.utils.interrupts import deferred

Array = npt.NDArray[Any]

# Policies whose `rollout` and `select_action` are known. Each rolls its actor out, but for COMBO's uniform
# actions, which `_rollout` leaves to the original.
_POLICIES = ("MOPOPolicy", "COMBOPolicy", "RAMBOPolicy", "MOBILEPolicy", "SACPolicy")
_WITHOUT_ROLLOUT = "leave fuse_rollout out, the model's steps run on the kernels without it"
# Policies whose `learn` is known; RAMBOPolicy inherits MOPOPolicy's.
_LEARNERS = ("MOPOPolicy", "MOBILEPolicy")
_WITHOUT_LEARN = "leave fuse_learn and fuse_trainer out and call fuse_rollout(policy): its own learn stays"
# 1 - tanh^2 plus this is the argument of the logarithm in TanhNormalWrapper.log_prob.
_LOG_PROB_EPSILON = 1e-6

# Attributes that are read here: of all policies whose `learn` is known, and of each kind.
_SHARED = ("actor", "actor_optim", "_tau", "_gamma", "_is_auto_alpha", "_alpha")
_MOPO = tuple(f"critic{number}{part}" for number in (1, 2) for part in ("", "_old", "_optim"))
_MOBILE = (
    *("critics", "critics_old", "critics_optim", "dynamics"),
    # The spelling is the original's.
    *("_penalty_coef", "_num_samples", "_deteterministic_backup", "_max_q_backup"),
)
_ACTOR = ("backbone", "dist_net")
_HEAD = ("mu", "sigma", "_unbounded", "_c_sigma", "_max", "_sigma_min", "_sigma_max")


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
        check_method(policy, method, "offlinerlkit", _WITHOUT_ROLLOUT, _POLICIES)
    _actor(policy.actor)
    # Copies and pickles of the policy have copies of this, for themselves.
    policy.rollout = functools.partial(_rollout, policy)
    return policy


def fuse_learn(
    policy: Any, *, dtype: TrainingDtype = "float32", backend: str = "auto", threads: int | None = None
) -> Any:
    """Replace a policy's `learn` by one that makes the whole SAC update in one kernel call.

    The update is the original's: the same losses, the same order of steps, and the hyperparameters and the
    learning rates that the policy and its optimizers have at the time of the call. Parameters and the moments
    in the optimizers change in place, so checkpoints, schedules and evaluations see them as before. The noise
    of the actions is keyed by a seed from NumPy's global generator.

    `select_action` is replaced too, unless the policy has one of its own: evaluations ask for one action at a
    time, for which the original's modules take three times as long.

    MOBILEPolicy's penalty is computed in a kernel too, see `RolloutEngine.bellman_inconsistency`. Only the
    rows from the model have one, as in the original.

    Args:
        policy: MOPOPolicy, RAMBOPolicy or MOBILEPolicy on the CPU with an actor as for `fuse_rollout`,
            critics of the same hidden layers, ReLU, and optimizers that are torch.optim.Adam with its
            defaults except for the learning rates. MOBILEPolicy's dynamics must be this module's.
        dtype: precision of the matrix products, see `SACConfig.dtype`.
        backend: backend of `SAC`.
        threads: number of CPU threads, see `SAC`.

    Returns:
        `policy` itself.

    Raises:
        InputError: the kernels do not support the policy. The message names the reason.
    """
    for method in ("learn", "_sync_weight", "compute_lcb"):
        check_method(policy, method, "offlinerlkit", _WITHOUT_LEARN, (*_LEARNERS, "SACPolicy"))
    check_method(policy, "actforward", "offlinerlkit", _WITHOUT_LEARN, _POLICIES)
    check_attributes(policy, (*_SHARED, *(_MOBILE if is_mobile(policy) else _MOPO)), VERSION)
    if policy._is_auto_alpha:
        check_attributes(policy, ("_target_entropy", "_log_alpha", "alpha_optim"), VERSION)
    if is_mobile(policy) and not isinstance(policy.dynamics, EnsembleDynamics):
        raise InputError("the policy's dynamics must be mopo_fast.compat.offlinerl_kit.EnsembleDynamics")
    _check_networks(policy)
    start_over(policy, dtype, backend, threads)
    shared_sac(policy)
    policy.learn = functools.partial(_learn_mobile if is_mobile(policy) else _learn, policy)
    try:
        check_method(policy, "select_action", "offlinerlkit", "", ("SACPolicy", "MOBILEPolicy"))
    except InputError:
        # One of its own, or RAMBOPolicy's, which may scale the observations.
        return policy
    policy.select_action = functools.partial(_select_action, policy)
    return policy


def shared_sac(policy: Any) -> SharedSAC:
    """Return the SAC that updates a policy that `fuse_learn` has taken over."""
    return shared_with(policy, _modules(policy), functools.partial(sac_config, policy))


def update(policy: Any, draws: Draws) -> dict[str, float]:
    """Make updates of a policy that `fuse_learn` has taken over; return what its `learn` returns."""
    alpha = None if policy._is_auto_alpha else float(policy._alpha)
    # Ctrl-C must not come between the updates and the policy's own temperature.
    with deferred():
        return _report(policy, shared_sac(policy).update(draws, sac_config(policy), alpha))


def sac_config(policy: Any) -> SACConfig:
    """Return the hyperparameters that a policy has now, without the learning rates."""
    head, mobile = policy.actor.dist_net, is_mobile(policy)
    if mobile and policy._max_q_backup:
        raise InputError("the updates have no max_q_backup; leave it out, or keep the policy's own learn")
    if policy._is_auto_alpha and float(policy._alpha) > 1.0:
        # The original's first update would take it as it is.
        raise InputError(
            f"the updates take an alpha of at most 1, which the original limits it to after its first update;"
            f" got {float(policy._alpha):g}: begin with a log_alpha of at most 0"
        )
    return SACConfig(
        hidden=tuple(layer.out_features for layer in _linears(policy.actor.backbone.model)),
        critics=len(policy.critics) if mobile else 2,
        log_std_min=head._sigma_min,
        log_std_max=head._sigma_max,
        log_prob_epsilon=_LOG_PROB_EPSILON,
        target_entropy=float(policy._target_entropy) if policy._is_auto_alpha else 0.0,
        critic_loss="mean_mse" if mobile else "mse",
        alpha_max=1.0 if policy._is_auto_alpha else None,
        entropy_backup=not (mobile and policy._deteterministic_backup),
        target_min=0.0 if mobile else None,
        order="critic_first",
        discount=policy._gamma,
        polyak=policy._tau,
        dtype=policy._mopo_fast["dtype"],
    )


def _report(policy: Any, losses: Losses) -> dict[str, float]:
    """Return what the original's `learn` returns, and set the policy's temperature."""
    metrics = losses.metrics
    result = {"loss/actor": metrics["actor_loss"]}
    if is_mobile(policy):
        result["loss/critic"] = metrics["critic_loss"]
    else:
        result |= {f"loss/critic{number}": loss for number, loss in enumerate(losses.critics, start=1)}
    if policy._is_auto_alpha:
        policy._alpha = torch.full_like(policy._log_alpha.detach(), losses.alpha)
        result |= {"loss/alpha": metrics["alpha_loss"], "alpha": losses.mean_alpha}
    return result


def _rollout(policy: Any, init_obss: Array, rollout_length: int) -> tuple[dict[str, Array], dict[str, Any]]:
    result: tuple[dict[str, Array], dict[str, Any]]
    if getattr(policy, "_uniform_rollout", False):
        result = type(policy).rollout(policy, init_obss, rollout_length)
    else:
        result = policy.dynamics.rollout(_actor(policy.actor), init_obss, rollout_length)
    return result


def _learn(policy: Any, batch: dict[str, dict[str, torch.Tensor]]) -> dict[str, float]:
    return update(policy, draw_all(_mix(batch), draw_seed()))


def _mix(batch: dict[str, dict[str, torch.Tensor]]) -> Transitions:
    """Return a batch's real rows, then its model rows."""
    real, fake = batch["real"], batch["fake"]
    return as_transitions({name: torch.cat([real[name], fake[name]]) for name in real})


def _select_action(policy: Any, obs: Array, deterministic: bool = False) -> Array:
    return shared_sac(policy).act(obs, deterministic=deterministic)


def _learn_mobile(policy: Any, batch: dict[str, dict[str, torch.Tensor]]) -> dict[str, float]:
    rows, real = _mix(batch), len(batch["real"]["rewards"])
    if len(rows) > real:
        shared = shared_sac(policy)
        # The policy and the target critics must be those of now.
        shared.share(sac_config(policy))
        penalties = policy.dynamics.kept_engine().bellman_inconsistency(
            rows.observations[real:],
            rows.actions[real:],
            shared.sac.actor,
            shared.sac.target,
            seed=draw_seed(),
            samples=policy._num_samples,
        )
        rows.rewards[real:] -= policy._penalty_coef * penalties
    return update(policy, draw_all(rows, draw_seed()))


def is_mobile(policy: Any) -> bool:
    """Tell whether a policy is a MOBILEPolicy."""
    return any(kind.__name__ == "MOBILEPolicy" for kind in type(policy).__mro__)


def as_transitions(arrays: Mapping[str, torch.Tensor]) -> Transitions:
    """Return a batch of OfflineRL-Kit, or the arrays of one of its buffers, as transitions.

    Raises:
        InputError: a terminal is neither 0 nor 1.
    """
    return Transitions(
        observations=arrays["observations"],
        actions=arrays["actions"],
        rewards=arrays["rewards"][:, 0],
        next_observations=arrays["next_observations"],
        terminals=as_flags("terminals", arrays["terminals"][:, 0]),
    )


def _check_networks(policy: Any) -> None:
    """Raise `InputError` if the kernels do not compute what the policy's networks do."""
    _actor(policy.actor)
    critics = policy.critics if is_mobile(policy) else (policy.critic1, policy.critic2)
    for critic in critics:
        check_attributes(critic, ("backbone", "last"), VERSION)
        for module in (critic, critic.backbone):
            check_method(module, "forward", "offlinerlkit", _WITHOUT_LEARN)


def _modules(policy: Any) -> Modules:
    """Return the layers and the optimizers of a policy."""
    body, head = policy.actor.backbone.model, policy.actor.dist_net
    if not all(isinstance(module, torch.nn.ReLU) for module in list(body)[1::2]):
        raise InputError(f"the updates take an actor with ReLU, got {body}")
    if is_mobile(policy):
        networks, optimizers = (policy.critics, policy.critics_old), [policy.critics_optim]
    else:
        networks = (policy.critic1, policy.critic2), (policy.critic1_old, policy.critic2_old)
        optimizers = [policy.critic1_optim, policy.critic2_optim]
    critics, targets = ([_critic(critic) for critic in some] for some in networks)
    return Modules(
        actor=[*_linears(body), head.mu, head.sigma],
        critics=critics,
        targets=targets,
        actor_optimizer=policy.actor_optim,
        critic_optimizers=optimizers,
        alpha=(policy._log_alpha, policy.alpha_optim) if policy._is_auto_alpha else float(policy._alpha),
    )


def _critic(critic: Any) -> list[torch.nn.Linear]:
    """Return the layers of a Critic."""
    modules = list(critic.backbone.model)
    if not all(
        type(module) is (torch.nn.ReLU if number % 2 else torch.nn.Linear)
        for number, module in enumerate(modules)
    ):
        raise InputError(f"the updates take critics of linear layers with ReLU, got {critic.backbone.model}")
    return [*_linears(modules), critic.last]


def _linears(modules: Any) -> list[torch.nn.Linear]:
    return [module for module in modules if isinstance(module, torch.nn.Linear)]


def _actor(actor: Any) -> Actor:
    """Return an ActorProb as this package's actor."""
    check_attributes(actor, _ACTOR, VERSION)
    head, modules = actor.dist_net, list(actor.backbone.model)
    for module in (actor, actor.backbone, head):
        check_method(module, "forward", "offlinerlkit", _WITHOUT_ROLLOUT)
    if type(head).__name__ != "TanhDiagGaussian" or not (head._unbounded and head._c_sigma) or head._max != 1:
        raise InputError(
            "the rollout can be fused for a TanhDiagGaussian with unbounded=True, conditioned_sigma=True and"
            " max_mu=1; leave fuse_rollout out for any other actor"
        )
    check_attributes(head, _HEAD, VERSION)
    linears = _linears(modules)
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
