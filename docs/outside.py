"""A link to a Markdown file outside this folder leads to a copy of that file, as a link to any other file does.

Without this extension MyST takes the file for a page of the site, which it is not.
"""

import re

LINK = re.compile(r"\]\((\.\./[^)#\s]+\.md)(#[^)\s]*)?\)")


def to_copies(text: str) -> str:
    return LINK.sub(r"](path:\1)", text)


def read(_app, _page: str, source: list[str]) -> None:
    source[0] = to_copies(source[0])


def setup(app) -> dict[str, bool]:
    app.connect("source-read", read)
    return {"parallel_read_safe": True}
