"""Print progress, notes and row errors on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

ERRORS_SHOWN = 20  # row errors to print; later ones are only counted


class Monitor:
    """Prints progress, notes and row errors on standard error, and a summary when its context ends.

    It draws a bar only if standard error is a terminal and results do not go there too. `quiet` prints errors only.
    `total` is the number of rows times the number of `passes` over them.
    """

    def __init__(
        self, total: int | None = None, *, passes: int = 1, quiet: bool = False, bar: bool = True, model: str = ""
    ) -> None:  # fmt: skip
        self.quiet = quiet
        self._by = f", model {model}" if model else ""
        self._of = None if total is None else total // passes
        self.rows = self.tokens = self.failed = self.missed = 0
        self._noted: set[str] = set()
        self._done = 0
        self._started = time.perf_counter()
        self._progress: Any = None
        if bar and not quiet and sys.stderr.isatty():
            self._progress = _progress_bar()
            self._bar = self._progress.add_task("scoring", total=total, rate="")

    def __enter__(self) -> Monitor:
        self._started = time.perf_counter()
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._progress:
            self._progress.stop()
        if not isinstance(value, BrokenPipeError):
            self._summary("stopped early: " if value else "")

    @property
    def seconds(self) -> float:
        """Seconds since the start of the context."""
        return time.perf_counter() - self._started

    @property
    def rate(self) -> float:
        """Tokens per second so far."""
        return self.tokens / max(self.seconds, 1e-9)

    def on_tokens(self, count: int) -> None:
        """Count `count` more tokens of the model."""
        self.tokens += count
        self._show()

    def advance(self, rows: int) -> None:
        """Move the bar by `rows` scored rows, which may still wait for an earlier row before they are written."""
        self._done += rows
        self._show()

    def on_row(self, where: str, error: str | None) -> None:
        """Count a written row and print its error, if any."""
        self.rows += 1
        if error:
            self.failed += 1
            self._say_error(f"{where}: {error}")

    def _say_error(self, text: str) -> None:
        if self.failed + self.missed <= ERRORS_SHOWN:
            self.say(text)

    def _show(self) -> None:
        if self._progress:
            self._progress.update(self._bar, completed=self._done, rate=f"{self.rate:,.0f} tokens/s")

    def note(self, text: str) -> None:
        """Print `text` unless quiet; only once if called again with the same text."""
        if not self.quiet and text not in self._noted:
            self._noted.add(text)
            self.say(text)

    def say(self, text: str) -> None:
        """Print `text` on standard error, above the bar."""
        line = f"endoreward: {one_line(text)}"
        if self._progress:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def _summary(self, prefix: str) -> None:
        """Print what was done, in what time, and, even if quiet, how many rows failed."""
        of = self._of if prefix and self._of is not None else self.rows
        self.note(
            f"{prefix}scored {self.rows - self.failed} of {of} rows, {self.tokens:,} tokens "
            f"in {self.seconds:.1f} s ({self.rate:,.0f} tokens/s){self._by}"
        )
        hidden = self.failed + self.missed - ERRORS_SHOWN
        more = f"; {hidden} not shown" if hidden > 0 else ""
        if self.missed:
            self.say(f"rows that another method could not score: {self.missed} (exit code 2){more}")
        if self.failed:
            self.say(f"{self.failed} of {self.rows} rows could not be scored (exit code 2){more}")


class Aside:
    """Reports another scorer's pass over the same rows to a Monitor, which counts its errors separately."""

    def __init__(self, monitor: Monitor, name: str) -> None:
        self._monitor, self._name = monitor, name
        self.on_tokens, self.advance = monitor.on_tokens, monitor.advance

    def on_row(self, where: str, error: str | None) -> None:
        """Count and print the row's error, if any."""
        if error:
            self._monitor.missed += 1
            self._monitor._say_error(f"{where}: {self._name}: {error}")


def say(text: str) -> None:
    """Write `text` to standard output. Characters that its encoding lacks are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


def say_now(text: str) -> None:
    """Write `text` to standard output at once, also into a file or a pipe that somebody watches."""
    say(text)
    sys.stdout.flush()


def one_line(text: str) -> str:
    """Return `text` without line breaks and control characters."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def _progress_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
