"""Tables, summary and picture of `bench.paper.rl`."""

from pathlib import Path

import numpy as np

from bench.paper import output
from bench.paper.curves import Collapse, collapse, smooth

ARMS = {
    "endogenous": "endogenous reward",
    "token level": "endogenous, token level",
    "random": "random reward",
    "verifiable": "verifiable reward",
}
COLOURS = {
    "endogenous": output.ENDOGENOUS,
    "token level": "#2a9d8f",
    "random": output.GUIDE,
    "verifiable": output.IMITATION,
}
MEASURES = ("sampled", "greedy", "number")
CURVES = {
    "accuracy": "sampled answers that are right, training",
    "reward": "endogenous reward of an answer, nats",
    "kl": "KL to the initial policy, nats a token",
    "entropy": "entropy, nats a token",
    "length": "tokens of an answer",
}


def table_of(runs: list[dict]) -> dict[str, dict]:
    """Return {arm: {"quiz", "others": {"before", "after", "gain": {measure: [mean, lowest, highest of seeds]}}}}.

    "collapse" holds a `curves.Collapse` for each seed.
    """

    def over_seeds(values: list[float]) -> list[float]:
        return [float(f(values)) for f in (np.mean, np.min, np.max)]

    found: dict[str, dict] = {}
    for arm in dict.fromkeys(r["arm"] for r in runs):
        mine = [r for r in runs if r["arm"] == arm]
        found[arm] = {"collapse": [collapse(r["curves"]) for r in mine]}
        measures = [m for m in MEASURES if m in mine[0]["quiz"]["before"]]
        for name in ("quiz", "others"):
            cells = {
                when: {m: over_seeds([r[name][when][m] for r in mine]) for m in measures}
                for when in ("before", "after")
            }
            gains = {m: over_seeds([r[name]["after"][m] - r[name]["before"][m] for r in mine]) for m in measures}
            found[arm][name] = cells | {"gain": gains}
    return found


def percent(cell: list[float], sign: str = "") -> str:
    mean, low, high = (100 * x for x in cell)
    return f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def report(found: dict[str, dict], name: str) -> str:
    measures = [m for m in MEASURES if all(m in cells[name]["gain"] for cells in found.values())]
    header = [f"{name}: accuracy, %, mean (range) over seeds"]
    for m in measures:
        header += [f"{m}, before", "after", "gain"]
    rows = []
    for arm, cells in found.items():
        row = [ARMS[arm]]
        for m in measures:
            row += [percent(cells[name][when][m], "+" * (when == "gain")) for when in ("before", "after", "gain")]
        rows.append(tuple(row))
    return output.table(tuple(header), rows)


def report_collapse(found: dict[str, dict]) -> str:
    header = ("collapse: step, by seed", "accuracy stays below its start", "entropy stays below a tenth of its start")
    return output.table(header, [(ARMS[arm], *_steps(cells["collapse"])) for arm, cells in found.items()])


def _steps(collapses: list[Collapse]) -> tuple[str, str]:
    fell = [f"{c.accuracy or 'none'}{'' if c.rose or not c.accuracy else ' (never rose)'}" for c in collapses]
    return ", ".join(fell), ", ".join(str(c.entropy or "none") for c in collapses)


def draw(runs: list[dict], found: dict[str, dict], note: str, path: Path) -> None:
    figure, axes = output.panels(2, 3, width=4.4, height=2.9)
    for axis, (name, label) in zip(axes, CURVES.items(), strict=False):
        for arm in found:
            curves = np.array([smooth(r["curves"][name]) for r in runs if r["arm"] == arm])
            x = np.arange(1, curves.shape[1] + 1)
            axis.plot(x, curves.mean(0), color=COLOURS[arm], lw=1.8, label=ARMS[arm])
            axis.fill_between(x, curves.min(0), curves.max(0), color=COLOURS[arm], alpha=0.15, lw=0)
        output.title(axis, label)
        axis.set_xlabel("step")
    for axis in axes[1:-1]:  # one legend for all
        for line in axis.get_lines():
            line.set_label("_")
    last = axes[-1]
    for at, (arm, cells) in enumerate(found.items()):
        for offset, name in ((-0.2, "quiz"), (0.2, "others")):
            mean, low, high = (100 * x for x in cells[name]["gain"]["sampled"])
            shade = {"alpha": 0.45} if name == "others" else {}
            spread = [[mean - low], [high - mean]]
            last.bar(at + offset, mean, 0.36, color=COLOURS[arm], yerr=spread, ecolor=output.INK, **shade)
    last.axhline(0, color=output.INK, lw=0.8)
    last.set_xticks(range(len(found)), [name.replace(" ", "\n") for name in found], fontsize=8)
    output.title(last, "gain in accuracy, points (pale: other questions)")
    print(output.picture(figure, axes, note, path))


def sentence(found: dict[str, dict], runs: list[dict]) -> str:
    """Summarise the results."""
    parts = []
    for arm, cells in found.items():
        quiz = cells["quiz"]
        others, others_greedy = (percent(cells["others"]["gain"][m], "+") for m in ("sampled", "greedy"))
        sampled, greedy = ([percent(quiz[w][m]) for w in ("before", "after")] for m in ("sampled", "greedy"))
        parts.append(
            f"{ARMS[arm].capitalize()}: sampled answers to the training questions are right in {sampled[0]}% before "
            f"and {sampled[1]}% after training (greedy answers: {greedy[0]} and {greedy[1]}). On other questions, the "
            f"accuracy changes by {others} points (greedy: {others_greedy})."
        )
        if "number" in quiz["gain"]:
            before, after = (percent(cells["others"][when]["number"]) for when in ("before", "after"))
            parts.append(
                f"Whatever their form, greedy answers to other questions end in the right word in {before}% before and "
                f"{after}% after."
            )
        fell, gone = _steps(cells["collapse"])
        parts.append(
            f"Step, by seed, from which accuracy in training stays below its start: {fell}. Step from which entropy is "
            f"below a tenth: {gone}."
        )
    lengths = [smooth(r["curves"]["length"]) for r in runs if r["arm"] == "endogenous"]
    if lengths:
        first, last = (np.mean([c[i] for c in lengths]) for i in (4 if len(lengths[0]) > 4 else 0, -1))
        parts.append(
            f"Answers under the endogenous reward have {first:.1f} tokens in the first steps, {last:.1f} in the last."
        )
    return output.paragraph(*parts)
