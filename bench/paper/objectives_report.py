"""Tables, summary and picture of `bench.paper.objectives`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.paper import output
from bench.paper.curves import smooth

NAMES = {"reval": "ReVal", "tbrm": "TBRM", "grpo": "GRPO"}
COLOURS = {"reval": output.ENDOGENOUS, "tbrm": output.OTHER, "grpo": output.IMITATION}
CURVES = {
    "reward": "reward of sampled answers, training",
    "kl": "KL to the initial policy, nats an answer",
    "entropy": "entropy, nats a token",
    "length": "tokens of an answer",
}
SETS = {"quiz": "questions trained on", "others": "other questions"}
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""the 97.5% quantile of Student's t by degrees of freedom"""


def interval(values: Sequence[float]) -> list[float]:
    """Return the mean and its 95% interval by Student's t over seeds. NaN bounds for a single seed."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return [float(x.mean()), np.nan, np.nan]
    half = T_975[min(len(x) - 1, 9)] * x.std(ddof=1) / len(x) ** 0.5
    return [float(x.mean()), float(x.mean() - half), float(x.mean() + half)]


def table_of(runs: list[dict]) -> dict[str, dict]:
    """Return {objective: {set: {measure: {"before", "after", "gain", "ahead"}}, curve: its last 5 steps}}.

    Each cell is the mean over seeds and its 95% interval. "ahead" is the accuracy after training less GRPO's with the
    same seed.
    """

    def change(objective: str, name: str, measure: str) -> np.ndarray:
        return np.array([np.array(r["accuracy"][name][measure])[[0, -1]] for r in runs if r["objective"] == objective])

    found: dict[str, dict] = {}
    for objective in dict.fromkeys(r["objective"] for r in runs):
        mine = [r for r in runs if r["objective"] == objective]
        cells: dict[str, dict] = {c: interval([np.mean(r["curves"][c][-5:]) for r in mine]) for c in CURVES}
        for name in SETS:
            cells[name] = {}
            for measure in ("sampled", "greedy"):
                ours, grpo = change(objective, name, measure), change("grpo", name, measure)
                cells[name][measure] = {
                    "before": interval(ours[:, 0]),
                    "after": interval(ours[:, 1]),
                    "gain": interval(ours[:, 1] - ours[:, 0]),
                    "ahead": interval(ours[:, 1] - grpo[:, 1]),
                }
        found[objective] = cells
    return found


def percent(cell: list[float], sign: str = "") -> str:
    mean, low, high = (100 * x for x in cell)
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def report(found: dict[str, dict]) -> str:
    blocks = []
    for name, label in SETS.items():
        header = [f"{label}: accuracy, %, [95%]"]
        for measure in ("sampled", "greedy"):
            header += [f"{measure}, before", "after", "gain", "less GRPO's"]
        rows = []
        for objective, cells in found.items():
            row = [NAMES[objective]]
            for measure in ("sampled", "greedy"):
                cell = cells[name][measure]
                row += [percent(cell[k], "+" * (k in ("gain", "ahead"))) for k in ("before", "after", "gain", "ahead")]
            rows.append(tuple(row))
        blocks.append(output.table(tuple(header), rows))
    last = [(NAMES[o], *("{:.3f} [{:.3f}, {:.3f}]".format(*cells[c]) for c in CURVES)) for o, cells in found.items()]
    return "\n\n".join([*blocks, output.table(("last 5 steps", *CURVES), last)])


def sentence(found: dict[str, dict], seeds: int) -> str:
    """Summarise the results."""
    parts = []
    for objective, cells in found.items():
        quiz, others = cells["quiz"], cells["others"]
        parts.append(
            f"{NAMES[objective]}: sampled answers to the questions trained on are right in "
            f"{percent(quiz['sampled']['before'])}% before and {percent(quiz['sampled']['after'])}% after training; on "
            f"other questions, accuracy changes by {percent(others['sampled']['gain'], '+')} points (greedy: "
            f"{percent(others['greedy']['gain'], '+')})."
        )
        if objective != "grpo":
            ahead = [quiz["sampled"]["ahead"], others["sampled"]["ahead"]]
            parts.append(
                f"Its accuracy less GRPO's: {percent(ahead[0], '+')} points on the questions trained on "
                f"({verdict(ahead[0])}), {percent(ahead[1], '+')} on others ({verdict(ahead[1])})."
            )
    return output.paragraph(*parts, f"{seeds} seeds; brackets are 95% intervals over seeds.")


def verdict(cell: list[float]) -> str:
    _, low, high = cell
    return "ahead" if low > 0 else "behind" if high < 0 else "within the interval"


def draw(runs: list[dict], found: dict[str, dict], seeds: int, path: Path) -> None:
    figure, axes = output.panels(2, 3, width=4.4, height=2.9)

    def lines(axis, x, curves: np.ndarray, objective: str, label: str) -> None:
        axis.plot(x, curves.mean(0), color=COLOURS[objective], lw=1.8, label=label)
        axis.fill_between(x, curves.min(0), curves.max(0), color=COLOURS[objective], alpha=0.15, lw=0)

    for axis, (name, title) in zip(axes, (CURVES | SETS).items(), strict=True):
        for objective in found:
            mine = [r for r in runs if r["objective"] == objective]
            label = NAMES[objective] if axis is axes[0] else "_"
            if name in CURVES:
                curves = np.array([smooth(r["curves"][name]) for r in mine])
                lines(axis, np.arange(1, curves.shape[1] + 1), curves, objective, label)
            else:
                curves = np.array([r["accuracy"][name]["sampled"] for r in mine])
                lines(axis, mine[0]["accuracy"][name]["step"], 100 * curves, objective, label)
        output.title(axis, title if name in CURVES else f"accuracy on {title}, %")
        axis.set_xlabel("step")
    note = f"{seeds} seeds; lines: means over seeds, the first four also over 5 steps; bands: lowest and highest seed."
    print(output.picture(figure, axes, note, path))
