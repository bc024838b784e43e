"""Docstrings are plain text, aligned in columns, as `help()` prints them. This extension shows them so on the site.

A paragraph with columns or an indent keeps its lines; any other is running text, with `names` as code.
"""

import re
import textwrap
from collections.abc import Iterator

COLUMNS = re.compile(r"\S {2,}\S")
NAME = re.compile(r"`([^`]+)`")
SPECIAL = re.compile(r"([\\*|_<>])")


def paragraphs(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines between blank ones. Aligned paragraphs that follow each other stay together."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return filter(None, found)


def aligned(paragraph: list[str]) -> bool:
    return any(line[0] == " " or COLUMNS.search(line) for line in paragraph)


def running(text: str) -> str:
    """Text as reStructuredText: `name` is code, and nothing else has a meaning."""
    parts = NAME.split(text)
    return "".join(f"``{part}``" if i % 2 else SPECIAL.sub(r"\\\1", part) for i, part in enumerate(parts))


def restructured(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText."""
    out: list[str] = []
    for paragraph in paragraphs(lines):
        if aligned(paragraph):
            indented = textwrap.indent(textwrap.dedent("\n".join(paragraph)), "    ").splitlines()
            out += [".. code-block:: text", "", *indented, ""]
        else:
            out += [*running("\n".join(paragraph)).splitlines(), ""]
    return out


def replace(_app, _what, _name, _object, _options, lines: list[str]) -> None:
    lines[:] = restructured(lines)


def setup(app) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", replace)
    return {"parallel_read_safe": True}
