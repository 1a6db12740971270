"""Submodules that are imported on first use, as attributes of their package."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType


def lazy_submodules(package: str) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package whose submodules are imported on first use.

    `__dir__` lists the package's `__all__`, or all its names where there is none, and the submodules. Names
    that begin with an underscore are left out.

    Args:
        package: full name of the package, its `__name__`.
    """

    def submodules() -> set[str]:
        # Imported on first use like the submodules, since `import mopo_fast` does not need it.
        import pkgutil

        return {module.name for module in pkgutil.iter_modules(sys.modules[package].__path__)}

    def get(name: str) -> ModuleType:
        if name.startswith("_") or name not in submodules():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    def names() -> list[str]:
        module = sys.modules[package]
        found = {*getattr(module, "__all__", vars(module)), *submodules()}
        return sorted(name for name in found if name == "__version__" or not name.startswith("_"))

    return get, names
