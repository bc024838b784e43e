"""Compute RMGAP (Zhou and Li, arXiv 2605.01831; src/rmgap/task_runner.py of github.com/nanzhi84/RMGAP).

A row has four responses and four groups of three prompts. The prompts of a group say the same in other words, and one
response, the winner, suits them best.

    Pair          share of the comparisons with another response in which the winner scores strictly higher
    BoN           share of prompts whose winner scores strictly above all three others
    Consistency   share of groups whose three prompts rank the four responses alike. Equal scores are ranked by the
                  responses' keys. A group with a prompt that could not be scored counts as not consistent. A row
                  without a prompt that could be scored is left out

Each is computed for each domain; the benchmark's figure is the mean over the domains. Chance is 50%, 25% and, for three
independent random rankings of four responses, 1 / 24^2 = 0.17%.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...data.benchmarks import RMGAP, RMGAP_DOMAINS, RMGAP_GROUPS, RMGAP_PROMPTS
from .judged import Accuracy, Judged, by, count_rows, mean_of, over_rows, wilson

CHANCE = {"Pair": 1 / 2, "BoN": 1 / 4, "Consistency": 1 / 24**2}


@dataclass(frozen=True)
class RmGap:
    """RMGAP over the domains that the rows cover."""

    domains: dict[str, dict[str, Accuracy]]
    """{domain: {"Pair": ..., "BoN": ..., "Consistency": ...}}"""
    mean: dict[str, Accuracy]
    absent: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "domains": {name: {k: a.to_json() for k, a in found.items()} for name, found in self.domains.items()},
            "mean": {k: a.to_json() for k, a in self.mean.items()},
            "chance": CHANCE,
            "domains_absent": self.absent,
        }


def rmgap(rows: Iterable[Judged]) -> RmGap | None:
    """Return RMGAP over the prompts of its rows, or None if there are none."""
    groups = by((row for row in rows if row.benchmark == RMGAP), lambda r: r.subset)
    if not groups:
        return None
    domains = {name: _figures(groups[name]) for name in RMGAP_DOMAINS if name in groups}
    mean = {name: mean_of([found[name] for found in domains.values()]) for name in CHANCE}
    return RmGap(domains, mean, [name for name in RMGAP_DOMAINS if name not in groups])


def _figures(prompts: Sequence[Judged]) -> dict[str, Accuracy]:
    groups: dict[Any, list[tuple[int, ...]]] = {}
    for prompt in prompts:
        groups.setdefault((prompt.file, prompt.row, prompt.group), []).append(ranking(prompt))
    alike = [len(group) == RMGAP_PROMPTS and len(set(group)) == 1 for group in groups.values()]
    count = RMGAP_GROUPS * len({(prompt.file, prompt.row) for prompt in prompts})
    return {
        "Pair": over_rows(prompts, lambda row: row.accuracy),
        "BoN": over_rows(prompts, lambda row: row.on_top),
        "Consistency": wilson(sum(alike) / count, count_rows(prompts)),
    }


def ranking(prompt: Judged) -> tuple[int, ...]:
    """Return the places of the responses (in the order of their keys), best first. Of equal ones the first leads."""
    scores = list(prompt.rejected)
    scores.insert(prompt.place, prompt.chosen[0])
    return tuple(sorted(range(len(scores)), key=lambda i: -scores[i]))
