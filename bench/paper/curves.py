"""Curves of a training: their running mean, and the step at which the policy has collapsed."""

from collections.abc import Mapping, Sequence

import numpy as np

WIDTH = 5  # steps of a running mean
SHARP = 0.1  # share of the entropy at the start below which a policy has collapsed


def smooth(curve: Sequence[float], width: int = WIDTH) -> np.ndarray:
    """Return the running mean over the last `width` steps."""
    c = np.asarray(curve, dtype=float)
    return np.array([c[max(0, i - width + 1) : i + 1].mean() for i in range(len(c))])


def collapse(curves: Mapping[str, Sequence[float]], width: int = WIDTH) -> dict[str, int | None]:
    """Return the steps, counted from 1, at which accuracy has fallen and entropy is gone; None if that never happens.

    arXiv 2603.08660: every intrinsic reward sharpens the policy, so accuracy rises and then falls. All values are
    running means over `width` steps, and the start is the first mean that covers `width` steps.

        accuracy   the first step from which accuracy stays below its start to the end, for at least `width` steps,
                   after it was above
        entropy    the first step from which entropy stays below SHARP of its start to the end. The policy then gives
                   one answer to each question: there is no gradient left, and accuracy can still be high
    """
    accuracy, entropy = (smooth(curves[name], width)[width - 1 :] for name in ("accuracy", "entropy"))
    found: dict[str, int | None] = {"accuracy": None, "entropy": None}
    if len(accuracy) == 0:
        return found
    below = _always(accuracy < accuracy[0])
    if below is not None and len(accuracy) - below >= width and accuracy[:below].max() > accuracy[0]:
        found["accuracy"] = below + width
    gone = _always(entropy < SHARP * entropy[0])
    if gone is not None:
        found["entropy"] = gone + width
    return found


def _always(true: np.ndarray) -> int | None:
    """Return the first index from which `true` holds to the end, or None."""
    failed = np.flatnonzero(~true)
    first = int(failed[-1]) + 1 if len(failed) else 0
    return first if first < len(true) else None
