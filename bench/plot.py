"""`python -m bench.plot`: draw bench/results/cpu.svg, the README's figure, from the JSON files beside it."""

import json

import matplotlib

from bench.harness.peers import OURS, OURS_COMPILED
from bench.harness.timing import RESULTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS_COLOUR, PEER_COLOUR, INK, MUTED = "#d1495b", "#b9c2cc", "#22272e", "#6b7480"
LINEAR, LOGITS = "linear qwen3-0.6b N=512 fp32", "logits qwen3-0.6b N=512 fp32"


def case_of(file_name: str, name: str) -> tuple[dict, dict]:
    """Return (environment, case) from bench/results/<file_name>.json."""
    record = json.loads((RESULTS / f"{file_name}.json").read_text())
    return record["environment"], next(case for case in record["cases"] if case["name"] == name)


def bars(axis, title: str, values: dict[str, float], text: dict[str, str], limit: float) -> None:
    """Draw horizontal bars in the JSON's order, ours last, each labelled with its value. Bars end at `limit`."""
    names = list(values)
    shown = [min(value, limit) for value in values.values()]
    colours = [OURS_COLOUR if name in (OURS, OURS_COMPILED) else PEER_COLOUR for name in names]
    axis.barh(names, shown, color=colours, height=0.62)
    for row, (name, value) in enumerate(zip(names, shown, strict=True)):
        weight = "bold" if name in (OURS, OURS_COMPILED) else "normal"
        axis.text(value + limit * 0.02, row, text[name], va="center", fontsize=9.5, color=INK, weight=weight)
    axis.set_title(title, loc="left", fontsize=10, color=INK, pad=8)
    axis.set_xlim(0, limit * 1.22)
    axis.invert_yaxis()
    axis.xaxis.set_visible(False)
    axis.tick_params(left=False, labelcolor=INK, labelsize=9.5)
    for spine in axis.spines.values():
        spine.set_visible(False)


def ratios(axis, title: str, case: dict) -> None:
    values = {name: peer["ratio"] for name, peer in case["peers"].items()}
    bars(axis, title, values, {name: f"{value:.2f}x" for name, value in values.items()}, min(2.0, max(values.values())))


def memory(axis, title: str, case: dict) -> None:
    values = {name: peer["extra_mib"] for name, peer in case["peers"].items()}
    bars(axis, title, values, {name: f"{value:.0f} MiB" for name, value in values.items()}, max(values.values()))


def draw() -> None:
    record, linear = case_of("cpu-linear", LINEAR)
    _, logits = case_of("cpu-logits", LOGITS)
    figure, axes = plt.subplots(1, 3, figsize=(13, 2.9), width_ratios=(1.1, 0.9, 1.3))
    rows, vocab = linear["rows"], linear["vocab"]
    ratios(axes[0], "time from hidden states (bare matmul = 1)", linear)
    memory(axes[1], "extra memory from hidden states", linear)
    axes[1].set_yticks([])
    ratios(axes[2], "time from logits (logsumexp = 1)", logits)
    threads = f"{record['cpu']}, {record['threads']} threads, torch {record['torch'].split('+')[0]}"
    shape = f"{rows} tokens, Qwen3-0.6B head (hidden {linear['hidden']}, vocabulary {vocab}), fp32"
    note = f"{shape}. {threads}, {record['date'][:10]}. Medians of ratios within rounds; less is better."
    figure.text(0.01, 0.02, note, fontsize=8.5, color=MUTED)
    figure.tight_layout(rect=(0, 0.08, 1, 1), w_pad=2.5)
    plt.rcParams["svg.hashsalt"] = "endoreward_fast"  # the same figures give the same file
    figure.savefig(RESULTS / "cpu.svg", metadata={"Date": None})
    figure.savefig(RESULTS / "cpu.png", dpi=150)


if __name__ == "__main__":
    draw()
