"""Read rows of JSON Lines and of JSON documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import EndoRewardError
from .records import Ambiguous, Record, is_messages, kind_of, record

LISTS = frozenset(("completions", "responses", "messages", "prompt_ids", "completion_ids"))
TEXTS = frozenset(("prompt", "question", "completion", "response", "answer", "chosen", "rejected"))
COLUMNS = TEXTS | LISTS
"""columns with a meaning, which columns.py defines"""
GIVEN = frozenset(("tools", "documents", "chat_template_kwargs", "completion_mask"))
"""optional columns that hold lists and objects"""
TERMINAL = "terminal"


def loads(text: str) -> Any:
    """Parse JSON. An object with a repeated key becomes an `Ambiguous`.

    NaN and infinities are accepted. columns.py rejects them in place of text. Other columns are written with null.
    """
    return json.loads(text, object_pairs_hook=of_pairs)


def of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object from (key, value) pairs; an `Ambiguous` if a key is repeated."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    twice = Ambiguous(found)
    twice.key = next(name for n, name in enumerate(names) if name in names[:n])
    return twice


def is_row(line: bytes) -> bool:
    """Return whether a line is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def json_lines(lines: Iterable[bytes], skipped: int = 0) -> Iterator[Record]:
    """Yield a Record per line that is not blank. `skipped` lines came before."""
    for number, line in enumerate(lines, start=skipped + 1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Record(where, None, f"not UTF-8 (byte {error.start + 1})")
        except json.JSONDecodeError as error:
            yield Record(where, None, f"not valid JSON ({error.msg}, column {error.colno})")
        except (ValueError, RecursionError) as error:
            yield Record(where, None, f"not valid JSON ({error})")
        else:
            yield record(where, row)


def document(name: str, data: bytes, skipped: int) -> Any:
    """Parse a JSON document. Raises EndoRewardError if it is not valid."""
    try:
        return loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1 + skipped
        raise EndoRewardError(f"{name} is not UTF-8 (line {line}): save it as UTF-8") from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, line {error.lineno + skipped} column {error.colno}"
        raise EndoRewardError(f"{name} is not valid JSON ({reason})") from None
    except (ValueError, RecursionError) as error:
        raise EndoRewardError(f"{name} is not valid JSON ({error})") from None


def rows_of_document(value: object, name: str) -> list[Any]:
    """Return the rows of a JSON document. Raises EndoRewardError if it has none, or is ambiguous."""
    if not (rows := _rows_of(value, name)):
        raise EndoRewardError(f"{name} has no rows: there is nothing to score")
    return rows


def is_mostly_lines(data: bytes) -> bool:
    """Return whether at least half of the lines are JSON objects: damaged JSON Lines, not a damaged document."""
    lines = [line for line in data.split(b"\n") if line.strip()]
    return 2 * sum(map(is_row, lines)) >= len(lines)


def _rows_of(value: object, name: str) -> list[Any]:
    """Return the rows of an array, of {"data": ...}, of an object of columns, or the one row that the object is."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise EndoRewardError(f"{name}: wanted an array or an object, found {kind_of(value)}")
    if not COLUMNS & value.keys() and isinstance(value.get("data"), (list, dict)):
        _refuse_ambiguous(value, name)
        others = [key for key, rows in value.items() if key != "data" and _are_rows(rows)]
        if others:
            raise EndoRewardError(f'{name} has rows under "data" and under "{others[0]}": keep one of them')
        return _rows_of(value["data"], name)
    if value and all(isinstance(column, dict) for column in value.values()):
        return _by_index(value, name)
    if not value or not all(isinstance(v, list) and not is_messages(v) for v in value.values()):
        return [value]
    _refuse_ambiguous(value, name)
    lengths = {key: len(v) for key, v in value.items()}
    if len(set(lengths.values())) > 1:
        raise EndoRewardError(f"{name}: its columns differ in length: {lengths}")
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def _by_index(columns: dict[str, dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return the rows of pandas' {column: {index: value}}. Values of the same index form a row, in any order."""
    for part in (columns, *columns.values()):
        _refuse_ambiguous(part, name)
    first, index = next(iter(columns.items()))
    for column, values in columns.items():
        if odd := values.keys() ^ index.keys():
            raise EndoRewardError(f"{name}: only one of its columns {first!r} and {column!r} has row {min(odd)!r}")
    return [{column: values[key] for column, values in columns.items()} for key in index]


def _refuse_ambiguous(value: dict[str, Any], name: str) -> None:
    if isinstance(value, Ambiguous):
        raise EndoRewardError(f"{name}: the key {value.key!r} occurs twice in one object: keep one")


def _are_rows(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(row, dict) and COLUMNS & row.keys() for row in value)
