"""Compiles the Triton kernels for a GPU that need not be there: python triton_compiles.py 90 float16 [FOLDER].

The canonical shapes. Prints what each kernel takes and holds, one JSON line; its PTX and cubin go to FOLDER, if one
is given. Must not be run under TRITON_INTERPRET.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from kernel_cases import inputs, make_ensemble, make_policy
from triton.backends.compiler import GPUTarget

from mopo_fast import backends
from mopo_fast.backends import triton_kernels
from mopo_fast.backends.triton import TritonBackend
from mopo_fast.rollout import RolloutEngine

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


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


def resources(cubin: Path) -> dict[str, int]:
    """Of a thread: registers, bytes of its stack and of spills to local memory."""
    run = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True)
    found = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", run.stdout)}
    return {"registers": found["reg"], "spilled": found["stack"] + found["local"]}


class Anywhere(TritonBackend):
    def refusal(self, *_: Any) -> None:
        return None


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any, folder: Path) -> None:
        self.kernel, self.folder, self.count = kernel, folder, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
        name = f"{self.kernel.__name__}_{self.count}"
        self.count += 1
        (self.folder / f"{name}.cubin").write_bytes(compiled.asm["cubin"])
        (self.folder / f"{name}.ptx").write_text(compiled.asm["ptx"])
        products = re.findall(r"wgmma\.mma_async[^;]*;", compiled.asm["ptx"])
        # The left factor is a list of registers or a descriptor of shared memory.
        from_registers = [product for product in products if re.search(r"\}\s*,\s*\{", product)]
        print(json.dumps({
            "kernel": self.kernel.__name__,
            **resources(self.folder / f"{name}.cubin"),
            "shared": compiled.metadata.shared,
            "warps": compiled.metadata.num_warps,
            "wgmma": len(products),
            "wgmma_from_registers": len(from_registers),
            **{word: compiled.asm["ptx"].count(word) for word in ("mma.sync", "cp.async.cg", "trap;")},
        }))  # fmt: skip


def main(capability: str, operands: str, folder: str) -> None:
    assert not triton_kernels.INTERPRETED
    triton.runtime.driver.set_active(Driver(int(capability)))
    for name in ("rollout_kernel", "compact_kernel"):
        setattr(triton_kernels, name, Compiled(getattr(triton_kernels, name), Path(folder)))
    engine = RolloutEngine(make_ensemble(17, 6, hidden=(200,) * 4))
    # Served by name to arrays on the CPU, of which the kernels' types are all that is looked at.
    engine.operands = operands
    backends._backends()[engine.backend] = Anywhere()
    observations, actions = inputs(1, 17, 6)
    engine.step(observations, actions, seed=2**63, distributions=True)
    engine.rollout(make_policy(17, 6, hidden=(256, 256)), observations, 1, seed=1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(*sys.argv[1:3], sys.argv[3] if len(sys.argv) > 3 else temporary)
