"""Models on the Hub: check a name, check that the Hub can be reached, find a model's files and commit."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import EndoRewardError, first_line

PATIENCE = 5.0
"""seconds to wait for the Hub's first answer; huggingface_hub itself tries six times, for half a minute"""
OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")
"""options of from_pretrained that say where a file is and how it is fetched"""
KNOWN = ("config.json", "adapter_config.json")
"""files of which every model has one"""


def refuse_no_hub_name(name: str, local: tuple[str, ...]) -> None:
    """Raise EndoRewardError if no repository can have this name, or if it is similar to one of the `local` names."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    near = get_close_matches(name.lower(), local, n=1, cutoff=0.75)
    if near:
        raise EndoRewardError(f"model {name!r}: there is no such folder; did you mean {near[0]!r}?")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise EndoRewardError(
            f"model {name!r}: there is no such folder, and no model of the Hub has that name"
        ) from None


def reachable(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return `options` for a model on the Hub, with local_files_only if it is cached and the Hub does not answer.

    This makes one request. Raises EndoRewardError if the Hub does not answer and the model is not in the cache.
    """
    from huggingface_hub import constants, get_session

    if options.get("local_files_only") or constants.is_offline_mode():
        return options
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # the type depends on huggingface_hub's HTTP library; any error means no answer
        if _cached(name, options):
            return options | {"local_files_only": True}
        where = f"{constants.ENDPOINT} cannot be reached ({first_line(error)})"
        raise EndoRewardError(
            f"model {name!r}: there is no such folder, it is not in the cache, and {where}"
        ) from error
    return options


def commit_of(name: str, options: dict[str, Any], file: str = "") -> str:
    """Return the commit of a model on the Hub, from the cached path of `file`, or else of its config."""
    from transformers.utils import cached_file

    asked = {key: value for key, value in options.items() if key in OPTIONS}
    reasons = []
    for known in (file,) if file else KNOWN:
        try:
            return _commit(Path(str(cached_file(name, known, **asked))))
        except (OSError, ValueError) as error:
            reasons.append(error)
    raise EndoRewardError(f"model {name!r} cannot be loaded: {first_line(reasons[0])}") from reasons[0]


def file_of(place: str, file: str, where: dict[str, Any]) -> Path | None:
    """Return the path of a file in a folder or on the Hub, or None if it is not there."""
    if Path(place).is_dir():
        path = Path(place, where.get("subfolder") or "", file)
        return path if path.is_file() else None
    from transformers.utils import cached_file

    quietly = ("gated_repo", "missing_entries", "connection_errors")
    found = cached_file(place, file, **where, **{f"_raise_exceptions_for_{what}": False for what in quietly})
    return None if found is None else Path(found)


def _commit(path: Path) -> str:
    """Return the commit from a path in the cache: .../snapshots/COMMIT/..."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1]


def _cached(name: str, options: dict[str, Any]) -> bool:
    from huggingface_hub import try_to_load_from_cache

    wanted = [options["gguf_file"]] if options.get("gguf_file") else KNOWN
    inside = options.get("subfolder") or ""
    where = {key: options[key] for key in ("cache_dir", "revision") if options.get(key)}
    paths = (os.path.join(inside, file) for file in wanted)
    return any(isinstance(try_to_load_from_cache(name, path, **where), str) for path in paths)
