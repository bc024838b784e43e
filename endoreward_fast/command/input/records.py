"""One row of an input, and what every reader asks of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...text.messages import DEEPEST


@dataclass(frozen=True)
class Record:
    """One row of the input, or why it cannot be used."""

    where: str
    """ "line 3" or "row 3", counted from 1: how messages name it"""
    row: dict[str, Any] | None
    error: str | None = None


class Ambiguous(dict):  # type: ignore[type-arg]
    """A JSON object that has a key twice: readers of JSON disagree on which value counts."""

    key: str


def record(where: str, row: object) -> Record:
    """`row` as a Record, with an error if it is no row or no reader would agree on what it says."""
    if not isinstance(row, dict):
        return Record(where, None, f"wanted a JSON object, found {kind_of(row)}")
    if _is_deeper(row, DEEPEST):
        return Record(where, None, f"nested more than {DEEPEST} levels deep")
    if (twice := _ambiguous(row)) is not None:
        return Record(where, None, f"the key {twice.key!r} stands twice in one object: keep one")
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
    """The JSON name of a value's type, for messages."""
    if value != value or value in (float("inf"), float("-inf")):
        return f"{value}, which stands for a missing value"
    if value == []:
        return "an empty array"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "an array"}
    if isinstance(value, bytes):
        return "bytes, which are no text before they are decoded"
    return "null" if value is None else names.get(type(value), "an object")


def is_messages(value: object) -> bool:
    """Whether `value` is a chat: a list of {"role": ..., "content": ...}."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
