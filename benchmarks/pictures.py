"""Draw the charts of speed from the committed results: `python -m benchmarks.pictures`.

It writes docs/pictures/speed.svg, which the README shows, and docs/pictures/epochs.svg, which the page on
other code shows. Nothing is measured here.
"""

import json
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.command import run_command
from benchmarks.record import RESULTS
from mopo_fast.utils.pictures import BLUE, GREY, blank, look

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"

# A bar: its label, and its time relative to the panel's last bar as the name of a result and a way in it.
Bar = tuple[str, str, str]
# Each panel has the bars of one kernel, all from one run of `benchmarks.compare` or `benchmarks.canonical`.
# Or it has OfflineRL-Kit's own code, each bar beside the code as shipped in one run of `benchmarks.compat`.
KIT = "PyTorch, in OfflineRL-Kit's way"
PANELS: dict[str, tuple[Bar, ...]] = {
    "Rollouts": (
        ("mopo_fast, bfloat16", "rollout-bfloat16-cpu", "cpu bfloat16"),
        ("mopo_fast", "rollout-bfloat16-cpu", "cpu"),
        ("JAX", "rollout-bfloat16-cpu", "JAX"),
        ("torch.compile", "rollout-bfloat16-cpu", "torch.compile"),
        ("PyTorch", "rollout-bfloat16-cpu", "PyTorch, linears"),
        (KIT, "rollout-bfloat16-cpu", "PyTorch, NumPy between"),
    ),
    "SAC updates": (
        ("mopo_fast, bfloat16", "sac-bfloat16-cpu", "cpu bfloat16"),
        ("mopo_fast", "sac-bfloat16-cpu", "cpu"),
        ("JAX", "sac-bfloat16-cpu", "JAX"),
        ("torch.compile", "sac-bfloat16-cpu", "torch.compile"),
        ("PyTorch", "sac-bfloat16-cpu", "reference"),
        (KIT, "sac-bfloat16-cpu", "PyTorch, plain"),
    ),
    "Ensemble fit": (
        ("mopo_fast, bfloat16", "fit-bfloat16-cpu", "cpu bfloat16"),
        ("mopo_fast", "fit-bfloat16-cpu", "cpu"),
        ("JAX", "fit-bfloat16-cpu", "JAX"),
        ("torch.compile", "fit-bfloat16-cpu", "torch.compile"),
        (KIT, "fit-bfloat16-cpu", "PyTorch, eager"),
    ),
    "Whole run": (
        ("mopo_fast, bfloat16", "canonical-cpu", "mopo_fast, medium"),
        ("mopo_fast", "canonical-cpu", "mopo_fast"),
        ("torch.compile", "canonical-cpu", "torch.compile"),
        (KIT, "canonical-cpu", "as OfflineRL-Kit"),
    ),
    "OfflineRL-Kit itself: its rollout": (
        ("with mopo_fast, bfloat16", "compat-offlinerl-kit-bfloat16", "rollout, fused"),
        ("with mopo_fast", "compat-offlinerl-kit", "rollout, fused"),
        ("as shipped", "compat-offlinerl-kit", "rollout, as shipped"),
    ),
    "OfflineRL-Kit itself: a whole epoch": (
        ("with mopo_fast, bfloat16", "compat-offlinerl-kit-bfloat16", "epoch, fuse_trainer"),
        ("with mopo_fast", "compat-offlinerl-kit", "epoch, fuse_trainer"),
        ("as shipped", "compat-offlinerl-kit", "epoch, as shipped"),
    ),
}


# Code bases by the names of their results.
CODE_BASES = {
    "offlinerl-kit": "OfflineRL-Kit",
    "mopo-tf": "the authors' code",
    "mbrl-lib": "mbrl-lib",
    "d3rlpy": "d3rlpy 1.x",
    "polixir": "Polixir's OfflineRL",
    "unifloral": "Unifloral",
}


def speed(path: Path, way: str) -> float:
    """Return the speed of a way in a result file, in a unit of that file's own."""
    result = json.loads(path.read_text())
    if "hours" in result:
        return 1.0 / float(sum(result["hours"][way].values()))
    if "times_as_shipped" in result["rows"][0]:
        return float(next(row["times_as_shipped"] for row in result["rows"] if row["what"] == way))
    return float(next(row["rate"] for row in result["rows"] if row["backend"] == way))


def result_path(results: Path, name: str, isa: str) -> Path:
    """Return a result's file; the names of those of `benchmarks.compat` lack the instruction set."""
    return results / (f"{name}.json" if name.startswith("compat-") else f"{name}-{isa}.json")


def draw_epochs(results: Path, path: Path) -> None:
    """Draw the speed of every code base's epoch as shipped, and in the fastest way with mopo_fast."""
    machines = set()
    with svg_look():
        figure = blank(11.5, 5.0)
        figure.suptitle(
            "Speed of an epoch on two CPU cores, relative to the code as shipped", fontweight="bold"
        )
        speeds: dict[str, dict[str, float]] = {}
        for name, title in CODE_BASES.items():
            speeds[title] = {}
            for dtype, suffix in (("bfloat16", "-bfloat16"), ("float32", "")):
                result = json.loads((results / f"compat-{name}{suffix}.json").read_text())
                machines.add(_machine(result))
                epochs = [row for row in result["rows"] if row["what"].startswith("epoch, ")]
                best = max(float(row["times_as_shipped"]) for row in epochs)
                speeds[title][f"mopo_fast, {dtype}"] = best
            speeds[title]["as shipped"] = 1.0
        # One scale for all, so that bars can be compared between panels.
        most = max(max(values.values()) for values in speeds.values())
        for axes, (title, values) in zip(figure.subplots(2, 3).flat, speeds.items(), strict=True):
            _draw_bars(axes, title, values, most)
        _save(figure, machines, path)


def draw(results: Path, isa: str, path: Path) -> None:
    """Draw every panel from the results of one instruction set."""
    machines = set()
    with svg_look():
        figure = blank(11.5, 6.2)
        figure.suptitle("Speed on two CPU cores, relative to the last bar of each panel", fontweight="bold")
        for axes, (title, bars) in zip(figure.subplots(3, 2).flat, PANELS.items(), strict=True):
            speeds = {}
            for label, name, way in bars:
                file = result_path(results, name, isa)
                machines.add(_machine(json.loads(file.read_text())))
                speeds[label] = speed(file, way)
            last = speeds[bars[-1][0]]
            _draw_bars(axes, title, {label: value / last for label, value in speeds.items()})
        _save(figure, machines, path)


def svg_look() -> AbstractContextManager[None]:
    """Apply the common style to figures within the block, whose SVG has the same bytes each time."""
    stack = ExitStack()
    stack.enter_context(look())
    stack.enter_context(matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "mopo_fast"}))
    return stack


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['cpu'].replace('(R)', '')}, {machine['cores']} cores, {machine['isa']}"


def _save(figure: Figure, machines: set[str], path: Path) -> None:
    label = f"{'; '.join(sorted(machines))}. Float32 where nothing else is said."
    figure.supxlabel(label, fontsize=9, color=GREY)
    save_svg(figure, path)


def save_svg(figure: Figure, path: Path) -> None:
    """Save a figure, within `svg_look`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date, so that the same results give the same file.
    figure.savefig(path, metadata={"Date": None})


def _draw_bars(axes: Axes, title: str, values: dict[str, float], most: float | None = None) -> None:
    colours = [BLUE if "mopo_fast" in label else "#b9c0c8" for label in values]
    bars = axes.barh(list(values), list(values.values()), color=colours, height=0.72)
    axes.bar_label(bars, [f"{value:.1f}" for value in values.values()], padding=4, fontsize=9.5)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.set_xlim(0, 1.12 * (most or max(values.values())))
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False)


def main(
    isa: Annotated[str, tyro.conf.arg(help="Instruction set that the results' names end in.")] = "avx512_amx",
    out: Annotated[Path, tyro.conf.arg(help="Folder of the pictures.")] = PICTURES,
) -> None:
    """Draw the charts of speed from the committed results."""
    draw(RESULTS, isa, out / "speed.svg")
    draw_epochs(RESULTS, out / "epochs.svg")
    print(out)


if __name__ == "__main__":
    run_command(main)
