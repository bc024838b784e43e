"""compare.svg and compare-dark.svg: the error of each case and the time of each arm, from the record alone."""

from pathlib import Path

import matplotlib

from bench.compare import measure, page
from bench.harness.peers import OURS
from bench.plot import THEMES, Theme

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

MARKS = dict(zip(measure.DTYPES, ("o", "D"), strict=True))
FLOOR = 1e-8  # the least error that is drawn, in nats


def draw(record: dict, folder: Path) -> list[Path]:
    return [_draw(record, folder / f"compare{theme.suffix}.svg", theme) for theme in THEMES]


def _draw(record: dict, path: Path, theme: Theme) -> Path:
    names = [
        name
        for name, arm in record["arms"].items()
        if "failed" not in arm and any(page.measured(arm[dtype]) for dtype in MARKS)
    ]
    figure, (error, time) = plt.subplots(
        1, 2, figsize=(11.0, 0.42 * len(names) + 1.9), width_ratios=(3, 2), sharey=True
    )
    for at, name in enumerate(names):
        arm = record["arms"][name]
        colour = theme.ours if name.startswith(OURS) else theme.muted
        for shift, (dtype, mark) in zip((-0.17, 0.17), MARKS.items(), strict=True):
            found, y = arm[dtype], at + shift
            if not page.measured(found):
                continue
            errors = [
                max(case["statistics"]["nll"], FLOOR)
                for case_name, case in found["accuracy"].items()
                if case_name != page.APART and "nll" in case["statistics"]
            ]
            filled = colour if found["repeatability"].get("rows alone") else "none"
            if errors:
                error.plot([min(errors), max(errors)], [y, y], color=colour, lw=1)
                error.plot(errors, [y] * len(errors), mark, ms=5, mec=colour, mfc=filled, ls="")
            span = (found["times"] or {}).get("forward", {})
            if "ratio" in span:
                time.plot([span["ratio_low"], span["ratio_high"]], [y, y], color=colour, lw=1)
                time.plot([span["ratio"]], [y], mark, ms=5, mec=colour, mfc=filled)
    error.set_xscale("log")
    error.set_yticks(range(len(names)), names)
    error.invert_yaxis()
    error.set_title(
        "Error of nll against float64 (nats), one mark for each case", loc="left", fontsize=10, color=theme.ink
    )
    time.set_xscale("log")
    time.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    time.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    time.xaxis.set_minor_formatter(ticker.NullFormatter())
    time.axvline(1.0, color=theme.muted, lw=1, ls="--")
    time.set_title("Time of the forward (bare matmul = 1)", loc="left", fontsize=10, color=theme.ink)
    for axis in (error, time):
        axis.patch.set_visible(False)
        axis.tick_params(colors=theme.ink, labelsize=9)
        for spine in axis.spines.values():
            spine.set_color(theme.muted)
    note = (
        f"Circles, diamonds: {', '.join(MARKS)}. The offset of 1e4 is left out. Filled: a row alone has the same bits "
        "as in the batch. Without a time: in Triton's interpreter."
    )
    figure.text(0.01, 0.01, note, fontsize=8.5, color=theme.muted, va="bottom")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    plt.rcParams["svg.hashsalt"] = "endoreward_fast"  # the same figures give the same file
    figure.savefig(path, metadata={"Date": None}, transparent=True)
    plt.close(figure)
    return path
