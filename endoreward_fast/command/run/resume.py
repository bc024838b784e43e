"""Going on with a run that was cut off: which rows its output holds already, and whether it was made the same way.

Beside an output OUT stands OUT.settings.json: what the numbers depend on, and a hash of it. A row is done when it has
its score; one with an error is tried again. It is known again by a hash of its own columns, or of the one that --id
names; equal rows are counted, so that each is scored as often as it stands in the input. When all is done, what was
made up for is moved to where the input has it.
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

from ...errors import EndoRewardError
from ..flags.options import SOURCE, EngineFlags
from ..input.files import STDIN, Record, Source
from .sink import PART, plain

ADDED = frozenset({"score", "scores", "ranking", "best", "flags", "error", "token_rewards"})
"""columns that a command adds behind the row's own"""
FIRST = {"score": "score", "rank": "scores"}
"""the first of them, which every row gets"""
EXCERPT = 80
"""characters of a setting that is too long to be said"""
IRRELEVANT = frozenset({"model", *SOURCE, "limit", "max_tokens_per_batch", "device"})
"""where a model is, as a hash of its weights is there; and flags that change a score only by the rounding of matmuls in
another batch: by 2e-5 in float32, by up to 0.5 in bfloat16 (`EndoRewardModel.score`). Resuming does that anyway, as it
batches the rows that are left anew; and a run that ran out of memory has to go on with smaller batches"""


def settings_of(command: str, version: str, flags: Mapping[str, Any], per_token: bool, weights: str) -> dict[str, Any]:
    """What a run was made with. `weights`: what its model's name stood for."""
    return {"command": command, "version": version, "per_token": per_token, **flags, "weights": weights}


def day_of(output: str | None, *, resume: bool) -> str | None:
    """The day on which a run's chat template writes its rows: today, or the one that a resumed run began on.

    None without a file to keep it in.
    """
    if output is None or output == STDIN:
        return None
    if resume:
        # What is wrong is said where all of it is read.
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            found = json.loads(_beside(output).read_text(encoding="utf-8"))["settings"]["date"]
            if isinstance(found, str):
                return found
    return date.today().isoformat()


@contextmanager
def recorded(output: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Write OUT.settings.json once what is inside is done: emptying `output`, which is not begun if they cannot be.

    New settings beside the rows of an earlier run would have --resume take those for this one's.
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
        with suppress(OSError):  # it is there no more, or never was
            part.unlink()


@dataclass(frozen=True)
class Done:
    """What an output holds of an earlier run."""

    rows: Counter[str] = field(default_factory=Counter)
    """how often each row that has its score stands there, by its key"""
    failed: int = 0
    """rows that have none: they are tried again"""

    @property
    def described(self) -> str:
        """In words."""
        again = f", and {self.failed:,} without a score, which are tried again" if self.failed else ""
        return f"{self.rows.total():,} rows of an earlier run{again}"


def holds_rows(output: str, settings: Mapping[str, Any]) -> bool:
    """Whether there is anything in `output`. EndoRewardError if it was made with other settings, weights apart."""
    if not Path(output).exists() or not Path(output).stat().st_size:
        return False  # settings come with the first row
    before = _settings_beside(output)
    for name in sorted({*before, *settings} - IRRELEVANT - {"weights"}):
        if before.get(name) != settings.get(name):
            was, now = _apart(repr(before.get(name)), repr(settings.get(name)))
            raise EndoRewardError(f"--resume: {output} was made with {name}={was}, not {now}: scores would not compare")
    return True


def _apart(was: str, now: str) -> tuple[str, str]:
    """Two texts; of long ones (a file of tools) what stands about the place where they part."""
    parts = next((n for n, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
    start = max(0, parts - EXCERPT // 2)
    cut = (text if len(text) <= 2 * EXCERPT else f"... {text[start : start + EXCERPT]} ..." for text in (was, now))
    return next(cut), next(cut)


def rows_done(output: str, settings: Mapping[str, Any], column: str | None = None) -> Done:
    """What stands in `output`; nothing if that is not there yet, or empty. A torn last line is cut off.

    Raises EndoRewardError: an output without its settings or with others, a line that is no row.
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
                    file.truncate(end)  # it was being written when the run ended
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
    """The lines of `output` that have their scores."""
    return (line for line, _, added in _results(output, command) if "error" not in added)


def _results(output: str, command: str) -> Iterator[tuple[bytes, dict[str, Any], frozenset[str]]]:
    """(line, row of the input, columns added to it) of a whole output."""
    with open(output, "rb") as file:
        for number, line in enumerate(file, 1):
            yield line, *_row_of_result(line, command, f"{output}, line {number}")


def in_order(output: str, command: str, order: list[str], column: str | None = None) -> Iterator[bytes] | None:
    """The lines of `output` in the order of the input, whose rows' keys are `order`; None if they are in it already.

    What --resume makes up for stands behind what was there. A line of no row of this input keeps to the one before it.
    """
    places: dict[str, deque[int]] = defaultdict(deque)
    for number, key in enumerate(order):
        places[key].append(number)
    lines: list[tuple[int, int]] = []
    """place in the input, and where the line begins"""
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
    """The rows of `source` that are not done. One without what --id names is an error: it could not be known again.

    `order` gets the key of every row that is read, if some are done.
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
        yield found if known else replace(found, error=f"it has no {column!r}, the column that --id names")


def _remaining(records: Iterator[Record], done: Counter[str], column: str | None, order: list[str]) -> Iterator[Record]:
    for found in records:
        key = key_of(found.row or {}, column)
        order.append(key)
        if done[key]:
            done[key] -= 1
        else:
            yield found


def key_of(row: Mapping[str, Any], column: str | None = None) -> str:
    """A hash of a row of the input, or of one column: the same for it and for what of it is kept in the output."""
    # A column whose name is taken there is kept as input_..., which these names do without.
    own = ((_own_name(name), row[name]) for name in row if column is None or _own_name(name) == _own_name(column))
    return _hash(sorted(json.dumps([name, plain(value)], sort_keys=True) for name, value in own))


def _own_name(name: str) -> str:
    own = name
    while own.startswith("input_"):
        own = own.removeprefix("input_")
    return own if own in ADDED else name


def _row_of_result(line: bytes, command: str, where: str) -> tuple[dict[str, Any], frozenset[str]]:
    """What is kept of the row that this line of the output was made of, and which columns were added to it."""
    first = FIRST[command]
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or first not in row:
        raise EndoRewardError(f"--resume: {where} is not a row of results")
    names = list(row)
    added = ADDED.intersection(names[names.index(first) :])
    return {name: value for name, value in row.items() if name not in added}, added


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def beside(output: str | None) -> tuple[str, ...]:
    """The files that are written beside an output."""
    if output is None or output == STDIN:
        return ()
    return str(_beside(output)), f"{_beside(output)}{PART}"


def _beside(output: str) -> Path:
    # Beside the file itself: a link to it may come to name another.
    return Path(f"{os.path.realpath(output)}.settings.json")


def _settings_beside(output: str) -> dict[str, Any]:
    try:
        return dict(json.loads(_beside(output).read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise EndoRewardError(
            f"--resume: {output} is there, but {_beside(output).name} does not say how it was made"
        ) from None


def _refuse_other_weights(output: str, settings: Mapping[str, Any]) -> None:
    before = _settings_beside(output)
    if before.get("weights") != settings["weights"]:
        was, now = (f"{s.get('model')!r} ({s.get('weights')})" for s in (before, settings))
        raise EndoRewardError(f"--resume: {output} was made with the model {was}, not {now}: scores would not compare")
