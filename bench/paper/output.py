"""Shared parts of the commands in this folder: arguments, the JSON record, tables, the layout of pictures."""

import argparse
import dataclasses
import json
import math
import re
import textwrap
from pathlib import Path

import matplotlib
import numpy as np

from bench.harness.environment import environment
from endoreward_fast import EndoRewardModel

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.harness.charts import INK, MUTED, quiet

RESULTS = Path(__file__).parents[1] / "results"
POCKET = "pocket"
IMITATION, ENDOGENOUS, OTHER, GUIDE = "#3d5a80", "#d1495b", "#edae49", "#b9c2cc"


def arguments(doc: str, seeds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="first seed; the others are the next integers")
    parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the picture")
    return parser


def with_model(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add --model to a parser, for the claims about a model."""
    parser.add_argument("--model", default=POCKET, help="pocket, smollm2, or another model's name or folder")
    return parser


def load(name: str) -> EndoRewardModel:
    """Load a model: a real one in bfloat16, because two cores read it twice as fast so."""
    return EndoRewardModel.from_pretrained(name, dtype=None if name == POCKET else "bfloat16")


def named(claim: str, model: str = POCKET) -> str:
    """Return the name of a claim's files: "rl" for the embedded model, "rl-smollm2" for another."""
    return claim if model == POCKET else f"{claim}-{re.sub(r'[^A-Za-z0-9._-]+', '-', model).strip('-')}"


def write(claim: str, settings: dict, results: dict, folder: Path, module: str = "") -> Path:
    """Write folder/paper-<claim>.json, with the model's name for another than the embedded one. Return its path.

    `module` is that of the command, if its name is not the claim's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = settings.get("model", POCKET)
    path = folder / f"paper-{named(claim, model)}.json"
    command = f"python -m bench.paper.{module or claim}" + (f" --model {model}" if model != POCKET else "")
    record = {"command": command, "environment": environment(), "settings": settings}
    path.write_text(json.dumps(_finite(record | {"results": results}), indent=1, allow_nan=False) + "\n")
    return path


def _finite(value):
    """Return a value as plain JSON, with None for a number that is not finite: JSON has none."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def paragraph(*parts: str) -> str:
    """Join the parts and wrap the text."""
    return textwrap.fill(" ".join(parts), 118)


def table(header: tuple[str, ...], rows: list[tuple]) -> str:
    """Format a table with the first column aligned left and the others right."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def panels(rows: int, columns: int, width: float = 4.6, height: float = 3.5):
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns + 0.4, height * rows + 0.3), squeeze=False)
    return figure, list(axes.flat)


def title(axis, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=10, color=INK)


def quartiles(errors) -> np.ndarray:
    return np.quantile(errors, [0.25, 0.75], axis=0)


def of_the_mean(errors) -> np.ndarray:
    """Bootstrap the 95% interval of the mean over seeds. Quartiles are 0 where most seeds have no error."""
    rng = np.random.default_rng(0)
    means = [errors[rng.integers(len(errors), size=len(errors))].mean(0) for _ in range(1000)]
    return np.quantile(means, [0.025, 0.975], axis=0)


def band(axis, x, errors, colour: str, label: str, spread=quartiles) -> None:
    """Draw the mean over seeds of errors (seeds, len(x)) as a line, with `spread` as a band."""
    errors = np.asarray(errors)
    axis.plot(x, errors.mean(0), marker="o", ms=3.5, color=colour, lw=1.8, label=label)
    axis.fill_between(x, *spread(errors), color=colour, alpha=0.15, lw=0)


def guide(axis, x, at: float, power: float, label: str) -> None:
    """Draw a dashed line of slope `power` through (x[0], at)."""
    axis.plot(x, [at * (value / x[0]) ** power for value in x], "--", color=GUIDE, lw=1.2, label=label, zorder=1)


def picture(figure, axes, note: str, path: Path, legend: str = "best") -> Path:
    """Add legends, grid and a note on what was run. Save path.png and path.svg; return the former."""
    for axis in axes:
        quiet(axis)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False, labelcolor=INK, loc=legend)
        for label in (axis.xaxis.label, axis.yaxis.label):
            label.set(fontsize=9, color=MUTED)
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, 0.22 / height, 1, 1), w_pad=2.0)
    figure.text(0.01, 0.08 / height, note, fontsize=8, color=MUTED)
    figure.savefig(path.with_suffix(".png"), dpi=140)
    plt.rcParams["svg.hashsalt"] = "endoreward_fast"  # makes the file reproducible
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    return path.with_suffix(".png")
