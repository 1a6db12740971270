"""Precisions of matrix products, by the names of `torch.set_float32_matmul_precision`, and their dtypes.

A part of a run takes a lower precision than float32 only where it is faster.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mopo_fast.backends import cpu
from mopo_fast.backends.choose import choose, choose_for_run
from mopo_fast.backends.interface import Need
from mopo_fast.config import MatmulPrecision, RolloutDtype, TrainingDtype
from mopo_fast.errors import InputError
from mopo_fast.utils.machine import check_device

# A lower precision is taken where its products are this many times as fast: conversions cost some time.
_WORTHWHILE = 1.3
# Products of bfloat16 that make one product of each dtype.
_PRODUCTS: dict[TrainingDtype, int] = {"bfloat16": 1, "bfloat16x3": 3}


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of a precision.

    Attributes:
        training: dtype of the fit and of SAC.
        rollout: dtype of rollouts.
        why: why a part takes float32, although a lower precision was asked for; otherwise empty.
    """

    training: TrainingDtype = "float32"
    rollout: RolloutDtype = "float32"
    why: str = ""


def dtypes_of(precision: MatmulPrecision, device: torch.device | str, backend: str = "auto") -> Dtypes:
    """Return the dtypes that are fastest on a device and have at least the accuracy of `precision`.

    Args:
        precision: one of `config.MATMUL_PRECISIONS`.
        device: device of the run.
        backend: name of the run's backend, as `choose` takes it.

    Raises:
        InputError: the device cannot be used, or the backend cannot serve at all.
    """
    check_device(device)
    device = torch.device(device)
    if precision == "highest":
        return Dtypes()
    if device.type == "cpu":
        dtype: TrainingDtype = "bfloat16x3" if precision == "high" else "bfloat16"
        why = _why_not(dtype, backend, device)
        if why:
            return Dtypes(why=why)
        reasons = []
        if not (trains := cpu.isa() in cpu.WITH_BFLOAT16):
            reasons.append(f"the kernels for {cpu.isa()} train in float32")
        if not (rolls := _serves(backend, Need(dtype, device))):
            reasons.append(f"the backend {backend} makes no rollouts in {dtype}")
        return Dtypes(dtype if trains else "float32", dtype if rolls else "float32", " and ".join(reasons))
    rollout: RolloutDtype = "tfloat32" if precision == "high" else "bfloat16"
    why = f"the kernels for {device.type} train in float32"
    if _serves(backend, Need(rollout, device)):
        return Dtypes(rollout=rollout, why=why)
    return Dtypes(why=f"no kernel makes rollouts in {rollout} here, and {why}")


def _serves(backend: str, need: Need) -> bool:
    """Tell whether kernels can serve a need."""
    try:
        return choose(backend, need) != "reference"
    except InputError:
        return False


def describe(precision: MatmulPrecision, why: str, parts: Mapping[str, str | None]) -> str:
    """Describe a precision for people, and tell why some parts take float32 in place of it.

    Args:
        precision: one of `config.MATMUL_PRECISIONS`.
        why: as in `Dtypes`.
        parts: dtype of each part, by its name.
    """
    slower = [name for name, dtype in parts.items() if dtype == "float32"]
    if not (why and slower):
        return precision
    names = " and ".join(filter(None, (", ".join(slower[:-1]), slower[-1])))
    return f"{precision}, but float32 for {names}: {why}"


def _why_not(dtype: TrainingDtype, backend: str, device: torch.device) -> str:
    """Return why a dtype brings nothing on this CPU, or an empty text where it does."""
    name = choose_for_run(backend, device)
    if name != "cpu":
        return f"the backend {name} is no faster in {dtype}"
    several = dtype == "bfloat16x3" and cpu.isa() not in cpu.WITH_BFLOAT16
    gain = 0.0 if several else cpu.bfloat16_gain() / _PRODUCTS[dtype]
    if gain == 0.0:
        return f"the instruction set {cpu.isa()} has no products of {dtype}"
    if gain < _WORTHWHILE:
        return f"products in {dtype} are only {gain:.1f} times as fast as in float32 on {cpu.isa()}"
    return ""
