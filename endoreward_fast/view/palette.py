"""Diverging colours centred at 0: blue above, orange below, which every common kind of colour blindness tells apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LEVELS = 9
"""steps of colour on either side of 0"""
CLIPPED = 0.98
"""share of rewards inside the scale: one outlier would leave the rest pale"""
USUAL, TIMES = 0.75, 3.0
"""and of few rewards: the scale ends at so many times this quantile of |reward| (a normal's CLIPPED is at 2.0 times)"""


@dataclass(frozen=True)
class Theme:
    """Colours as #rrggbb. Text has a contrast of at least 4.5 on every level (WCAG 2.2, 1.4.3)."""

    zero: str
    above: str
    below: str
    ink: str
    line: str
    """under what is below 0: a contrast of at least 3 (1.4.11)"""

    def background(self, level: int) -> str:
        """Of `level` in [-LEVELS, LEVELS]."""
        share = abs(level) / LEVELS
        ends = zip(_channels(self.zero), _channels(self.above if level > 0 else self.below), strict=True)
        return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in ends)


# On a terminal of 256 colours, by number: olive, brown, orange below 0; navy, teal, blue above; dark enough for white.
# The 19 levels of a Theme would fall onto 9 of those colours, some of another hue.
BELOW_256, ZERO_256, ABOVE_256 = (58, 94, 130), 234, (17, 24, 25)


def terminal_256(level: int) -> int:
    """The number of `level`'s colour on a terminal of 256: three steps on either side of 0."""
    steps = BELOW_256 if level < 0 else ABOVE_256
    return steps[-(-abs(level) * len(steps) // LEVELS) - 1] if level else ZERO_256


LIGHT = Theme(zero="#ffffff", above="#5aa5e8", below="#f0923a", ink="#14171c", line="#7a3500")
DARK = Theme(zero="#16191f", above="#1d66ad", below="#a84f08", ink="#ffffff", line="#ffc48a")


def limit_of(rewards: Iterable[float]) -> float:
    """The |reward| at which colours are full: the CLIPPED quantile of |reward|, at most TIMES the USUAL one.

    1 where all are 0 or not finite.
    """
    sizes = sorted(abs(r) for r in rewards if math.isfinite(r))
    if not sizes or not sizes[-1]:
        return 1.0
    high, usual = (sizes[math.ceil(share * len(sizes)) - 1] for share in (CLIPPED, USUAL))
    return (min(high, TIMES * usual) if usual else high) or sizes[-1]


def level_of(reward: float, limit: float) -> int | None:
    """Level of colour in [-LEVELS, LEVELS]; at least one step for what is not 0; None for NaN."""
    if math.isnan(reward):
        return None
    if reward == 0:
        return 0
    level = max(1, round(LEVELS * min(abs(reward) / limit, 1.0)))
    return level if reward > 0 else -level


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
