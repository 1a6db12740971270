"""Install the package where there is no compiler, as users do: `python -m tests.install WHEEL`.

The wheel is installed into a fresh environment with all that it needs, and then the sources in its place.
Each time `doctor`, a short training and a rollout must work: on the wheel's kernels, and without kernels.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from mopo_fast.backends import cpu

ROOT = Path(__file__).parents[1]
LARGEST = 2_500_000
_SMALL = (
    *("--dynamics.hidden", "8", "--dynamics.weight-decay", "1e-5", "1e-5", "--dynamics.max-epochs", "2"),
    *("--sac.hidden", "8", "--steps", "4", "--rollout.interval", "2", "--rollout.batch-size", "20"),
    *("--evaluation.episodes", "1"),
)
_ROLLOUT = """
import mopo_fast
data = mopo_fast.load_dataset("data.hdf5")
ensemble = mopo_fast.EnsembleDynamics.load("run")
engine = mopo_fast.RolloutEngine(ensemble, penalty_coef=1.0, termination="hopper")
policy = mopo_fast.Actor(data.obs_dim, data.act_dim)
rollouts = engine.rollout(policy, data.observations[:50], horizon=5, seed=0)
assert len(rollouts.rewards) > 50
print(engine.backend)
"""


def try_installations(wheel: Annotated[Path, Positional]) -> None:
    """Install a wheel, then the sources, and use each.

    Args:
        wheel: File of a wheel for this machine and Python.
    """
    size = wheel.stat().st_size
    assert size < LARGEST, f"{wheel} has {size:,} bytes, {LARGEST:,} or more"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = folder / "venv"
        venv.create(environment, with_pip=True)
        # Nothing but Python is found, so no compiler is.
        variables = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        variables |= {"PATH": str(environment / "bin"), "HOME": str(folder), "COLUMNS": "200"}
        constraints = str(ROOT / "constraints.txt")
        variables |= {"PIP_CONSTRAINT": constraints, "PIP_BUILD_CONSTRAINT": constraints}

        def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
            done = subprocess.run(
                list(map(str, command)),
                cwd=folder,
                env=variables,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
            return done

        python, mopo_fast = environment / "bin" / "python", environment / "bin" / "mopo-fast"

        def use(backend: str) -> str:
            shutil.rmtree(folder / "run", ignore_errors=True)
            train = ("train", "data.hdf5", "--task", "hopper", "--out", "run", "--quiet")
            said = run(mopo_fast, *train, *_SMALL).stderr
            assert run(python, "-c", _ROLLOUT).stdout.strip() == backend
            report = json.loads(run(mopo_fast, "doctor", "--json").stdout)
            assert (report["extension"] is not None) == (backend == "cpu"), report
            return said

        pip = (python, "-m", "pip", "install", "--quiet", "--no-compile")
        run(*pip, wheel.resolve())
        run(mopo_fast, "collect", "hopper-random", "--steps", "1000", "--out", "data.hdf5")
        use("cpu")
        found = run(
            python, "-c", "import torch, mopo_fast._cpu; print(*mopo_fast._cpu.isas())"
        ).stdout.split()
        assert found == cpu.isas(), f"the wheel finds {found}, this checkout {cpu.isas()}"
        print(f"{wheel.name}, {size / 1e6:.2f} MB: trained and rolled out on {found[0]}", flush=True)

        source = folder / "source"
        kept = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, source, ignore=kept)
        run(*pip, "--no-deps", "--force-reinstall", source)
        said = use("reference")
        assert said.count("several times slower: the C++ kernels were not built") == 1, said
        print("without a compiler: trained and rolled out in PyTorch, and said so")


if __name__ == "__main__":
    tyro.cli(try_installations)
