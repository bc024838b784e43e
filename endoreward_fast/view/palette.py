"""Diverging colours centred at 0: blue above, orange below. They differ under every common kind of colour blindness."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LEVELS = 9
"""colour steps on either side of 0"""
CLIPPED = 0.98
"""quantile of |reward| at which the scale ends: ending it at an outlier would leave the rest pale"""
USUAL, TIMES = 0.75, 3.0
"""the scale also ends at TIMES the USUAL quantile, for small samples (in a normal distribution, CLIPPED is at 2.0)"""


@dataclass(frozen=True)
class Theme:
    """Colours as #rrggbb. Text has a contrast of at least 4.5 on every level (WCAG 2.2, 1.4.3)."""

    zero: str
    above: str
    below: str
    ink: str
    line: str
    """underline of rewards below 0, with a contrast of at least 3 (1.4.11)"""

    def background(self, level: int) -> str:
        """Return the background of `level`, which is in [-LEVELS, LEVELS]."""
        share = abs(level) / LEVELS
        ends = zip(_channels(self.zero), _channels(self.above if level > 0 else self.below), strict=True)
        return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in ends)


# Colour numbers on a 256-colour terminal: olive, brown, orange below 0; navy, teal, blue above. White text is legible
# on all. The nearest terminal colours to a Theme's 19 levels would be 9 colours, some of another hue.
BELOW_256, ZERO_256, ABOVE_256 = (58, 94, 130), 234, (17, 24, 25)


def terminal_256(level: int) -> int:
    """Return the colour number of `level` on a 256-colour terminal, with three steps on either side of 0."""
    steps = BELOW_256 if level < 0 else ABOVE_256
    return steps[-(-abs(level) * len(steps) // LEVELS) - 1] if level else ZERO_256


LIGHT = Theme(zero="#ffffff", above="#5aa5e8", below="#f0923a", ink="#14171c", line="#7a3500")
DARK = Theme(zero="#16191f", above="#1d66ad", below="#a84f08", ink="#ffffff", line="#ffc48a")


def limit_of(rewards: Iterable[float]) -> float:
    """Return the |reward| at which colours saturate: the CLIPPED quantile, at most TIMES the USUAL quantile.

    1 if no reward is finite and nonzero.
    """
    sizes = sorted(abs(r) for r in rewards if math.isfinite(r))
    if not sizes or not sizes[-1]:
        return 1.0
    high, usual = (sizes[math.ceil(share * len(sizes)) - 1] for share in (CLIPPED, USUAL))
    return (min(high, TIMES * usual) if usual else high) or sizes[-1]


def level_of(reward: float, limit: float) -> int | None:
    """Return the colour level in [-LEVELS, LEVELS]; 0 only for a reward of 0; None for NaN."""
    if math.isnan(reward):
        return None
    if reward == 0:
        return 0
    level = max(1, round(LEVELS * min(abs(reward) / limit, 1.0)))
    return level if reward > 0 else -level


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
