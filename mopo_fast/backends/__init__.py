"""Backends: the implementations of rollouts and training; interface.py says what they offer."""

from mopo_fast.backends.choose import (
    available,
    choose,
    choose_for_run,
    get_backend,
    isa_of,
    training_kernels,
)
from mopo_fast.backends.interface import BackendStatus, StepResult
from mopo_fast.utils.lazy import lazy_submodules

__all__ = [
    "BackendStatus",
    "StepResult",
    "available",
    "choose",
    "choose_for_run",
    "get_backend",
    "isa_of",
    "training_kernels",
]

__getattr__, __dir__ = lazy_submodules(__name__)
