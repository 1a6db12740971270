"""Write the tables of the docs from the committed results: `python -m benchmarks.tables`.

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. NAME is a file of benchmarks/results
without its ending. Nothing is measured here.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.command import run_command
from benchmarks.record import RESULTS
from mopo_fast.utils.atomic import atomic_path

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (DOCS / "performance.md", DOCS / "compat.md")
BLOCK = re.compile(r"(<!-- table: ([\w -]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Record = dict[str, Any]

# Descriptions of the contenders of `benchmarks.compare`, by kernel, in place of their short names.
CONTENDERS = {
    ("rollout", "cpu bfloat16"): "**mopo_fast, bfloat16**",
    ("rollout", "cpu bfloat16x3"): "**mopo_fast, bfloat16x3**",
    ("rollout", "cpu"): "**mopo_fast**",
    ("rollout", "reference"): (
        "mopo_fast's reference: PyTorch, members as one batch (`baddbmm`), 2000 rows at a time"
    ),
    ("rollout", "PyTorch, linears"): "PyTorch, a linear layer a member, in place, 2000 rows at a time",
    ("rollout", "torch.compile"): "the same by torch.compile, weights frozen",
    ("rollout", "PyTorch, NumPy between"): (
        "PyTorch as OfflineRL-Kit has it: einsum over all rows, NumPy between, noise for all members"
    ),
    ("rollout", "PyTorch, bfloat16"): "PyTorch, linear layers in bfloat16",
    ("rollout", "torch.compile, bfloat16"): "the same by torch.compile, frozen, max-autotune",
    ("rollout", "JAX"): "JAX, one jitted scan, 2000 rows at a time",
    ("sac", "cpu bfloat16"): "**mopo_fast, bfloat16**",
    ("sac", "cpu bfloat16x3"): "**mopo_fast, bfloat16x3**",
    ("sac", "cpu"): "**mopo_fast**",
    ("sac", "reference"): "mopo_fast's reference: PyTorch, critics as one batch, fused Adam",
    ("sac", "PyTorch, plain"): "PyTorch, one network at a time, three optimisers, as OfflineRL-Kit has it",
    ("sac", "torch.compile"): "gradients, Adam and target in one graph of torch.compile",
    ("sac", "PyTorch, bfloat16"): "PyTorch, one network at a time, bfloat16 by autocast",
    ("sac", "torch.compile, bfloat16"): "torch.compile, bfloat16 by autocast",
    ("sac", "JAX"): "JAX, one jitted scan, as Unifloral has it",
    ("fit", "cpu bfloat16"): "**mopo_fast, bfloat16**",
    ("fit", "cpu bfloat16x3"): "**mopo_fast, bfloat16x3**",
    ("fit", "cpu"): "**mopo_fast**",
    ("fit", "reference"): "mopo_fast's reference: PyTorch, members as one batch, autograd, fused Adam",
    ("fit", "PyTorch, eager"): "PyTorch, members as one batch, autograd, fused Adam",
    ("fit", "torch.compile"): "gradient and Adam in one graph of torch.compile",
    ("fit", "PyTorch, bfloat16"): "PyTorch, bfloat16 by autocast",
    ("fit", "torch.compile, bfloat16"): "torch.compile, bfloat16 by autocast",
    ("fit", "JAX"): "JAX, one jitted scan",
}


def update(text: str, results: Path) -> str:
    """Return a page's text with every marked table drawn anew from the files in `results`.

    Raises:
        FileNotFoundError: if a table names a file that is not there.
    """

    def draw(match: re.Match[str]) -> str:
        records = [json.loads((results / f"{name}.json").read_text()) for name in match[2].split()]
        return f"{match[1]}\n{render(records)}\n\n{match[3]}"

    return BLOCK.sub(draw, text)


def render(records: list[Record]) -> str:
    """Return the machine, the commands and the table of results that one benchmark wrote."""
    modules = {record["command"].removeprefix("python -m benchmarks.").split()[0] for record in records}
    (module,) = modules
    machines = {_machine(record) for record in records}
    (machine,) = machines
    commands = ", ".join(f"`{record['command']}`" for record in records)
    label = "Command" if len(records) == 1 else "Commands"
    return f"Machine: {machine}.\n{label}: {commands}.\n\n{RENDERERS[module](records)}"


def _machine(record: Record) -> str:
    machine = record["machine"]
    return f"{machine['cpu'].replace('(R)', '')}, {machine['cores']} cores, `{machine['isa']}`"


def _compare(records: list[Record]) -> str:
    (record,) = records
    rows = record["rows"]
    kernel, unit = rows[0]["kernel"], rows[0]["unit"].replace("*", " x ")
    # Ours come first: one column for each, with the times it is as fast as the contenders after it.
    ours = [row for row in rows if row["backend"].startswith("cpu")]
    names = [f"mopo_fast {row['dtype']}" if len(ours) > 1 else "mopo_fast" for row in ours]
    header = [
        "contender",
        unit,
        "GFLOP/s",
        "share of peak",
        *(f"{name} is ... times as fast" for name in names),
    ]
    body = []
    for i, row in enumerate(rows):
        ratios = [
            f"{own['rate'] / row['rate']:.2f}" if k < i and _rank(own) <= _rank(row) else ""
            for k, own in enumerate(ours)
        ]
        body.append(
            [
                CONTENDERS[kernel, row["backend"]],
                f"{row['rate']:,.0f}",
                f"{row['gflops']:.0f}",
                f"{row['share_of_peak']:.0%}".replace("%", " %"),
                *ratios,
            ]
        )
    peaks = {row["dtype"]: row["peak_gflops"] for row in rows}
    described = ", ".join(
        f"{peak:,.0f} GFLOP/s in {dtype}" for dtype, peak in sorted(peaks.items(), reverse=True)
    )
    return (
        f"Peak: {described}. `torch.mm` in float32: {rows[0]['mm_gflops']:.0f} GFLOP/s.\n\n"
        + markdown_table(header, body)
    )


def _rank(row: Record) -> int:
    """Return a number that is higher for a more precise dtype."""
    return ("bfloat16", "bfloat16x3", "float32").index(row["dtype"])


def _scaling(records: list[Record]) -> str:
    (record,) = records
    header = ["kernel", "dtype", "1 thread", f"{record['threads']} threads", "times"]
    units = {"rollout": "transitions/s", "sac": "updates/s", "fit": "samples x members/s"}
    return markdown_table(
        header,
        [
            [
                f"{'SAC' if row['kernel'] == 'sac' else row['kernel']}, {units[row['kernel']]}",
                row["dtype"],
                f"{row['one']:,.0f}",
                f"{row['many']:,.0f}",
                f"{row['many'] / row['one']:.2f}",
            ]
            for row in record["rates"]
        ],
    )


def _instruction_sets(records: list[Record]) -> str:
    (record,) = records
    isas = list(record["kernels"][0]["rates"])
    return markdown_table(
        ["kernel", *isas, "avx2 / portable"],
        [
            [
                f"{'SAC' if row['kernel'] == 'sac' else row['kernel']}, {row['unit'].replace('*', ' x ')}",
                *(f"{row['rates'][isa]:,.0f}" for isa in isas),
                f"{row['rates']['avx2'] / row['rates']['portable']:.1f}",
            ]
            for row in record["kernels"]
        ],
    )


def _ensembles(records: list[Record]) -> str:
    (record,) = records
    names = list(record["kernels"][0]["rates"])
    body = []
    for row in record["kernels"]:
        first = row["rates"][names[0]]
        rates = [f"{rate:,.0f} ({rate / first:.2f})" for rate in row["rates"].values()]
        body.append([f"{row['kernel']}, {row['unit'].replace('*', ' x ')}", row["dtype"], *rates])
    return markdown_table(["kernel", "dtype", *names], body)


def _canonical(records: list[Record]) -> str:
    (record,) = records
    ways = record["hours"]
    totals = {way: sum(phases.values()) for way, phases in ways.items()}
    phases = ["fit", "rollout", "sac", "evaluate"]
    header = ["way", "fit", "rollout", "SAC", "evaluation", "whole", "times as fast as OfflineRL-Kit's way"]
    body = []
    for way, hours in ways.items():
        shares = [
            f"{hours[phase]:.2f} ({hours[phase] / totals[way]:.0%})".replace("%", " %") for phase in phases
        ]
        body.append([way, *shares, f"{totals[way]:.2f}", f"{totals['as OfflineRL-Kit'] / totals[way]:.2f}"])
    return markdown_table(header, body)


def _penalty(records: list[Record]) -> str:
    (record,) = records
    rates = record["transitions_per_second"]
    header = ["rollout", *(f"{dtype}, transitions/s" for dtype in rates), *rates]
    cases = list(next(iter(rates.values())))
    return markdown_table(
        header,
        [
            [
                case,
                *(f"{each[case]:,.0f}" for each in rates.values()),
                *(f"{each[case] / each[cases[0]]:.2f}" for each in rates.values()),
            ]
            for case in cases
        ],
    )


def _pieces(records: list[Record]) -> str:
    (record,) = records
    rates = record["transitions_per_second"]
    header = ["transitions/s", *(f"{int(count):,} rollouts" for count in rates)]
    names = list(next(iter(rates.values())))
    return markdown_table(
        header,
        [
            [name, *(f"{each[name]:,.0f} ({each[name] / each[names[0]]:.2f})" for each in rates.values())]
            for name in names
        ],
    )


def _step(records: list[Record]) -> str:
    (record,) = records
    return markdown_table(
        ["rows", "mopo_fast, ms", "PyTorch, ms", "times as fast"],
        [
            [
                f"{int(rows):,}",
                f"{each['cpu']:.3f}",
                f"{each['reference']:.3f}",
                f"{each['reference'] / each['cpu']:.1f}",
            ]
            for rows, each in record["milliseconds"].items()
        ],
    )


def _bulk(records: list[Record]) -> str:
    first = records[0]
    formats = [name for name in first if name.startswith(("hdf5, ", "parquet, "))]
    header, memory = [""], ["kernel into memory"]
    body = [["HDF5"], *([_format(name)] for name in formats)]
    for record in records:
        header += [f"{record['dtype']}, transitions/s", "share of the kernel's rate"]
        memory += [f"{record['rate_kernel']:,.0f}", ""]
        ratios = [record["ratio"], *(record[name]["ratio"] for name in formats)]
        for row, ratio in zip(body, ratios, strict=True):
            row += [f"{ratio * record['rate_kernel']:,.0f}", f"{ratio:.2f}"]
    sizes = [first["bytes"], *(first[name]["bytes"] for name in formats)]
    for row, size in zip(body, sizes, strict=True):
        row.append(f"{size / first['count']:.0f}")
    return markdown_table([*header, "bytes a row"], [[*memory, ""], *body])


def _compat(records: list[Record]) -> str:
    """Return seconds as shipped, and how many times as fast every other way is, for each dtype."""
    ways = [row["what"] for row in records[0]["rows"]]
    shipped = {
        what.partition(",")[0]: f"{row['seconds']:.1f} s"
        for what, row in zip(ways, records[0]["rows"], strict=True)
        if what.endswith(", as shipped")
    }
    header = ["", "as shipped", *(record["settings"]["dtype"] for record in records)]
    body = []
    for what in ways:
        if what.endswith(", as shipped"):
            continue
        rows = (next(row for row in record["rows"] if row["what"] == what) for record in records)
        times = [f"{row['times_as_shipped']:.1f} x" for row in rows]
        body.append([what, shipped[what.partition(",")[0]], *times])
    return markdown_table(header, body)


def _format(name: str) -> str:
    return name.replace("hdf5", "HDF5").replace("parquet", "Parquet").removesuffix(", none")


def markdown_table(header: list[str], body: list[list[str]]) -> str:
    """Return a table of Markdown; columns of numbers are aligned on the right."""
    # Columns of numbers are read from the right.
    columns = zip(*body, strict=True)
    numbers = [all(re.match(r"[+-]?[\d.,]*( %| \(| ± |$)", cell) for cell in column) for column in columns]
    lines = [header, ["---:" if number else "---" for number in numbers], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


RENDERERS: dict[str, Callable[[list[Record]], str]] = {
    "compare": _compare,
    "scaling": _scaling,
    "instruction_sets": _instruction_sets,
    "ensembles": _ensembles,
    "canonical": _canonical,
    "compat": _compat,
    "bulk": _bulk,
    "penalty": _penalty,
    "pieces": _pieces,
    "step": _step,
}


def main(
    pages: Annotated[tuple[Path, ...], tyro.conf.arg(help="Pages whose tables are written.")] = PAGES,
) -> None:
    """Write the tables of pages from the committed results."""
    for page in pages:
        text = update(page.read_text(encoding="utf-8"), RESULTS)
        with atomic_path(page) as path:
            path.write_text(text, encoding="utf-8")
        print(page)


if __name__ == "__main__":
    run_command(main)
