"""Going on with a run that was cut off: which rows its output holds already, and whether it was made the same way.

Beside an output OUT stands OUT.settings.json: what the numbers depend on, and a hash of it. A row is known again by a
hash of its own columns; equal rows are counted, so that each is scored as often as it stands in the input.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import EndoRewardError
from .data import Record, Source
from .output import plain

ADDED = frozenset({"score", "scores", "ranking", "best", "flags", "error", "token_rewards"})
"""columns that a command adds behind the row's own"""
FIRST = {"score": "score", "rank": "scores"}
"""the first of them, which every row gets"""
IRRELEVANT = frozenset({"limit", "max_tokens_per_batch", "device"})
"""flags that change no score beyond float noise"""


def settings_of(command: str, version: str, flags: Mapping[str, Any], per_token: bool) -> dict[str, Any]:
    """What the numbers of a run depend on."""
    kept = {name: value for name, value in flags.items() if name not in IRRELEVANT}
    return {"command": command, "version": version, "per_token": per_token} | kept


def record(output: str, settings: Mapping[str, Any]) -> None:
    """Write OUT.settings.json."""
    text = json.dumps({"hash": _hash(settings), "settings": settings}, indent=1) + "\n"
    try:
        _beside(output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise EndoRewardError(f"cannot write {_beside(output)}: {error.strerror}") from None


def rows_done(output: str, settings: Mapping[str, Any]) -> Counter[str]:
    """How often each row stands in `output`; none if that is not there yet, or empty. A torn last line is cut off.

    Raises EndoRewardError: an output without its settings or with others, a line that is no row.
    """
    if not Path(output).exists() or not Path(output).stat().st_size:
        return Counter()  # settings come with the first row
    _refuse_other(output, settings)
    done: Counter[str] = Counter()
    try:
        with open(output, "rb+") as file:
            end = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    file.truncate(end)  # it was being written when the run ended
                    break
                end += len(line)
                done[_key_of_result(line, FIRST[settings["command"]], f"{output}, line {number}")] += 1
    except OSError as error:
        raise EndoRewardError(f"cannot read {output}: {error.strerror}") from None
    return done


def without_done(source: Source, done: Counter[str]) -> Source:
    """`source` without the rows that are done already."""
    left = None if source.total is None else max(0, source.total - done.total())
    return Source(source.name, _remaining(source.records, Counter(done)), left)


def _remaining(records: Iterator[Record], done: Counter[str]) -> Iterator[Record]:
    for found in records:
        key = key_of(found.row or {})
        if done[key]:
            done[key] -= 1
        else:
            yield found


def key_of(row: Mapping[str, Any]) -> str:
    """A hash of a row of the input: the same for it and for what of it is kept in the output."""
    # A column whose name is taken there is kept as input_..., which these names do without.
    return _hash(sorted(json.dumps([_own_name(name), plain(row[name])], sort_keys=True) for name in row))


def _own_name(name: str) -> str:
    own = name
    while own.startswith("input_"):
        own = own.removeprefix("input_")
    return own if own in ADDED else name


def _key_of_result(line: bytes, first: str, where: str) -> str:
    """`key_of` the row that this line of the output was made of; `first` is the first column that was added to it."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or first not in row:
        raise EndoRewardError(f"--resume: {where} is not a row of results")
    names = list(row)
    added = ADDED.intersection(names[names.index(first) :])
    return key_of({name: value for name, value in row.items() if name not in added})


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _beside(output: str) -> Path:
    # Beside the file itself: a link to it may come to name another.
    return Path(f"{os.path.realpath(output)}.settings.json")


def _refuse_other(output: str, settings: Mapping[str, Any]) -> None:
    try:
        before = dict(json.loads(_beside(output).read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise EndoRewardError(
            f"--resume: {output} is there, but {_beside(output).name} does not say how it was made"
        ) from None
    for name in sorted({*before, *settings}):
        if before.get(name) != settings.get(name):
            was, now = before.get(name), settings.get(name)
            raise EndoRewardError(
                f"--resume: {output} was made with {name}={was!r}, not {now!r}: scores would not compare"
            )
