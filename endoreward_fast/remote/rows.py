"""Rows as JSON: the fields of a row that scoring reads, checked as a local model checks them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import EndoRewardError
from ..scoring.results import RowScore
from ..text.messages import DEEPEST
from ..text.rows import Row, ids_of, mask_of, prompt_and_completion, refuse_no_row, switch_of

FOR_TEMPLATES = ("tools", "documents", "chat_template_kwargs")
FOR_SIGNALS = ("answer_span", "reference_answer", "privileged")
TEMPLATE_OR_NOT = (None, True, False)
"""what a row's own `chat` may be"""


@dataclass(frozen=True)
class Sent:
    """A row on its way to the server."""

    place: int
    """position in the caller's rows"""
    body: bytes
    """the row as JSON"""
    chat: bytes
    """the option `chat` as JSON, which a row may set for itself; b"": nobody sets it. A request holds rows of one"""


def to_send(place: int, row: Any, chat: bytes) -> Sent | RowScore:
    """Return the row as JSON, or a RowScore that says why it cannot be scored. `chat` is the option for all rows."""
    if isinstance(row, RowScore):
        return row
    try:
        refuse_no_row(row)
        own = row.get("chat")
        if own not in TEMPLATE_OR_NOT:
            raise EndoRewardError(f"chat={own!r}: expected True, False or None")
        return Sent(place, as_json(_fields(row), "the row"), as_json(own, "chat") if "chat" in row else chat)
    except EndoRewardError as error:
        return RowScore(None, 0, None, error=str(error))


def as_json(value: Any, name: str) -> bytes:
    """Return JSON. Tensors and arrays become lists. Raises EndoRewardError, which names `name`, if it cannot."""
    try:
        if _is_deeper(value, DEEPEST):
            raise RecursionError
        return json.dumps(value, default=_plain, allow_nan=False, separators=(",", ":")).encode()
    except RecursionError:
        raise EndoRewardError(f"{name} is nested more than {DEEPEST} levels deep") from None
    except (TypeError, ValueError) as error:
        raise EndoRewardError(f"{name} cannot be sent to a server: {error}") from None


def _fields(row: Row) -> dict[str, Any]:
    if "prompt_ids" in row and "completion_ids" in row:
        found: dict[str, Any] = {name: ids_of(row, name) for name in ("prompt_ids", "completion_ids")}
        found["terminal"] = switch_of(row, "terminal")
        if row.get("completion_mask") is not None:
            found["completion_mask"] = [int(own) for own in mask_of(row, found["completion_ids"])]
    else:
        prompt, completion = prompt_and_completion(row)
        if "prompt" in row and "completion" in row and (prompt or isinstance(prompt, str)):
            found = {"prompt": prompt, "completion": completion}
        else:  # without a turn before the completion, columns of data are "messages"
            turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            found = {"messages": [*prompt, *turns]}
    return found | {name: row[name] for name in (*FOR_TEMPLATES, *FOR_SIGNALS) if row.get(name) is not None}


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"it holds a {type(value).__name__}")


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return levels < 0 or any(_is_deeper(one, levels - 1) for one in inner if isinstance(one, Mapping | list | tuple))
