"""Continue an interrupted run: find the rows that its output already holds, and check that its settings were the same.

Each output OUT has a file OUT.settings.json with the settings that the numbers depend on, and their hash. A row is done
if it has a score; rows with an error are scored again. Rows are recognised by a hash of their own columns, or of the
column that --id names. Equal rows are counted, so that each is scored as often as the input has it. At the end, rows
that were added later are moved to their place in the input's order.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...data.files import STDIN, Record, Source
from ...errors import EndoRewardError
from ..flags.engine_flags import EngineFlags
from ..flags.options import SOURCE
from .sink import PART, plain

ADDED = frozenset({"score", "scores", "ranking", "best", "flags", "error", "signals", "signal_errors", "token_rewards"})
"""columns that a command adds after the row's own columns"""
FIRST = {"score": "score", "rank": "scores"}
"""the first added column, which every row gets"""
EXCERPT = 80
"""characters that a message quotes of a long setting"""
IRRELEVANT = frozenset({"model", *SOURCE, "limit", "max_tokens_per_batch", "device"})
"""settings that may differ. Of the model, only the hash of its weights counts. The other flags change a score only by
the rounding of matmuls in another batch: by 2e-5 in float32, by up to 0.5 in bfloat16 (`EndoRewardModel.score`).
Resuming regroups the remaining rows into batches anyway, and a run that ran out of memory needs smaller batches"""


OF_MODEL = frozenset({"weights", "served_dtype"})
"""settings that are known when the model is: see `engines.model_of`"""


def settings_of(command: str, version: str, flags: Mapping[str, Any], per_token: bool, weights: str) -> dict[str, Any]:
    """Return the settings of a run. `weights` is the hash of its model's weights."""
    return {"command": command, "version": version, "per_token": per_token, **flags, "weights": weights}


def day_of(output: str | None, *, resume: bool) -> str | None:
    """Return the date for the chat template: today, or the day on which a resumed run began.

    Returns None without an output file, because no settings are kept then.
    """
    if output is None or output == STDIN:
        return None
    if resume:
        # `_settings_beside` reports errors in this file.
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            found = json.loads(_beside(output).read_text(encoding="utf-8"))["settings"]["date"]
            if isinstance(found, str):
                return found
    return date.today().isoformat()


@contextmanager
def recorded(output: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Write OUT.settings.json after the block, which empties `output`.

    The block does not run if the settings cannot be written. The order matters: with new settings and the rows of an
    earlier run, --resume would take those rows for this run's.
    """
    final = _beside(output)
    part = final.with_name(f"{final.name}{PART}")
    relevant = {name: value for name, value in settings.items() if name not in IRRELEVANT}
    text = json.dumps({"hash": _hash(relevant), "settings": settings}, indent=1) + "\n"
    try:
        try:
            if final.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            part.write_text(text, encoding="utf-8")
        except OSError as error:
            raise EndoRewardError(f"cannot write {final}: {error.strerror}") from None
        yield
        os.replace(part, final)
    finally:
        with suppress(OSError):  # it was renamed or never created
            part.unlink()


@dataclass(frozen=True)
class Done:
    """The rows of an earlier run in an output."""

    rows: Counter[str] = field(default_factory=Counter)
    """number of rows with a score, by row key"""
    failed: int = 0
    """number of rows without a score, which are scored again"""

    @property
    def described(self) -> str:
        """Return both numbers in words."""
        again = f", and {self.failed:,} without a score, which are scored again" if self.failed else ""
        return f"{self.rows.total():,} rows of an earlier run{again}"


def holds_rows(output: str, settings: Mapping[str, Any]) -> bool:
    """Return whether `output` has rows. Raises EndoRewardError if its settings differ, except for the weights."""
    if not Path(output).exists() or not Path(output).stat().st_size:
        return False  # settings are written with the first row
    before = _settings_beside(output)
    for name in sorted({*before, *settings} - IRRELEVANT - OF_MODEL):
        if before.get(name) != settings.get(name):
            was, now = _excerpts(repr(before.get(name)), repr(settings.get(name)))
            raise EndoRewardError(
                f"--resume: {output} was made with {name}={was}, not {now}: use that value, or name another --output"
            )
    return True


def _excerpts(was: str, now: str) -> tuple[str, str]:
    """Return both texts. Long ones (a file of tools) are cut around the first difference."""
    parts = next((n for n, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
    start = max(0, parts - EXCERPT // 2)
    cut = (text if len(text) <= 2 * EXCERPT else f"... {text[start : start + EXCERPT]} ..." for text in (was, now))
    return next(cut), next(cut)


def rows_done(output: str, settings: Mapping[str, Any], column: str | None = None) -> Done:
    """Return the rows that `output` holds; none if it does not exist or is empty. Cuts off an incomplete last line.

    Raises EndoRewardError if its settings are missing or differ, or if a line is not a row of results.
    """
    if not holds_rows(output, settings):
        return Done()
    _refuse_other_weights(output, settings)
    done: Counter[str] = Counter()
    failed = 0
    try:
        with open(output, "rb+") as file:
            end = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    file.truncate(end)  # the run ended while it wrote this line
                    break
                end += len(line)
                row, added = _row_of_result(line, settings["command"], f"{output}, line {number}")
                if "error" in added:
                    failed += 1
                else:
                    done[key_of(row, column)] += 1
    except OSError as error:
        raise EndoRewardError(f"cannot read {output}: {error.strerror}") from None
    return Done(done, failed)


def lines_done(output: str, command: str) -> Iterator[bytes]:
    """Yield the lines of `output` that have a score."""
    return (line for line, _, added in _results(output, command) if "error" not in added)


def _results(output: str, command: str) -> Iterator[tuple[bytes, dict[str, Any], frozenset[str]]]:
    """Yield (line, row of the input, columns added to it) of a complete output."""
    with open(output, "rb") as file:
        for number, line in enumerate(file, 1):
            yield line, *_row_of_result(line, command, f"{output}, line {number}")


def in_order(output: str, command: str, order: list[str], column: str | None = None) -> Iterator[bytes] | None:
    """Return the lines of `output` in the order of the input, or None if they are in that order already.

    `order` has the key of each row of the input. --resume adds rows at the end. A line whose row is not in this input
    stays after the line before it.
    """
    places: dict[str, deque[int]] = defaultdict(deque)
    for number, key in enumerate(order):
        places[key].append(number)
    lines: list[tuple[int, int]] = []
    """(position in the input, offset of the line in bytes)"""
    place, start = -1, 0
    for line, row, _ in _results(output, command):
        if known := places[key_of(row, column)]:
            place = known.popleft()
        lines.append((place, start))
        start += len(line)
    if all(a <= b for (a, _), (b, _) in pairwise(lines)):
        return None
    return _lines_at(output, [start for _, start in sorted(lines)])


def _lines_at(output: str, starts: list[int]) -> Iterator[bytes]:
    with open(output, "rb") as file:
        for start in starts:
            file.seek(start)
            yield file.readline()


def rows_left(source: Source, flags: EngineFlags, done: Counter[str], order: list[str]) -> Source:
    """Return the rows of `source` that are not done. Rows without the column that --id names get an error.

    If some rows are done, `order` receives the key of every row read.
    """
    if flags.id is not None:
        source = replace(source, records=_identified(source.records, flags.id))
    if not done:
        return source
    left = None if source.total is None else max(0, source.total - done.total())
    return Source(source.name, _remaining(source.records, Counter(done), flags.id, order), left)


def _identified(records: Iterator[Record], column: str) -> Iterator[Record]:
    for found in records:
        known = found.row is None or found.row.get(column) is not None
        yield found if known else replace(found, error=f"no value in {column!r}, the column that --id names")


def _remaining(records: Iterator[Record], done: Counter[str], column: str | None, order: list[str]) -> Iterator[Record]:
    for found in records:
        key = key_of(found.row or {}, column)
        order.append(key)
        if done[key]:
            done[key] -= 1
        else:
            yield found


def key_of(row: Mapping[str, Any], column: str | None = None) -> str:
    """Return a hash of a row, or of one of its columns. A row has the same hash in the input and in the output."""
    # The output keeps a column as input_... if its name is taken, so that prefix is removed.
    own = ((_own_name(name), row[name]) for name in row if column is None or _own_name(name) == _own_name(column))
    return _hash(sorted(json.dumps([name, plain(value)], sort_keys=True) for name, value in own))


def _own_name(name: str) -> str:
    own = name
    while own.startswith("input_"):
        own = own.removeprefix("input_")
    return own if own in ADDED else name


def _row_of_result(line: bytes, command: str, where: str) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the input row that a line of the output keeps, and the names of the columns added to it."""
    first = FIRST[command]
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or first not in row:
        raise EndoRewardError(f"--resume: {where} is not a row of results: remove that line, or name another --output")
    names = list(row)
    added = ADDED.intersection(names[names.index(first) :])
    return {name: value for name, value in row.items() if name not in added}, added


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def beside(output: str | None) -> tuple[str, ...]:
    """Return the paths of the files that are written next to an output."""
    if output is None or output == STDIN:
        return ()
    return str(_beside(output)), f"{_beside(output)}{PART}"


def _beside(output: str) -> Path:
    # Next to the file itself, because a symbolic link to it may change.
    return Path(f"{os.path.realpath(output)}.settings.json")


def _settings_beside(output: str) -> dict[str, Any]:
    try:
        return dict(json.loads(_beside(output).read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise EndoRewardError(
            f"--resume: {_beside(output).name} is missing or damaged, so the settings of {output} are unknown: "
            "name another --output"
        ) from None


def _refuse_other_weights(output: str, settings: Mapping[str, Any]) -> None:
    before = _settings_beside(output)
    dtypes = {s["served_dtype"] for s in (before, settings) if "served_dtype" in s}
    if before.get("weights") != settings["weights"] or len(dtypes) > 1:
        named = ("weights", "served_dtype") if len(dtypes) > 1 else ("weights",)
        was, now = (f"{s.get('model')!r} ({', '.join(str(s.get(name)) for name in named)})" for s in (before, settings))
        raise EndoRewardError(
            f"--resume: {output} was made with the model {was}, not {now}: name that model, or another --output"
        )
