"""Compute accuracy on preference data, with the aggregations of RM-Bench and RewardBench.

RM-Bench (Liu et al., arXiv 2410.16184; its compute_accuracy): every prompt has three chosen and three rejected
completions, each three in the styles concise, detailed, and detailed with markdown. M[i][j] is the share of prompts
whose chosen completion of style i scores strictly above the rejected one of style j.

    hard     mean of the three entries above the diagonal, where the rejected completion has the fancier style
    normal   mean of the diagonal
    easy     mean of the three entries below the diagonal

A domain's average is the mean of the three. The benchmark's average is the mean over the domains chat, code, math and
safety. Safety pools the rows of safety-refuse and safety-response, as the published script does.

RewardBench (Lambert et al., arXiv 2403.13787): accuracy on pairs, by subset. A section is the mean over its prompts,
with the weight of math-prm raised from 447 to 984, the number of code prompts. The overall score is the mean of the
sections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .judged import Accuracy, Judged, by, mean_of, over_rows, similar_length, wilson

RM_BENCH_DOMAINS = ("chat", "code", "math", "safety")
RM_BENCH_PARTS = ("chat", "code", "math", "safety-refuse", "safety-response", "safety")
STYLES = ("concise", "detailed", "markdown")
REWARD_BENCH = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}
MATH_PRM_WEIGHT = 984 / 447


def matrix(rows: Sequence[Judged]) -> list[list[float]]:
    """Return RM-Bench's 3x3 matrix: the share of rows in which chosen style i is strictly above rejected style j."""
    return [[sum(r.wins[i][j] for r in rows) / len(rows) for j in range(3)] for i in range(3)]


def _cells(keep: Callable[[int, int], bool]) -> tuple[tuple[int, int], ...]:
    return tuple((i, j) for i in range(3) for j in range(3) if keep(i, j))


LEVELS = {"easy": _cells(lambda i, j: i > j), "normal": _cells(lambda i, j: i == j), "hard": _cells(lambda i, j: i < j)}
"""(style of the chosen completion, style of the rejected one) of each level"""


def _share_of(cells: Sequence[tuple[int, int]]) -> Callable[[Judged], float]:
    return lambda row: sum(row.wins[i][j] for i, j in cells) / len(cells)


@dataclass
class Block:
    """The numbers of one domain or file of RM-Bench."""

    matrix: list[list[float]]
    easy: Accuracy
    normal: Accuracy
    hard: Accuracy
    average: Accuracy

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"matrix": self.matrix} | {
            name: getattr(self, name).to_json() for name in ("easy", "normal", "hard", "average")
        }


def block(rows: Sequence[Judged]) -> Block:
    """Return RM-Bench's matrix and levels over rows of its shape (at least one)."""
    levels = {name: over_rows(rows, _share_of(cells), cells) for name, cells in LEVELS.items()}
    average = wilson(sum(level.value for level in levels.values()) / 3, len(rows))
    average = replace(average, similar=similar_length(rows))
    return Block(matrix(rows), levels["easy"], levels["normal"], levels["hard"], average)


def rm_bench_part(row: dict[str, Any], file: str) -> str | None:
    """Return the part of RM-Bench that a row belongs to, or None."""
    for text in (row.get("domain"), row.get("id"), Path(file).name):
        for part in sorted(RM_BENCH_PARTS, key=len, reverse=True):
            if isinstance(text, str) and text.startswith(part):
                return part
    return None


@dataclass
class RmBench:
    """RM-Bench over the domains that the rows cover."""

    domains: dict[str, Block]
    parts: dict[str, Block]
    """safety-refuse and safety-response separately"""
    overall: dict[str, Accuracy]
    """means of easy, normal, hard and average over the domains"""
    absent: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "domains": {name: b.to_json() for name, b in self.domains.items()},
            "parts": {name: b.to_json() for name, b in self.parts.items()},
            "overall": {name: a.to_json() for name, a in self.overall.items()},
            "domains_absent": self.absent,
        }


def rm_bench(rows: Iterable[Judged]) -> RmBench | None:
    """Return RM-Bench over the rows of its shape with a known domain, or None if there are none."""
    styled = [row for row in rows if row.styled]
    domains = {name: block(g) for name, g in by(styled, lambda r: r.domain and r.domain.split("-")[0]).items()}
    if not domains:
        return None
    parts = by(styled, lambda r: r.domain if r.domain and "-" in r.domain else None)
    overall = {n: mean_of([getattr(b, n) for b in domains.values()]) for n in ("easy", "normal", "hard", "average")}
    absent = [name for name in RM_BENCH_DOMAINS if name not in domains]
    return RmBench(domains, {name: block(group) for name, group in parts.items()}, overall, absent)


def reward_bench(rows: Iterable[Judged]) -> dict[str, Accuracy] | None:
    """Return RewardBench's sections and "overall" over the pairs of its subsets, or None if there are none."""
    groups = by((row for row in rows if row.comparisons == 1), lambda r: r.subset)
    sections = {}
    for section, subsets in REWARD_BENCH.items():
        here = [name for name in subsets if name in groups]
        weights = [len(groups[n]) * (MATH_PRM_WEIGHT if n == "math-prm" else 1) for n in here]
        if here:
            sections[section] = mean_of([over_rows(groups[n], lambda r: r.accuracy) for n in here], weights)
    return sections | {"overall": mean_of(list(sections.values()))} if sections else None
