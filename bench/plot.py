"""`python -m bench.plot`: README's figure, cpu.svg and cpu-dark.svg, from the JSON beside them. Nothing is typed in.

The panels stand one above the other, so that a phone shows the letters at a legible size.
"""

import json
from dataclasses import dataclass

import matplotlib

from bench.harness.peers import OURS, OURS_COMPILED
from bench.harness.timing import RESULTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LINEAR, LOGITS = "linear qwen3-0.6b N=512 fp32", "logits qwen3-0.6b N=512 fp32"
WIDTH = 6.2  # inches: on a phone of 375 points a letter of 13 is 11 high


@dataclass(frozen=True)
class Theme:
    """Colours of one variant. The background is the page's."""

    suffix: str
    ours: str
    peer: str
    ink: str
    muted: str


THEMES = (
    Theme("", "#d1495b", "#b9c2cc", "#22272e", "#5b6470"),
    Theme("-dark", "#f0788a", "#56606c", "#e6edf3", "#9aa5b1"),
)


def case_of(file_name: str, name: str) -> tuple[dict, dict]:
    """(environment, case) from bench/results/<file_name>.json."""
    record = json.loads((RESULTS / f"{file_name}.json").read_text())
    return record["environment"], next(case for case in record["cases"] if case["name"] == name)


def bars(axis, title: str, values: dict[str, float], unit: str, theme: Theme) -> None:
    """Horizontal bars in the JSON's order, ours last, each with its value at its end."""
    limit = max(values.values())
    for row, (name, value) in enumerate(values.items()):
        ours = name in (OURS, OURS_COMPILED)
        axis.barh(row, value, color=theme.ours if ours else theme.peer, height=0.66)
        weight = "bold" if ours else "normal"
        axis.text(
            value + limit * 0.02, row, unit.format(value), va="center", fontsize=13, color=theme.ink, weight=weight
        )
    axis.set_title(title, loc="left", fontsize=14, weight="bold", color=theme.ink, pad=6, x=-0.735)
    axis.set_yticks(range(len(values)), [*values])
    axis.set_xlim(0, limit * 1.28)
    axis.invert_yaxis()
    axis.xaxis.set_visible(False)
    axis.patch.set_visible(False)
    axis.tick_params(left=False, labelcolor=theme.ink, labelsize=13)
    for spine in axis.spines.values():
        spine.set_visible(False)


def picture(theme: Theme) -> None:
    record, linear = case_of("cpu-linear", LINEAR)
    _, logits = case_of("cpu-logits", LOGITS)
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 7.6), height_ratios=(6, 6, 5))
    for axis, case, field, unit, title in (
        (axes[0], linear, "ratio", "{:.2f}x", "Time from hidden states (bare matmul = 1)"),
        (axes[1], linear, "extra_mib", "{:.0f} MiB", "Extra memory from hidden states"),
        (axes[2], logits, "ratio", "{:.2f}x", "Time from stored logits (logsumexp = 1)"),
    ):
        bars(axis, title, {name: peer[field] for name, peer in case["peers"].items()}, unit, theme)
    size = f"{linear['rows']} tokens, hidden size {linear['hidden']}, vocabulary {linear['vocab']:,}"
    where = f"{record['threads']} threads of {record['cpu']}, torch {record['torch'].split('+')[0]}"
    note = f"Less is better; medians. {size},\nfp32. {where}, {record['date'][:10]}."
    figure.text(0.01, 0.01, note, fontsize=10.5, color=theme.muted, va="bottom")
    figure.subplots_adjust(left=0.425, right=0.99, top=0.95, bottom=0.085, hspace=0.26)
    plt.rcParams["svg.hashsalt"] = "endoreward_fast"  # the same figures give the same file
    figure.savefig(RESULTS / f"cpu{theme.suffix}.svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)


def draw() -> None:
    for theme in THEMES:
        picture(theme)


if __name__ == "__main__":
    draw()
