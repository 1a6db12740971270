"""Compare all of `mopo-fast rollout` with the bare kernel: `python -m benchmarks.bulk RUN DATASET`.

Rates are medians over rounds in which all contenders take turns. Memory is measured in a process of its own
for each size.
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from benchmarks.command import run_command
from benchmarks.record import write_record
from mopo_fast import Actor, EnsembleDynamics, load_dataset
from mopo_fast.bulk.generate import Generator
from mopo_fast.bulk.plan import generate_config
from mopo_fast.bulk.write import generate_shards
from mopo_fast.data.manifest import COMPRESSIONS
from mopo_fast.doctor import examine

_PEAK = """
import sys
from mopo_fast.cli import main
code = main(sys.argv[1:])
# Not getrusage: its peak is inherited from the process that has started this one.
status = open("/proc/self/status").read()
print(code, status.split("VmHWM:")[1].split()[0])
"""


def main(
    run: Annotated[Path, Positional],
    dataset: Annotated[str, Positional],
    *,
    count: int = 5_000_000,
    rounds: int = 3,
    dtype: Literal["float32", "bfloat16"] = "float32",
    memory: tuple[int, ...] = (1_000_000, 2_000_000, 10_000_000),
    compressed: bool = True,
    folder: Path | None = None,
    json: Path | None = None,
) -> None:
    """Measure the rates and memory of rollouts to disk.

    Args:
        count: Transitions of a timed call.
        memory: Numbers of transitions at which the peak of memory is measured.
        compressed: Also measure every other format and compression, once.
        folder: Folder for temporary shards (default: the system's temporary folder).
    """
    data = load_dataset(dataset, quiet=True)
    config = generate_config(run, horizon=None, seed=0, penalty_coef=None, dtype=dtype, backend="auto")
    generator = Generator(EnsembleDynamics.load(run), Actor.load(run), data.observations, config)
    ring = generator.allocate_ring(count)

    def kernel() -> None:
        ring.clear()
        generator.fill(ring, count)

    def whole(**options: Any) -> int:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            manifest = generate_shards(run, data, out, count=count, dtype=dtype, quiet=True, **options)
            return sum(shard.bytes for shard in manifest.shards)

    def timed(call: Callable[..., Any], **options: Any) -> tuple[float, Any]:
        started = time.perf_counter()
        result = call(**options)
        return time.perf_counter() - started, result

    seconds: dict[str, list[float]] = {"bare kernel": [], "to disk": []}
    for _ in range(rounds):
        seconds["bare kernel"].append(timed(kernel)[0])
        took, size = timed(whole)
        seconds["to disk"].append(took)
    bare, disk = (statistics.median(times) for times in seconds.values())
    results: dict[str, Any] = {
        "count": count,
        "dtype": dtype,
        "seconds": seconds,
        "rate_kernel": count / bare,
        "rate_to_disk": count / disk,
        "ratio": bare / disk,
        "bytes": size,
    }
    table = Table("", "transitions/s", "of the kernel's", "bytes a row")
    table.add_row("bare kernel", f"{count / bare:,.0f}", "", "")
    table.add_row("hdf5, none", f"{count / disk:,.0f}", f"{bare / disk:.2f}", f"{size / count:.1f}")
    others = [(format, one) for format, some in COMPRESSIONS.items() for one in some][1:]
    for format, compression in others if compressed else ():
        took, size = timed(whole, format=format, compression=compression)
        name = f"{format}, {compression}"
        results[name] = {"seconds": took, "bytes": size, "ratio": bare / took}
        table.add_row(name, f"{count / took:,.0f}", f"{bare / took:.2f}", f"{size / count:.1f}")
    for rows in memory:
        out = Path(tempfile.mkdtemp(dir=folder))
        command = ["rollout", str(run), "--dataset", dataset, "--out", str(out), "--count", str(rows)]
        command += ["--dtype", dtype, "--quiet"]
        process = [sys.executable, "-c", _PEAK, *command]
        took, done = timed(subprocess.run, args=process, capture_output=True, text=True, check=True)
        code, kilobytes = done.stdout.split()[-2:]
        assert code == "0", done.stderr
        results[f"memory at {rows}"] = {"peak_mib": int(kilobytes) / 1024, "seconds": took}
        rate, peak = f"{rows / took:,.0f} with its start", f"{int(kilobytes) / 1024:,.0f} MiB at most"
        table.add_row(f"{rows:,} rows", rate, peak, "")
        shutil.rmtree(out)
    Console().print(table)
    if json is not None:
        write_record(json, "bulk", examine(), results)


if __name__ == "__main__":
    run_command(main)
