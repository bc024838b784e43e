"""A row with the samples that are scored for it, and the scores that have arrived."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import isfinite
from typing import TYPE_CHECKING

from ..text.row_flags import NOTHING_TO_SCORE
from .columns import Task
from .records import Record
from .signal_columns import NEEDS

if TYPE_CHECKING:
    from ..scoring.results import RowScore


@dataclass
class Item:
    """One row with its samples and the scores that have arrived."""

    record: Record
    task: Task | None
    error: str | None = None
    """why the row as a whole has no score"""
    unusable: bool = False
    """whether `error` is about missing columns"""
    results: dict[int, RowScore] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.task is None or len(self.results) == len(self.task.samples)

    def problem(self, position: int, signal: str | None = None) -> str | None:
        """Return why the sample at `position` has no score (or `signal`), or None."""
        result, score = self.results[position], self._value(position, signal)
        if self.says_nothing(position):
            return None
        why = self._lacking(result, signal)
        if result.error is None and why is None and (score is None or not isfinite(score)):
            return f"the score is not finite ({score})"
        return result.error or why

    def has(self, signal: str) -> bool:
        """Return whether the row has the columns that `signal` needs, right or wrong."""
        return any(signal in {**(r.signals or {}), **(r.signal_errors or {})} for r in self.results.values())

    def signal_error(self, signal: str) -> str | None:
        """Return why a sample of the row does not have what `signal` needs, or None."""
        return next((why for r in self.results.values() if (why := self._lacking(r, signal))), None)

    def _lacking(self, result: RowScore, signal: str | None) -> str | None:
        """Return why one sample does not have what `signal` needs, or None."""
        if signal is None or result.error is not None or not self.has(signal):
            return None
        if signal not in {**(result.signals or {}), **(result.signal_errors or {})}:
            return f"only some completions of the row have {' and '.join(NEEDS.get(signal, ()))}: give all of them one"
        return (result.signal_errors or {}).get(signal)

    def says_nothing(self, position: int) -> bool:
        """Return whether the sample at `position` is empty and has no score. That is no error; it ranks last."""
        return self.results[position].error == NOTHING_TO_SCORE

    def score(self, position: int, signal: str | None = None) -> float | None:
        """Return the score (or `signal`) of the sample at `position`, or None."""
        return None if self.problem(position, signal) else self._value(position, signal)

    def _value(self, position: int, signal: str | None) -> float | None:
        result = self.results[position]
        return result.score if signal is None else (result.signals or {}).get(signal)

    @property
    def first_problem(self) -> str | None:
        """Why the row has no complete score, in one line, or None."""
        return self.trouble()

    def trouble(self, signal: str | None = None) -> str | None:
        """Return why the row has no complete score (or `signal`), or None."""
        if self.task is None:
            return self.error
        return next((problem for i in range(len(self.task.samples)) if (problem := self.problem(i, signal))), None)

    def again(self) -> Item:
        """Return the same row without scores, for another scorer."""
        return replace(self, results={})
