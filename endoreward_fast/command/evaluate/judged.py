"""Accuracies over rows of preferences: the row with its scores, the interval, and the accuracy at similar length.

The accuracy at similar length is over those comparisons of which the longer completion has at most 10% more scored
tokens than the shorter one. A model that prefers short (or long) completions gains nothing there. A row counts the
share of such comparisons that it wins; rows without any are left out. Chance is 50%.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

Cells = Collection[tuple[int, int]]
"""comparisons of a row: (index of the chosen completion, index of the rejected one)"""


@dataclass(frozen=True)
class Judged:
    """One preference row with the scores of its completions."""

    file: str
    subset: str | None
    domain: str | None
    """RM-Bench domain, from the row's column, the start of its id, or the start of the file name, in that order"""
    id: Any
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """scored tokens of the chosen and of the rejected completions, if they are known; 0: unknown"""
    benchmark: str | None = None
    """the benchmark that the row's columns belong to (data/benchmarks.py), or None"""
    place: int = 0
    """position of the chosen completion in the benchmark's own order of completions"""
    row: Any = None
    """the row of the file, if it has several prompts, each of which is a Judged (RMGAP)"""
    group: int | None = None
    """position of the prompt group within that row"""
    group_name: Any = None
    """what the row calls that group"""

    @property
    def wins(self) -> list[list[bool]]:
        """wins[i][j]: chosen i scores strictly above rejected j."""
        return [[c > r for r in self.rejected] for c in self.chosen]

    @property
    def ties(self) -> int:
        """Number of equal scores among the comparisons. They count as lost."""
        return sum(c == r for c in self.chosen for r in self.rejected)

    @property
    def comparisons(self) -> int:
        """Number of comparisons: chosen times rejected completions."""
        return len(self.chosen) * len(self.rejected)

    @property
    def styled(self) -> bool:
        """Whether this row has RM-Bench's shape."""
        return len(self.chosen) == len(self.rejected) == 3

    @property
    def on_top(self) -> float:
        """1.0 if every chosen completion is strictly above every rejected one, else 0.0."""
        return float(min(self.chosen) > max(self.rejected))

    @property
    def chance_on_top(self) -> float:
        """Probability of `on_top` for scores in random order: k! m! / (k + m)! for k chosen and m rejected."""
        return 1 / math.comb(len(self.chosen) + len(self.rejected), len(self.chosen))

    @property
    def accuracy(self) -> float:
        """Share of comparisons won."""
        return sum(map(sum, self.wins)) / self.comparisons

    @property
    def similar(self) -> Cells:
        """The comparisons at similar length."""
        if self.lengths is None:
            return ()
        return [
            (i, j)
            for i, a in enumerate(self.lengths[0])
            for j, b in enumerate(self.lengths[1])
            if a and b and 10 * max(a, b) <= 11 * min(a, b)
        ]


@dataclass(frozen=True)
class Accuracy:
    """An accuracy and its 95% interval."""

    value: float
    low: float
    high: float
    rows: int
    similar: Similar | None = None
    """the same at similar length; None if lengths are unknown"""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        found: dict[str, Any] = {"accuracy": self.value, "low": self.low, "high": self.high, "rows": self.rows}
        return found if self.similar is None else {**found, "similar_length": self.similar.to_json()}


@dataclass(frozen=True)
class Similar:
    """The accuracy over comparisons at similar length. `accuracy` is None if there are none."""

    accuracy: Accuracy | None
    pairs: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        none = {"accuracy": None, "low": None, "high": None, "rows": 0}
        return (none if self.accuracy is None else self.accuracy.to_json()) | {"pairs": self.pairs}


def wilson(share: float, rows: int, z: float = 1.959964) -> Accuracy:
    """Return `share` with Wilson's interval for `rows` trials.

    The trial is the row, not the comparison, because comparisons within a row are not independent.
    """
    if not rows:
        return Accuracy(math.nan, 0.0, 1.0, 0)
    spread = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    middle, scale = share + z * z / (2 * rows), 1 + z * z / rows
    return Accuracy(share, max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale), rows)


def mean_of(parts: Sequence[Accuracy], weights: Sequence[float] | None = None) -> Accuracy:
    """Return the weighted mean of independent accuracies. Half-widths of intervals add in quadrature (MOVER).

    The accuracy at similar length is the mean over those parts that have one.
    """
    weights = weights or [1.0] * len(parts)
    shares = [w / sum(weights) for w in weights]
    value = sum(s * p.value for s, p in zip(shares, parts, strict=True))
    low = math.sqrt(sum((s * (p.value - p.low)) ** 2 for s, p in zip(shares, parts, strict=True)))
    high = math.sqrt(sum((s * (p.high - p.value)) ** 2 for s, p in zip(shares, parts, strict=True)))
    rows = sum(p.rows for p in parts)
    return Accuracy(value, max(0.0, value - low), min(1.0, value + high), rows, _mean_similar(parts, weights))


def _mean_similar(parts: Sequence[Accuracy], weights: Sequence[float]) -> Similar | None:
    known = [(p.similar, w) for p, w in zip(parts, weights, strict=True) if p.similar is not None]
    if not known:
        return None
    some = [(similar.accuracy, w) for similar, w in known if similar.accuracy is not None]
    accuracy = mean_of([a for a, _ in some], [w for _, w in some]) if some else None
    return Similar(accuracy, sum(similar.pairs for similar, _ in known))


def over_rows(rows: Sequence[Judged], share: Callable[[Judged], float], cells: Cells | None = None) -> Accuracy:
    """Return the mean of `share` over rows, with Wilson's interval, and the accuracy at similar length.

    cells   the comparisons that `share` is about; None: all of a row
    """
    found = wilson(sum(map(share, rows)) / len(rows) if rows else math.nan, count_rows(rows))
    return replace(found, similar=similar_length(rows, cells))


def count_rows(rows: Sequence[Judged]) -> int:
    """Return the number of rows of the files. Prompts of one row are not independent, so they are one trial."""
    return len({n if row.row is None else (row.file, row.row) for n, row in enumerate(rows)})


def similar_length(rows: Sequence[Judged], cells: Cells | None = None) -> Similar | None:
    """Return the accuracy over the comparisons at similar length, or None if no row's lengths are known."""
    if all(row.lengths is None for row in rows):
        return None
    found = [(row, [row.wins[i][j] for i, j in row.similar if cells is None or (i, j) in cells]) for row in rows]
    some = [row for row, wins in found if wins]
    shares = [sum(wins) / len(wins) for _, wins in found if wins]
    accuracy = wilson(sum(shares) / len(shares), count_rows(some)) if some else None
    return Similar(accuracy, sum(len(wins) for _, wins in found))


def by(rows: Iterable[Judged], key: Callable[[Judged], str | None]) -> dict[str, list[Judged]]:
    """Group rows by `key`, in order of appearance. Rows whose key is None are left out."""
    groups: dict[str, list[Judged]] = {}
    for row in rows:
        if (name := key(row)) is not None:
            groups.setdefault(name, []).append(row)
    return groups
