"""Print the benchmarks whose rows have columns of their own, and RewardBench, as tables."""

from __future__ import annotations

from collections.abc import Mapping

from .judge_bench import CHANCE as OF_PAIRS
from .judge_bench import JudgeBench
from .judged import Accuracy
from .lines import chance, interval, line, percent
from .process_bench import Figures, ProcessBench, Subset
from .reward_bench_2 import CHANCE as OF_FOUR
from .reward_bench_2 import RewardBench2
from .rmgap import CHANCE as OF_RMGAP
from .rmgap import RmGap

STEP_COLUMNS = ("F1", "wrong", "right", "F1 (GSM8K)", "lowest", "earlier", "similar", "pairs")
STEP_LEGEND = (
    "  A step's score is the mean, sum or min over its tokens. The first step below a threshold is predicted.",
    "  F1: harmonic mean of the accuracies on solutions with a wrong step (wrong) and without (right). The threshold",
    "  is fitted on one half of the solutions and applied to the other half.",
    "  F1 (GSM8K): the threshold is fitted on GSM8K, as in the paper. For GSM8K itself, it has seen the tested labels.",
    "  lowest: the first wrong step scores lowest of all steps.",
    "  earlier: an earlier step, which is right, scores higher than the first wrong one.",
    "  similar: those pairs of steps of which the longer has at most 10% more tokens than the shorter.",
)


def reward_bench_lines(sections: Mapping[str, Accuracy], methods: Mapping[str, Accuracy]) -> list[str]:
    """Return RewardBench's sections, and the overall accuracy of other methods."""
    lines = ["RewardBench sections", *(line(name, a) for name, a in sections.items())]
    return lines + _by_method("overall", methods)


def reward_bench_2_lines(bench: RewardBench2, methods: Mapping[str, RewardBench2]) -> list[str]:
    """Return the subsets of RewardBench 2, and the mean of other methods."""
    lines = ["RewardBench 2, best of 4 (k completions that tie for the highest score earn 1/k)"]
    lines += [line(name, a) + chance(OF_FOUR) for name, a in bench.subsets.items()]
    if (ties := bench.ties) is not None:
        about = f"not computed: {ties.why}"
        if ties.score is not None and ties.chance is not None:
            about = f"{percent(ties.score)}%  the Ties formula, over {ties.pairs} pairs of prompts{chance(ties.chance)}"
        lines.append(f"  {'Ties':<26}{about}")
    if bench.score is not None and bench.chance is not None:
        lines.append(f"  {'mean of the six':<26}{percent(bench.score)}%{chance(bench.chance)}")
        means = [(name, other.score) for name, other in methods.items() if other.score is not None]
        lines += ["  mean of the six by method"] * bool(means)
        lines += [f"    {name:<24}{percent(score)}%" for name, score in means]
    elif bench.absent:
        lines.append(f"  not in these files: {', '.join(bench.absent)} (the benchmark's score needs all six subsets)")
    return lines


def judge_bench_lines(bench: JudgeBench, methods: Mapping[str, JudgeBench]) -> list[str]:
    """Return the categories of JudgeBench, and the overall accuracy of other methods."""
    lines = ["JudgeBench"]
    lines += [line(name, a) + chance(OF_PAIRS) for name, a in {**bench.categories, "overall": bench.overall}.items()]
    if bench.ties:
        lines.append(
            f"  {bench.ties} ties count as lost, as in the benchmark's two orders; under --single_game: "
            f"{percent(bench.single_game)}%"
        )
    return lines + _by_method("overall", {name: other.overall for name, other in methods.items()})


def rmgap_lines(bench: RmGap, methods: Mapping[str, RmGap]) -> list[str]:
    """Return the domains of RMGAP, and the means of other methods."""
    lines = ["RMGAP"]
    for figure, by_chance in OF_RMGAP.items():
        found = {domain: figures[figure] for domain, figures in bench.domains.items()} | {"mean": bench.mean[figure]}
        lines += [f"  {figure}{chance(by_chance)}", *(line(name, a, 4) for name, a in found.items())]
        means = {name: other.mean[figure] for name, other in methods.items()}
        lines += ["    mean by method"] * bool(means) + [f"      {n:<22}{interval(a)}" for n, a in means.items()]
    if bench.absent:
        lines.append(f"  not in these files: {', '.join(bench.absent)} (the benchmark's mean needs all four domains)")
    return lines


def _by_method(title: str, methods: Mapping[str, Accuracy]) -> list[str]:
    return [f"  {title} by method", *(line(name, a, 4) for name, a in methods.items())] if methods else []


# ------------------------------------------------------------------------------------------------------ ProcessBench


def process_bench_lines(bench: ProcessBench) -> list[str]:
    """Return one table for each subset of ProcessBench, and the mean over them."""
    lines = ["ProcessBench, first wrong step from the rewards of tokens"]
    for name, subset in bench.subsets.items():
        heading = f"  {name}: {subset.wrong} solutions with a wrong step, {subset.right} without"
        lines += [heading, _step_line("", STEP_COLUMNS)]
        lines += [_step_line(method, _cells(figures)) for method, figures in subset.methods.items()]
        lines.append(_step_line("chance", _chances(subset)))
    if len(bench.subsets) > 1:
        lines += ["  mean of subsets", _step_line("", ("F1", "", "", "F1 (GSM8K)"))]
        lines += [
            _step_line(name, (_cell(m["f1"]), "", "", _cell(m["f1_gsm8k"]))) for name, m in bench.mean.items()
        ]  # fmt: skip
    if bench.absent and list(bench.subsets) != ["all"]:
        lines.append(f"  not in these files: {', '.join(bench.absent)} (the benchmark's mean needs all four subsets)")
    return [*lines, *STEP_LEGEND]


def _step_line(name: str, cells: tuple[str, ...]) -> str:
    widths = (7, 7, 7, 12, 8, 9, 9, 7)
    return f"    {name:<18}{''.join(f'{c:>{w}}' for c, w in zip(cells, widths, strict=False))}".rstrip()


def _cells(f: Figures) -> tuple[str, ...]:
    similar = f.earlier.similar if f.earlier else None
    shares = (f.f1, _value(f.wrong), _value(f.right), f.f1_gsm8k, _value(f.lowest), _value(f.earlier))
    near = _value(similar.accuracy) if similar else None
    return (*map(_cell, (*shares, near)), str(similar.pairs if similar else 0))


def _chances(subset: Subset) -> tuple[str, ...]:
    c = subset.chance
    return (_cell(c["f1"]), "", "", _cell(c["f1"]), _cell(c["lowest"]), _cell(c["earlier"]), _cell(c["earlier"]))


def _value(a: Accuracy | None) -> float | None:
    return None if a is None else a.value


def _cell(share: float | None) -> str:
    return percent(share).strip()
