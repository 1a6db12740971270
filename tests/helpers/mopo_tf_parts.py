"""Stand-ins for those parts of the authors' code whose work the kernels take over, without TensorFlow.

Tests load this file as a module of a package called softlearning, and again as one of a package called mopo,
as the adapter looks at these names.
"""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np

SCALE_DIAG_MIN_MAX = (-20, 2)


class Variable:
    """A variable of a session, or a constant of its graph, with its value."""

    def __init__(self, value: Any) -> None:
        self.value = np.array(value)
        self.initializer = SimpleNamespace(variable=self, inputs=(None, object()))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


class Session:
    """A session that fetches variables and runs their initializers. It counts its calls in `runs`."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, fetches: list[Any], feed_dict: dict[Any, Any] | None = None) -> list[Any]:
        self.runs += 1
        if feed_dict is None:
            return [one.value.copy() for one in fetches]
        for initializer in fetches:
            # Without a copy, as TensorFlow does with an aligned array.
            given, variable = np.asarray(feed_dict[initializer.inputs[1]]), initializer.variable
            assert (given.shape, given.dtype) == (variable.value.shape, variable.value.dtype)
            variable.value = given
        return []


class AdamOptimizer:
    def __init__(self, rate: float) -> None:
        self._beta1, self._beta2, self._epsilon = 0.9, 0.999, 1e-8
        self._lr_t = Variable(np.float32(rate))
        self.powers = Variable(np.float32(0.9)), Variable(np.float32(0.999))
        self.slots: dict[tuple[Variable, str], Variable] = {}

    def _get_beta_accumulators(self) -> tuple[Variable, Variable]:
        return self.powers

    def get_slot(self, variable: Variable, name: str) -> Variable:
        return self.slots.setdefault((variable, name), Variable(np.zeros_like(variable.value)))


def network(widths: tuple[int, ...]) -> list[Variable]:
    random = np.random.default_rng(sum(widths))
    sizes = [size for pair in itertools.pairwise(widths) for size in (pair, pair[1:])]
    return [Variable(random.normal(0.0, 0.3, size).astype(np.float32)) for size in sizes]


class InputLayer:
    pass


class Lambda:
    pass


class Dense:
    def __init__(self, activation: str) -> None:
        self.activation = SimpleNamespace(__name__=activation)


class Critic:
    def __init__(self, widths: tuple[int, ...]) -> None:
        self.trainable_variables = network(widths)
        dense = [Dense("relu") for _ in widths[:-2]]
        self.layers: list[Any] = [InputLayer(), InputLayer(), Lambda(), *dense, Dense("linear")]


class FeedforwardGaussianPolicy:
    def __init__(self, widths: tuple[int, ...]) -> None:
        self.trainable_variables = network(widths)
        self._squash, self._preprocessor = True, None
        self._activation, self._output_activation = "relu", "linear"

    def actions(self, conditions: Any) -> None:
        raise AssertionError

    def log_pis(self, conditions: Any, actions: Any) -> None:
        raise AssertionError

    def _shift_and_log_scale_diag_net(self, input_shapes: Any, output_size: Any) -> None:
        raise AssertionError

    def get_weights(self) -> list[Any]:
        return [variable.value.copy() for variable in self.trainable_variables]

    def actions_np(self, observations: Any) -> Any:
        return observations[:, :1] * self.trainable_variables[0].value[0, 0]


class SimpleReplayPool:
    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields, self.size = fields, len(fields["rewards"])

    def random_batch(self, size: int) -> dict[str, Any]:
        return {name: array[:size] for name, array in self.fields.items()}


class RLAlgorithm:
    def _timestep_before_hook(self) -> None:
        pass

    def _timestep_after_hook(self) -> None:
        pass

    def _do_training_repeats(self, timestep: int) -> None:
        if timestep % self._train_every_n_steps > 0:
            return
        for _ in range(self._n_train_repeat):
            self._do_training(iteration=timestep, batch=self._training_batch())
        self._num_train_steps += self._n_train_repeat
