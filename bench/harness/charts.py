"""`python -m bench.harness.charts FOLDER`: draw the JSON that `make gpu` or bench.sweep wrote to a folder.

Writes time-against-N.png, time-against-V.png and memory-against-N.png. If the record has both ceilings, bare matmuls
and a device copy, also roofline.png. All values come from the JSON; a picture without data is not drawn.
"""

import json
import sys
from pathlib import Path

import matplotlib

from bench.harness.peers import BARE_MATMUL, DEVICE_COPY, OURS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

INK, MUTED = "#22272e", "#6b7480"
OURS_COLOURS = {
    OURS: "#d1495b",
    f"{OURS}, auto": "#b23a6f",
    f"{OURS}, fused": "#d1495b",
    f"{OURS}, chunked": "#edae49",
    f"{OURS}, compiled": "#8d1d2c",
}
PEER_COLOURS = (
    "#00798c",
    "#3d5a80",
    "#6a4c93",
    "#52796f",
    "#8a817c",
    "#457b9d",
    "#b08968",
    "#9a8c98",
    "#2a9d8f",
    "#606c38",
    "#a5a58d",
)
CEILINGS = (BARE_MATMUL, DEVICE_COPY)
MARKERS = "osD^vP"


def load(files: list[Path]) -> tuple[dict, list[dict]]:
    """Return (environment of the first file, all measured cases)."""
    records = [json.loads(file.read_text()) for file in files]
    cases = [case for record in records for case in record["cases"] if "peers" in case]
    return records[0]["environment"], cases


def families(cases: list[dict], along: str) -> dict[str, list[dict]]:
    """Group cases that differ in `along` ("rows" or "vocab") only, sorted by it: {title: two or more cases}."""
    found: dict[str, list[dict]] = {}
    for case in cases:
        sizes = {"rows": f"N={case['rows']}", "vocab": f"V={case['vocab']}"}
        if along == "vocab" and not case["shape"].startswith("D"):
            continue  # a real model's head, not a point of the sweep: its peers differ
        hidden = f", D={case['hidden']}" if case["hidden"] else ""
        del sizes[along]
        title = f"{case['subject']}, {case['dtype']}{hidden}, {', '.join(sizes.values())}"
        found.setdefault(title, []).append(case)
    found = {
        title: sorted({c[along]: c for c in group}.values(), key=lambda c: c[along]) for title, group in found.items()
    }
    return {title: group for title, group in found.items() if len(group) > 1}


def colours(cases: list[dict]) -> dict[str, str]:
    """Return one colour for each peer, the same in all pictures of a record. Ceilings are drawn in ink."""
    names = dict.fromkeys(name for case in cases for name in case["peers"])
    others = [name for name in names if name not in OURS_COLOURS and name not in CEILINGS]
    chosen = {name: PEER_COLOURS[i % len(PEER_COLOURS)] for i, name in enumerate(others)}
    return {name: OURS_COLOURS.get(name) or chosen.get(name) or INK for name in names}


def panel(axis, title: str, group: list[dict], along: str, field: str, scale: float, colour: dict[str, str]) -> None:
    """Draw one line for each peer, with the quartiles of its times as a band."""
    for name in dict.fromkeys(name for case in group for name in case["peers"]):
        points = [(case[along], case["peers"][name]) for case in group if name in case["peers"]]
        points = [(x, peer) for x, peer in points if peer[field] is not None]
        if not points:
            continue
        ours, ceiling = name in OURS_COLOURS, name in CEILINGS
        style = {"color": colour[name], "lw": 2.2 if ours else 1.2, "zorder": 3 if ours else 2}
        xs = [x for x, _ in points]
        ys = [max(peer[field] * scale, FLOOR if field == "extra_mib" else 0.0) for _, peer in points]
        axis.plot(xs, ys, "--" if ceiling else "-", marker="" if ceiling else "o", ms=3.5, label=name, **style)
        if field == "median_s":
            low, high = ([peer[q] * scale for _, peer in points] for q in ("low_s", "high_s"))
            axis.fill_between(xs, low, high, color=colour[name], alpha=0.15, lw=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_title(title, loc="left", fontsize=9.5, color=INK)
    ticks = [case[along] for case in group]
    axis.set_xticks(ticks, [f"{x // 1024}K" if x >= 16384 else str(x) for x in ticks])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    quiet(axis)


FLOOR = 0.1  # MiB: the lowest value drawn on a logarithmic axis


def quiet(axis) -> None:
    axis.grid(True, color="#e6e9ed", lw=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(colors=MUTED, labelsize=8.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def against(
    environment: dict, cases: list[dict], along: str, field: str, scale: float, unit: str, path: Path
) -> Path | None:
    """Draw one picture with a panel for each family of cases; None if there are none."""
    groups = {
        title: group
        for title, group in families(cases, along).items()
        if any(peer[field] is not None for case in group for peer in case["peers"].values())
    }
    if not groups:
        return None
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns + 0.4, 3.4 * rows + 1.0), squeeze=False)
    colour = colours(cases)
    for axis, (title, group) in zip(axes.flat, groups.items(), strict=False):
        panel(axis, title, group, along, field, scale, colour)
        axis.set_xlabel({"rows": "N, tokens", "vocab": "V, vocabulary"}[along], fontsize=9, color=MUTED)
        axis.set_ylabel(unit, fontsize=9, color=MUTED)
    for axis in list(axes.flat)[len(groups) :]:
        axis.set_visible(False)
    return finish(figure, axes.flat, environment, path)


def roofline(environment: dict, cases: list[dict], path: Path) -> Path | None:
    """Draw the rate of the linear cases against flops per byte, below the ceilings measured in the same run.

    Flops and bytes are the formulas' minimum.
    """
    matmul = [case["peers"][BARE_MATMUL]["tflops"] for case in cases if BARE_MATMUL in case["peers"]]
    copy = [case["peers"][DEVICE_COPY]["gb_per_s"] for case in cases if DEVICE_COPY in case["peers"]]
    points = [case for case in cases if case["subject"] == "linear" and not case["shape"].startswith("D")]
    if not (matmul and copy and points):
        return None
    peak, bandwidth = max(matmul), max(copy)
    figure, axis = plt.subplots(figsize=(8.6, 5.0))
    intensity = [case["flops"] / case["bytes"] for case in points]
    low, high = min(intensity) / 2, max(intensity) * 2
    ridge = peak * 1e3 / bandwidth
    bend = sorted({low, high, min(max(ridge, low), high)})
    axis.plot(bend, [min(peak, x * bandwidth / 1e3) for x in bend], "--", color=INK, lw=1.2)
    label = f"ceilings of this run: {peak:.0f} TFLOP/s ({BARE_MATMUL}), {bandwidth:.0f} GB/s ({DEVICE_COPY})"
    axis.set_title(label, loc="left", fontsize=9.5, color=INK)
    colour, shown = colours(cases), set()
    hidden = sorted({case["hidden"] for case in points})
    for x, case in zip(intensity, points, strict=True):
        for name, peer in case["peers"].items():
            ours = name in OURS_COLOURS
            marker = MARKERS[hidden.index(case["hidden"]) % len(MARKERS)]
            style = {"color": colour[name], "s": 46 if ours else 22, "zorder": 3 if ours else 2, "marker": marker}
            axis.scatter([x], [peer["tflops"]], label=None if name in shown else name, **style)
            shown.add(name)
    shapes = ", ".join(f"{mark} D={d}" for mark, d in zip("●■◆▲▼✚", hidden, strict=False))
    axis.set_xlabel(f"FLOP per byte, least traffic by formula    ({shapes})", fontsize=9, color=MUTED)
    axis.set_ylabel("TFLOP/s", fontsize=9, color=MUTED)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    quiet(axis)
    return finish(figure, [axis], environment, path)


def finish(figure, axes, environment: dict, path: Path) -> Path:
    """Add one legend for all panels and a note on the machine, then save the file."""
    entries = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    height = figure.get_figheight()
    columns = max(1, int(figure.get_figwidth() / 2.3))
    lines = -(-len(entries) // columns)
    figure.tight_layout(rect=(0, (0.38 + 0.2 * lines) / height, 1, 1), w_pad=1.5, h_pad=1.5)
    at = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.26 / height), "ncol": columns, "fontsize": 8.5}
    figure.legend(entries.values(), entries.keys(), frameon=False, **at)
    where = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    note = f"{where}, torch {environment['torch']}, {environment['date'][:10]}. Medians; bands are quartiles."
    figure.text(0.01, 0.08 / height, note, fontsize=8, color=MUTED)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path


def draw(folder: Path, pattern: str = "gpu-*.json", prefix: str = "") -> list[Path]:
    """Draw every picture that the record has data for. Return their paths."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise FileNotFoundError(f"{folder} has no file {pattern}: run the benchmark first")
    environment, cases = load(files)
    named = {name: folder / f"{prefix}{name}.png" for name in ("time-against-N", "time-against-V", "memory-against-N")}
    made = [
        against(environment, cases, "rows", "median_s", 1e3, "ms", named["time-against-N"]),
        against(environment, cases, "vocab", "median_s", 1e3, "ms", named["time-against-V"]),
        against(environment, cases, "rows", "extra_mib", 1.0, "extra MiB at the peak", named["memory-against-N"]),
        roofline(environment, cases, folder / f"{prefix}roofline.png"),
    ]
    return [path for path in made if path]


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1])):
        print(path)
