"""HTML pages that need no other file: their frame, tables and pictures."""

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

from mopo_fast.utils.atomic import atomic_path

_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem; color: #1d2530; background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }}
h1 {{ font-size: 1.7rem; margin: 0 0 1rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 2.6rem 0 .6rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; padding: .32rem .8rem .32rem 0; border-bottom: 1px solid #e4e7eb;
         vertical-align: top; overflow-wrap: anywhere; }}
th {{ width: 14rem; font-weight: 600; color: #55606e; }}
.numbers {{ overflow-x: auto; font-size: .875rem; }}
.numbers th {{ width: auto; }}
.numbers th, .numbers td {{ white-space: nowrap; }}
.numbers :is(th, td):not(:first-child) {{ text-align: right; font-variant-numeric: tabular-nums; }}
img {{ max-width: 100%; height: auto; display: block; }}
p, li {{ color: #3d4754; margin: .4rem 0; overflow-wrap: anywhere; }}
pre {{ margin: 1rem 0; padding: .7rem .9rem; background: #f3f5f7; border-radius: .3rem; font-size: .85rem;
      white-space: pre-wrap; overflow-wrap: anywhere; }}
summary {{ margin: 1rem 0 .4rem; cursor: pointer; color: #2f6db3; }}
.missing {{ color: #7a828c; font-style: italic; }}
@media (max-width: 40rem) {{ th {{ width: 8.5rem; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write_page(path: str | os.PathLike[str], title: str, parts: Iterable[str]) -> None:
    """Write a page whole or not at all.

    Args:
        path: HTML file to write.
        title: plain text.
        parts: HTML of the page's parts, in order.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        page = _FRAME.format(title=html.escape(title), body="\n".join(parts))
        # Names and texts of files may hold characters that UTF-8 cannot encode.
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def heading(text: str) -> str:
    """Return the heading of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def missing(line: str) -> str:
    """Return a line that says why a part is missing."""
    return f'<p class="missing">{html.escape(line)}</p>'


def code(text: str) -> str:
    """Return a block of code, whose long lines are wrapped."""
    return f"<pre>{html.escape(text)}</pre>"


def bullets(lines: Iterable[str]) -> str:
    """Return a list of lines of plain text."""
    return "<ul>\n" + "\n".join(f"<li>{html.escape(line)}</li>" for line in lines) + "\n</ul>"


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of names and values."""
    cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return "<table>\n" + "\n".join(cells) + "\n</table>"


def number_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with a header; the first column has names, the others have numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        first, *rest = (html.escape(cell) for cell in cells)
        return f"<tr><th>{first}</th>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in rest) + "</tr>"

    lines = [line(header, "th"), *(line(row, "td") for row in rows)]
    return '<div class="numbers"><table>\n' + "\n".join(lines) + "\n</table></div>"


def foldable(title: str, content: str) -> str:
    """Return HTML that is hidden until the reader opens it by its title."""
    return f"<details><summary>{html.escape(title)}</summary>\n{content}\n</details>"


def to_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def picture(title: str, png: bytes) -> str:
    """Return a picture that is part of the page itself.

    Args:
        title: text for readers who do not see the picture.
        png: contents of a PNG file.
    """
    encoded = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{encoded}">'
