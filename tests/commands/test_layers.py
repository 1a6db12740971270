"""Test that the package's imports follow docs/architecture.md."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from places import ROOT

PACKAGE = ROOT / "mopo_fast"
MODULES = {
    ".".join(("mopo_fast", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(name: str) -> set[str]:
    """Return the package's modules that a module imports, also in functions, but not for types alone."""
    tree, found = ast.parse(MODULES[name].read_text()), set()
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in for_types:
            assert node.level == 0, f"{name} imports relatively"
            # The package's own names are imported on first use, so they would hide the module behind them.
            names = {alias.name for alias in node.names if f"mopo_fast.{alias.name}" not in MODULES}
            assert node.module != "mopo_fast" or names <= {"__version__"}, f"{name} imports {names}"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {each if each in MODULES else node.module for each in full}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys() - {name, "mopo_fast"}


IMPORTS = {name: imports(name) for name in MODULES}


def test_imports_make_no_circle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


# Folders, and the parts of the package that their files may import beside the folder itself.
NOTHING_ELSE = {
    "mopo_fast.utils": ("mopo_fast.errors",),
    "mopo_fast.data": ("mopo_fast.config", "mopo_fast.errors", "mopo_fast.tasks", "mopo_fast.utils"),
}
# Several runs at once are optional, so nothing that makes one run may depend on them.
ONE_RUN = [
    *("mopo_fast.sac", "mopo_fast.fit", "mopo_fast.train", "mopo_fast.evaluate", "mopo_fast.rollout"),
    *("mopo_fast.run.folder", "mopo_fast.run.log", "mopo_fast.run.checkpoint", "mopo_fast.run.dynamics"),
    *("mopo_fast.run.resolve", "mopo_fast.report"),
]
# Files or folders, and folders that they never import.
NEVER = [
    ("mopo_fast.buffer", "mopo_fast.backends"),
    ("mopo_fast.fit", "mopo_fast.backends.cpu"),
    *((name, "mopo_fast.run.population") for name in ONE_RUN),
]


def test_rules_name_parts_that_exist() -> None:
    rooms = {*NOTHING_ELSE, *sum(NOTHING_ELSE.values(), ()), *(part for rule in NEVER for part in rule)}
    assert rooms <= MODULES.keys()


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


@pytest.mark.parametrize(("room", "allowed"), NOTHING_ELSE.items())
def test_a_room_imports_nothing_else(room: str, allowed: tuple[str, ...]) -> None:
    for name in MODULES:
        if inside(name, room):
            others = {
                other for other in IMPORTS[name] if not any(inside(other, part) for part in (room, *allowed))
            }
            assert not others, f"{name} imports {others}"


@pytest.mark.parametrize(("room", "other"), NEVER)
def test_what_never_imports_what(room: str, other: str) -> None:
    for name in MODULES:
        if inside(name, room):
            assert not [found for found in IMPORTS[name] if inside(found, other)], f"{name} imports {other}"
