"""Compiles the Triton kernels for a GPU that need not be there: python triton_compiles.py 90 float16.

Prints what the PTX of each kernel holds, one JSON line. Must not be run under TRITON_INTERPRET.
"""

import functools
import json
import sys
from typing import Any

import triton
from kernel_cases import inputs, make_ensemble, make_policy
from triton.backends.compiler import GPUTarget

from mopo_fast import backends
from mopo_fast.backends import triton_kernels
from mopo_fast.backends.triton import TritonBackend
from mopo_fast.rollout import RolloutEngine


class Driver:
    """As much of a driver as compiling takes."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        ptx = self.kernel.warmup(*args, grid=grid, **kwargs).asm["ptx"]
        holds = {word: word in ptx for word in ("trap;", "wgmma", "mma.sync", "cp.async")}
        print(json.dumps({"kernel": self.kernel.__name__, **holds}))


def main(capability: str, operands: str) -> None:
    assert not triton_kernels.INTERPRETED
    triton.runtime.driver.set_active(Driver(int(capability)))
    for name in ("rollout_kernel", "compact_kernel"):
        setattr(triton_kernels, name, Compiled(getattr(triton_kernels, name)))
    engine = RolloutEngine(make_ensemble(17, 6, hidden=(200,)), penalty="mixture_std")
    # Served by name to arrays on the CPU, of which the kernels' types are all that is looked at.
    engine.operands = operands
    backends._backends()[engine.backend] = TritonBackend()
    observations, actions = inputs(1, 17, 6)
    engine.step(observations, actions, seed=2**63, distributions=True)
    engine.rollout(make_policy(17, 6, hidden=(256,)), observations, 1, seed=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
