"""Pages made at build time: the command line, the tutorial with its output, two files of the root."""

import contextlib
import io
import os
import re
import sys
import textwrap
from pathlib import Path
from unittest import mock

import griffe
import jupytext
import nbformat
from jupyter_client.manager import AsyncKernelManager
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbformat.v4 import new_code_cell
from traitlets import default

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

NOTEBOOK = ROOT / "build" / "tutorial.ipynb"

INTRODUCTION = """# Command line

`mopo-fast COMMAND --help` prints the same in the terminal. This page is made from the parser itself.

Results go to standard output, progress and errors to standard error. The exit code is 0 after success, 2
after a mistake in the arguments or files, and 130 after Ctrl-C.
"""


class Lists(griffe.Extension):
    """Blank lines before lists in docstrings, which Markdown asks for and a terminal does not need."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Add the blank lines to one docstring."""
        if obj.docstring:
            before = re.compile(r"^( *)(\w.*\n)(?=\1 +- )", re.MULTILINE)
            obj.docstring.value = before.sub(r"\1\2\n", obj.docstring.value)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages: dict[str, str | bytes] = {
        "cli.md": cli_page(),
        "contributing.md": root_page("CONTRIBUTING.md"),
        "changelog.md": root_page("CHANGELOG.md"),
        **tutorial_pages(ROOT / "docs" / "tutorial.py"),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def tutorial_pages(source: Path) -> dict[str, str | bytes]:
    """Run the tutorial and return its page, its pictures, and the notebook to download.

    With DOCS_REUSE=1, as in `make docs-serve`, the last output is taken if the tutorial's text is older.
    """
    is_fresh = NOTEBOOK.exists() and NOTEBOOK.stat().st_mtime > source.stat().st_mtime
    if os.environ.get("DOCS_REUSE") == "1" and is_fresh:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
    else:
        notebook = jupytext.read(source)
        notebook.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        notebook.cells.insert(0, new_code_cell('%config InlineBackend.figure_formats = ["svg"]'))
        resources = {"metadata": {"path": str(ROOT)}}
        NotebookClient(notebook, timeout=300, resources=resources, kernel_manager_class=Kernel).execute()
        del notebook.cells[0]
        check_quiet(notebook)
        NOTEBOOK.parent.mkdir(exist_ok=True)
        nbformat.write(notebook, NOTEBOOK)
    page, resources = MarkdownExporter().from_notebook_node(notebook)
    download = "[Download this page as a notebook](tutorial.ipynb){ download }\n"
    return {
        "tutorial.md": page + download,
        "tutorial.ipynb": nbformat.writes(notebook),
        **resources["outputs"],
    }


class Kernel(AsyncKernelManager):
    """Python process whose sockets are files, which other users cannot reach."""

    @default("transport")
    def _transport(self) -> str:
        return "ipc"


def check_quiet(notebook: nbformat.NotebookNode) -> None:
    """Raise ValueError where a cell has written to standard error: the tutorial gives no warnings."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise ValueError(f"the tutorial has written to standard error: {output.text}")


def root_page(name: str) -> str:
    """Return a file of the root, its links to docs/ made relative to docs/."""
    return (ROOT / name).read_text().replace("](docs/", "](")


def cli_page() -> str:
    """Return a section for each command: its usage, and a table for each group of its options."""
    from mopo_fast.cli import COMMANDS

    return "\n".join([INTRODUCTION, *(command_section(command) for command in COMMANDS)])


def help_text(command: str) -> str:
    """Return what `mopo-fast COMMAND --help` prints, 100 columns wide and without colour."""
    from mopo_fast.cli import main

    # Boxes are drawn with letters where the encoding is unknown.
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    environment = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    with (
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main([command, "--help"])
    printed.seek(0)
    return printed.read()


def on_page_markdown(markdown: str, **_: object) -> str:
    """Keep a number and its unit on one line in tables, such as "22 %", "31.8 +- 0.3" and "0.64 (32 %)"."""
    space = re.compile(r"(?<=\d) (?=%|\+-|\(\d)|(?<=\+-) (?=\d)")
    return re.sub(
        r"^\|.*$", lambda line: space.sub("\N{NO-BREAK SPACE}", line[0]), markdown, flags=re.MULTILINE
    )


def command_section(command: str) -> str:
    """Return the Markdown of one command.

    Raises:
        ValueError: the help text has no usage line, or an option is not found in it.
    """
    head, *boxes = re.split(r"^╭─ (.+?) ─*╮$", help_text(command), flags=re.MULTILINE)
    usage, _, description = head.partition("\n\n")
    if not usage.startswith("usage: ") or not boxes:
        raise ValueError(f"the help text of {command} is not in tyro's layout")
    usage = " ".join(usage.removeprefix("usage: ").split())
    parts = [f"## {command}", f"```text\n{usage}\n```", escape(description.strip())]
    for title, box in zip(boxes[::2], boxes[1::2], strict=True):
        introduction, rows = read_box(box)
        if rows:
            parts += [f"**{title.capitalize().replace('Sac ', 'SAC ')}**", escape(introduction), table(rows)]
    examples = boxes[-1].partition("\nExamples:\n")[2]
    if examples:
        parts += ["**Examples**", f"```sh\n{textwrap.dedent(examples).strip()}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def read_box(box: str) -> tuple[str, list[tuple[str, str, str]]]:
    """Return a box's introduction and its rows: flag, default, meaning."""
    introduction: list[str] = []
    rows: list[tuple[str, list[str]]] = []
    lines = [line[2:-1].rstrip() for line in box.splitlines() if line.startswith("│")]
    ruler = next((i for i, line in enumerate(lines) if line.startswith("──")), -1)
    for i, line in enumerate(lines):
        if i < ruler:
            introduction.append(line)
        elif i > ruler and line.startswith(" "):
            # An item of a list keeps its line.
            rows[-1][1].append(re.sub(r"^- ", "\n- ", line.strip()))
        elif i > ruler and line:
            flag, _, meaning = line.partition("  ")
            rows.append((flag, [meaning.strip()]))
    return " ".join(introduction), [
        row(flag, " ".join(filter(None, words))) for flag, words in rows if flag != "-h, --help"
    ]


def row(flag: str, meaning: str) -> tuple[str, str, str]:
    """Split "meaning (default: value)"."""
    found = re.fullmatch(r"(.*?)\s*\((?:default: (.*)|(required))\)", meaning, re.DOTALL)
    if found is None:
        return flag, "", meaning
    return flag, found[2] or found[3] or "", found[1]


def table(rows: list[tuple[str, str, str]]) -> str:
    """Return a Markdown table."""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for flag, value, meaning in rows:
        choices = re.search(r" \{(.+)\}", flag)
        text, *items = escape(meaning).split("\n- ")
        if items:
            text += f"<ul><li>{'</li><li>'.join(items)}</li></ul>"
        elif choices:
            # A line of its own in the wide column: the names would make the first column wide.
            text += f"<br>Choices: {', '.join(map(code, choices[1].split(',')))}."
        if choices:
            flag = flag.replace(choices[0], "")
        # A default is a value, or words for it.
        is_words = re.search(r"[a-z]{2,} [a-z]|^required$", value)
        cells = (code(flag), escape(value) if is_words else code(value), text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def code(text: str) -> str:
    """Return text as code within a table's cell."""
    text = text.replace("|", "\\|")
    return f"`{text}`" if text else ""


def escape(text: str) -> str:
    """Return plain text as Markdown: flags become code, other special characters are escaped."""
    text = re.sub(r"`[^`]*`|(?<!\S)--[a-z][\w.-]*\w", lambda found: f"`{found[0].strip('`')}`", text)
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(
        piece if i % 2 else re.sub(r"([*_|<>\[\]])", r"\\\1", piece) for i, piece in enumerate(pieces)
    )
