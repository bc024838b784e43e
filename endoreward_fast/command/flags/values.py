"""Parse and check the values of single flags."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from ...errors import EndoRewardError
from ...model.dtypes import ALIASES
from ...text.template import Extras, as_date

DEVICE_ALIASES = {"gpu": "cuda"}
ALL = "all"


def dtype_name(text: str) -> str:
    """Return the dtype's name for an alias such as "bf16" or "torch.half"; other text in lower case."""
    name = text.lower().removeprefix("torch.")
    return ALIASES.get(name, name)


def device_name(text: str | None) -> str | None:
    """Return the device's name for an alias: "cuda:1" for "gpu:1"."""
    if text is None:
        return None
    kind, colon, index = text.lower().partition(":")
    return f"{DEVICE_ALIASES.get(kind, kind)}{colon}{index}"


def tools_in(context: typer.Context, path: str | None) -> str | None:
    """Return the contents of a file of tools as checked JSON text.

    The text travels in a run's settings and to its other processes, so that these do not need the file.
    """
    if path is None:
        return None
    try:
        file = Path(path).expanduser()
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise EndoRewardError(f"--tools: cannot read {path}: it is not UTF-8") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: ~user of an unknown user
        raise EndoRewardError(f"--tools: cannot read {path}: {getattr(error, 'strerror', error)}") from None
    context.meta["tools_file"] = str(file)
    return _template_json(f"--tools {path}", "tools", text)


def template_kwargs(text: str | None) -> str | None:
    """Return the template's variables as checked JSON text."""
    return None if text is None else _template_json("--template-kwargs", "chat_template_kwargs", text)


def _template_json(flag: str, name: str, text: str) -> str:
    try:
        if Extras.of({name: text}, Extras()) == Extras() and json.loads(text) is None:
            raise EndoRewardError("wanted a list or an object, found null")
    except EndoRewardError as error:
        raise EndoRewardError(f"{flag}: {str(error).removeprefix(f'{name}: ')}") from None
    return json.dumps(json.loads(text), ensure_ascii=False)


def day(text: str | None) -> str | None:
    """Return `text`. Raises EndoRewardError if it is not a date."""
    if text is not None:
        as_date(text)
    return text


def names(flag: str, text: str | None, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names in comma-separated `text`: all for "all", none for None. EndoRewardError for an unknown name."""
    if text is None or text == ALL:
        return allowed if text else ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in allowed:
            raise EndoRewardError(f"{flag} must be {ALL}, or some of {', '.join(allowed)}, got {name!r}")
    return names


def one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise EndoRewardError(f"{flag} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")


def at_least_one(flag: str, value: int) -> None:
    if value < 1:
        raise EndoRewardError(f"{flag} must be 1 or more, got {value}")
