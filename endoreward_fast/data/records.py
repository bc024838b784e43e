"""A row of the input, and the checks that every reader makes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..text.messages import DEEPEST


@dataclass(frozen=True)
class Record:
    """One row of the input, or the error that makes it unusable."""

    where: str
    """ "line 3" or "row 3", counted from 1, for messages"""
    row: dict[str, Any] | None
    error: str | None = None


class Ambiguous(dict):  # type: ignore[type-arg]
    """A JSON object with a repeated key. JSON readers disagree on which value counts."""

    key: str


def record(where: str, row: object) -> Record:
    """Return a Record of `row`, with an error if `row` is not an object, is too deep, or repeats a key."""
    if not isinstance(row, dict):
        return Record(where, None, f"wanted a JSON object, found {kind_of(row)}")
    if _is_deeper(row, DEEPEST):
        return Record(where, None, f"nested more than {DEEPEST} levels deep")
    if (twice := _ambiguous(row)) is not None:
        return Record(where, None, f"the key {twice.key!r} occurs twice in one object: keep one")
    return Record(where, row)


def _is_deeper(value: dict[str, Any] | list[Any], levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(one, levels - 1) for one in inner if isinstance(one, (dict, list)))


def _ambiguous(value: dict[str, Any] | list[Any]) -> Ambiguous | None:
    if isinstance(value, Ambiguous):
        return value
    inner = value.values() if isinstance(value, dict) else value
    found = (_ambiguous(one) for one in inner if isinstance(one, (dict, list)))
    return next((one for one in found if one is not None), None)


def kind_of(value: object) -> str:
    """Return the JSON name of a value's type, for messages."""
    if value != value or value in (float("inf"), float("-inf")):
        return f"{value}, which stands for a missing value"
    if value == []:
        return "an empty array"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "an array"}
    if isinstance(value, bytes):
        return "bytes, which must be decoded to text first"
    return "null" if value is None else names.get(type(value), "an object")


def is_number(value: object) -> bool:
    """Return whether `value` is a finite number. An integer is, however large."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def is_messages(value: object) -> bool:
    """Return whether `value` is a chat: a list of {"role": ..., "content": ...}."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
