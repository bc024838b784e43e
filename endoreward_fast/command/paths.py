"""Paths for printed output, without the user's name."""

from __future__ import annotations

import getpass
from contextlib import suppress
from pathlib import Path


def short(path: str | Path) -> str:
    """Return a path with ~ for the home folder, and for any other part that is the user's name."""
    text = Path(path)
    with suppress(ValueError, RuntimeError):  # it is elsewhere; there is no home folder
        text = Path("~", text.relative_to(Path.home()))
    return str(Path(*("~" if part == _user() else part for part in text.parts)))


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # an id without a name
        return None
