"""Score or rank a window of rows, in any place: in this process, in another rank, in a Ray actor, or by a server."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ...data.answers import ranked_row, scored_row
from ...data.items import Item
from ...errors import EndoRewardError
from ..flags.engine_flags import EngineFlags
from . import pipeline
from .monitor import Monitor
from .pipeline import Encoder, Scorer
from .sink import to_line

if TYPE_CHECKING:
    from ...remote.client import RemoteModel

ANSWERS: dict[str, Callable[..., dict[str, Any]]] = {"score": scored_row, "rank": ranked_row}
RETRIES = 3
"""how often a request is sent again to a server that does not answer"""
Write = Callable[[str], None]
"""writes one line of results"""
Engine = Callable[[Iterator[list[Item]], Write, Monitor], None]
"""(windows, write, monitor): scores every row of the windows and writes them in order"""


@dataclass
class Finished:
    """The finished rows of a window, as they travel to the process that writes them."""

    number: int
    """number of the window in the input, from 0"""
    rows: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(line to write, place of the row in the input, error or None)"""
    tokens: int = 0
    stopped: str | None = None
    """the error that stopped the window, if one did"""
    notes: list[str] = field(default_factory=list)
    """warnings"""

    def to_json(self) -> str:
        """Return the window as JSON text."""
        return json.dumps([self.number, self.rows, self.tokens, self.stopped, self.notes])

    @classmethod
    def from_json(cls, text: str | bytes) -> Finished:
        """Read the text of `to_json`."""
        number, rows, tokens, stopped, notes = json.loads(text)
        return cls(number, [(line, where, problem) for line, where, problem in rows], tokens, stopped, notes)

    def hand_on(self, write: Write, monitor: Monitor) -> None:
        """Write the rows. Raises EndoRewardError if the window was stopped."""
        for note in self.notes:
            monitor.note(note)
        for line, where, problem in self.rows:
            write(line)
            monitor.on_row(where, problem)
        monitor.advance(len(self.rows))
        monitor.on_tokens(self.tokens)
        if self.stopped:
            raise EndoRewardError(self.stopped)

    # While the window is scored, this object takes the place of a Monitor:
    def on_tokens(self, count: int) -> None:
        """Count `count` more tokens of the model."""
        self.tokens += count

    def advance(self, rows: int) -> None:
        """Do nothing: there is no bar to move."""

    def on_row(self, where: str, error: str | None) -> None:
        """Complete the row of the last line."""
        line, *_ = self.rows[-1]
        self.rows[-1] = (line, where, error)


@dataclass(frozen=True)
class Job:
    """The command, its flags and how to score with them. Plain data, because it travels to other processes."""

    command: str
    """a key of ANSWERS"""
    flags: EngineFlags
    per_token: bool = False

    def load(self) -> Encoder:
        """Load the model. Call this after the cheap checks."""
        return pipeline.load_scorer(self.flags)

    @property
    def options(self) -> dict[str, Any]:
        """The options of scoring."""
        return {**self.flags.scoring(), "per_token": self.per_token}

    def score(
        self, items: list[Item], scorer: Scorer, write: Write, monitor: Monitor | Finished,
        samples: list[Any] | None = None,
    ) -> None:  # fmt: skip
        """Score one window. Each row is written as soon as all rows before it are done."""
        answer = ANSWERS[self.command]
        pipeline.score_items(
            items, scorer, self.options, lambda item: write(to_line(answer(item, per_token=self.per_token))), monitor,
            strict=self.flags.strict, samples=samples,
        )  # fmt: skip

    def finish(self, number: int, items: list[Item], scorer: Scorer) -> Finished:
        """Score window `number` and return its rows. An EndoRewardError is kept in the result, not raised."""
        found = Finished(number)
        try:
            with warnings_to(found.notes.append):
                self.score(items, scorer, lambda line: found.rows.append((line, "", None)), found)
        except EndoRewardError as error:
            found.stopped = str(error)
        return found


class InOrder:
    """Takes finished windows in any order and writes them in the order of the input."""

    def __init__(self, write: Write, monitor: Monitor) -> None:
        self._write, self._monitor = write, monitor
        self._waiting: dict[int, Finished] = {}
        self.due = 0
        """the number of the next window to write"""

    def add(self, finished: Finished) -> None:
        """Write the window once all before it are written.

        Raises EndoRewardError if a window was stopped or cannot be written. Then the waiting windows are dropped.
        """
        self._waiting[finished.number] = finished
        try:
            while self.due in self._waiting:
                self.due += 1
                self._waiting.pop(self.due - 1).hand_on(self._write, self._monitor)
        except EndoRewardError:
            self._waiting.clear()
            raise

    def keep(self) -> None:
        """Write the waiting windows in spite of gaps. Call this when no more come; --resume fills the gaps."""
        for number in sorted(self._waiting):
            finished = self._waiting.pop(number)
            replace(finished, stopped=None).hand_on(self._write, self._monitor)


@contextmanager
def warnings_to(tell: Callable[[str], None]) -> Iterator[None]:
    """Pass the block's Python warnings to `tell` when it ends."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            yield
        finally:
            for warning in caught:
                tell(str(warning.message))


def ask_server(flags: EngineFlags) -> RemoteModel:
    """Return the model at --url. A run can be continued, so it does not wait long for a server that has gone away."""
    from ...remote.client import RemoteModel

    return RemoteModel(flags.url or "", retries=RETRIES)


def nothing_left(windows: Iterator[list[Item]], write: Write, monitor: Monitor) -> None:
    """Do nothing: the Engine for a run whose rows are all done. It needs no model."""


def here(job: Job, *, ahead: bool, scorer: Encoder | None = None) -> Engine:
    """Return the Engine that scores in this process. `scorer`: default: load it. `ahead`: see `pipeline.encoded`."""
    scorer = job.load() if scorer is None else scorer

    def run(windows: Iterator[list[Item]], write: Write, monitor: Monitor) -> None:
        for items, samples in pipeline.encoded(windows, scorer, job.options, ahead=ahead):
            with warnings_to(monitor.note):
                job.score(items, scorer, write, monitor, samples)

    return run


class Windows:
    """Iterates over windows. If reading raises an EndoRewardError, iteration ends and `error` keeps it."""

    def __init__(self, windows: Iterator[list[Item]]) -> None:
        self._windows = windows
        self.count = 0
        """windows read so far"""
        self.error: EndoRewardError | None = None

    def __iter__(self) -> Iterator[list[Item]]:
        try:
            for items in self._windows:
                self.count += 1
                yield items
        except EndoRewardError as error:
            self.error = error

    def raise_error(self) -> None:
        """Raise the error of reading, if there was one. Call this when the windows before it are written."""
        if self.error is not None:
            raise self.error


def note_idle(monitor: Monitor, windows: int, workers: int, name: str) -> None:
    """Print a note if there were fewer windows than `workers`."""
    if windows < workers:
        monitor.note(
            f"only {windows} of {workers} {name} had rows. Each takes about {pipeline.WINDOW} characters per token of "
            "a batch at a time: to use more of them, lower --max-tokens-per-batch"
        )
