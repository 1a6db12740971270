"""Results as JSON, with the command, commit, machine and versions that they belong to."""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

from mopo_fast.doctor import Report
from mopo_fast.utils.atomic import write_json

RESULTS = Path(__file__).parent / "results"


def write_record(path: Path, module: str, findings: Report, results: dict[str, Any]) -> None:
    """Write `results` with the command, date, commit, machine and versions that they belong to."""
    record = {
        "command": " ".join([f"python -m benchmarks.{module}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": dataclasses.asdict(findings.machine),
        "versions": {
            "python": findings.python.split()[0],
            "mopo_fast": findings.version,
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy")},
            "jax": importlib.metadata.version("jax") if importlib.util.find_spec("jax") else None,
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record | results)


def _commit() -> str:
    """Return the commit, with "-dirty" if the working tree differs from it in more than earlier results."""
    commit = _git("rev-parse", "HEAD") or "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", ":/", f":(exclude){RESULTS}")
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip()
