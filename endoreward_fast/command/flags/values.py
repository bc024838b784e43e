"""Values of single flags: what they are read as, and refused for."""

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
    """The name of a dtype that `text` is an alias of, with or without "torch." before it; `text` if it is none."""
    name = text.lower().removeprefix("torch.")
    return ALIASES.get(name, name)


def device_name(text: str | None) -> str | None:
    """The same for a device, whose index is kept: cuda:1 for gpu:1."""
    if text is None:
        return None
    kind, colon, index = text.lower().partition(":")
    return f"{DEVICE_ALIASES.get(kind, kind)}{colon}{index}"


def tools_in(context: typer.Context, path: str | None) -> str | None:
    """The tools that a file holds, as JSON text: a run's settings and its other processes need no file."""
    if path is None:
        return None
    try:
        file = Path(path).expanduser()
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise EndoRewardError(f"--tools: cannot read {path}: it is not UTF-8") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody has that home
        raise EndoRewardError(f"--tools: cannot read {path}: {getattr(error, 'strerror', error)}") from None
    context.meta["tools_file"] = str(file)
    return _template_json(f"--tools {path}", "tools", text)


def template_kwargs(text: str | None) -> str | None:
    """JSON text of the template's variables, checked."""
    return None if text is None else _template_json("--template-kwargs", "chat_template_kwargs", text)


def _template_json(flag: str, name: str, text: str) -> str:
    try:
        if Extras.of({name: text}, Extras()) == Extras() and json.loads(text) is None:
            raise EndoRewardError("wanted a list or an object, found null")
    except EndoRewardError as error:
        raise EndoRewardError(f"{flag}: {str(error).removeprefix(f'{name}: ')}") from None
    return json.dumps(json.loads(text), ensure_ascii=False)


def day(text: str | None) -> str | None:
    """A date, checked."""
    if text is not None:
        as_date(text)
    return text


def names(flag: str, text: str | None, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The names in a text with commas; all of them for "all", none for None. EndoRewardError for any other."""
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
