"""Find the first wrong step of a solution: ProcessBench (arXiv 2412.06559; github.com/QwenLM/ProcessBench).

A solution has steps and a label: the index of the first wrong step, or -1. The prediction is the first step whose score
is below a threshold, or -1 if there is none. It has to equal the label.

    F1 = 2 w r / (w + r)      w, r: accuracy on solutions with a wrong step, and on those without

The threshold. Scores of steps have no natural zero. The paper (Zheng et al., section 4.1) takes the threshold with the
highest F1 on the GSM8K subset and applies it to every subset. `f1_gsm8k` is that. For GSM8K itself, this threshold has
seen the labels that it is tested on. `f1` is cross-fitted: the solutions of each subset are split into two halves, and
the threshold that is best on one half is applied to the other. A half has every second solution with a wrong step, and
every second without.

Without a threshold:

    lowest    share of solutions with a wrong step in which that step has the lowest score (k steps that tie for it
              earn 1/k). Its chance is the mean of 1 / (number of steps)
    earlier   share of the comparisons of the first wrong step with an earlier step in which the earlier one scores
              higher. Earlier steps are right. Chance is 50%. Steps after the first wrong one have no label, so they
              are left out

The chance of F1 is that of scores that are independent of the labels, at their best threshold: each step is below it
with probability p, so the expected accuracies are the means of p (1 - p)^label and of (1 - p)^(number of steps). The
best p is taken.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .judged import Accuracy, Judged, over_rows, wilson
from .steps import METHODS

SUBSETS = ("gsm8k", "math", "olympiadbench", "omnimath")
GRID = 1000
"""number of probabilities p that the chance of F1 is tried at"""


@dataclass(frozen=True)
class Solution:
    """One solution with the scores of its steps."""

    file: str
    subset: str
    id: Any
    label: int
    """index of the first wrong step; -1: none"""
    scores: dict[str, tuple[float, ...]]
    """{method: score of each step}"""
    tokens: tuple[int, ...]
    """number of tokens of each step"""


def subset_of(id: Any, file: str) -> str:
    """Return the subset by the start of the id, or of the file's name; "all" for others."""
    for text in (str(id), Path(file).name):
        for name in SUBSETS:
            if text.lower().startswith(name):
                return name
    return "all"


@dataclass(frozen=True)
class Figures:
    """The figures of one method on one subset. A figure is None if no solution allows it."""

    f1: float | None
    wrong: Accuracy | None
    """accuracy on solutions with a wrong step, at the cross-fitted threshold"""
    right: Accuracy | None
    f1_gsm8k: float | None
    lowest: Accuracy | None
    earlier: Accuracy | None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {k: v.to_json() if isinstance(v, Accuracy) else v for k, v in vars(self).items()}


@dataclass(frozen=True)
class Subset:
    """The figures of a subset."""

    wrong: int
    """number of solutions with a wrong step"""
    right: int
    methods: dict[str, Figures]
    chance: dict[str, float | None]
    """of f1, lowest and earlier"""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        methods = {name: figures.to_json() for name, figures in self.methods.items()}
        counts = {"solutions_with_a_wrong_step": self.wrong, "solutions_without": self.right}
        return {**counts, "chance": self.chance, "methods": methods}


@dataclass(frozen=True)
class ProcessBench:
    """ProcessBench over the subsets that the solutions cover."""

    subsets: dict[str, Subset]
    mean: dict[str, dict[str, float | None]]
    """{method: {"f1": ..., "f1_gsm8k": ...}}, means over the subsets; None unless every subset has the figure"""
    absent: list[str]
    """subsets of the benchmark that the solutions do not cover"""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        subsets = {name: s.to_json() for name, s in self.subsets.items()}
        return {"subsets": subsets, "mean_of_subsets": self.mean, "subsets_absent": self.absent}


def process_bench(solutions: Iterable[Solution]) -> ProcessBench | None:
    """Return ProcessBench over the solutions, or None if there are none."""
    groups: dict[str, list[Solution]] = {}
    for solution in solutions:
        groups.setdefault(solution.subset, []).append(solution)
    if not groups:
        return None
    fitted = {name: best_threshold(groups.get("gsm8k", []), name) for name in METHODS}
    subsets = {name: _subset(group, fitted) for name, group in groups.items()}
    mean = {}
    for method in METHODS:
        figures = [subset.methods[method] for subset in subsets.values()]
        mean[method] = {name: _mean([getattr(f, name) for f in figures]) for name in ("f1", "f1_gsm8k")}
    return ProcessBench(subsets, mean, [name for name in SUBSETS if name not in groups])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _subset(group: Sequence[Solution], fitted: dict[str, float | None]) -> Subset:
    wrong = [s for s in group if s.label >= 0]
    right = [s for s in group if s.label < 0]
    chance = {
        "f1": chance_of_f1(group),
        "lowest": sum(1 / len(s.tokens) for s in wrong) / len(wrong) if wrong else None,
        "earlier": 0.5,
    }
    return Subset(
        len(wrong), len(right), {name: _figures(wrong, right, name, fitted[name]) for name in METHODS}, chance
    )


def _figures(wrong: Sequence[Solution], right: Sequence[Solution], method: str, gsm8k: float | None) -> Figures:
    of_wrong, of_right = _cross_fitted(wrong, right, method) or (None, None)
    lowest = [_credit(s.scores[method], s.label) for s in wrong]
    earlier = [_judged(s, method) for s in wrong if s.label > 0]
    return Figures(
        f1=f1_of(of_wrong.value, of_right.value) if of_wrong and of_right else None,
        wrong=of_wrong,
        right=of_right,
        f1_gsm8k=_f1_at(wrong, right, method, gsm8k),
        lowest=wilson(sum(lowest) / len(lowest), len(lowest)) if lowest else None,
        earlier=over_rows(earlier, lambda row: row.accuracy) if earlier else None,
    )


def _judged(s: Solution, method: str) -> Judged:
    """Return the comparisons of the first wrong step with the earlier ones, which should score higher."""
    scores, tokens, at = s.scores[method], s.tokens, s.label
    return Judged(s.file, s.subset, None, s.id, scores[:at], (scores[at],), (tokens[:at], (tokens[at],)))


def _credit(scores: Sequence[float], label: int) -> float:
    return (scores[label] == min(scores)) / scores.count(min(scores))


# -------------------------------------------------------------------------------------------------------- thresholds


def predicted(scores: Sequence[float], threshold: float) -> int:
    """Return the index of the first step that scores below `threshold`, or -1."""
    return next((n for n, score in enumerate(scores) if score < threshold), -1)


def f1_of(wrong: float, right: float) -> float:
    """Return the harmonic mean of the two accuracies; 0 if both are 0."""
    return 2 * wrong * right / (wrong + right) if wrong + right else 0.0


def best_threshold(solutions: Sequence[Solution], method: str) -> float | None:
    """Return the threshold with the highest F1, the lowest of several. None unless there are both kinds of solutions.

    A solution is predicted right for thresholds in (low, high]: above the score of its first wrong step, and at most
    the lowest score before it. So F1 changes at these bounds only. A threshold is taken halfway between two of them.
    """
    wrong, right = ([s for s in solutions if (s.label >= 0) is kind] for kind in (True, False))
    if not wrong or not right:
        return None
    spans = [(s.scores[method][s.label], min(s.scores[method][: s.label], default=math.inf)) for s in wrong]
    spans = [(low, high) for low, high in spans if low < high]
    lows, highs = sorted(low for low, _ in spans), sorted(high for _, high in spans)
    tops = sorted(min(s.scores[method]) for s in right)
    bounds = sorted({bound for bound in (*lows, *highs, *tops) if math.isfinite(bound)})
    between = [(a + b) / 2 for a, b in pairwise(bounds)]

    def f1_at(threshold: float) -> float:
        found = bisect_left(lows, threshold) - bisect_left(highs, threshold)
        return f1_of(found / len(wrong), (len(tops) - bisect_left(tops, threshold)) / len(tops))

    # At the lowest bound, only steps of -inf are below the threshold.
    return max([-math.inf, *bounds[:1], *between, math.inf], key=f1_at)


def _cross_fitted(
    wrong: Sequence[Solution], right: Sequence[Solution], method: str
) -> tuple[Accuracy, Accuracy] | None:  # fmt: skip
    """Return the accuracies on both kinds of solutions, each at the threshold that fits the half without it best."""
    first, second = (best_threshold([*wrong[half::2], *right[half::2]], method) for half in (0, 1))
    if first is None or second is None:
        return None
    of_wrong, of_right = (
        _accuracy(kind, [(second, first)[n % 2] for n in range(len(kind))], method) for kind in (wrong, right)
    )
    return of_wrong, of_right


def _accuracy(solutions: Sequence[Solution], thresholds: Sequence[float], method: str) -> Accuracy:
    hits = [predicted(s.scores[method], t) == s.label for s, t in zip(solutions, thresholds, strict=True)]
    return wilson(sum(hits) / len(hits), len(hits))


def _f1_at(wrong: Sequence[Solution], right: Sequence[Solution], method: str, threshold: float | None) -> float | None:
    if threshold is None or not wrong or not right:
        return None
    return f1_of(*(_accuracy(kind, [threshold] * len(kind), method).value for kind in (wrong, right)))


def chance_of_f1(solutions: Sequence[Solution]) -> float | None:
    """Return the F1 of scores that are independent of the labels, at the best threshold (formula above)."""
    wrong = Counter(s.label for s in solutions if s.label >= 0)
    right = Counter(len(s.tokens) for s in solutions if s.label < 0)
    if not wrong or not right:
        return None

    def expected(kinds: Counter[int], p: float) -> float:
        return sum(count * (1 - p) ** steps for steps, count in kinds.items()) / kinds.total()

    return max(f1_of(p * expected(wrong, p), expected(right, p)) for p in (n / GRID for n in range(GRID + 1)))
