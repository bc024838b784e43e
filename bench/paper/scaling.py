"""Exponents: the slope of a straight line through (log x, log of the mean over seeds), and how sure it is."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Exponent:
    """error ~ x^value; low, high: 95% by bootstrap over seeds. None: nothing was drawn, or a mean is not positive."""

    value: float | None
    low: float | None = None
    high: float | None = None
    lower_half: float | None = None  # slope over the smaller half of x and over the larger: equal if it is a power law
    upper_half: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "none: 0 at some"
        spread = "" if self.low is None or self.high is None else f" [{two(self.low)}, {two(self.high)}]"
        return two(self.value) + spread


def two(value: float) -> str:
    """Two places, and no minus before a zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def slope(x: np.ndarray, mean: np.ndarray) -> float | None:
    """Least squares on log-log; None where a value is not positive, as then there is no logarithm to fit."""
    if not (mean > 0).all():
        return None
    return float(np.polyfit(np.log(x), np.log(mean), 1)[0])


def exponent(x, errors, rng: np.random.Generator, resamples: int = 1000) -> Exponent:
    """errors (seeds, len(x)): every row one seed. With a single row (nothing sampled) there is no interval."""
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
