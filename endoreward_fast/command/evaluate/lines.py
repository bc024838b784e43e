"""Write figures as parts of the lines of a table."""

from __future__ import annotations

from .judged import Accuracy

SIMILAR = (
    "similar length: the comparisons whose longer completion has at most 10% more tokens than the shorter. Chance: 50%."
)


def percent(value: float | None) -> str:
    """Return a share in percent, 5 characters wide; None is "-"."""
    return f"{'-':>5}" if value is None else f"{100 * value:5.1f}"


def interval(a: Accuracy) -> str:
    """Return the accuracy, its interval, its rows, and the accuracy at similar length if lengths are known."""
    return f"{percent(a.value)}%  [{percent(a.low)}, {percent(a.high)}]  {a.rows:6d} rows{similar(a)}"


def similar(a: Accuracy) -> str:
    """Return the accuracy at similar length and its number of comparisons, or "" if lengths are unknown."""
    if a.similar is None:
        return ""
    found = a.similar.accuracy
    share = f"{'-':>6}" if found is None else f"{percent(found.value)}%"
    return f" | similar length {share} of {a.similar.pairs:5d} pairs"


def chance(value: float) -> str:
    """Return what scores in random order reach."""
    return f"  chance {100 * value:.{1 if value > 0.01 else 2}f}%"


def line(name: str, a: Accuracy, indent: int = 2) -> str:
    """Return one line of a table: a name and an accuracy."""
    return f"{' ' * indent}{name:<{28 - indent}}{interval(a)}"
