"""Compile the Triton kernels without a GPU: python triton_compiles.py 90 float16 [OUT].

Compiles the canonical shapes and prints a line of JSON with the resources of each kernel. PTX and cubin are
written to the folder OUT, if given. Must not be run with TRITON_INTERPRET.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from kernel_cases import inputs, make_ensemble, make_policy
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from mopo_fast.backends.choose import BACKENDS
from mopo_fast.backends.gpu import triton as host
from mopo_fast.backends.gpu import triton_kernels
from mopo_fast.rollout import RolloutEngine

# Bytes of shared memory that a block may use, by compute capability.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 120: 101376}


class Driver:
    """Stand-in for the parts of a GPU driver that compiling needs."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(ptx: Path, capability: int) -> dict[str, int]:
    """Return the registers of a thread and the bytes that it spills."""
    architecture = f"sm_{capability}" + "a" * (capability >= 90)
    command = [
        get_ptxas(capability).path,
        "-v",
        f"--gpu-name={architecture}",
        ptx,
        "-o",
        ptx.with_suffix(".cubin"),
    ]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"(\d+) bytes spill stores.*?Used (\d+) registers", log, re.DOTALL)
    assert found, log
    return {"registers": int(found[2]), "spilled": int(found[1])}


class Anywhere(host.TritonBackend):
    def refusal(self, *_: Any) -> None:
        return None


class Compiled:
    """Wrapper of a kernel that compiles it instead of launching it."""

    def __init__(self, kernel: Any, capability: int, folder: Path) -> None:
        self.kernel, self.capability, self.folder, self.count = kernel, capability, folder, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
        ptx = self.folder / f"{self.kernel.__name__}_{self.count}.ptx"
        ptx.write_text(compiled.asm["ptx"])
        self.count += 1
        products = re.findall(r"wgmma\.mma_async[^;]*;", compiled.asm["ptx"])
        # The left factor is a list of registers or a descriptor of shared memory.
        from_registers = [product for product in products if re.search(r"\}\s*,\s*\{", product)]
        print(json.dumps({
            "kernel": self.kernel.__name__,
            **resources(ptx, self.capability),
            "shared": compiled.metadata.shared,
            "warps": compiled.metadata.num_warps,
            "wgmma": len(products),
            "wgmma_from_registers": len(from_registers),
            **{word: compiled.asm["ptx"].count(word) for word in ("mma.sync", "cp.async.cg", "trap;")},
        }))  # fmt: skip


def main(capability: int, operands: str, folder: str) -> None:
    assert not triton_kernels.INTERPRETED
    triton.runtime.driver.set_active(Driver(capability))
    host._gpu = lambda device: SimpleNamespace(
        major=capability // 10, shared_memory_per_block_optin=SHARED[capability], multi_processor_count=1
    )
    for name in ("rollout_kernel", "compact_kernel"):
        kernel = getattr(triton_kernels, name)
        setattr(triton_kernels, name, Compiled(kernel, capability, Path(folder)))
    engine = RolloutEngine(make_ensemble(17, 6, hidden=(200,) * 4))
    # Arrays on the CPU suffice, because only the types of a kernel's arguments are used.
    engine.operands = operands
    BACKENDS[engine.backend] = Anywhere()
    observations, actions = inputs(1, 17, 6)
    engine.step(observations, actions, seed=2**63, distributions=True)
    engine.rollout(make_policy(17, 6, hidden=(256, 256)), observations, 1, seed=1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(int(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else temporary)
