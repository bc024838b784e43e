"""The record as a table, and as a picture: tokens a second and peak memory of every arm."""

import json
from pathlib import Path

import matplotlib

from bench.scoring.arms import OURS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.harness.charts import INK, MUTED, OURS_COLOURS

OTHERS = "#b9c2cc"


def table(case: dict) -> str:
    """Format one case: tokens a second with quartiles, times ours without sharing, batch size, memory, gap."""
    lines = [
        f"{case['dtype']}: {case['rows']} rows, {case['tokens']} tokens ({case['distinct']} distinct), "
        f"{case['threads']} thread(s), {case['rounds']} rounds",
        f"  {'':40}{'tokens/s':>9}{'quartiles':>12}{'wall':>8}{'time':>7}{'batch':>13}{'MiB':>8}{'gap':>10}",
    ]
    for name, arm in case["arms"].items():
        quartiles = f"{arm['tokens_per_s_low']:.0f}-{arm['tokens_per_s_high']:.0f}"
        wall = case["tokens"] / arm["wall"]["median_s"]
        lines.append(
            f"  {name:40}{arm['tokens_per_s']:9.0f}{quartiles:>12}{wall:8.0f}{arm['ratio']:7.2f}"
            f"{arm['size']:>6} {arm['unit']:6}{arm['extra_mib']:8.0f}{arm['gap']:10.2g}"
        )
    lines += [f"  {name:40}absent: {reason}" for name, reason in case["absent"].items()]
    lines += [f"  {name:40}refused: {reason}" for name, reason in case["refused"].items()]
    return "\n".join(lines)


def draw(folder: Path) -> list[Path]:
    """Draw scoring.svg and scoring.png from scoring.json in `folder`. Return their paths."""
    record = json.loads((folder / "scoring.json").read_text())
    cases, where = record["cases"], record["environment"]
    counts = [len(case["arms"]) for case in cases]
    figure, axes = plt.subplots(
        len(cases), 2, figsize=(11.5, 0.9 + sum(0.34 * count + 0.75 for count in counts)), squeeze=False,
        height_ratios=counts, width_ratios=(1, 1),
    )  # fmt: skip
    for (speed, memory), case in zip(axes, cases, strict=True):
        arms = dict(sorted(case["arms"].items(), key=lambda item: item[1]["tokens_per_s"]))
        bars(speed, f"{case['dtype']}: tokens a processor second", {n: a["tokens_per_s"] for n, a in arms.items()})
        low = [a["tokens_per_s"] - a["tokens_per_s_low"] for a in arms.values()]
        high = [a["tokens_per_s_high"] - a["tokens_per_s"] for a in arms.values()]
        speed.errorbar(
            [a["tokens_per_s"] for a in arms.values()], range(len(arms)), xerr=[low, high], fmt="none", ecolor=INK, lw=1
        )
        bars(memory, "peak memory over the loaded model, MiB", {n: a["extra_mib"] for n, a in arms.items()})
        memory.set_yticks([])
    first = cases[0]
    note = (
        f"{first['rows']} RM-Bench rows, {first['tokens']} tokens, {first['threads']} thread of {where['cpu']}, torch "
        f"{where['torch']}, {where['date'][:10]}. Medians of {first['rounds']} rounds; lines are quartiles."
    )
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1), h_pad=1.6)
    figure.text(0.01, 0.08 / figure.get_figheight(), note, fontsize=8, color=MUTED)
    plt.rcParams["svg.hashsalt"] = "endoreward_fast"  # the same figures give the same file
    paths = [folder / "scoring.svg", folder / "scoring.png"]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=140)
    plt.close(figure)
    return paths


def bars(axis, title: str, values: dict[str, float]) -> None:
    """Draw horizontal bars, each with its value at its end."""
    limit = max(values.values())
    for place, (name, value) in enumerate(values.items()):
        axis.barh(place, value, height=0.66, color=OURS_COLOURS[OURS] if name.startswith(OURS) else OTHERS)
        axis.text(value + limit * 0.03, place, f"{value:.0f}", va="center", fontsize=9, color=INK)
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_yticks(range(len(values)), [*values], fontsize=9)
    axis.set_xlim(0, limit * 1.18)
    axis.xaxis.set_visible(False)
    axis.tick_params(left=False, labelcolor=INK)
    for spine in axis.spines.values():
        spine.set_visible(False)
