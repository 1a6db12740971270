"""Search for the package's functions that read files, by the calls in their source."""

import ast
from collections.abc import Iterator
from pathlib import Path

# Functions that read files, whatever object they are called on; among them the package's own readers.
_READS = {
    *("read_text", "read_bytes", "readinto", "File", "memmap", "fromfile", "loadtxt", "genfromtxt"),
    *(
        "load_file",
        "safe_open",
        "loads",
        "validate_json",
        "Unpickler",
        "loadmat",
        "read_table",
        "ParquetFile",
    ),
    *(
        "ZipFile",
        "is_zipfile",
        "TarFile",
        "DictReader",
        "run_path",
        "load_dataset",
        "load_configured",
        "mmap",
        "urlopen",
    ),
    *("copyfile", "copy2", "copytree", "read_csv", "open_file", "read_file", "read_json", "read_json_as"),
    *("load_tensors", "load_metadata", "load_state", "file_checksum", "iter_lines", "file_digest"),
}
# Functions that read files if called on these modules or by these bare names.
_OF_MODULES = {
    "load": {"np", "numpy", "torch", "json", "pickle", "pickles", "torch_files", "marshal", "tomllib", "jit"},
    "reader": {"csv"},
    "copy": {"shutil"},
}
_BARE = {"load", "reader"}


def readers(folder: Path) -> set[str]:
    """Return all functions below `folder` that read a file, as "package.module:Class.function"."""
    return {
        f"{'.'.join(path.relative_to(folder.parent).with_suffix('').parts).removesuffix('.__init__')}:{name}"
        for path in folder.rglob("*.py")
        for name in readers_in(path.read_text())
    }


def readers_in(source: str) -> set[str]:
    """Return a module's functions that read a file; calls of nested functions count for the outermost one."""
    return {name for name, call in _calls(ast.parse(source), "") if _reads(call)}


def _calls(node: ast.AST, inside: str, whole: bool = False) -> Iterator[tuple[str, ast.Call]]:
    """Yield the calls below `node` with the function or class around them; `whole` stops nested names."""
    for child in ast.iter_child_nodes(node):
        name, ends = inside, whole
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not whole:
            name, ends = f"{inside}.{child.name}".lstrip("."), not isinstance(child, ast.ClassDef)
        if isinstance(child, ast.Call):
            yield name or "<module>", child
        yield from _calls(child, name, ends)


def _reads(call: ast.Call) -> bool:
    function = call.func
    if isinstance(function, ast.Name):
        name, module = function.id, None
    elif isinstance(function, ast.Attribute):
        name, module = function.attr, function.value
    else:
        return False
    if name == "open":
        # The mode is the second argument of open(), the first of Path.open().
        place = 1 if module is None or (isinstance(module, ast.Name) and module.id == "io") else 0
        return not _only_writes(call, place)
    if name == "File":
        return not _only_writes(call, 1)
    if name in _OF_MODULES and module is not None:
        base = module.attr if isinstance(module, ast.Attribute) else getattr(module, "id", None)
        return base in _OF_MODULES[name]
    return name in _READS or (module is None and name in _BARE)


def _only_writes(call: ast.Call, place: int) -> bool:
    """Tell whether a mode is given that does not permit reading."""
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] + call.args[
        place : place + 1
    ]
    mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else None
    return isinstance(mode, str) and "r" not in mode and "+" not in mode
