"""What `score` and `rank` do with a window of rows, wherever that happens: here, in another rank, in an actor."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import EndoRewardError
from ..flags.options import EngineFlags
from . import pipeline
from .monitor import Monitor
from .pipeline import Item, Scorer
from .sink import to_line

ANSWERS: dict[str, Callable[..., dict[str, Any]]] = {"score": pipeline.scored_row, "rank": pipeline.ranked_row}
Write = Callable[[str], None]
"""takes one line of results"""
Engine = Callable[[Iterator[list[Item]], Write, Monitor], None]
"""(windows, write, monitor): every row of the windows scored, and written in their order"""


@dataclass
class Finished:
    """A window's rows as they are written, on their way to who writes them."""

    number: int
    """of the window in the input, from 0"""
    rows: list[tuple[str, str, str | None]] = field(default_factory=list)
    """line, where the row stood, what is wrong with it"""
    tokens: int = 0
    stopped: str | None = None
    """why there are no more"""
    notes: list[str] = field(default_factory=list)
    """warnings"""

    def to_json(self) -> str:
        """One text."""
        return json.dumps([self.number, self.rows, self.tokens, self.stopped, self.notes])

    @classmethod
    def from_json(cls, text: str | bytes) -> Finished:
        """And back."""
        number, rows, tokens, stopped, notes = json.loads(text)
        return cls(number, [(line, where, problem) for line, where, problem in rows], tokens, stopped, notes)

    def hand_on(self, write: Write, monitor: Monitor) -> None:
        """Write the rows. Raises EndoRewardError where it was stopped."""
        for note in self.notes:
            monitor.note(note)
        for line, where, problem in self.rows:
            write(line)
            monitor.on_row(where, problem)
        monitor.advance(len(self.rows))
        monitor.on_tokens(self.tokens)
        if self.stopped:
            raise EndoRewardError(self.stopped)

    # As a Monitor, while the window is scored:
    def on_tokens(self, count: int) -> None:
        """`count` more tokens went through the model."""
        self.tokens += count

    def advance(self, rows: int) -> None:
        """Nothing to draw here."""

    def on_row(self, where: str, error: str | None) -> None:
        """The row of the last line is done."""
        line, *_ = self.rows[-1]
        self.rows[-1] = (line, where, error)


@dataclass(frozen=True)
class Job:
    """What is done with every row. Plain data: it travels to other processes."""

    command: str
    """of ANSWERS"""
    flags: EngineFlags
    per_token: bool = False

    def load(self) -> Scorer:
        """The model. Call it after the cheap checks."""
        return pipeline.load_scorer(self.flags)

    def score(self, items: list[Item], scorer: Scorer, write: Write, monitor: Monitor | Finished) -> None:
        """One window, each row written as soon as all before it are done."""
        answer, options = ANSWERS[self.command], {**self.flags.scoring(), "per_token": self.per_token}
        pipeline.score_items(
            items, scorer, options, lambda item: write(to_line(answer(item, per_token=self.per_token))), monitor,
            strict=self.flags.strict,
        )  # fmt: skip

    def finish(self, number: int, items: list[Item], scorer: Scorer) -> Finished:
        """Window `number`, kept for who writes it; an EndoRewardError is part of it."""
        found = Finished(number)
        try:
            with warnings_to(found.notes.append):
                self.score(items, scorer, lambda line: found.rows.append((line, "", None)), found)
        except EndoRewardError as error:
            found.stopped = str(error)
        return found


class InOrder:
    """Finished windows, in whatever order they come, on their way into the output in the order of the input."""

    def __init__(self, write: Write, monitor: Monitor) -> None:
        self._write, self._monitor = write, monitor
        self._waiting: dict[int, Finished] = {}
        self.due = 0
        """the number of the next to be written"""

    def add(self, finished: Finished) -> None:
        """Write it once all before it are. Raises EndoRewardError: it was stopped, or cannot be written; no more is."""
        self._waiting[finished.number] = finished
        try:
            while self.due in self._waiting:
                self.due += 1
                self._waiting.pop(self.due - 1).hand_on(self._write, self._monitor)
        except EndoRewardError:
            self._waiting.clear()
            raise

    def keep(self) -> None:
        """Write what waits, past what is missing: nothing more comes, and --resume fills holes."""
        for number in sorted(self._waiting):
            finished = self._waiting.pop(number)
            replace(finished, stopped=None).hand_on(self._write, self._monitor)


@contextmanager
def warnings_to(tell: Callable[[str], None]) -> Iterator[None]:
    """Python's warnings inside go to `tell`, at the end."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            yield
        finally:
            for warning in caught:
                tell(str(warning.message))


def nothing_left(windows: Iterator[list[Item]], write: Write, monitor: Monitor) -> None:
    """The Engine that needs no model: all is done already."""


def here(job: Job) -> Engine:
    """In this process."""
    scorer = job.load()

    def run(windows: Iterator[list[Item]], write: Write, monitor: Monitor) -> None:
        for items in windows:
            with warnings_to(monitor.note):
                job.score(items, scorer, write, monitor)

    return run


class Windows:
    """Iterates over windows up to the EndoRewardError that reading them may end with, which is kept as `error`."""

    def __init__(self, windows: Iterator[list[Item]]) -> None:
        self._windows = windows
        self.count = 0
        """read so far"""
        self.error: EndoRewardError | None = None

    def __iter__(self) -> Iterator[list[Item]]:
        try:
            for items in self._windows:
                self.count += 1
                yield items
        except EndoRewardError as error:
            self.error = error

    def raise_error(self) -> None:
        """Once what came before it is written."""
        if self.error is not None:
            raise self.error


def note_idle(monitor: Monitor, windows: int, workers: int, name: str) -> None:
    """Say so if there were fewer windows than `workers`."""
    if windows < workers:
        monitor.note(
            f"only {windows} of {workers} {name} had rows: each takes about {pipeline.WINDOW} characters for every "
            "token of a batch at a time; with a smaller --max-tokens-per-batch more of them share"
        )
