"""Compute JudgeBench (Tan et al., arXiv 2410.12784; run_judge.py, utils/metrics.py of github.com/ScalerLab/JudgeBench).

A row has two responses to a question; `label` says which one is correct. The accuracy is the share of rows whose
correct response scores higher, over all rows and over those of each source. The categories are sources: Knowledge is
MMLU-Pro, Reasoning and Math are LiveBench, Coding is LiveCodeBench. The overall accuracy is over all rows, so the
categories have the weight of their rows. Chance is 50%.

Ties. The benchmark asks a judge in both orders. A reward model's tie is "B>A" both times and so earns nothing. Here a
tie is lost too. With its flag --single_game, the benchmark asks once, so a tie wins if the label is "B>A".
`single_game` is the overall accuracy under that rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...data.benchmarks import JUDGE_BENCH
from .judged import Accuracy, Judged, over_rows

CATEGORIES = {
    "Knowledge": "mmlu-pro",
    "Reasoning": "livebench-reasoning",
    "Math": "livebench-math",
    "Coding": "livecodebench",
}
"""{category: what its sources begin with}"""
CHANCE = 0.5


@dataclass(frozen=True)
class JudgeBench:
    """JudgeBench over the categories that the rows cover."""

    categories: dict[str, Accuracy]
    overall: Accuracy
    ties: int
    single_game: float
    """overall accuracy if a tie means that the second response is better"""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "categories": {name: a.to_json() for name, a in self.categories.items()},
            "overall": self.overall.to_json(),
            "chance": CHANCE,
            "ties": self.ties,
            "single_game": self.single_game,
        }


def judge_bench(rows: Iterable[Judged]) -> JudgeBench | None:
    """Return JudgeBench over its rows, or None if there are none."""
    mine = [row for row in rows if row.benchmark == JUDGE_BENCH]
    if not mine:
        return None
    groups = {name: [r for r in mine if str(r.subset).startswith(start)] for name, start in CATEGORIES.items()}
    categories = {name: over_rows(group, lambda r: r.accuracy) for name, group in groups.items() if group}
    won = sum(r.accuracy or (r.ties and r.place) for r in mine)
    return JudgeBench(categories, over_rows(mine, lambda r: r.accuracy), sum(r.ties for r in mine), won / len(mine))
