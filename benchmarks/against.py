"""Compare the speed of the kernels with a commit's or a wheel's: `make bench-compare REF=v0.1.0`.

The tests of this checkout's kernels must pass first. A commit is built from a temporary worktree. The other
package is installed into a temporary folder. The rounds of both alternate, each in a process of its own, so
that a drift of the machine affects both.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from benchmarks.command import run_command

ROOT = Path(__file__).parent.parent
BFLOAT16 = ["--dtype", "bfloat16"]
BENCHES = (["rollout"], ["rollout", *BFLOAT16], ["sac"], ["sac", *BFLOAT16], ["fit"], ["fit", *BFLOAT16])


def against(ref: Annotated[str, Positional], *, rounds: int = 5) -> None:
    """Print the kernels' rates of this checkout, divided by those of another package.

    Args:
        ref: The commit, or the file of the wheel, to compare with.
        rounds: Rounds of each kernel, of which the median counts.
    """
    tests = sorted((ROOT / "tests" / "kernels").glob("test_kernel_*.py"))
    _run(sys.executable, "-m", "pytest", "-q", *tests)
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "site")
        if ref.endswith(".whl"):
            _install(Path(ref), site)
        else:
            _install_commit(ref, Path(folder, "worktree"), site)
        table = Table("kernel", "ref", "this checkout", "times ref")
        for bench in BENCHES:
            rates: dict[Path, list[float]] = {site: [], ROOT: []}
            unit = ""
            for _ in range(rounds):
                for source, measured in rates.items():
                    row = _measure(source, bench, Path(folder, "rows.json"))
                    if row is not None:
                        measured.append(row["rate"])
                        unit = row["unit"]
            then, now = (statistics.median(values) if values else None for values in rates.values())
            cells = [f"{rate:,.0f} {unit}" if rate else "refused" for rate in (then, now)]
            table.add_row(" ".join(bench), *cells, f"{now / then:.2f}" if now and then else "")
        Console().print(table)


def _install_commit(ref: str, worktree: Path, site: Path) -> None:
    _run("git", "-C", str(ROOT), "worktree", "add", "--detach", str(worktree), ref)
    try:
        _install(worktree, site)
    finally:
        _run("git", "-C", str(ROOT), "worktree", "remove", "--force", str(worktree))


def _install(source: Path, site: Path) -> None:
    _run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, source)


def _measure(source: Path, bench: list[str], rows: Path) -> dict[str, Any] | None:
    """Measure one round with the package in `source`; return None if it lacks this bench."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "mopo_fast",
        "bench",
        *bench,
        "--backend",
        "cpu",
        "--quiet",
        "--rounds",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    result = subprocess.run(
        [*command, "--json", str(rows)], env=environment, capture_output=True, check=False
    )
    if result.returncode == 2 and source != ROOT:
        return None
    result.check_returncode()
    row: dict[str, Any] = json.loads(rows.read_text())[0]
    return row


def _run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True)


if __name__ == "__main__":
    run_command(against)
