"""Draw the chart of speed from the committed results: `python -m benchmarks.pictures`.

It writes docs/pictures/speed.svg, which the README and the docs show. Nothing is measured here.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import tyro
from matplotlib.axes import Axes

from benchmarks.record import RESULTS
from mopo_fast.utils.pictures import BLUE, GREY, blank, look

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "speed.svg"

# Each panel: its title, the result's name, and its bars as (label, contender), the one that counts as 1 last.
# OfflineRL-Kit's fit is plain PyTorch, as the contender "PyTorch, eager" is.
PANELS = (
    (
        "Rollouts",
        "rollout-bfloat16",
        (
            ("mopo_fast, bfloat16", "cpu bfloat16"),
            ("mopo_fast", "cpu"),
            ("JAX", "JAX"),
            ("torch.compile", "torch.compile"),
            ("PyTorch", "PyTorch, linears"),
            ("as OfflineRL-Kit", "PyTorch, NumPy between"),
        ),
    ),
    (
        "SAC updates",
        "sac",
        (
            ("mopo_fast", "cpu"),
            ("JAX", "JAX"),
            ("torch.compile", "torch.compile"),
            ("PyTorch", "reference"),
            ("as OfflineRL-Kit", "PyTorch, plain"),
        ),
    ),
    (
        "Ensemble fit",
        "fit-bfloat16",
        (
            ("mopo_fast, bfloat16", "cpu bfloat16"),
            ("mopo_fast", "cpu"),
            ("JAX", "JAX"),
            ("torch.compile", "torch.compile"),
            ("as OfflineRL-Kit", "PyTorch, eager"),
        ),
    ),
    (
        "Whole run",
        "canonical",
        (
            ("mopo_fast, bfloat16*", "mopo_fast, bfloat16 fit and rollouts"),
            ("mopo_fast", "mopo_fast"),
            ("torch.compile", "torch.compile"),
            ("as OfflineRL-Kit", "as OfflineRL-Kit"),
        ),
    ),
)


def speeds(result: dict[str, Any]) -> dict[str, float]:
    """Return each contender's speed in a result of `benchmarks.compare` or `benchmarks.canonical`."""
    if "hours" in result:
        return {way: 1.0 / sum(phases.values()) for way, phases in result["hours"].items()}
    return {row["backend"]: row["rate"] for row in result["rows"]}


def draw(results: Path, machine: str, path: Path) -> None:
    """Draw every panel from the results of one machine, named as the files end."""
    read = {name: json.loads((results / f"{name}-{machine}.json").read_text()) for _, name, _ in PANELS}
    cpus = {f"{one['machine']['cores']} cores, {one['machine']['isa']}" for one in read.values()}
    with look(), matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "mopo_fast"}):
        figure = blank(10.5, 4.4)
        figure.suptitle("Times as fast as PyTorch code like OfflineRL-Kit's", fontweight="bold")
        for axes, (title, name, bars) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            rates = speeds(read[name])
            last = rates[bars[-1][1]]
            _bars(axes, title, {label: rates[contender] / last for label, contender in bars})
        figure.supxlabel(
            f"{', '.join(sorted(cpus))}; float32 unless bfloat16 is said."
            "    * bfloat16 fit and rollouts, float32 SAC",
            fontsize=9,
            color=GREY,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a date and random names, so that the same results give the same file.
        figure.savefig(path, metadata={"Date": None})


def _bars(axes: Axes, title: str, values: dict[str, float]) -> None:
    colours = [BLUE if label.startswith("mopo_fast") else "#b9c0c8" for label in values]
    bars = axes.barh(list(values), list(values.values()), color=colours, height=0.72)
    axes.bar_label(bars, [f"{value:.1f}" for value in values.values()], padding=4, fontsize=9.5)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.set_xlim(0, 1.12 * max(values.values()))
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False)


def main(
    machine: Annotated[str, tyro.conf.arg(help="Ending of the results' names.")] = "cpu-avx512_amx",
    out: Annotated[Path, tyro.conf.arg(help="Picture to write, SVG or PNG.")] = PICTURE,
) -> None:
    """Draw the chart of speed from the committed results."""
    draw(RESULTS, machine, out)
    print(out)


if __name__ == "__main__":
    tyro.cli(main)
