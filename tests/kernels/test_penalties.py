"""Test that the kernels have all penalties."""

import pytest
from kernel_cases import make_ensemble

from mopo_fast import InputError
from mopo_fast.backends import cpu
from mopo_fast.backends.gpu import triton
from mopo_fast.config import PENALTIES
from mopo_fast.rollout import RolloutEngine


def test_the_kernels_have_every_penalty():
    # If one were missing, "auto" would choose the reference, and kernel tests would compare it with itself.
    assert set(cpu.extension().penalties()) == set(PENALTIES)
    assert set(triton.PENALTIES) == set(PENALTIES)


def test_kernels_refuse_a_penalty_that_they_lack(monkeypatch):
    monkeypatch.setattr(cpu.extension(), "penalties", lambda: ["max_aleatoric", "max_deviation"])
    ensemble = make_ensemble(5, 2)
    assert RolloutEngine(ensemble, penalty="max_deviation").backend == "cpu"
    assert RolloutEngine(ensemble, penalty="mixture_std").backend == "reference"
    with pytest.raises(InputError, match="cpu: has the penalties max_aleatoric, max_deviation, not"):
        RolloutEngine(ensemble, penalty="mixture_std", backend="cpu")
