"""Print the results of `eval` as tables and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .evaluation import STYLES, Accuracy, Block, Judged, RmBench, block, by, over_rows, reward_bench, rm_bench
from .reward_bench_2 import CHANCE, RewardBench2, reward_bench_2


@dataclass
class FileResult:
    """The scored rows and the errors of one file."""

    name: str
    rows: int = 0
    judged: list[Judged] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    beside: dict[str, FileResult] = field(default_factory=dict)
    """the same file's results by other methods"""

    @classmethod
    def by_methods(cls, name: str, methods: Sequence[str]) -> FileResult:
        """Return an empty result for the score and each of `methods`."""
        return cls(name, beside={method: cls(name) for method in methods})

    def to_json(self) -> dict[str, Any]:
        """Return counts, accuracies by subset and, for rows of RM-Bench's shape, its matrix."""
        found: dict[str, Any] = {
            "file": self.name,
            "rows": self.rows,
            "scored": len(self.judged),
            "skipped": self.rows - len(self.judged),
            "comparisons": sum(row.comparisons for row in self.judged),
            "ties": sum(row.ties for row in self.judged),
            "errors": self.errors,
        }
        if self.judged:
            found |= over_rows(self.judged, lambda r: r.accuracy).to_json() | {"rows": self.rows}
            found["every_chosen_on_top"] = self.on_top.to_json() | {"chance": self.chance}
            found["subsets"] = {n: over_rows(g, lambda r: r.accuracy).to_json() for n, g in self.subsets.items()}
        if self.styled:
            found["rm_bench"] = block(self.judged).to_json()
        return found

    @property
    def subsets(self) -> dict[str, list[Judged]]:
        """Rows by subset."""
        return by(self.judged, lambda r: r.subset)

    @property
    def on_top(self) -> Accuracy:
        """Share of rows in which every chosen completion is above every rejected one."""
        return over_rows(self.judged, lambda r: r.on_top)

    @property
    def chance(self) -> float:
        """Expected `on_top` for scores in random order."""
        return sum(row.chance_on_top for row in self.judged) / len(self.judged)

    @property
    def listed(self) -> bool:
        """Whether some row compares more than two completions, and not all have RM-Bench's shape."""
        return not self.styled and any(row.comparisons > 1 for row in self.judged)

    @property
    def styled(self) -> bool:
        """Whether every row has RM-Bench's shape."""
        return bool(self.judged) and all(row.styled for row in self.judged)


def to_json(files: Sequence[FileResult], about: dict[str, Any]) -> dict[str, Any]:
    """Return `about`, the results and every row's scores, and the same results for each other method."""
    beside = {name: _numbers([file.beside[name] for file in files]) for name in files[0].beside}
    return {**about, **_numbers(files), **({"methods": beside} if beside else {})}


def _numbers(files: Sequence[FileResult]) -> dict[str, Any]:
    judged = _judged(files)
    bench, rewards, second = rm_bench(judged), reward_bench(judged), reward_bench_2(judged)
    return {
        "files": [file.to_json() for file in files],
        "rm_bench": bench.to_json() if bench else None,
        "reward_bench": {name: a.to_json() for name, a in rewards.items()} if rewards else None,
        "reward_bench_2": second.to_json() if second else None,
        "scores": [
            {
                "file": r.file,
                "id": r.id,
                "subset": r.subset,
                "chosen": _finite(r.chosen),
                "rejected": _finite(r.rejected),
            }
            for r in judged
        ],
    }


def _finite(scores: Sequence[float]) -> list[float | None]:
    """Return the scores, with None for empty completions that have no score."""
    return [score if math.isfinite(score) else None for score in scores]


def _judged(files: Sequence[FileResult]) -> list[Judged]:
    return [row for file in files for row in file.judged]


def to_text(files: Sequence[FileResult], note: str | None = None) -> str:
    """Return the results as tables: one per file, then the benchmarks over all files."""
    judged = _judged(files)
    lines: list[str] = []
    for file in files:
        lines += [*_file_lines(file), *_beside_lines(file), ""]
    if (bench := rm_bench(judged)) and len(files) > 1:
        lines += [*_rm_bench_lines(bench), *_beside_rm_bench_lines(files), ""]
    if rewards := reward_bench(judged):
        lines += ["RewardBench sections", *(f"  {name:<26}{_with_interval(a)}" for name, a in rewards.items())]
        lines += [*_beside_reward_bench_lines(files), ""]
    if second := reward_bench_2(judged):
        lines += [*_reward_bench_2_lines(second), ""]
    lines += [note + "."] if note else []
    lines.append("Intervals: 95%, Wilson, one trial per row. Ties count as lost.")
    if not any(file.listed for file in files):
        lines[-1] += " Chance is 50%."
    return "\n".join(lines) + "\n"


def _percent(value: float) -> str:
    return f"{100 * value:5.1f}"


def _with_interval(a: Accuracy) -> str:
    return f"{_percent(a.value)}%  [{_percent(a.low)}, {_percent(a.high)}]  {a.rows:6d} rows"


def _file_lines(file: FileResult) -> list[str]:
    skipped = file.rows - len(file.judged)
    compared = sum(row.comparisons for row in file.judged)
    ties = sum(row.ties for row in file.judged)
    counts = f"{len(file.judged)} rows scored, {skipped} skipped, {compared} comparisons, {ties} ties"
    lines = [file.name, f"  {counts}"]
    if not file.judged:
        return lines
    if file.styled:
        lines += _matrix_lines(block(file.judged))
    accuracy = _with_interval(over_rows(file.judged, lambda r: r.accuracy))
    if not file.listed:
        lines.append(f"  {'accuracy':<26}{accuracy}")
        for name, rows in file.subsets.items():
            lines.append(f"    {name:<24}{_with_interval(over_rows(rows, lambda r: r.accuracy))}")
        return lines
    lines.append(f"  {'accuracy of comparisons':<26}{accuracy}{_chance(0.5)}")
    lines.append(f"  {'every chosen on top':<26}{_with_interval(file.on_top)}{_chance(file.chance)}")
    for name, rows in file.subsets.items():
        subset = FileResult(name, len(rows), rows)
        lines.append(f"    {name:<24}{_with_interval(subset.on_top)}{_chance(subset.chance)}")
    return lines


def _chance(value: float) -> str:
    return f"  chance {100 * value:.1f}%"


def _reward_bench_2_lines(bench: RewardBench2) -> list[str]:
    lines = ["RewardBench 2, best of 4 (k completions that tie for the highest score earn 1/k)"]
    lines += [f"  {name:<26}{_with_interval(a)}{_chance(CHANCE)}" for name, a in bench.subsets.items()]
    if (ties := bench.ties) is not None:
        value = f"not computed: {ties.why}" if ties.score is None else _percent(ties.score) + "%"
        about = f"  the Ties formula, over {ties.pairs} pairs of prompts" if ties.score is not None else ""
        lines.append(f"  {'Ties':<26}{value}{about}")
    if bench.score is not None:
        lines.append(f"  {'mean of the six':<26}{_percent(bench.score)}%")
    elif bench.absent:
        lines.append(f"  not in these files: {', '.join(bench.absent)} (the benchmark's score needs all six subsets)")
    return lines


def _matrix_lines(b: Block) -> list[str]:
    lines = [f"  {'chosen / rejected':<22}" + "".join(f"{style:>10}" for style in STYLES)]
    for style, row in zip(STYLES, b.matrix, strict=True):
        lines.append(f"  {style:<22}" + "".join(f"{_percent(share):>10}" for share in row))
    for name in ("easy", "normal", "hard"):
        lines.append(f"  {name:<26}{_with_interval(getattr(b, name))}")
    return lines


def _rm_bench_lines(bench: RmBench) -> list[str]:
    lines = [
        f"RM-Bench{'':<12}" + "".join(f"{name:>9}" for name in ("easy", "normal", "hard", "average")) + "     rows"
    ]
    for name, b in bench.domains.items():
        lines.append(f"  {name:<18}" + _levels(vars(b)) + f"{b.average.rows:9d}")
        for part, p in bench.parts.items():
            if part.startswith(name):
                lines.append(f"    {part:<16}" + _levels(vars(p)) + f"{p.average.rows:9d}")
    lines.append(f"  {'mean of domains':<18}" + _levels(bench.overall) + f"{bench.overall['average'].rows:9d}")
    average = bench.overall["average"]
    lines.append(f"  interval of the average: [{_percent(average.low)}, {_percent(average.high)}]")
    if bench.absent:
        lines.append(f"  not in these files: {', '.join(bench.absent)} (the benchmark's mean needs all four domains)")
    return lines


def _levels(of: dict[str, Any]) -> str:
    return "".join(f"{_percent(of[name].value):>9}" for name in ("easy", "normal", "hard", "average"))


# ------------------------------------------------------------------------------------------------ methods side by side


def _beside_lines(file: FileResult) -> list[str]:
    """Return one line per other method on a file: its accuracy, or RM-Bench's levels."""
    if not file.beside:
        return []
    lines = [_levels_heading("by method")] if file.styled else ["  by method"]
    for name, other in file.beside.items():
        if not other.judged:
            lines.append(f"    {name:<24}  no row was scored")
        elif file.styled:
            lines.append(_levels_line(name, vars(block(other.judged))))
        else:
            lines.append(f"    {name:<24}{_with_interval(over_rows(other.judged, lambda r: r.accuracy))}")
    return lines


def _beside_rm_bench_lines(files: Sequence[FileResult]) -> list[str]:
    benches = {name: rm_bench(_judged([file.beside[name] for file in files])) for name in files[0].beside}
    lines = [_levels_line(name, bench.overall) for name, bench in benches.items() if bench]
    return [_levels_heading("mean of domains by method"), *lines] if lines else []


def _beside_reward_bench_lines(files: Sequence[FileResult]) -> list[str]:
    benches = {name: reward_bench(_judged([file.beside[name] for file in files])) for name in files[0].beside}
    lines = [f"    {name:<24}{_with_interval(bench['overall'])}" for name, bench in benches.items() if bench]
    return ["  overall by method", *lines] if lines else []


def _levels_heading(title: str) -> str:
    return (
        f"  {title:<26}" + "".join(f"{name:>9}" for name in ("easy", "normal", "hard", "average")) + " " * 20 + "rows"
    )


def _levels_line(name: str, of: dict[str, Any]) -> str:
    average = of["average"]
    return f"    {name:<24}{_levels(of)}  [{_percent(average.low)}, {_percent(average.high)}]{average.rows:7d}"
