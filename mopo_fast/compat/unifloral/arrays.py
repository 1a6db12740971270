"""Arrays of JAX as tensors that share their memory, and trees of Flax parameters."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from mopo_fast.errors import InputError

_DLPACK_CPU = 1


def load_jax() -> Any:
    """Import JAX."""
    return importlib.import_module("jax")


def shared(array: Any, what: str = "the parameters") -> torch.Tensor:
    """Return a tensor that shares a JAX array's memory. `what` names the arrays in the error."""
    if array.__dlpack_device__()[0] != _DLPACK_CPU:
        raise InputError(f"{what} must be on the CPU, the only device supported for JAX")
    return from_dlpack(array).float()


def on_host(function: Callable[..., None], results: Any, *arguments: Any) -> Any:
    """Call function(results, *arguments) on tensors of JAX's memory, inside compiled functions too.

    Args:
        function: function that fills the result tensors.
        results: shapes of the results.
        arguments: JAX arrays.
    """
    jax = load_jax()

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


def seed_of(halves: torch.Tensor) -> int:
    """Return a 64-bit seed of two 32-bit words, the lower one first."""
    low, high = halves.tolist()
    return int(high) << 32 | int(low)


@contextlib.contextmanager
def parameters_of(what: str) -> Iterator[None]:
    """Raise `InputError` if parameters that are read within turn out to be another module's than `what`."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"these are not the parameters of {what}: {error!r}") from error


def dense_layers(tree: Any, as_tensor: Callable[[Any], torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return kernel [in, out] and bias [out] of each of the layers Dense_0, Dense_1, ... in a tree."""
    layers = (tree[f"Dense_{i}"] for i in range(len(tree)))
    return [[as_tensor(layer[name]) for name in ("kernel", "bias")] for layer in layers]
