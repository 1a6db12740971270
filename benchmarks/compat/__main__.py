"""Compare other code's loops as shipped and with our backend: `python -m benchmarks.compat NAME`.

A module NAME of this package has `contenders(checkout, batch_size=, updates=, **options)`, which returns
calls by name: "rollout, WAY" and "epoch, WAY", where the first way is "as shipped". `checkout` is the code
base's folder, or None if it is installed; `options` are dtype and threads of `RolloutEngine`, and the
algorithm for OfflineRL-Kit.
"""

import importlib
import statistics
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from benchmarks.command import run_command
from benchmarks.record import write_record
from mopo_fast.doctor import examine
from mopo_fast.utils.progress import progress_bar


def main(
    name: Annotated[
        Literal["offlinerl_kit", "mopo_tf", "mbrl_lib", "unifloral", "polixir", "d3rlpy"], Positional
    ],
    checkout: Annotated[Path | None, Positional] = None,
    *,
    batch_size: int = 50_000,
    updates: int = 1000,
    rounds: int = 5,
    algorithm: Literal["mopo", "combo", "rambo", "mobile"] = "mopo",
    dtype: Literal["float32", "bfloat16"] = "float32",
    threads: int | None = None,
    json: Path | None = None,
    quiet: bool = False,
) -> None:
    """Time every way in turn; print medians and speed-ups over the code as shipped.

    Args:
        checkout: Folder of the code base, if it is not an installed package.
        batch_size: Start states of a rollout of 5 steps.
        updates: SAC updates of an epoch, after one rollout.
        algorithm: Algorithm of offlinerl_kit. The other code bases have MOPO alone.
        dtype: Precision of our kernels' products.
        threads: CPU threads of our kernels. PyTorch keeps its default.
    """
    folder = None if checkout is None else checkout.resolve()
    options: dict[str, Any] = {"dtype": dtype, "threads": threads}
    if name == "offlinerl_kit":
        options["algorithm"] = algorithm
    elif algorithm != "mopo":
        raise SystemExit(f"{name} has no {algorithm}; --algorithm is for offlinerl_kit")
    module = importlib.import_module(f"benchmarks.compat.{name}")
    contenders = module.contenders(folder, batch_size=batch_size, updates=updates, **options)
    seconds: dict[str, list[float]] = {what: [] for what in contenders}
    with progress_bar(name, rounds * len(contenders), quiet=quiet) as bar:
        for _ in range(rounds):
            for what, call in contenders.items():
                started = time.perf_counter()
                call()
                seconds[what].append(time.perf_counter() - started)
                bar.advance()
    rows = []
    for what, times in seconds.items():
        median = statistics.median(times)
        shipped = statistics.median(seconds[f"{what.partition(',')[0]}, as shipped"])
        rows.append({"what": what, "seconds": median, "all": times, "times_as_shipped": shipped / median})
    table = Table("", "seconds", "of the best round", "times as fast as shipped")
    for row in rows:
        best = min(row["all"])
        table.add_row(row["what"], f"{row['seconds']:.3f}", f"{best:.3f}", f"{row['times_as_shipped']:.2f}")
    Console().print(table)
    if json is not None:
        settings = {"code": name, "batch_size": batch_size, "updates": updates, "rounds": rounds, **options}
        write_record(json.resolve(), "compat", examine(), {"settings": settings, "rows": rows})


if __name__ == "__main__":
    run_command(main)
