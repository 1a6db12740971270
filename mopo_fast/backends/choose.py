"""The registry of the backends, and the choice of the one that serves."""

import functools
import logging
import os

import torch

from mopo_fast.backends.cpu import CpuBackend, is_built, isa
from mopo_fast.backends.gpu.cuda import CudaBackend
from mopo_fast.backends.gpu.triton import TritonBackend
from mopo_fast.backends.interface import Backend, BackendStatus, Need, Sizes
from mopo_fast.backends.reference import ReferenceBackend
from mopo_fast.errors import InputError

logger = logging.getLogger("mopo_fast")

_ALL: tuple[Backend, ...] = (CpuBackend(), CudaBackend(), TritonBackend(), ReferenceBackend())
# By name, best first.
BACKENDS = {backend.name: backend for backend in _ALL}


def available() -> list[BackendStatus]:
    """Every backend's status, best first."""
    return [backend.status() for backend in BACKENDS.values()]


def get_backend(name: str) -> Backend:
    """The backend called `name`, which `choose` has found able."""
    return BACKENDS[name]


def training_kernels(name: str) -> Backend | None:
    """The backend called `name` where its kernels train; None where PyTorch does."""
    backend = BACKENDS[name]
    return backend if backend.trains == "kernels" else None


def choose(
    name: str,
    dtype: str,
    device: torch.device,
    *,
    ensemble: Sizes | None = None,
    policy: Sizes | None = None,
    training: int | None = None,
) -> str:
    """Choose `name`, or for "auto" MOPO_FAST_BACKEND, else the best backend that serves such a `Need`.

    The choice and the reasons against better ones are logged once.

    Raises:
        InputError: an unknown name, or one that cannot serve; says why. Or MOPO_FAST_ISA names no instruction
            set of this processor.
    """
    return _choose(_wanted(name), Need(dtype, device, ensemble, policy, training))


def choose_for_run(name: str, device: torch.device) -> str:
    """Choose the backend of a run's fit and SAC: the best, where the wanted one trains nothing.

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
    # No other backend may take the kernels' place unasked.
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
            against = f" ({'; '.join(reasons)})" if reasons else ""
            _log_once(f"backend: {backend.name}{against}")
            return backend.name
        reasons.append(f"{backend.name}: {reason}")
    raise InputError(f"no backend can serve {need.dtype} on {need.device}: {'; '.join(reasons)}")


def _reason_against(backend: Backend, wanted: str, need: Need) -> str | None:
    status = backend.status()
    if not status.available:
        return status.reason
    if status.by_name_only and wanted != backend.name:
        return f"{status.reason}, serves where it is asked for by name"
    return backend.refusal(need)


@functools.cache
def _log_once(choice: str) -> None:
    logger.info("%s", choice)
