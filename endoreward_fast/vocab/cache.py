"""The user's cache folder. This module does not import torch."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return endoreward_fast's folder in $XDG_CACHE_HOME or ~/.cache. RuntimeError if there is no home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "endoreward_fast"
