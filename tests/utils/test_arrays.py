"""Test RolloutEngine.step with arrays of other libraries: results have the same type and share memory."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import inputs, make_ensemble

from mopo_fast import InputError, RolloutEngine
from mopo_fast.utils.arrays import to_tensor


class Foreign:
    """An array that supports DLPack and the array API standard, and nothing else."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(from_dlpack=lambda array: Foreign(torch.from_dlpack(array)))


def plain(array: Any) -> np.ndarray[Any, Any]:
    return (array._tensor if isinstance(array, Foreign) else torch.as_tensor(array)).numpy()


MAKERS = {"numpy": lambda tensor: tensor.numpy(), "dlpack": Foreign}
FIELDS = ("next_observations", "rewards", "terminals", "raw_rewards", "penalties", "members", "mean", "std")


@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_kind_out(kind: str) -> None:
    engine = RolloutEngine(make_ensemble(5, 2), termination=None)
    observations, actions = inputs(37, 5, 2)
    make, rows = MAKERS[kind], torch.arange(37).flip(0)
    expected = engine.step(observations, actions, seed=3, rows=rows, distributions=True)
    found = engine.step(make(observations), make(actions), seed=3, rows=make(rows), distributions=True)
    for name in FIELDS:
        array = getattr(found, name)
        assert type(array) is type(make(observations)), name
        assert plain(array).dtype == plain(getattr(expected, name)).dtype
        assert np.array_equal(plain(array), plain(getattr(expected, name))), name
    assert engine.step(make(observations), make(actions), seed=3).mean is None


@pytest.mark.parametrize("kind", MAKERS)
def test_memory_is_shared(kind: str) -> None:
    tensor = torch.rand(4, 3)
    assert to_tensor("x", MAKERS[kind](tensor), torch.device("cpu")).data_ptr() == tensor.data_ptr()


def test_any_numpy_array() -> None:
    engine = RolloutEngine(make_ensemble(5, 2))
    observations, actions = (tensor.numpy() for tensor in inputs(16, 5, 2))
    expected = engine.step(observations, actions, seed=1).next_observations
    fixed = observations.copy()
    fixed.flags.writeable = False
    wide = np.zeros((32, 10), np.float32)
    wide[::2, ::2] = observations
    backwards = observations[::-1].copy()[::-1]
    foreign = observations.astype(observations.dtype.newbyteorder())
    fortran = np.asfortranarray(fixed)
    for same in (fixed, wide[::2, ::2], backwards, observations.astype(np.float64), fortran, foreign):
        assert np.array_equal(engine.step(same, actions, seed=1).next_observations, expected)
    for wrong, message in (
        (observations.astype(object), "observations cannot be read as a tensor"),
        (observations.astype(np.int32), "observations must be floating-point, got torch.int32"),
    ):
        with pytest.raises(InputError, match=message):
            engine.step(wrong, actions, seed=1)


def test_a_library_that_does_not_say_how() -> None:
    class Bare:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.__dlpack__, self.__dlpack_device__ = tensor.__dlpack__, tensor.__dlpack_device__

    observations, actions = inputs(4, 5, 2)
    engine = RolloutEngine(make_ensemble(5, 2))
    with pytest.raises(InputError, match="observations, a Bare, lacks __array_namespace__"):
        engine.step(Bare(observations), actions, seed=0)  # type: ignore[type-var]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_termination_function_gets_what_the_caller_has(kind: str) -> None:
    make = MAKERS[kind]
    observations, actions = inputs(9, 5, 2)

    def ends(*arrays: Any) -> Any:
        assert all(type(array) is type(make(observations)) for array in arrays)
        return make(torch.as_tensor(plain(arrays[2])[:, 0] > 0))

    engine = RolloutEngine(make_ensemble(5, 2), termination=ends)
    result = engine.step(make(observations), make(actions), seed=0)
    successors = plain(result.next_observations)
    assert 0 < (successors[:, 0] > 0).sum() < 9
    assert np.array_equal(plain(result.terminals), successors[:, 0] > 0)
