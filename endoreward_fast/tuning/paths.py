"""Text for printed output, without the user's name."""

import getpass
import re
from contextlib import suppress
from pathlib import Path

END = r"(?![\w.-])"


def shortened(text: str | Path) -> str:
    """Return text with ~ for the home folder in it, and for any other part of a path that is the user's name."""
    short = str(text)
    with suppress(RuntimeError):  # there is no home folder
        short = re.sub(re.escape(str(Path.home())) + END, "~", short)
    with suppress(OSError, KeyError):  # an id without a name
        short = re.sub(f"(?<=/){re.escape(getpass.getuser())}{END}", "~", short)
    return short
