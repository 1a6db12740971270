"""Adapter for Unifloral (JAX): rollouts of its `EnsembleDynamics` on fused kernels, and its files.

In Unifloral's `algorithms/mopo.py`, wrap the dynamics:

    from mopo_fast.compat import unifloral
    dynamics_model = unifloral.EnsembleDynamics(load_dynamics_model(args.model_path))

Import the module, not the class: Unifloral's pickles are loaded by the name `EnsembleDynamics` in mopo.py.

JAX is imported only by functions that take JAX arrays. Files are read and written without it. In this module,
"the original" is Unifloral's class or function of the same name.

Source: github.com/EmptyJackson/unifloral, commit f2dc127, algorithms/dynamics.py.
"""

import contextlib
import importlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from mopo_fast.compat import Checkpoint
from mopo_fast.compat.models import (
    actor_of,
    check_first_layer,
    check_kind,
    check_method,
    check_model,
    ensemble_of,
    warn_of_changes,
)
from mopo_fast.config import Activation, Hints
from mopo_fast.ensemble import EnsembleDynamics as Ensemble
from mopo_fast.ensemble import elites_of
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.utils.atomic import atomic_path
from mopo_fast.utils.pickles import NUMPY, as_array, from_buffer, load
from mopo_fast.utils.seeds import ROLLOUT, derive_seed

# Bounds of the log-stds in Unifloral's TanhGaussianActor.
LOG_STD_BOUNDS = (-5.0, 2.0)

_DLPACK_CPU = 1


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
        self.ensemble = _make_ensemble(self.params, _shared, activation)
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
        return _Rollout(
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
class _Rollout:
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
        jax = _jax()
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
            return _jax().numpy.concatenate([old[count:], new])
        return old.at[len(old) - count :].set(new)

    def _by_steps(self, key: Any, policy: Any, start: Any) -> dict[str, Any]:
        """Roll out step by step, with the policy as a JAX function."""
        jax = _jax()
        keys = jax.random.split(key, self.batch_size)
        _, rows = jax.lax.scan(lambda carry, _: self._step(policy, *carry), (start, keys), None, self.length)
        return {name: array.reshape(-1, *array.shape[2:]) for name, array in rows.items()}

    def _step(self, policy: Any, obs: Any, keys: Any) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """Step every row, as the original does with its networks' predictions.

        Returns:
            The carry (next observations, next keys) and the rows of this step.
        """
        jax = _jax()
        numpy, random, each = jax.numpy, jax.random, jax.vmap
        dynamics, members = self.dynamics, self.dynamics.num_ensemble
        outputs = dynamics.ensemble.obs_dim + 1
        now, keys = each(random.split, out_axes=1)(keys)
        act, draw, noise, act_next = each(lambda key: random.split(key, 4), out_axes=1)(now)
        action = each(policy)(obs, act)
        shape = jax.ShapeDtypeStruct((members, self.batch_size, outputs), numpy.float32)
        mean, std = _on_host(self._predict, (shape, shape), obs, action)
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
        jax, ensemble, count = _jax(), self.dynamics.ensemble, self.batch_size * self.length
        shapes = {"obs": (count, ensemble.obs_dim), "action": (count, ensemble.act_dim), "reward": (count,)}
        shapes |= {"next_" + name: shapes[name] for name in ("obs", "action")}
        results = {name: jax.ShapeDtypeStruct(shape, jax.numpy.float32) for name, shape in shapes.items()}
        seed = jax.random.bits(key, (2,), jax.numpy.uint32)
        rows: dict[str, Any] = _on_host(self._roll, results, start, seed, params)
        transitions = rows["obs"], rows["action"], rows["next_obs"]
        return rows | {"done": jax.vmap(self.dynamics.termination_fn)(*transitions)}

    def _roll(
        self, out: dict[str, torch.Tensor], start: torch.Tensor, halves: torch.Tensor, params: Any
    ) -> None:
        low, high = halves.tolist()
        seed = high << 32 | low
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
    with _parameters_of("a TanhGaussianActor"):
        *hidden, log_std, mean = _dense_layers(params["params"], _shared)
        # Unifloral has a layer for each head, the log-std first.
        heads = [torch.cat(pair, dim=-1) for pair in zip(mean, log_std, strict=True)]
        layers = zip(*hidden, heads, strict=True)
        return actor_of(*layers, activation="relu", log_std_min=low, log_std_max=high)


def _make_ensemble(params: Any, as_tensor: Callable[[Any], torch.Tensor], activation: Activation) -> Ensemble:
    with _parameters_of("an EnsembleDynamicsModel"):
        params = params["params"]
        kernels, biases = zip(*_dense_layers(params["ensemble"], as_tensor), strict=True)
        bounds = (as_tensor(params[name]) for name in ("max_logvar", "min_logvar"))
        return ensemble_of(kernels, biases, *bounds, activation=activation)


@contextlib.contextmanager
def _parameters_of(what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"these are not the parameters of {what}: {error!r}") from error


def _dense_layers(tree: Any, as_tensor: Callable[[Any], torch.Tensor]) -> list[list[torch.Tensor]]:
    layers = (tree[f"Dense_{i}"] for i in range(len(tree)))
    return [[as_tensor(layer[name]) for name in ("kernel", "bias")] for layer in layers]


def _jax() -> Any:
    return importlib.import_module("jax")


def _shared(array: Any) -> torch.Tensor:
    """Return a tensor that shares a JAX array's memory."""
    if array.__dlpack_device__()[0] != _DLPACK_CPU:
        raise InputError("the parameters must be on the CPU, the only device supported for JAX")
    return from_dlpack(array).float()


def _on_host(function: Callable[..., None], results: Any, *arguments: Any) -> Any:
    """Call function(results, *arguments) on tensors of JAX's memory, inside compiled functions too.

    Args:
        function: function that fills the result tensors.
        results: shapes of the results.
        arguments: JAX arrays.
    """
    jax = _jax()

    def tensors(tree: Any) -> Any:
        return jax.tree.map(from_dlpack, tree)

    try:
        callbacks = importlib.import_module("jax.experimental.buffer_callback")
    except ImportError:
        # JAX before 0.6.1 has no buffer callbacks: its callbacks copy arguments and results.
        def fill(*arguments: Any) -> Any:
            out = jax.tree.map(lambda result: np.empty(result.shape, result.dtype), results)
            function(tensors(out), *tensors(arguments))
            return out

        return jax.pure_callback(fill, results, *arguments)

    def fill_in_place(_: Any, out: Any, *arguments: Any) -> None:
        function(tensors(out), *tensors(arguments))

    return callbacks.buffer_callback(fill_in_place, results)(*arguments)


# --- files: a pickled EnsembleDynamics, called ensemble_dynamics_model_DATASET_TIME.pkl

# Unifloral's termination functions by the beginning of a data set's name, looked up in this order.
_TERMINATION_FUNCTIONS = {
    "halfcheetahvel": "termination_fn_halfcheetahveljump",
    "halfcheetah": "termination_fn_halfcheetah",
    "hopper": "termination_fn_hopper",
    "antangle": "termination_fn_antangle",
    "ant": "termination_fn_ant",
    "walker2d": "termination_fn_walker2d",
    "point2denv": "termination_fn_point2denv",
    "point2dwallenv": "termination_fn_point2dwallenv",
    "pendulum": "termination_fn_pendulum",
    "humanoid": "termination_fn_humanoid",
    "maze2d-open": "maze2d_open_termination_fn",
    "maze2d-umaze": "maze2d_umaze_termination_fn",
    "maze2d-medium": "maze2d_medium_termination_fn",
    "maze2d-large": "maze2d_large_termination_fn",
    "pen": "termination_fn_pen",
    "door": "terminaltion_fn_door",
    "relocate": "termination_fn_relocate",
    "kitchen": "termination_fn_kitchen",
}
# Names of the pickled class: dynamics.py was run as a script, or imported.
_CLASSES = ("__main__.EnsembleDynamics", "dynamics.EnsembleDynamics")
_INERT = {
    *_CLASSES,
    *(name + "Model" for name in _CLASSES),
    *(f"termination_fns.{name}" for name in _TERMINATION_FUNCTIONS.values()),
    # State of a Flax module.
    "flax.ids.FlaxId",
    "flax.linen.module.SetupState",
    "flax.linen.module._ModuleInternalState",
}


def _rebuild_jax_array(make: Any, arguments: Any, state: Any, _: Any) -> Any:
    """Rebuild the NumPy array that a pickled JAX array is made of."""
    array = make(*arguments)
    array.__setstate__(state)
    return array


_ALLOWED: dict[str, Callable[..., Any]] = {
    **NUMPY,
    "flax.core.frozen_dict.FrozenDict": lambda tree: tree,
    "jax._src.array._reconstruct_array": _rebuild_jax_array,
    # `write` pickles arrays by these two.
    "jax.numpy.asarray": lambda array: array,
    "numpy.ndarray": lambda shape, kind, content: from_buffer(content, kind, shape, "C"),
}


FILES: tuple[str, ...] = ()
"""A checkpoint is one file, so `read` takes no folder."""


def read(source: Path, hints: Hints = Hints()) -> Checkpoint:  # noqa: B008
    """Read a pickled EnsembleDynamics. It holds elites alone, so all members become elites.

    MOReL's statistics (discrepancy, min_r) are left out.

    Raises:
        InputError: see `Format.read`.
    """
    if hints.absolute:
        raise InputError("Unifloral's dynamics predict changes of the observation; leave absolute out")
    found = load(source, _ALLOWED, _INERT)
    if type(found).__name__ != "EnsembleDynamics" or not isinstance(found.state, dict):
        raise InputError(f"{source} holds no EnsembleDynamics of Unifloral")
    try:
        dynamics = _make_ensemble(
            found.state.get("params"),
            _copied,
            hints.activation or "relu",
        )
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    check_model(source, dynamics)
    if hints.elites is not None:
        dynamics.elites = torch.tensor(elites_of(hints.elites, dynamics.members))
    return Checkpoint(dynamics)


def _copied(value: Any) -> torch.Tensor:
    array = as_array(value)
    if array.dtype.kind != "f":
        raise InputError(f"a parameter holds {array.dtype}, expected floats")
    with np.errstate(over="ignore"):
        return torch.from_numpy(array.astype(np.float32))


def check_dynamics(ensemble: Ensemble) -> list[str]:
    """Return a sentence about members that are no elites, which Unifloral's files leave out.

    Raises:
        InputError: Unifloral's dynamics lack a property of these dynamics.
    """
    if ensemble.activation != "relu" or len(set(ensemble.hidden)) != 1:
        raise InputError(
            "Unifloral's dynamics have ReLU and hidden layers of one width; these have"
            f" {ensemble.activation} and widths {ensemble.hidden}"
        )
    check_kind(ensemble, "Unifloral's dynamics", log_scale="variance")
    if len(ensemble.elites) == ensemble.members:
        return []
    return [
        f"Unifloral's files hold elites alone: {ensemble.members - len(ensemble.elites)} of"
        f" {ensemble.members} members are left out, and its penalty is the maximum over the elites alone"
    ]


def check_policy(policy: Actor) -> list[str]:
    """Refuse every policy.

    Raises:
        InputError: always.
    """
    raise InputError("Unifloral has no file for a policy alone")


def write(checkpoint: Checkpoint, target: Path) -> None:
    """Write a pickle for Unifloral's `load_dynamics_model`, without importing Unifloral, Flax or JAX.

    As in Unifloral's files, it holds the elites alone. The input scale is moved into the first layer.

    Args:
        checkpoint: dynamics, without a policy: Unifloral has no file for one.
        target: file whose name contains the data set's name, as in Unifloral. It decides the termination
            function.

    Raises:
        InputError: see `Format.write`.
    """
    model = checkpoint.dynamics
    if model is None:
        raise InputError("Unifloral's files hold dynamics, and there are none")
    dataset = target.name.removeprefix("ensemble_dynamics_model_")
    beginning = next((known for known in _TERMINATION_FUNCTIONS if dataset.startswith(known)), None)
    if beginning is None:
        raise InputError(
            f"{target.name} must name the data set, which decides the termination function; for example"
            " ensemble_dynamics_model_hopper-medium-v2.pkl"
        )
    warn_of_changes(checkpoint, check_dynamics, check_policy)
    weights = [weight.detach()[model.elites] for weight in model.weights]
    biases = [bias.detach()[model.elites] for bias in model.biases]
    biases[0] = biases[0] - (model.input_mean / model.input_std) @ weights[0]
    weights[0] = weights[0] / model.input_std.unsqueeze(-1)
    check_first_layer(weights[0], biases[0])
    layers = {
        f"Dense_{i}": {"kernel": w, "bias": b} for i, (w, b) in enumerate(zip(weights, biases, strict=True))
    }
    params = {"ensemble": layers, "max_logvar": model.max_logvar, "min_logvar": model.min_logvar}
    members, sizes = len(model.elites), (len(model.hidden), model.hidden[0])
    state = {
        "num_ensemble": members,
        "dynamics_model": _Call(
            "dynamics.EnsembleDynamicsModel", (model.obs_dim, model.act_dim, members, *sizes)
        ),
        "params": _Call("flax.core.frozen_dict.FrozenDict", ({"params": params},)),
        "termination_fn": _Global(f"termination_fns.{_TERMINATION_FUNCTIONS[beginning]}"),
        "discrepancy": None,
        "min_r": None,
        "dataset": None,
    }
    made = _encode(_Global("dynamics.EnsembleDynamics")) + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    with atomic_path(target) as temporary:
        temporary.write_bytes(pickle.PROTO + b"\x03" + made + _encode(state) + pickle.BUILD + pickle.STOP)


class _Global(str):
    """Global that a pickle refers to, as "module.name"."""


@dataclass(frozen=True)
class _Call:
    """Call that a pickle makes when it is loaded."""

    function: str
    arguments: tuple[Any, ...]


def _encode(value: Any) -> bytes:
    """Return the pickle opcodes that push `value` on the stack.

    Python's own pickler is not used because it imports every class that it names.
    """
    if isinstance(value, _Global):
        return pickle.GLOBAL + "{}\n{}\n".format(*value.rsplit(".", 1)).encode()
    if isinstance(value, _Call):
        arguments = b"".join(map(_encode, value.arguments))
        return _encode(_Global(value.function)) + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE
    if isinstance(value, dict):
        items = b"".join(_encode(key) + _encode(entry) for key, entry in value.items())
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if isinstance(value, torch.Tensor):
        array = value.detach().cpu().numpy().astype("<f4")
        return _encode(
            _Call("jax.numpy.asarray", (_Call("numpy.ndarray", (array.shape, "<f4", array.tobytes())),))
        )
    return pickle.dumps(value, protocol=3)[2:-1]
