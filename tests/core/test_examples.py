"""Test that the examples import what this package has. Most need another code base to run."""

import ast
import importlib
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_imports_from_this_package(path: Path) -> None:
    found = 0
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mopo_fast":
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
