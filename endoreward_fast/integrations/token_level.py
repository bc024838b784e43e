"""Token rewards and token advantages as lists, for trainers that take them natively (prime-rl, SkyRL, slime)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import EndoRewardError
from ..returns import rewards_to_go
from ..scoring.sampled import Own
from .advantages import Scale, token_advantages


def weight_of(environment: Any) -> float:
    """Return the weight of an environment's rewards. Raises EndoRewardError for anything but a finite number."""
    if not (isinstance(environment, int | float) and math.isfinite(environment)):
        raise EndoRewardError(f"environment={environment!r}: expected a finite number, the weight of its rewards")
    return float(environment)


def spread(values: Iterable[float], own: Own) -> list[float]:
    """Return one value for each token of a response: `values` on the policy's tokens, in order, and 0 on the others."""
    found = iter(values)
    return [next(found) if chosen else 0.0 for chosen in own]


def group_advantages(
    rewards: Sequence[Sequence[float] | None], lengths: Sequence[int], *, gamma: float = 1.0, scale: Scale = "group",
    others: Sequence[float] | None = None, weight: float = 0.0,
) -> list[list[float]]:  # fmt: skip
    """Return the advantage of each token for the completions of one prompt (`token_advantages`).

    rewards   each completion's token rewards, of the policy's tokens alone; None for a completion without
    lengths   number of the policy's tokens in each completion
    others    another reward of each completion, added with `weight`; 0 leaves it out

    A completion without any reward is no part of the group's mean and spread, and its advantages are 0.
    """
    known = [None if row is None else torch.tensor(row, dtype=torch.float64) for row in rewards]
    to_go = torch.full((len(known), max(1, *lengths)), torch.nan, dtype=torch.float64)
    for place, row in zip(to_go, known, strict=True):
        if row is not None:
            place[: len(row)] = rewards_to_go(row[None], torch.ones_like(row[None], dtype=torch.bool), gamma=gamma)[0]
    columns = [[torch.nan if row is None else row.sum().item() for row in known]]
    if others is not None and weight:
        columns.append([float(value) for value in others])
    totals, weights = torch.tensor(columns, dtype=torch.float64).T, torch.tensor([1.0, weight][: len(columns)])
    found = token_advantages(to_go, totals, endo=0, weights=weights, group=len(known), scale=scale)
    return [row[:n].tolist() for row, n in zip(found, lengths, strict=True)]


def mean_of(metrics: Sequence[Mapping[str, Any]], prefix: str = "endo_reward/") -> dict[str, float]:
    """Return the means of `Rewarded.metrics` over the scored completions, and the number of unscored ones."""
    scored = [m for m in metrics if not m["unscored"]]
    names = ("token", "first_value", "length") if scored else ()
    found = {f"{prefix}{name}": sum(m[name] for m in scored) / len(scored) for name in names}
    return found | {f"{prefix}unscored": float(len(metrics) - len(scored))}
