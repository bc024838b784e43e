"""The record as text and as a picture: speed and latency against clients, and memory under chaos."""

import json
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from bench.harness.charts import INK, MUTED, quiet

COLOURS = ("#d1495b", "#00798c", "#edae49", "#6a4c93", "#52796f", "#3d5a80", "#b08968")
TARGET = 0.9
SHADES = {"p50": "-", "p95": "--", "p99": ":"}


def title(case: dict) -> str:
    return f"{case['model']}, {case['workload']}"


def table(case: dict) -> str:
    """Format one case of speed: tokens a second, ratios in wall and processor time, latencies."""
    lines = [
        f"{title(case)}, {case['dtype']}: {case['rows']} rows, {case['tokens']} tokens ({case['distinct']} distinct), "
        f"{case['threads']} thread(s), {case['rounds']} rounds, load {case['load']} to {case['load_after']}",
        f"  {'':42}{'tokens/s':>9}{'ratio':>7}{'quartiles':>12}{'minima':>8}{'lists':>7}{'cpu':>7}{'ms/row':>8}"
        f"{'p50':>8}{'p95':>8}{'p99':>8}{'client':>8}{'gap':>9}",
    ]
    for name, arm in case["arms"].items():
        quartiles = f"{arm['ratio_low']:.2f}-{arm['ratio_high']:.2f}"
        line = f"  {name:42}{arm['tokens_per_s']:9.0f}{arm['ratio']:7.3f}{quartiles:>12}"
        line += f"{arm['ratio_of_minima']:8.3f}{arm['ratio_to_lists']:7.3f}{arm['cpu_ratio']:7.3f}"
        line += f"{arm['ms_of_processor_per_row']:8.2f}"
        if arm["clients"]:
            line += "".join(f"{arm['latency_ms'][q]:8.1f}" for q in SHADES)
            line += f"{arm['generator_share']:8.1%}{arm['gap']:9.1g}"
        lines.append(line)
    return "\n".join(lines)


def sentence(case: dict) -> str:
    """Summarise one run of chaos."""
    latency, kinds = case["latency_ms"], case["kinds"]
    memory = "; ".join(
        f"{name} {m['first']:.0f} to {m['last']:.0f} MiB"
        + ("" if m["growth_of_second_half"] is None else f" ({m['growth_of_second_half']:+.2%} in the second half)")
        for name, m in case["memory_mib"].items()
    )
    wrong = f"{len(case['wrong'])} wrong, the first: {case['wrong'][0]}" if case["wrong"] else "all checks passed"
    return (
        f"{case['server']}, {title(case)}: {case['requests']:,} requests in {case['seconds']:.0f} s; "
        f"rows {kinds['row']}, cancelled {kinds.get('cancelled')}, refused for a time {case['refused_for_a_time']}; "
        f"largest difference {case['gap']:.2g}; p50 {latency['p50']:.0f}, p95 {latency['p95']:.0f}, "
        f"p99 {latency['p99']:.0f} ms; {memory}; {wrong}"
    )


def draw(folder: Path) -> Path:
    """Draw serving.png from serving.json in `folder`."""
    record = json.loads((folder / "serving.json").read_text())
    speeds = [case for case in record["cases"] if case["kind"] == "speed"]
    storms = [case for case in record["cases"] if case["kind"] == "chaos"]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6))
    of_speed(axes[0], speeds)
    of_latency(axes[1], speeds)
    of_memory(axes[2], storms)
    for axis in axes:
        quiet(axis)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8, loc="upper left", ncol=2 if axis is axes[2] else 1)
    where = record["environment"]
    note = (
        f"{where['cpu']}, {where['cores']} cores shared by server, clients and other work, {where['threads']} thread "
        f"for scoring, torch {where['torch']}, {where['date'][:10]}. Medians over rounds; bars are quartiles."
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1), w_pad=2)
    figure.text(0.01, 0.015, note, fontsize=8, color=MUTED)
    path = folder / "serving.png"
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path


def served(case: dict, rows_per_request: int = 1) -> list[dict]:
    return [arm for arm in case["arms"].values() if arm["clients"] and arm["rows_per_request"] == rows_per_request]


def of_speed(axis, cases: list[dict]) -> None:
    """Tokens a second over those in-process, against clients that ask for one row each."""
    for case, colour in zip(cases, COLOURS, strict=False):
        arms = served(case)
        ratio = [arm["ratio"] for arm in arms]
        error = [
            [arm["ratio"] - arm["ratio_low"] for arm in arms], [arm["ratio_high"] - arm["ratio"] for arm in arms]
        ]  # fmt: skip
        axis.errorbar(
            [arm["clients"] for arm in arms], ratio, error, marker="o", ms=4, lw=1.8, color=colour, label=title(case)
        )
    axis.axhline(TARGET, color=INK, lw=0.8, ls="--")
    axis.set_title("tokens a second / in-process, one list", loc="left", fontsize=10, color=INK)
    axis.set_ylim(0, 1.3)
    clients_axis(axis, cases)


def of_latency(axis, cases: list[dict]) -> None:
    """Percentiles of the latency of one row against clients."""
    for case, colour in zip(cases, COLOURS, strict=False):
        for quantile, style in SHADES.items():
            arms = served(case)
            label = f"{title(case)}, {quantile}" if case is cases[0] else None
            values = [arm["latency_ms"][quantile] for arm in arms]
            axis.plot([arm["clients"] for arm in arms], values, style, marker="o", ms=3, color=colour, label=label)
    axis.set_yscale("log")
    axis.set_ylim(10, 10**5)
    axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_title("latency of a request for one row, ms", loc="left", fontsize=10, color=INK)
    clients_axis(axis, cases)


def clients_axis(axis, cases: list[dict]) -> None:
    axis.set_xscale("log", base=2)
    ticks = sorted({arm["clients"] for case in cases for arm in served(case)})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlabel("clients", fontsize=9, color=MUTED)


def of_memory(axis, cases: list[dict]) -> None:
    """Resident memory against answers."""
    colours = cycle(COLOURS)
    for case in cases:
        for name, memory in case["memory_mib"].items():
            seen = memory["readings"]
            label = case["server"] if name == "server" else f"{case['server'].partition(',')[0]}: {name}"
            axis.plot([r["rows"] for r in seen], [r["mib"] for r in seen], lw=1.4, color=next(colours), label=label)
        if case["killed"]:
            axis.axvline(case["requests"] / 2, color=INK, lw=0.8, ls=":")
    axis.set_title("resident memory, MiB", loc="left", fontsize=10, color=INK)
    axis.set_ylim(0, 1.4 * axis.get_ylim()[1])
    axis.set_xlabel("requests answered", fontsize=9, color=MUTED)
