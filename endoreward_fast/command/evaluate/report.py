"""Print the results of `eval` as tables and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import benchmark_lines as tables
from .evaluation import STYLES, Block, RmBench, block, reward_bench, rm_bench
from .judge_bench import judge_bench
from .judged import Accuracy, Judged, by, count_rows, over_rows
from .lines import SIMILAR, chance, line, percent, similar
from .process_bench import Solution, process_bench
from .reward_bench_2 import reward_bench_2
from .rmgap import rmgap

SIDES = ("chosen", "rejected")


@dataclass
class FileResult:
    """The scored rows and the errors of one file."""

    name: str
    rows: int = 0
    judged: list[Judged] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    beside: dict[str, FileResult] = field(default_factory=dict)
    """the same file's results by other methods"""
    solutions: list[Solution] = field(default_factory=list)
    """rows of ProcessBench"""

    @classmethod
    def by_methods(cls, name: str, methods: Sequence[str]) -> FileResult:
        """Return an empty result for the score and each of `methods`."""
        return cls(name, beside={method: cls(name) for method in methods})

    def to_json(self) -> dict[str, Any]:
        """Return counts, accuracies by subset and, for rows of RM-Bench's shape, its matrix."""
        found: dict[str, Any] = {
            "file": self.name,
            "rows": self.rows,
            "scored": self.scored,
            "skipped": self.rows - self.scored,
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
    def scored(self) -> int:
        """Number of rows that have a score."""
        return count_rows(self.judged) + len(self.solutions)

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
    solutions = [solution for file in files for solution in file.solutions]
    rewards = reward_bench(judged)
    found: dict[str, Any] = {
        "files": [file.to_json() for file in files],
        "rm_bench": _plain(rm_bench(judged)),
        "reward_bench": {name: a.to_json() for name, a in rewards.items()} if rewards else None,
        "reward_bench_2": _plain(reward_bench_2(judged)),
        "judge_bench": _plain(judge_bench(judged)),
        "rmgap": _plain(rmgap(judged)),
        "process_bench": _plain(process_bench(solutions)),
        "scores": [_scores(row) for row in judged],
    }
    if solutions:
        found["step_scores"] = [{**vars(s), "scores": {k: _finite(v) for k, v in s.scores.items()}} for s in solutions]
    return found


def _plain(bench: Any) -> dict[str, Any] | None:
    return None if bench is None else bench.to_json()


def _scores(row: Judged) -> dict[str, Any]:
    found = {"file": row.file, "id": row.id, "subset": row.subset}
    found |= {} if row.group is None else {"group": row.group_name}
    found |= {"chosen": _finite(row.chosen), "rejected": _finite(row.rejected)}
    return found if row.lengths is None else found | {"lengths": dict(zip(SIDES, row.lengths, strict=True))}


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
    if sections := reward_bench(judged):
        others = {name: found["overall"] for name, found in _beside(files, reward_bench).items()}
        lines += [*tables.reward_bench_lines(sections, others), ""]
    for rule, table in TABLES:
        if found := rule(judged):
            lines += [*table(found, _beside(files, rule)), ""]
    if steps := process_bench(solution for file in files for solution in file.solutions):
        lines += [*tables.process_bench_lines(steps), ""]
    lines += [note + "."] if note else []
    lines += [SIMILAR] if any(row.lengths for row in judged) else []
    lines.append("Intervals: 95%, Wilson, one trial per row. Ties count as lost.")
    if not any(file.listed or file.solutions for file in files):
        lines[-1] += " Chance is 50%."
    elif any(file.judged and not file.listed for file in files):
        lines[-1] += " Chance for pairs and for RM-Bench: 50%."
    return "\n".join(lines) + "\n"


TABLES: tuple[tuple[Callable[[list[Judged]], Any], Callable[..., list[str]]], ...] = (
    (reward_bench_2, tables.reward_bench_2_lines),
    (judge_bench, tables.judge_bench_lines),
    (rmgap, tables.rmgap_lines),
)
"""(rule of a benchmark, its table from the result and the results of other methods)"""


def _beside(files: Sequence[FileResult], rule: Callable[[list[Judged]], Any]) -> dict[str, Any]:
    """Return {method: result of `rule`} for the methods that have one."""
    found = {name: rule(_judged([file.beside[name] for file in files])) for name in files[0].beside}
    return {name: result for name, result in found.items() if result}


def _file_lines(file: FileResult) -> list[str]:
    compared = sum(row.comparisons for row in file.judged)
    ties = sum(row.ties for row in file.judged)
    counts = f"{file.scored} rows scored, {file.rows - file.scored} skipped, {compared} comparisons, {ties} ties"
    lines = [file.name, f"  {counts}"]
    if not file.judged:
        return lines
    if file.styled:
        lines += _matrix_lines(block(file.judged))
    accuracy = over_rows(file.judged, lambda r: r.accuracy)
    if not file.listed:
        lines.append(line("accuracy", accuracy))
        return lines + [line(n, over_rows(rows, lambda r: r.accuracy), 4) for n, rows in file.subsets.items()]
    lines.append(line("accuracy of comparisons", accuracy) + chance(0.5))
    lines.append(line("every chosen on top", file.on_top) + chance(file.chance))
    for name, rows in file.subsets.items():
        subset = FileResult(name, len(rows), rows)
        lines.append(line(name, subset.on_top, 4) + chance(subset.chance))
    return lines


def _matrix_lines(b: Block) -> list[str]:
    lines = [f"  {'chosen / rejected':<22}" + "".join(f"{style:>10}" for style in STYLES)]
    for style, row in zip(STYLES, b.matrix, strict=True):
        lines.append(f"  {style:<22}" + "".join(f"{percent(share):>10}" for share in row))
    for name in ("easy", "normal", "hard"):
        lines.append(line(name, getattr(b, name)))
    return lines


def _rm_bench_lines(bench: RmBench) -> list[str]:
    lines = [
        f"RM-Bench{'':<12}" + "".join(f"{name:>9}" for name in ("easy", "normal", "hard", "average")) + "     rows"
    ]
    for name, b in bench.domains.items():
        lines.append(f"  {name:<18}" + _levels(vars(b)) + f"{b.average.rows:9d}{similar(b.average)}")
        for part, p in bench.parts.items():
            if part.startswith(name):
                lines.append(f"    {part:<16}" + _levels(vars(p)) + f"{p.average.rows:9d}{similar(p.average)}")
    lines.append(f"  {'mean of domains':<18}" + _levels(bench.overall) + f"{bench.overall['average'].rows:9d}")
    average = bench.overall["average"]
    lines.append(f"  interval of the average: [{percent(average.low)}, {percent(average.high)}]{similar(average)}")
    if bench.absent:
        lines.append(f"  not in these files: {', '.join(bench.absent)} (the benchmark's mean needs all four domains)")
    return lines


def _levels(of: dict[str, Any]) -> str:
    return "".join(f"{percent(of[name].value):>9}" for name in ("easy", "normal", "hard", "average"))


# ------------------------------------------------------------------------------------------------ methods side by side


def _beside_lines(file: FileResult) -> list[str]:
    """Return one line per other method on a file: its accuracy, or RM-Bench's levels."""
    if not file.beside:
        return []
    if file.solutions and not file.judged:
        return ["  no other methods: ProcessBench needs a score for each step, and they have one for each completion"]
    lines = [_levels_heading("by method")] if file.styled else ["  by method"]
    for name, other in file.beside.items():
        if not other.judged:
            lines.append(f"    {name:<24}  no row was scored")
        elif file.styled:
            lines.append(_levels_line(name, vars(block(other.judged))))
        else:
            lines.append(line(name, over_rows(other.judged, lambda r: r.accuracy), 4))
    return lines


def _beside_rm_bench_lines(files: Sequence[FileResult]) -> list[str]:
    lines = [_levels_line(name, bench.overall) for name, bench in _beside(files, rm_bench).items()]
    return [_levels_heading("mean of domains by method"), *lines] if lines else []


def _levels_heading(title: str) -> str:
    return (
        f"  {title:<26}" + "".join(f"{name:>9}" for name in ("easy", "normal", "hard", "average")) + " " * 20 + "rows"
    )


def _levels_line(name: str, of: dict[str, Any]) -> str:
    average = of["average"]
    share = f"    {name:<24}{_levels(of)}  [{percent(average.low)}, {percent(average.high)}]{average.rows:7d}"
    return share + similar(average)
