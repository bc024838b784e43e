"""The rows that `score` and `rank` write: the input's columns, and the results beside them."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from .columns import arrange
from .items import Item

if TYPE_CHECKING:
    from ..scoring.results import RowScore


def scored_row(item: Item, *, per_token: bool = False) -> dict[str, Any]:
    """Return the row with `score` and, if there are any, `flags` and `error` in the shape of the score."""
    if item.task is None:
        return _with_columns(item, {"score": None}, None, per_token)
    layout = item.task.layout
    return _with_columns(item, {"score": arrange(layout, lambda i: _number(item.score(i)))}, layout, per_token)


def ranked_row(item: Item, *, per_token: bool = False) -> dict[str, Any]:
    """Return the row with `scores`, `ranking` (positions, best first; ties in input order) and `best`."""
    if item.task is None:
        return _with_columns(item, {"scores": None, "ranking": None, "best": None}, None, per_token)
    samples = item.task.samples
    scores = [item.score(i) for i in range(len(samples))]
    worth = [-inf if item.says_nothing(i) else score for i, score in enumerate(scores)]
    ranking = sorted((i for i, w in enumerate(worth) if w is not None), key=lambda i: -(worth[i] or 0.0))
    best = samples[ranking[0]].get("completion") if ranking and scores[ranking[0]] is not None else None
    new = {"scores": [_number(s) for s in scores], "ranking": ranking, "best": best}
    return _with_columns(item, new, list(range(len(samples))), per_token)


def compact(value: float, digits: int = 9) -> float:
    """Round to `digits` significant digits. Nine of them identify every float32."""
    return float(f"{value:.{digits}g}")


def _number(score: float | None) -> float | None:
    return None if score is None else compact(score)


def _with_columns(item: Item, new: dict[str, Any], layout: Any, per_token: bool) -> dict[str, Any]:
    if item.task is None:
        new["error"] = f"{item.record.where}: {item.error}" if item.record.row is None else item.error
    else:
        results, given = item.results, item.task.flags
        if any((*given, *result.flags) for result in results.values()):
            new["flags"] = arrange(layout, lambda i: [*given, *results[i].flags])
        if item.first_problem:
            new["error"] = arrange(layout, item.problem)
        for name in ("signals", "signal_errors"):
            if any(getattr(result, name) for result in results.values()):
                new[name] = arrange(layout, lambda i, name=name: _plain(getattr(results[i], name)))
        if per_token:
            new["token_rewards"] = arrange(layout, lambda i: _token_table(results[i]))
    row = item.record.row or {}
    return {**{_kept_as(name, new, row): value for name, value in row.items()}, **new}


def _kept_as(name: str, new: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Return the name of an input column in the output: input_... if a new column (a file scored before) takes it."""
    taken = name in new
    while taken:
        name = f"input_{name}"
        taken = name in row  # the file was scored twice before
    return name


def _plain(found: Mapping[str, float | str] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {n: v if isinstance(v, str) else compact(v) if isfinite(v) else None for n, v in found.items()}


def _token_table(result: RowScore) -> dict[str, list[Any]] | None:
    """Return parallel lists with one entry per scored token, or None."""
    if result.tokens is None:
        return None
    columns = {name: list(values) for name, values in vars(result.tokens).items() if values is not None}
    return {
        name: [compact(float(v), 6) if isinstance(v, float) else v for v in values] for name, values in columns.items()
    }
