"""Test that the examples import what this package has, and train agents by the one that needs no checkout."""

import ast
import importlib
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_imports_from_this_package(path: Path) -> None:
    found = 0
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mopo_fast":
            if node.module == "mopo_fast.compat.stable_baselines3":
                pytest.importorskip("stable_baselines3", reason="needs the extra `agents`")
            module = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"
                found += 1
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.partition(".")[0] == "mopo_fast":
                    importlib.import_module(name.name)
                    found += 1
    assert found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("agent", "library"), [("sac", "stable_baselines3"), ("ppo", "stable_baselines3"), ("torchrl", "torchrl")]
)
@pytest.mark.filterwarnings("ignore")  # The libraries' own.
def test_agents_train_in_the_model(agent: str, library: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(library, reason="needs the extra `agents`")
    (path,) = (path for path in EXAMPLES if path.stem == "model_env")
    small = ["--steps", "200", "--envs", "8", "--horizon", "3", "--rows", "600", "--epochs", "1"]
    runpy.run_path(str(path))["main"](["--agent", agent, *small])
    printed = capsys.readouterr().out
    assert "200 steps in the model" in printed and "return in the environment: " in printed
