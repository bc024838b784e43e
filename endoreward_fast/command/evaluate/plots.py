"""`endoreward plot`: a histogram of scores, score against length, and reward by position. Needs matplotlib."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.files import STDIN, open_source
from ...data.items import Item
from ...errors import EndoRewardError
from ...view.palette import LIGHT
from ..flags.options import RowFlags
from ..run import pipeline
from ..run.interrupted import end, kept_until_written
from ..run.monitor import Monitor
from ..run.sink import Sink

PICTURE = "rewards.png"
FORMATS = (".png", ".svg")
COLOURS = {"chosen": "#1d66ad", "rejected": "#d97a1c", "completions": "#5b6470"}
FEWEST = 5
"""minimum number of completions for the mean at a position, and for a correlation"""
POINTS = 60
"""maximum number of means on a line; the means of a thousand single positions would be noise"""
FEW_POINTS = 12
"""lines of at most this many points get markers, because a single point would be invisible"""
TITLE = 90
"""maximum number of characters of the title"""


@dataclass
class Kind:
    """Statistics of the completions of one kind. Memory grows with rows and the longest row, not with all tokens."""

    scores: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """lengths in tokens"""
    counts: list[int] = field(default_factory=list)
    """by position: number of completions that reach it"""
    means: list[float] = field(default_factory=list)
    """by position: mean reward"""
    squares: list[float] = field(default_factory=list)
    """by position: sum of squared deviations from the mean (Welford)"""

    def add(self, score: float, rewards: Iterable[float]) -> None:
        """Add one completion."""
        self.scores.append(score)
        length = 0
        for position, reward in enumerate(rewards):
            length = position + 1
            if position == len(self.counts):
                self.counts.append(0), self.means.append(0.0), self.squares.append(0.0)
            self.counts[position] += 1
            step = reward - self.means[position]
            self.means[position] += step / self.counts[position]
            self.squares[position] += step * (reward - self.means[position])
        self.lengths.append(length)

    @property
    def reached(self) -> int:
        """Number of positions that at least FEWEST completions reach."""
        return sum(n >= FEWEST for n in self.counts)  # counts never increase with position

    def by_position(self, together: int = 1) -> list[tuple[float, float, float]]:
        """Return (middle position, counted from 1; mean reward; its standard error) per group of `together` positions.

        The groups end where fewer than FEWEST completions have a token.
        """
        starts = range(0, self.reached, together)
        groups = [slice(start, min(start + together, self.reached)) for start in starts]
        return [((g.start + 1 + g.stop) / 2, *self._pooled(g)) for g in groups]

    def _pooled(self, group: slice) -> tuple[float, float]:
        """Return the mean of all rewards at these positions, and its standard error."""
        parts = list(zip(self.counts[group], self.means[group], self.squares[group], strict=True))
        total = sum(n for n, _, _ in parts)
        mean = sum(n * m for n, m, _ in parts) / total
        squares = sum(square + n * (m - mean) ** 2 for n, m, square in parts)
        return mean, math.sqrt(squares / (total - 1) / total)


def plot(file: str, flags: RowFlags) -> bool:
    """Score `file` and draw. Returns whether every completion has a score.

    Raises EndoRewardError for arguments that cannot work, and if no completion has a score.
    """
    path = flags.output or PICTURE
    suffix = Path(path).suffix.lower()
    if path != STDIN and suffix not in FORMATS:
        raise EndoRewardError(f"--output {path}: use a name that ends in {' or '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise EndoRewardError("endoreward plot needs matplotlib: pip install matplotlib")
    with Sink(path, (file, *flags.inputs), overwrite=flags.overwrite) as sink:
        source = open_source(file, flags.limit)
        batches = pipeline.checked(pipeline.windows(source, "plot", flags), source.name)
        pipeline.before_loading(flags)
        scorer = pipeline.load_scorer(flags)
        options = {**flags.scoring(), "per_token": True, "texts": False}
        kinds: dict[str, Kind] = {}
        monitor = Monitor(source.total, quiet=flags.quiet, model=flags.model)
        with kept_until_written() as ended, monitor:
            for items in batches:
                pipeline.score_items(
                    items, scorer, options, lambda item: collect(item, kinds), monitor, strict=flags.strict
                )
        if not kinds:
            end(ended)
            raise EndoRewardError(f"{source.name}: no completion has a score: there is nothing to draw")
        sink.write(picture(kinds, flags.described(), suffix or FORMATS[0]))
        end(ended)
    return not monitor.failed


def collect(item: Item, kinds: dict[str, Kind]) -> None:
    """Add the row's completions that have a score to their kinds."""
    if item.task is None:
        return
    for position, name in _kinds(item.task.layout):
        score, table = item.score(position), item.results[position].tokens
        if score is not None and table is not None:
            kinds.setdefault(name, Kind()).add(score, table.rewards)


def _kinds(layout: Any, name: str = "completions") -> Iterator[tuple[int, str]]:
    if isinstance(layout, dict):
        for side, part in layout.items():
            yield from _kinds(part, side)
    elif isinstance(layout, list):
        for part in layout:
            yield from _kinds(part, name)
    else:
        yield layout, name


def correlation(xs: list[int], ys: list[float]) -> float | None:
    """Return Pearson's correlation. None if xs or ys do not vary, or for fewer than FEWEST points."""
    import numpy as np

    if len(xs) < FEWEST or len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    return float(np.corrcoef(xs, ys)[0, 1])


def picture(kinds: dict[str, Kind], title: str, suffix: str) -> bytes:
    """Return the contents of a ".png" or ".svg" file. The same numbers give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    of_scores, of_lengths, of_positions = figure.subplots(1, 3)
    # A model's name may be long, and may hold dollar signs, which matplotlib would parse as formulas.
    shown = title if len(title) <= TITLE else f"…{title[1 - TITLE :]}"
    figure.suptitle(shown, x=0.01, ha="left", fontsize=11, color=LIGHT.ink, parse_math=False)
    everything = [score for kind in kinds.values() for score in kind.scores]
    low, high = min(everything), max(everything)
    for name, kind in kinds.items():
        of_scores.hist(kind.scores, bins=30, range=(low, high), histtype="step", lw=1.8, **_style(name, kind))
        mark = {"marker": _mark(name), "color": COLOURS[name]}
        of_lengths.scatter(kind.lengths, kind.scores, s=14, alpha=0.55, lw=0.8, **mark)
    r = correlation([n for kind in kinds.values() for n in kind.lengths], everything)
    labels = (
        (of_scores, "Scores", "score", "completions"),
        (of_lengths, f"Length bias{'' if r is None else f': correlation {r:+.2f}'}", "tokens scored", "score"),
        (of_positions, _by_position(of_positions, kinds), f"token (as far as {FEWEST} completions reach)", "reward"),
    )
    for axis, name, x, y in labels:
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel(x), axis.set_ylabel(y)
        axis.spines[["top", "right"]].set_visible(False)
    for counts in (of_scores.yaxis, of_lengths.xaxis, of_positions.xaxis):
        counts.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    handles, names = of_scores.get_legend_handles_labels()
    figure.legend(handles, names, loc="upper right", ncols=len(names), frameon=False, fontsize=9)  # over no data
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "endoreward_fast"}):
        metadata = {"Date": None} if suffix == ".svg" else {}
        figure.savefig(stream, format=suffix[1:], dpi=130, metadata=metadata)
    return stream.getvalue()


def _by_position(axis: Any, kinds: dict[str, Kind]) -> str:
    """Draw mean rewards by position. Returns the title."""
    reached = max(kind.reached for kind in kinds.values())
    if left_out := [name for name, kind in kinds.items() if not kind.reached]:
        said = f"{' and '.join(left_out)}: fewer than {FEWEST} have a token"
        axis.text(0.5, 0.9, said, transform=axis.transAxes, ha="center", fontsize=9, color=LIGHT.ink)
    if not reached:
        axis.set_axis_off()
    together = -(-reached // POINTS) or 1
    for name, kind in kinds.items():
        if points := kind.by_position(together):
            at, mean, error = (list(column) for column in zip(*points, strict=True))
            dots = {"marker": _mark(name), "ms": 4} if len(points) <= FEW_POINTS else {}
            axis.plot(at, mean, lw=1.6, **dots, **_style(name, kind))
            edges = [[m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1)]
            axis.fill_between(at, *edges, color=COLOURS[name], alpha=0.2, lw=0)
    axis.axhline(0, color="#9aa3ae", lw=0.8)
    groups = f", {together} at a time" if together > 1 else ""
    return f"Mean reward by position{groups} (± 1 s.e.)"


def _style(name: str, kind: Kind) -> dict[str, Any]:
    """Return colour, label and line style. One kind is dashed, so that they differ without colour too."""
    line = "--" if name == "rejected" else "-"
    return {"color": COLOURS[name], "label": f"{name} ({len(kind.scores)})", "ls": line}


def _mark(name: str) -> str:
    return "x" if name == "rejected" else "o"
