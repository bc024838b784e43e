"""Curves of a training: their running mean, and the step at which the policy has collapsed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH = 5  # steps of a running mean
SHARP = 0.1  # share of the entropy at the start below which a policy has collapsed


def smooth(curve: Sequence[float], width: int = WIDTH) -> np.ndarray:
    """Return the running mean over the last `width` steps."""
    c = np.asarray(curve, dtype=float)
    return np.array([c[max(0, i - width + 1) : i + 1].mean() for i in range(len(c))])


@dataclass(frozen=True)
class Collapse:
    """The steps, counted from 1, at which a policy has collapsed. None: never."""

    accuracy: int | None
    """from which accuracy stays below its start to the end, for at least WIDTH steps"""
    rose: bool
    """whether accuracy was above its start before, as under every intrinsic reward in arXiv 2603.08660"""
    entropy: int | None
    """from which entropy stays below SHARP of its start to the end. Each question then has one answer, so there is
    hardly a gradient left; accuracy can still be high"""


def collapse(curves: Mapping[str, Sequence[float]], width: int = WIDTH) -> Collapse:
    """Return where the curves "accuracy" and "entropy" collapse.

    Both are running means over `width` steps. The start is the first mean that covers `width` steps.
    """
    accuracy, entropy = (smooth(curves[name], width)[width - 1 :] for name in ("accuracy", "entropy"))
    if len(accuracy) == 0:
        return Collapse(None, False, None)
    fell, gone = _always(accuracy < accuracy[0]), _always(entropy < SHARP * entropy[0])
    if fell is not None and len(accuracy) - fell < width:
        fell = None
    rose = bool((accuracy[:fell] > accuracy[0]).any())
    return Collapse(None if fell is None else fell + width, rose, None if gone is None else gone + width)


def _always(true: np.ndarray) -> int | None:
    """Return the first index from which `true` holds to the end, or None."""
    failed = np.flatnonzero(~true)
    first = int(failed[-1]) + 1 if len(failed) else 0
    return first if first < len(true) else None
