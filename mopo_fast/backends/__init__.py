"""Backends: the implementations of rollouts and training; interface.py says what they offer."""

from mopo_fast.backends.choose import available, choose, choose_for_run, get_backend, training_kernels
from mopo_fast.backends.interface import BackendStatus, StepResult

__all__ = [
    "BackendStatus",
    "StepResult",
    "available",
    "choose",
    "choose_for_run",
    "get_backend",
    "training_kernels",
]
