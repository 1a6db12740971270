"""Adapter for mbrl-lib: its `ModelEnv` and the updates of its SAC on fused kernels, and its files.

    from mopo_fast.compat.mbrl_lib import ModelEnv, fuse_sac
    model_env = ModelEnv(env, dynamics_model, termination_fn, generator=generator)
    fuse_sac(agent.sac_agent)

mbrl-lib implements MBPO, the same loop as MOPO without a penalty. A positive `penalty_coef` makes it MOPO.

Source: mbrl 0.2.0.
"""

import dataclasses
import functools
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mopo_fast.backends import StepResult
from mopo_fast.compat import Checkpoint
from mopo_fast.compat.models import (
    activation_of,
    check_attributes,
    check_kind,
    check_method,
    check_model,
    ensemble_of,
    unstored_activation,
    warn_of_changes,
)
from mopo_fast.compat.torch_files import as_state, load, save, take
from mopo_fast.compat.torch_sac import (
    Modules,
    SharedSAC,
    as_flags,
    draw_all,
    learning_rate,
    shared_with,
    start_over,
)
from mopo_fast.config import Hints, Penalty, SACConfig, TrainingDtype
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.utils import pickles
from mopo_fast.utils.atomic import atomic_path
from mopo_fast.utils.interrupts import deferred

State = dict[str, Any]

VERSION = "mbrl-lib 0.2.0"
# Attributes that are read here: of a OneDTransitionRewardModel and its GaussianMLP, and of SAC and its
# networks.
_MODEL = (
    "obs_process_fn",
    "learned_rewards",
    "input_normalizer",
    "target_is_delta",
    "no_delta_list",
    "device",
)
_MLP = ("max_logvar", "min_logvar", "elite_models", "propagation_method", "out_size")
_SAC = (
    *("critic", "gamma", "tau", "alpha", "automatic_entropy_tuning", "target_update_interval"),
    *("critic_optim", "policy_optim"),
)
_TEMPERATURE = ("target_entropy", "log_alpha", "alpha_optim")
_POLICY = ("linear1", "linear2", "mean_linear", "log_std_linear", "action_scale", "action_bias")
_CRITIC = tuple(f"linear{number}" for number in range(1, 7))


class ModelEnv:
    """Replacement for `mbrl.models.ModelEnv`, for a OneDTransitionRewardModel of an ensemble GaussianMLP.

    Arguments, methods and results are those of mbrl-lib. The kernels read the model's weights in place.
    Elites are chosen by the model's propagation method, as in mbrl-lib: "random_model" and "fixed_model"
    shuffle the batch and split it equally among the elites, and "expectation" averages the elites. Unlike
    in mbrl-lib, the batch need not be a multiple of the number of elites. The noise depends on a seed drawn
    from `generator`. Rows that are not finite stay in the batch as NaN, as in mbrl-lib.

    Args:
        env: environment, used for its spaces.
        model: OneDTransitionRewardModel.
        termination_fn: function (actions, next_observations) -> bool [batch, 1].
        reward_fn: function (actions, next_observations) -> rewards [batch, 1]; None for the model's rewards.
        generator: generator of the seeds and of the noise of "expectation"; None for a new one.
        penalty_coef: lambda in the reward r - lambda * u(s, a), where u is over all members. 0 gives MBPO.
        penalty: penalty u, see `RolloutEngine`.
        partition: "equal" for the equal split of mbrl-lib, or "independent" to draw an elite for each row, as
            MOPO does.
        backend: backend of `RolloutEngine`.
        dtype: precision of the matrix products, see `RolloutEngine`.
        threads: number of CPU threads, see `RolloutEngine`.

    Attributes:
        penalties: u(s, a) [batch, 1] of the last step; None if penalty_coef is 0.

    Raises:
        InputError: the kernels do not support the model, rewards are neither learned nor computed by
            `reward_fn`, or an argument is out of range.
    """

    def __init__(
        self,
        env: Any,
        model: Any,
        termination_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        reward_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        generator: torch.Generator | None = None,
        *,
        penalty_coef: float = 0.0,
        penalty: Penalty = "max_aleatoric",
        partition: Literal["equal", "independent"] = "equal",
        backend: str = "auto",
        dtype: str = "float32",
        threads: int | None = None,
    ) -> None:
        if partition not in ("equal", "independent"):
            raise InputError(f'partition must be "equal" or "independent", got {partition!r}')
        if not 0.0 <= penalty_coef < float("inf"):
            raise InputError(f"penalty_coef must be finite and not negative, got {penalty_coef!r}")
        _check(model)
        if reward_fn is None and not model.learned_rewards:
            raise InputError("the model has not learned rewards: give a reward_fn")
        self.dynamics_model, self.termination_fn, self.reward_fn = model, termination_fn, reward_fn
        self.device = model.device
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.penalty_coef, self.penalty, self.partition = penalty_coef, penalty, partition
        self.penalties: Any = None
        self._options: State = {"backend": backend, "dtype": dtype, "threads": threads}
        self._rng = generator or torch.Generator(device=self.device)
        self._return_as_np = True

    def reset(self, initial_obs_batch: np.ndarray[Any, Any], return_as_np: bool = True) -> State:
        """Start rollouts at a batch of observations.

        Args:
            initial_obs_batch: start states [batch, obs_dim].
            return_as_np: whether `step` returns NumPy arrays instead of tensors.

        Returns:
            The model's state, an argument of `step`.

        Raises:
            InputError: the observations are not two-dimensional.
        """
        if np.ndim(initial_obs_batch) != 2:
            raise InputError(f"observations must be [batch, dim], got shape {np.shape(initial_obs_batch)}")
        self._return_as_np = return_as_np
        state: State | None = self.dynamics_model.reset(
            np.asarray(initial_obs_batch, dtype=np.float32), rng=self._rng
        )
        return state if state is not None else {}

    def step(self, actions: Any, model_state: State, sample: bool = False) -> tuple[Any, Any, Any, State]:
        """Predict one step.

        Args:
            actions: actions [batch, act_dim], a tensor or an array.
            model_state: state from `reset` or the last `step`; it is changed in place.
            sample: whether to sample predictions; False returns the means of the chosen elites.

        Returns:
            Next observations [batch, obs_dim], rewards [batch, 1], dones [batch, 1], as tensors or arrays
            (see `reset`), and `model_state`.
        """
        with torch.no_grad():
            if isinstance(actions, np.ndarray):
                actions = torch.from_numpy(actions).to(self.device)
            observations = torch.as_tensor(model_state["obs"], device=self.device)
            result = self._step(observations, actions, model_state, sample)
            rewards: Any = result.raw_rewards[:, None]
            if self.reward_fn is not None:
                rewards = self.reward_fn(actions, result.next_observations)
            if self.penalty_coef:
                assert result.penalties is not None
                self.penalties = result.penalties[:, None]
                rewards = rewards - self.penalty_coef * self.penalties
            dones: Any = self.termination_fn(actions, result.next_observations)
            model_state["obs"] = result.next_observations
            successors: Any = result.next_observations
            if self._return_as_np:
                successors, rewards, dones = (array.cpu().numpy() for array in (successors, rewards, dones))
            return successors, rewards, dones, model_state

    def evaluate_action_sequences(
        self, action_sequences: torch.Tensor, initial_state: np.ndarray[Any, Any], num_particles: int
    ) -> torch.Tensor:
        """Estimate the return of each action sequence, up to the first done.

        Args:
            action_sequences: actions [population, horizon, act_dim].
            initial_state: start state [obs_dim].
            num_particles: number of rollouts of each sequence.

        Returns:
            Mean return [population] over the rollouts of a sequence.
        """
        population, horizon, _ = action_sequences.shape
        start = np.repeat(np.asarray(initial_state, np.float32)[None], num_particles * population, axis=0)
        with torch.no_grad():
            state = self.reset(start, return_as_np=False)
            total = torch.zeros(len(start), 1, device=self.device)
            ended = torch.zeros(len(start), 1, dtype=torch.bool, device=self.device)
            for step in range(horizon):
                actions = action_sequences[:, step].repeat_interleave(num_particles, dim=0)
                _, rewards, dones, state = self.step(actions, state, sample=True)
                total += torch.where(ended, 0.0, rewards)
                ended |= dones
            return total.reshape(-1, num_particles).mean(dim=1)

    def _step(
        self, observations: torch.Tensor, actions: torch.Tensor, state: State, sample: bool
    ) -> StepResult:
        model = self.dynamics_model
        process = model.obs_process_fn
        ensemble = _ensemble(model, absolute=None if process is None else range(_obs_dim(model)))
        inputs = torch.cat([observations if process is None else process(observations), actions], dim=1)
        finite = torch.isfinite(inputs).all(1, keepdim=True)
        inputs = torch.where(finite, inputs, 0.0)
        # Processed observations may have another size. With all outputs absolute, the kernel never adds an
        # input to an output, so that inputs may be split anywhere.
        split = inputs.tensor_split([ensemble.obs_dim], dim=1)
        result = self._predict(ensemble, split[0], split[1], state, sample)
        successors = result.next_observations
        if process is not None:
            predicted = torch.zeros(ensemble.obs_dim, dtype=torch.bool, device=self.device)
            predicted[_absolute(model)] = True
            successors = torch.where(predicted, successors, observations + successors)
        return dataclasses.replace(
            result,
            next_observations=torch.where(finite, successors, torch.nan),
            raw_rewards=torch.where(finite[:, 0], result.raw_rewards, torch.nan),
            penalties=None
            if result.penalties is None
            else torch.where(finite[:, 0], result.penalties, torch.nan),
        )

    def _predict(
        self,
        ensemble: EnsembleDynamics,
        observations: torch.Tensor,
        actions: torch.Tensor,
        state: State,
        sample: bool,
    ) -> StepResult:
        method = self.dynamics_model.model.propagation_method
        elites = ensemble.elites.tolist()
        if len(elites) > 1 and method is None:
            raise InputError("the model has no propagation method; set propagation_method of its GaussianMLP")
        seed = int(torch.randint(2**63 - 1, (1,), generator=self._rng, device=self.device))
        engine = self._engine(ensemble)
        if self.partition == "independent" and method == "random_model" and sample:
            return engine.step(observations, actions, seed=seed)
        penalties = None
        if self.penalty_coef:
            penalties = engine.step(observations, actions, seed=seed, deterministic=True).penalties
        if method == "expectation":
            result = self._expectation(_select_members(ensemble, elites), observations, actions, sample)
        else:
            order = state["propagation_indices"] if method == "fixed_model" else None
            if order is None:
                # From torch's global generator, as in mbrl-lib.
                order = torch.randperm(len(observations), device=self.device)
            result = self._step_each_elite(ensemble, elites, observations, actions, order, seed, sample)
        return result if penalties is None else dataclasses.replace(result, penalties=penalties)

    def _step_each_elite(
        self,
        ensemble: EnsembleDynamics,
        elites: list[int],
        observations: torch.Tensor,
        actions: torch.Tensor,
        order: torch.Tensor,
        seed: int,
        sample: bool,
    ) -> StepResult:
        """Split the rows, as `order` lists them, equally among the elites; each elite steps its part."""
        whole: dict[str, torch.Tensor] = {}
        for elite, rows in zip(elites, order.tensor_split(len(elites)), strict=True):
            if len(rows) == 0:
                continue
            part = self._engine(_select_members(ensemble, [elite])).step(
                observations[rows], actions[rows], seed=seed, rows=rows, deterministic=not sample
            )
            for name in ("next_observations", "raw_rewards", "terminals", "members"):
                array = getattr(part, name)
                whole.setdefault(name, array.new_empty((len(order), *array.shape[1:])))[rows] = array
        return StepResult(**whole, rewards=whole["raw_rewards"])

    def _expectation(
        self, ensemble: EnsembleDynamics, observations: torch.Tensor, actions: torch.Tensor, sample: bool
    ) -> StepResult:
        """Step by the mean of the elites' means and, if sampled, the mean of their log-variances."""
        result = self._engine(ensemble).step(
            observations, actions, seed=0, deterministic=True, distributions=sample
        )
        if not sample:
            return result
        assert result.std is not None
        std = result.std.log().mean(0).exp()
        noise = std * torch.randn(std.shape, generator=self._rng, device=std.device, dtype=std.dtype)
        rewards = result.raw_rewards + noise[:, -1]
        return dataclasses.replace(
            result,
            next_observations=result.next_observations + noise[:, :-1],
            rewards=rewards,
            raw_rewards=rewards,
        )

    def _engine(self, ensemble: EnsembleDynamics) -> RolloutEngine:
        penalties = bool(self.penalty_coef)
        return RolloutEngine(
            ensemble, penalty=self.penalty, penalty_coef=0.0, penalties=penalties, **self._options
        )


def _check(model: Any) -> None:
    inner: Any = getattr(model, "model", None)
    if not hasattr(inner, "mean_and_logvar") or not hasattr(inner, "hidden_layers"):
        raise InputError("the model must be a OneDTransitionRewardModel around a GaussianMLP")
    for owner, methods in ((model, ("forward", "sample")), (inner, ("forward", "sample_1d"))):
        for method in methods:
            check_method(owner, method, "mbrl", "use mbrl-lib's ModelEnv for this model")
    check_attributes(inner, ("deterministic",), VERSION)
    if inner.deterministic:
        raise InputError("the GaussianMLP is deterministic: it has no variances to draw from or to penalise")
    check_attributes(model, _MODEL, VERSION)
    check_attributes(inner, _MLP, VERSION)


def ensemble_over(model: Any) -> EnsembleDynamics:
    """Return a OneDTransitionRewardModel as this package's ensemble.

    The two share their weights if the model predicts rewards; otherwise a reward of 0 is added to a copy.

    Raises:
        InputError: see `ModelEnv`; or the model has an obs_process_fn, which only `ModelEnv` can apply.
    """
    _check(model)
    if model.obs_process_fn is not None:
        raise InputError("the model has an obs_process_fn, which an ensemble cannot apply; use ModelEnv")
    return _ensemble(model)


def _ensemble(model: Any, absolute: Sequence[int] | None = None) -> EnsembleDynamics:
    """Return the ensemble; `absolute` replaces the model's own absolute dimensions unless it is None."""
    inner = model.model
    layers = [layer[0] for layer in inner.hidden_layers] + [inner.mean_and_logvar]
    weights = [layer.weight.detach() for layer in layers]
    biases = [layer.bias.detach()[:, 0] for layer in layers]
    bounds = [inner.max_logvar.detach()[0], inner.min_logvar.detach()[0]]
    if not model.learned_rewards:
        # Add a reward of 0 whose log-variance is too small to add to a penalty.
        weights[-1], biases[-1] = (_insert_reward(tensor, 0.0) for tensor in (weights[-1], biases[-1]))
        bounds = [torch.cat([bound, bound.new_tensor([-60.0 - i])]) for i, bound in enumerate(bounds)]
    scale = model.input_normalizer
    return ensemble_of(
        weights,
        biases,
        *bounds,
        activation=activation_of(inner.hidden_layers[0][1]),
        input_mean=None if scale is None else scale.mean,
        input_std=None if scale is None else scale.std,
        elites=inner.elite_models,
        absolute=_absolute(model) if absolute is None else absolute,
    )


def _obs_dim(model: Any) -> int:
    return int(model.model.out_size) - bool(model.learned_rewards)


def _absolute(model: Any) -> list[int]:
    """Return the observation dimensions whose next value the model predicts instead of the change."""
    obs_dim = _obs_dim(model)
    dims = model.no_delta_list if model.target_is_delta else range(obs_dim)
    return sorted({dim % obs_dim for dim in dims})


def _insert_reward(heads: torch.Tensor, value: float) -> torch.Tensor:
    """Append a column of `value` to each half (mean, log-variance) of the last axis."""
    halves = heads.chunk(2, dim=-1)
    column = heads.new_full((*heads.shape[:-1], 1), value)
    return torch.cat([halves[0], column, halves[1], column], dim=-1)


def _select_members(ensemble: EnsembleDynamics, members: list[int]) -> EnsembleDynamics:
    """Return an ensemble of some members; one member alone shares its weights with `ensemble`."""
    some: Any = slice(members[0], members[0] + 1) if len(members) == 1 else members
    return ensemble_of(
        [weight[some] for weight in ensemble.weights],
        [bias[some] for bias in ensemble.biases],
        ensemble.max_logvar,
        ensemble.min_logvar,
        activation=ensemble.activation,
        input_mean=ensemble.input_mean,
        input_std=ensemble.input_std,
        absolute=ensemble.absolute.nonzero()[:, 0].tolist(),
    )


# --- updates of SAC

# Updates of one kernel call. With more of them, more batches are in memory, and Ctrl-C waits longer.
_UPDATES_AT_ONCE = 100
# A share of the way to the critics that is 0 in float32, so that the targets stay to the bit.
_STAY = 1e-300
_WITHOUT_FUSE = "leave fuse_sac out: mbrl-lib's own update_parameters stays"


def fuse_sac(
    sac: Any, *, dtype: TrainingDtype = "float32", backend: str = "auto", threads: int | None = None
) -> Any:
    """Replace a SAC's `update_parameters` by one that makes the whole update in one kernel call.

    Arguments, results and logged keys stay mbrl-lib's, and so do the losses, the order of the steps, the
    hyperparameters and the rows of a batch, which `memory.sample` draws. Parameters and the moments in the
    optimizers change in place, so that `select_action` and `save_checkpoint` see them as before. The noise
    of the actions is keyed by a seed from torch's global generator, which mbrl-lib draws its noise from.

    The SAC also gets a method that makes many updates in one kernel call, which is faster:

        sac.update_many(memory, batch_size, updates, count, logger=None, reverse_mask=False)

    It makes the updates number `updates`, `updates + 1`, ..., on the batches that as many calls of
    `update_parameters` would draw. It logs and returns the means of the losses over them, and the temperature
    after the last one.

    Args:
        sac: mbrl.third_party.pytorch_sac_pranz24.SAC on the CPU with a GaussianPolicy for actions in [-1, 1],
            and optimizers that are torch.optim.Adam with its defaults except for the learning rates.
        dtype: precision of the matrix products, see `SACConfig.dtype`.
        backend: backend of `SAC`.
        threads: number of CPU threads, see `SAC`.

    Returns:
        `sac` itself.

    Raises:
        InputError: the kernels do not support the SAC. The message names the reason.
    """
    _check_sac(sac)
    start_over(sac, dtype, backend, threads)
    _shared_sac(sac)
    # A copy of the SAC has copies of these, for itself.
    sac.update_parameters = functools.partial(_update_parameters, sac)
    sac.update_many = functools.partial(_update_many, sac)
    return sac


def _check_sac(sac: Any) -> None:
    if not all(hasattr(sac, name) for name in ("update_parameters", "policy", "critic_target")):
        raise InputError(
            f"fuse_sac takes mbrl.third_party.pytorch_sac_pranz24.SAC, got {type(sac).__name__};"
            " a SACAgent has it as sac_agent"
        )
    check_attributes(sac, _SAC, VERSION)
    if sac.automatic_entropy_tuning:
        check_attributes(sac, _TEMPERATURE, VERSION)
    policy = sac.policy
    if not any(kind.__name__ == "GaussianPolicy" for kind in type(policy).__mro__):
        raise InputError(f"the updates take a GaussianPolicy, got {type(policy).__name__}; {_WITHOUT_FUSE}")
    check_attributes(policy, _POLICY, VERSION)
    for critic in (sac.critic, sac.critic_target):
        check_attributes(critic, _CRITIC, VERSION)
    own = [(sac, "update_parameters"), (policy, "forward"), (policy, "sample")]
    for thing, method in [*own, (sac.critic, "forward"), (sac.critic_target, "forward")]:
        check_method(thing, method, "mbrl", _WITHOUT_FUSE)
    scale, bias = (torch.as_tensor(getattr(policy, f"action_{name}")) for name in ("scale", "bias"))
    if not bool((scale == 1.0).all() and (bias == 0.0).all()):
        raise InputError(
            f"the updates take actions in [-1, 1], got action_scale {scale.tolist()} and action_bias"
            f" {bias.tolist()}; wrap the environment in gymnasium.wrappers.RescaleAction(env, -1, 1)"
        )
    interval = sac.target_update_interval
    if not isinstance(interval, int) or interval < 1:
        raise InputError(f"target_update_interval must be a whole number of at least 1, got {interval!r}")
    if sac.automatic_entropy_tuning:
        learning_rate("alpha", sac.alpha_optim)


def _shared_sac(sac: Any) -> SharedSAC:
    return shared_with(sac, _modules(sac), functools.partial(_sac_config, sac))


def _sac_config(sac: Any) -> SACConfig:
    """Return the hyperparameters that a SAC has now, without the learning rates."""
    bounds = type(sac.policy).sample.__globals__
    return SACConfig(
        hidden=(sac.policy.linear1.out_features, sac.policy.linear2.out_features),
        critics=2,
        log_std_min=bounds["LOG_SIG_MIN"],
        log_std_max=bounds["LOG_SIG_MAX"],
        log_prob_epsilon=bounds["epsilon"],
        target_entropy=float(sac.target_entropy) if sac.automatic_entropy_tuning else 0.0,
        critic_loss="mse",
        order="critic_first",
        discount=sac.gamma,
        polyak=sac.tau,
        dtype=sac._mopo_fast["dtype"],
    )


def _modules(sac: Any) -> Modules:
    """Return the layers and the optimizers of a SAC."""
    policy = sac.policy
    critics, targets = (
        [
            [network.linear1, network.linear2, network.linear3],
            [network.linear4, network.linear5, network.linear6],
        ]
        for network in (sac.critic, sac.critic_target)
    )
    return Modules(
        actor=[policy.linear1, policy.linear2, policy.mean_linear, policy.log_std_linear],
        critics=critics,
        targets=targets,
        actor_optimizer=sac.policy_optim,
        critic_optimizers=[sac.critic_optim],
        alpha=(sac.log_alpha, sac.alpha_optim) if _kernel_steps_alpha(sac) else float(sac.alpha),
    )


def _kernel_steps_alpha(sac: Any) -> bool:
    """Tell whether the kernel makes the temperature's step.

    It uses the exponential of `log_alpha` and one count of steps for all optimizers. mbrl-lib's first update
    uses the `alpha` of its arguments instead, and `load_checkpoint` sets neither `log_alpha` nor the count of
    its optimizer.
    """
    if not sac.automatic_entropy_tuning:
        return False
    steps = [
        float(optimizer.state.get(parameter, {}).get("step", 0.0))
        for optimizer, parameter in (
            (sac.alpha_optim, sac.log_alpha),
            (sac.policy_optim, sac.policy.linear1.weight),
        )
    ]
    in_use, alpha = (torch.as_tensor(value).detach() for value in (sac.alpha, sac.log_alpha.exp()))
    return steps[0] == steps[1] and torch.allclose(in_use, alpha, rtol=1e-6, atol=0.0)


def _update_parameters(
    sac: Any, memory: Any, batch_size: int, updates: int, logger: Any = None, reverse_mask: bool = False
) -> tuple[float, ...]:
    return _update_many(sac, memory, batch_size, updates, 1, logger, reverse_mask)


def _update_many(
    sac: Any,
    memory: Any,
    batch_size: int,
    updates: int,
    count: int,
    logger: Any = None,
    reverse_mask: bool = False,
) -> tuple[float, ...]:
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    totals, made = np.zeros(6), 0
    while made < count:
        group = _group(sac, updates + made, count - made)
        rows = _draw(memory, batch_size, group, reverse_mask)
        means = [*_make(sac, rows, updates + made, group), float(rows.rewards.mean())]
        totals += group * np.array(means)
        made += group
    critic1, critic2, actor, alpha_loss, entropy, reward = (totals / count).tolist()
    if logger is not None:
        for name, value in {
            "train/batch_reward": reward,
            "train_critic/loss": critic1 + critic2,
            "train_actor/loss": actor,
            "train_actor/target_entropy": sac.target_entropy if sac.automatic_entropy_tuning else 0,
            "train_actor/entropy": entropy,
            "train_alpha/loss": alpha_loss,
            "train_alpha/value": sac.alpha,
        }.items():
            logger.log(name, value, updates + count - 1)
    return critic1, critic2, actor, alpha_loss, torch.as_tensor(sac.alpha).item()


def _group(sac: Any, number: int, left: int) -> int:
    """Return how many updates from `number` on one kernel call can make.

    All of them move the targets, or none does.
    """
    interval: int = sac.target_update_interval
    if sac.automatic_entropy_tuning and not _kernel_steps_alpha(sac):
        return 1
    if interval == 1:
        return min(left, _UPDATES_AT_ONCE)
    return min(left, _UPDATES_AT_ONCE, -number % interval or 1)


def _draw(memory: Any, batch_size: int, batches: int, reverse_mask: bool) -> Transitions:
    """Draw batches as mbrl-lib does; its rows stay, and drawing takes a hundredth of an update's time.

    Raises:
        InputError: a mask is neither 0 nor 1.
    """
    drawn = [memory.sample(batch_size).astuple()[:5] for _ in range(batches)]
    observations, actions, successors, rewards, masks = (
        torch.cat([torch.as_tensor(part, dtype=torch.float32) for part in parts])
        for parts in zip(*drawn, strict=True)
    )
    # mbrl-lib itself takes any number but 0 for an end in this case.
    terminals = masks != 0.0 if reverse_mask else ~as_flags("masks", masks)
    return Transitions(observations, actions, rewards, successors, terminals)


def _make(sac: Any, rows: Transitions, number: int, count: int) -> list[float]:
    """Make `count` updates, which all move the targets or all leave them.

    Returns:
        The means of each critic's loss, the actor's and the temperature's, and of the entropy.
    """
    config, shared = _sac_config(sac), _shared_sac(sac)
    if number % sac.target_update_interval:
        config = dataclasses.replace(config, polyak=_STAY)
    by_kernel = isinstance(shared.modules.alpha, tuple)
    seed = int(torch.randint(2**63 - 1, (1,)))
    # Ctrl-C must not come between the update and the temperature's step.
    with deferred():
        losses = shared.update(draw_all(rows, seed, count), config, None if by_kernel else float(sac.alpha))
        entropy, alpha_loss = losses.metrics["entropy"], 0.0
        if by_kernel:
            alpha_loss = losses.metrics["alpha_loss"]
            sac.alpha = sac.log_alpha.detach().exp()
        elif sac.automatic_entropy_tuning:
            alpha_loss = _step_alpha(sac, entropy)
    return [*losses.critics, losses.metrics["actor_loss"], alpha_loss, entropy]


def _step_alpha(sac: Any, entropy: float) -> float:
    """Make the temperature's step by its own optimizer; return its loss."""
    gradient = entropy - float(sac.target_entropy)
    loss = float(sac.log_alpha.detach()) * gradient
    sac.log_alpha.grad = torch.full_like(sac.log_alpha, gradient)
    sac.alpha_optim.step()
    sac.alpha = sac.log_alpha.detach().exp()
    return loss


# --- files


FILES = ("model.pth", "env_stats.pickle")
"""Names of the files that `read` looks for in a folder."""


def read(source: Path, hints: Hints = Hints()) -> Checkpoint:  # noqa: B008
    """Read the dynamics in a folder: model.pth and, for the input scale, env_stats.pickle if it exists.

    The files store neither the activation nor `no_delta_list`. `hints` must name the activation, and may name
    absolute dimensions. The model is taken to predict rewards.

    Raises:
        InputError: a file is damaged, or `hints` names no activation.
    """
    path = source / "model.pth"
    if not path.exists():
        return Checkpoint()
    content = load(path)
    found = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not {"mean_and_logvar.weight", "max_logvar"} <= found.keys():
        raise InputError(f"{path} holds no ensemble GaussianMLP with variances")
    state = as_state(path, found)
    if hints.activation is None:
        raise InputError(
            f"{path} does not store the activation; give it: --activation silu, which mbrl-lib's MBPO configs"
            " set, or relu, GaussianMLP's default"
        )
    depth = sum(name.startswith("hidden_layers.") and name.endswith(".weight") for name in state)
    names = [*(f"hidden_layers.{i}.0" for i in range(depth)), "mean_and_logvar"]
    weights, biases = (
        [take(path, state, f"{name}.{kind}", 3) for name in names] for kind in ("weight", "bias")
    )
    bounds = [take(path, state, f"{name}_logvar", 2) for name in ("max", "min")]
    mean = std = None
    if (source / "env_stats.pickle").exists():
        mean, std = _read_scale(source / "env_stats.pickle")
    elites = content.get("elite_models") if hints.elites is None else list(hints.elites)
    dynamics = ensemble_of(
        weights,
        [bias.squeeze(1) for bias in biases],
        *(bound.squeeze(0) for bound in bounds),
        activation=hints.activation,
        input_mean=mean,
        input_std=std,
        elites=elites,
        absolute=hints.absolute or (),
    )
    check_model(path, dynamics)
    return Checkpoint(dynamics)


def _read_scale(path: Path) -> list[torch.Tensor]:
    content = pickles.load(path)
    if not isinstance(content, dict) or not {"mean", "std"} <= content.keys():
        raise InputError(f"{path} must hold a dictionary of mean and std")
    arrays = [pickles.as_array(content[name]) for name in ("mean", "std")]
    if any(array.dtype.kind != "f" or not np.isfinite(array).all() for array in arrays):
        raise InputError(f"{path}: mean and std must be finite floats")
    with np.errstate(over="ignore"):
        return [torch.from_numpy(array.astype(np.float32)) for array in arrays]


def check_dynamics(ensemble: EnsembleDynamics) -> list[str]:
    """Return a sentence about absolute dimensions and one about an activation other than SiLU, if any.

    Raises:
        InputError: mbrl-lib's models lack a property of these dynamics.
    """
    check_kind(ensemble, "mbrl-lib's models", log_scale="variance", absolute=True)
    # The default is that of mbrl-lib's configurations.
    changes = unstored_activation(ensemble, "model.pth", "GaussianMLP", "silu")
    if absolute := ensemble.absolute.nonzero()[:, 0].tolist():
        changes.append(
            "model.pth does not store which dimensions are predicted themselves; build the"
            f" OneDTransitionRewardModel with no_delta_list={absolute}"
        )
    return changes


def check_policy(policy: Actor) -> list[str]:
    """Refuse every policy.

    Raises:
        InputError: always.
    """
    raise InputError("mbrl-lib has no file for a policy alone")


def write(checkpoint: Checkpoint, target: Path) -> None:
    """Write model.pth and env_stats.pickle for `OneDTransitionRewardModel.load` of a model of the same shape.

    The files have no place for absolute dimensions: pass them to that model as `no_delta_list`.

    Raises:
        InputError: there is a policy, for which the format has no file, or mbrl-lib cannot represent the
            dynamics.
    """
    ensemble = checkpoint.dynamics
    if ensemble is None:
        raise InputError("mbrl-lib's files hold dynamics, and there are none")
    warn_of_changes(checkpoint, check_dynamics, check_policy)
    names = [*(f"hidden_layers.{i}.0" for i in range(len(ensemble.hidden))), "mean_and_logvar"]
    state = {f"{name}_logvar": getattr(ensemble, f"{name}_logvar").detach()[None] for name in ("min", "max")}
    for name, weight, bias in zip(names, ensemble.weights, ensemble.biases, strict=True):
        state[f"{name}.weight"], state[f"{name}.bias"] = weight.detach(), bias.detach()[:, None]
    elites = ensemble.elites.tolist()
    all_elites = elites == list(range(ensemble.members))
    save(target / "model.pth", {"state_dict": state, "elite_models": None if all_elites else elites})
    scale = {"mean": ensemble.input_mean, "std": ensemble.input_std}
    with atomic_path(target / "env_stats.pickle") as temporary:
        temporary.write_bytes(pickle.dumps({name: value.numpy()[None] for name, value in scale.items()}))
