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

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        return len(self.chosen) == len(self.rejected) == len(STYLES)

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


@dataclass(frozen=True)
class Accuracy:
    """An accuracy and its 95% interval."""

    value: float
    low: float
    high: float
    rows: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"accuracy": self.value, "low": self.low, "high": self.high, "rows": self.rows}


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
    """Return the weighted mean of independent accuracies. Half-widths of intervals add in quadrature (MOVER)."""
    weights = weights or [1.0] * len(parts)
    shares = [w / sum(weights) for w in weights]
    value = sum(s * p.value for s, p in zip(shares, parts, strict=True))
    low = math.sqrt(sum((s * (p.value - p.low)) ** 2 for s, p in zip(shares, parts, strict=True)))
    high = math.sqrt(sum((s * (p.high - p.value)) ** 2 for s, p in zip(shares, parts, strict=True)))
    return Accuracy(value, max(0.0, value - low), min(1.0, value + high), sum(p.rows for p in parts))


def over_rows(rows: Sequence[Judged], share: Callable[[Judged], float]) -> Accuracy:
    """Return the mean of `share` over rows, with Wilson's interval."""
    return wilson(sum(map(share, rows)) / len(rows) if rows else math.nan, len(rows))


def matrix(rows: Sequence[Judged]) -> list[list[float]]:
    """Return RM-Bench's 3x3 matrix: the share of rows in which chosen style i is strictly above rejected style j."""
    return [[sum(r.wins[i][j] for r in rows) / len(rows) for j in range(3)] for i in range(3)]


def _level(keep: Callable[[int, int], bool]) -> Callable[[Judged], float]:
    cells = [(i, j) for i in range(3) for j in range(3) if keep(i, j)]
    return lambda row: sum(row.wins[i][j] for i, j in cells) / len(cells)


LEVELS = {"easy": _level(lambda i, j: i > j), "normal": _level(lambda i, j: i == j), "hard": _level(lambda i, j: i < j)}


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
    levels = {name: over_rows(rows, share) for name, share in LEVELS.items()}
    average = wilson(sum(level.value for level in levels.values()) / 3, len(rows))
    return Block(matrix(rows), levels["easy"], levels["normal"], levels["hard"], average)


def by(rows: Iterable[Judged], key: Callable[[Judged], str | None]) -> dict[str, list[Judged]]:
    """Group rows by `key`, in order of appearance. Rows whose key is None are left out."""
    groups: dict[str, list[Judged]] = {}
    for row in rows:
        if (name := key(row)) is not None:
            groups.setdefault(name, []).append(row)
    return groups


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
