"""gpu.json -> gpu.png beside it: time against N, extra memory against N, and the roofline. Nothing is typed in."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench import shapes
from bench.peers_gpu import CHUNKED, FUSED

COLOURS = {FUSED: "#d1495b", CHUNKED: "#2e6f95"}
GREYS = ("#22272e", "#6b7480", "#9aa3ad", "#b9c2cc", "#c9b458", "#7fb069", "#8d6a9f")


def draw(folder: Path) -> Path:
    record = json.loads((folder / "gpu.json").read_text())
    linear = [case for case in record["cases"] if case["subject"] == "linear"]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    widest = max((case["shape"] for case in linear), key=lambda name: shapes.SHAPES[name].hidden)
    cases = sorted((case for case in linear if case["shape"] == widest), key=lambda case: case["rows"])
    names = list(dict.fromkeys(name for case in cases for name in case["peers"]))
    greys = iter(GREYS)
    colours = {name: COLOURS.get(name) or next(greys) for name in names}
    for axis, field, title in (
        (axes[0], "ratio", f"time / torch.mm against N ({widest})"),
        (axes[1], "extra_mib", f"extra memory against N, MiB ({widest})"),
    ):
        for name in names:
            points = [(case["rows"], case["peers"][name][field]) for case in cases if name in case["peers"]]
            axis.plot(*zip(*points, strict=True), marker="o", ms=4, label=name, color=colours[name])
        axis.set_xscale("log", base=2)
        axis.set_title(title, fontsize=10, loc="left")
    axes[1].set_yscale("log")
    roofline(axes[2], linear, colours)
    axes[0].legend(fontsize=7.5, frameon=False)
    about = record["environment"]
    versions = f"torch {about['torch']}, Triton {about['triton']}"
    figure.text(0.01, 0.01, f"{about['device']}, {versions}, {about['date'][:10]}", fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    path = folder / "gpu.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def roofline(axis, cases: list[dict], colours: dict[str, str]) -> None:
    """TFLOP/s against flops per byte of the least traffic; the roof is the best matmul that was measured."""
    for case in cases:
        shape = shapes.SHAPES[case["shape"]]
        intensity = shapes.linear_flops(case["rows"], shape) / shapes.linear_bytes(case["rows"], shape, 2)
        for name, peer in case["peers"].items():
            axis.plot(intensity, peer["tflops"], marker="o", ms=4, color=colours.get(name, "#b9c2cc"))
    roof = max(peer["tflops"] for case in cases for name, peer in case["peers"].items() if name == case["ceiling"])
    axis.axhline(roof, color="#22272e", lw=0.8, ls="--")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_title("TFLOP/s against flops per byte", fontsize=10, loc="left")
