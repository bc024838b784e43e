"""Fit exponents: the slope of a line through (log x, log of the mean over seeds), with a bootstrap interval."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Exponent:
    """error ~ x^value, with the 95% bootstrap interval [low, high] over seeds.

    `value` is None if a mean is not positive; `low` and `high` also if there is only one seed.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    lower_half: float | None = None  # slope over the lower half of x
    upper_half: float | None = None  # slope over the upper half; equal to lower_half for a power law

    def __str__(self) -> str:
        if self.value is None:
            return "none: 0 at some"
        spread = "" if self.low is None or self.high is None else f" [{two(self.low)}, {two(self.high)}]"
        return two(self.value) + spread


def two(value: float) -> str:
    """Format with two decimals, and 0.00 without a minus sign."""
    return f"{round(value, 2) + 0.0:.2f}"


def slope(x: np.ndarray, mean: np.ndarray) -> float | None:
    """Return the least-squares slope in log-log coordinates; None if a mean is not positive."""
    if not (mean > 0).all():
        return None
    return float(np.polyfit(np.log(x), np.log(mean), 1)[0])


def exponent(x, errors, rng: np.random.Generator, resamples: int = 1000) -> Exponent:
    """Fit errors (seeds, len(x)), one row for each seed. A single row gives no interval."""
    x, errors = np.asarray(x, dtype=float), np.asarray(errors, dtype=float)
    mean, half = errors.mean(0), len(x) // 2
    value = slope(x, mean)
    if value is None:
        return Exponent(None)
    halves = slope(x[: half + 1], mean[: half + 1]), slope(x[half:], mean[half:])
    if len(errors) == 1:
        return Exponent(value, None, None, *halves)
    drawn = [slope(x, errors[rng.integers(len(errors), size=len(errors))].mean(0)) for _ in range(resamples)]
    drawn = [value for value in drawn if value is not None]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Exponent(value, float(low), float(high), *halves)
