"""Unifloral's `EnsembleDynamics` with its rollouts on fused kernels, and the actor of its parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mopo_fast.compat.models import actor_of, check_method, ensemble_of
from mopo_fast.compat.unifloral.arrays import (
    dense_layers,
    load_jax,
    on_host,
    parameters_of,
    seed_of,
    shared,
)
from mopo_fast.config import Activation
from mopo_fast.ensemble import EnsembleDynamics as Ensemble
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.utils.seeds import ROLLOUT, derive_seed

# Bounds of the log-stds in Unifloral's TanhGaussianActor.
LOG_STD_BOUNDS = (-5.0, 2.0)


class EnsembleDynamics:
    """Replacement for Unifloral's `EnsembleDynamics` in mopo.py, combo.py, morel.py and unifloral.py.

    Args:
        dynamics: the original, as `load_dynamics_model` returns it. The kernels share the memory of its
            `params`, JAX arrays on the CPU.
        activation: activation of the hidden layers; `dynamics` does not store it.

    Attributes:
        ensemble: ensemble that the kernels run. Unifloral keeps elites alone, so all its members are elites.
        dataset: Unifloral's Transition of the data; rollouts start from its `obs`.

    Raises:
        InputError: the parameters are not those of an EnsembleDynamicsModel on the CPU.
    """

    def __init__(self, dynamics: Any, *, activation: Activation = "relu") -> None:
        check_method(
            dynamics,
            "make_rollout_fn",
            # The class may be that of mopo.py, dynamics.py or another algorithm's file.
            type(dynamics).__module__.partition(".")[0],
            "use the original dynamics",
            ("EnsembleDynamics",),
        )
        self.params, self.termination_fn = dynamics.params, dynamics.termination_fn
        self.discrepancy, self.min_r, self.dataset = dynamics.discrepancy, dynamics.min_r, dynamics.dataset
        self.ensemble = make_ensemble(self.params, shared, activation)
        self.num_ensemble = self.ensemble.members

    def make_rollout_fn(
        self,
        batch_size: int,
        rollout_length: int,
        step_penalty_coef: float = 0.0,
        term_penalty_offset: float | None = None,
        threshold_coef: float = 1.0,
        *,
        first_in_first_out: bool = False,
        log_std_bounds: tuple[float, float] = LOG_STD_BOUNDS,
        backend: str = "auto",
        dtype: str = "float32",
        threads: int | None = None,
    ) -> Callable[[Any, Any, Any], Any]:
        """Make Unifloral's function (rng, policy, rollout_buffer) -> rollout_buffer.

        The function may be called inside and outside of `jax.jit`. `policy` is one of two:

        - A function (obs, rng) -> action for one row, as in the original. JAX runs it. The same rng draws the
          same start states, actions, members and noise as in the original, so the rollouts are equal row by
          row, to rounding.
        - The parameters of a TanhGaussianActor, `agent_state.actor.params`. All steps are fused into one
          kernel call. Start states are those of the original; actions, members and noise are drawn by the
          kernel, with a seed from rng.

        As in the original, and unlike in the MOPO authors' code, a rollout goes on after a terminal state,
        and after a non-finite prediction (as NaN); and new rows always replace the last rows of the buffer.

        Args:
            batch_size: number of start states.
            rollout_length: steps of each rollout. The batch_size * rollout_length rows are ordered by step.
            step_penalty_coef: lambda >= 0, the weight of the largest norm of a member's standard deviations.
            term_penalty_offset: MOReL's penalty: a row whose members disagree by more than
                threshold_coef * discrepancy ends with the reward min_r + term_penalty_offset. None for no
                such end. It needs a function as policy.
            threshold_coef: factor of the threshold above.
            first_in_first_out: replace the oldest rows of the buffer, as the MOPO authors do.
            log_std_bounds: bounds of the log-stds in the TanhGaussianActor.
            backend: backend of `RolloutEngine`.
            dtype: precision of the matrix products, see `RolloutEngine`.
            threads: number of CPU threads, see `RolloutEngine`.

        Raises:
            InputError: an argument is out of range, or MOReL's statistics are missing.
        """
        if term_penalty_offset is not None and None in (self.discrepancy, self.min_r):
            raise InputError(
                "term_penalty_offset needs discrepancy and min_r; fit with --precompute_term_stats"
            )
        # The kernel has no call that only evaluates the policy: a step in a model of zeros does.
        inputs, outputs = self.ensemble.obs_dim + self.ensemble.act_dim, 2 * (self.ensemble.obs_dim + 1)
        zero_model = ensemble_of(
            [torch.zeros(1, inputs, outputs)],
            [torch.zeros(1, outputs)],
            *torch.zeros(2, outputs // 2),
            activation="relu",
        )
        engine, actor_engine = (
            RolloutEngine(model, penalty_coef=coef, backend=backend, dtype=dtype, threads=threads)
            for model, coef in ((self.ensemble, step_penalty_coef), (zero_model, 0.0))
        )
        return Rollout(
            self,
            engine,
            actor_engine,
            batch_size,
            rollout_length,
            term_penalty_offset,
            threshold_coef,
            first_in_first_out,
            log_std_bounds,
        )


@dataclass(frozen=True, eq=False)
class Rollout:
    """Rollout function that `EnsembleDynamics.make_rollout_fn` returns."""

    dynamics: EnsembleDynamics
    engine: RolloutEngine
    actor_engine: RolloutEngine
    batch_size: int
    length: int
    term_penalty_offset: float | None
    threshold_coef: float
    first_in_first_out: bool
    log_std_bounds: tuple[float, float]

    def __call__(self, rng: Any, policy: Any, rollout_buffer: Any) -> Any:
        """Roll out; see `EnsembleDynamics.make_rollout_fn`."""
        jax = load_jax()
        _, start_key, key = jax.random.split(rng, 3)
        states = self.dynamics.dataset.obs
        start = states[jax.random.choice(start_key, len(states), (self.batch_size,))]
        rows = (self._by_steps if callable(policy) else self._fused)(key, policy, start)
        return jax.tree.map(self._append, rollout_buffer, rollout_buffer._replace(**rows))

    def _append(self, old: Any, new: Any) -> Any:
        """Put the new rows of one array into the buffer's array."""
        count = min(len(old), len(new))
        new = new[:count].astype(old.dtype)
        if self.first_in_first_out:
            return load_jax().numpy.concatenate([old[count:], new])
        return old.at[len(old) - count :].set(new)

    def _by_steps(self, key: Any, policy: Any, start: Any) -> dict[str, Any]:
        """Roll out step by step, with the policy as a JAX function."""
        jax = load_jax()
        keys = jax.random.split(key, self.batch_size)
        _, rows = jax.lax.scan(lambda carry, _: self._step(policy, *carry), (start, keys), None, self.length)
        return {name: array.reshape(-1, *array.shape[2:]) for name, array in rows.items()}

    def _step(self, policy: Any, obs: Any, keys: Any) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """Step every row, as the original does with its networks' predictions.

        Returns:
            The carry (next observations, next keys) and the rows of this step.
        """
        jax = load_jax()
        numpy, random, each = jax.numpy, jax.random, jax.vmap
        dynamics, members = self.dynamics, self.dynamics.num_ensemble
        outputs = dynamics.ensemble.obs_dim + 1
        now, keys = each(random.split, out_axes=1)(keys)
        act, draw, noise, act_next = each(lambda key: random.split(key, 4), out_axes=1)(now)
        action = each(policy)(obs, act)
        shape = jax.ShapeDtypeStruct((members, self.batch_size, outputs), numpy.float32)
        mean, std = on_host(self._predict, (shape, shape), obs, action)
        chosen = each(lambda key: random.randint(key, (), 0, members))(draw), numpy.arange(self.batch_size)
        sample = mean[chosen] + each(lambda key: random.normal(key, (outputs,)))(noise) * std[chosen]
        next_obs = obs + sample[:, :-1]
        done = each(dynamics.termination_fn)(obs, action, next_obs)
        reward = sample[:, -1] - self.engine.penalty_coef * numpy.linalg.norm(std, axis=-1).max(0)
        if self.term_penalty_offset is not None:
            distances = numpy.linalg.norm(mean[:, None] - mean, axis=-1)
            uncertain = distances.max((0, 1)) > dynamics.discrepancy * self.threshold_coef
            reward = numpy.where(uncertain, dynamics.min_r + self.term_penalty_offset, reward)
            done |= uncertain
        next_action = each(policy)(next_obs, act_next)
        rows = {"obs": obs, "action": action, "reward": reward, "next_obs": next_obs}
        return (next_obs, keys), rows | {"next_action": next_action, "done": done}

    def _predict(self, out: Any, observations: torch.Tensor, actions: torch.Tensor) -> None:
        # The engine refuses rows that are not finite; the original predicts NaN for them.
        lost = ~(observations.isfinite().all(1) & actions.isfinite().all(1))
        finite = (array.nan_to_num(0.0, 0.0, 0.0) for array in (observations, actions))
        result = self.engine.step(*finite, seed=0, deterministic=True, distributions=True)
        for target, source in zip(out, (result.mean, result.std), strict=True):
            target.copy_(source)
            target[:, lost] = torch.nan

    def _fused(self, key: Any, params: Any, start: Any) -> dict[str, Any]:
        """Roll out in one kernel call, with the policy given by its parameters."""
        if self.term_penalty_offset is not None:
            raise InputError("term_penalty_offset needs every member's mean: give the policy as a function")
        jax, ensemble, count = load_jax(), self.dynamics.ensemble, self.batch_size * self.length
        shapes = {"obs": (count, ensemble.obs_dim), "action": (count, ensemble.act_dim), "reward": (count,)}
        shapes |= {"next_" + name: shapes[name] for name in ("obs", "action")}
        results = {name: jax.ShapeDtypeStruct(shape, jax.numpy.float32) for name, shape in shapes.items()}
        seed = jax.random.bits(key, (2,), jax.numpy.uint32)
        rows: dict[str, Any] = on_host(self._roll, results, start, seed, params)
        transitions = rows["obs"], rows["action"], rows["next_obs"]
        return rows | {"done": jax.vmap(self.dynamics.termination_fn)(*transitions)}

    def _roll(
        self, out: dict[str, torch.Tensor], start: torch.Tensor, halves: torch.Tensor, params: Any
    ) -> None:
        seed = seed_of(halves)
        actor = make_actor(params, self.log_std_bounds)
        for array in out.values():
            array.fill_(torch.nan)
        rows = self.engine.rollout(actor, start, self.length, seed=seed)
        assert rows.step is not None and rows.rollout_index is not None
        # The engine orders rows by rollout, the original by step.
        places = rows.step.long() * self.batch_size + rows.rollout_index
        out["obs"][places] = rows.observations
        out["action"][places] = rows.actions
        out["reward"][places] = rows.rewards
        out["next_obs"][places] = rows.next_observations
        if len(rows) == 0:
            return
        more = self.actor_engine.rollout(actor, rows.next_observations, 1, seed=derive_seed(seed, ROLLOUT))
        assert more.rollout_index is not None
        out["next_action"][places[more.rollout_index]] = more.actions


def make_actor(params: Any, log_std_bounds: tuple[float, float] = LOG_STD_BOUNDS) -> Actor:
    """Build an actor that shares the memory of a TanhGaussianActor's parameters.

    Args:
        params: `agent_state.actor.params` of mopo.py, combo.py, morel.py, sac_n.py or edac.py. The Actor of
            unifloral.py is another module and is refused.
        log_std_bounds: bounds of its log-stds.

    Raises:
        InputError: the parameters belong to another module, or are not on the CPU.
    """
    low, high = log_std_bounds
    with parameters_of("a TanhGaussianActor"):
        *hidden, log_std, mean = dense_layers(params["params"], shared)
        # Unifloral has a layer for each head, the log-std first.
        heads = [torch.cat(pair, dim=-1) for pair in zip(mean, log_std, strict=True)]
        layers = zip(*hidden, heads, strict=True)
        return actor_of(*layers, activation="relu", log_std_min=low, log_std_max=high)


def make_ensemble(params: Any, as_tensor: Callable[[Any], torch.Tensor], activation: Activation) -> Ensemble:
    """Build an ensemble of an EnsembleDynamicsModel's parameters, which `as_tensor` makes tensors of."""
    with parameters_of("an EnsembleDynamicsModel"):
        params = params["params"]
        kernels, biases = zip(*dense_layers(params["ensemble"], as_tensor), strict=True)
        bounds = (as_tensor(params[name]) for name in ("max_logvar", "min_logvar"))
        return ensemble_of(kernels, biases, *bounds, activation=activation)
