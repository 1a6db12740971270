"""The registry of all backends, and the choice among them."""

import functools
import logging
import os

import torch

from mopo_fast.backends.cpu import CpuBackend, is_built, isa
from mopo_fast.backends.gpu.cuda import CudaBackend
from mopo_fast.backends.gpu.triton import TritonBackend
from mopo_fast.backends.interface import Backend, BackendStatus, Need
from mopo_fast.backends.reference import ReferenceBackend
from mopo_fast.errors import InputError

logger = logging.getLogger("mopo_fast")

_ALL: tuple[Backend, ...] = (CpuBackend(), CudaBackend(), TritonBackend(), ReferenceBackend())
# Backends by name, best first.
BACKENDS = {backend.name: backend for backend in _ALL}


def available() -> list[BackendStatus]:
    """Return every backend's status, best first."""
    return [backend.status() for backend in BACKENDS.values()]


def get_backend(name: str) -> Backend:
    """Return the backend called `name`, a result of `choose`."""
    return BACKENDS[name]


def isa_of(name: str) -> str | None:
    """Return the instruction set that the backend called `name` uses, None if it has no choice of one."""
    return isa() if name == CpuBackend.name else None


def training_kernels(name: str) -> Backend | None:
    """Return the backend called `name` if it trains with kernels, None if training is PyTorch's."""
    backend = BACKENDS[name]
    return backend if backend.trains == "kernels" else None


def choose(name: str, need: Need) -> str:
    """Choose a backend that can serve `need` and return its name.

    The choice and the reasons against better backends are logged once.

    Args:
        name: the backend to take. "auto" stands for the one that MOPO_FAST_BACKEND names, or without it for
            the best one that can serve.
        need: the work.

    Raises:
        InputError: the name is unknown, its backend cannot serve, or MOPO_FAST_ISA names an instruction set
            that this processor lacks.
    """
    return _choose(_wanted(name), need)


def choose_for_run(name: str, device: torch.device) -> str:
    """Choose the backend of a run's fit and SAC; take the best if the named one cannot train.

    Raises:
        InputError: as `choose`.
    """
    wanted = _wanted(name)
    if wanted in BACKENDS and BACKENDS[wanted].trains is None:
        wanted = "auto"
    return _choose(wanted, Need("float32", device, training=0))


def _wanted(name: str) -> str:
    return (os.environ.get("MOPO_FAST_BACKEND") or "auto") if name == "auto" else name


def _choose(wanted: str, need: Need) -> str:
    # A bad MOPO_FAST_ISA is an error, not a reason to choose another backend silently.
    if is_built():
        isa()
    if wanted != "auto" and wanted not in BACKENDS:
        raise InputError(f"unknown backend {wanted!r}; there are: auto, {', '.join(BACKENDS)}")
    reasons: list[str] = []
    for backend in BACKENDS.values():
        if wanted not in ("auto", backend.name):
            continue
        reason = _reason_against(backend, wanted, need)
        if reason is None:
            unbuilt = backend.name == ReferenceBackend.name != wanted and not is_built()
            against = f" ({'; '.join(reasons)})" if reasons and not unbuilt else ""
            _say_once(logging.INFO, f"backend: {backend.name}{against}")
            if unbuilt:
                reason = CpuBackend().status().reason
                slow = f"PyTorch computes everything, which is several times slower: {reason}"
                _say_once(logging.WARNING, slow)
            return backend.name
        reasons.append(f"{backend.name}: {reason}")
    raise InputError(f"no backend can serve {need.dtype} on {need.device}: {'; '.join(reasons)}")


def _reason_against(backend: Backend, wanted: str, need: Need) -> str | None:
    status = backend.status()
    if not status.available:
        return status.reason
    if status.by_name_only and wanted != backend.name:
        return f"{status.reason}, chosen only by name"
    return backend.refusal(need)


@functools.cache
def _say_once(level: int, message: str) -> None:
    logger.log(level, "%s", message)
