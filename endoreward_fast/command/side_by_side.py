"""`endoreward eval`: rows through the model and whatever its score is compared with, results by method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from . import pipeline
from .evaluation import Judged, rm_bench_part
from .options import SOURCE, EvalFlags
from .output import Aside, Monitor
from .pipeline import Item, Scorer
from .report import FileResult

REWARD_MODEL = "reward model"


@dataclass(frozen=True)
class Rival:
    """A scorer that goes over the rows once more."""

    name: str
    scorer: Scorer


@dataclass(frozen=True)
class Panel:
    """A model, and whatever its score is compared with."""

    scorer: Scorer
    options: dict[str, Any]
    """of the model: its signals among them"""
    signals: tuple[str, ...]
    rivals: tuple[Rival, ...]
    rival_options: dict[str, Any]

    @property
    def passes(self) -> int:
        """How often every row is scored."""
        return 1 + len(self.rivals)

    @property
    def methods(self) -> tuple[str, ...]:
        """What stands beside the score, in the order of the tables."""
        return (*self.signals, *(rival.name for rival in self.rivals))

    def judge(self, items: list[Item], result: FileResult, monitor: Monitor, *, strict: bool) -> None:
        """Score one window of rows by every method, into `result`."""
        pipeline.score_items(items, self.scorer, self.options, self._collect(result), monitor, strict=strict)
        for rival in self.rivals:
            readable = [item.again() for item in items if item.task]
            collect = partial(add, result.beside[rival.name])
            aside = Aside(monitor, rival.name)
            pipeline.score_items(readable, rival.scorer, self.rival_options, collect, aside, strict=strict)

    def _collect(self, result: FileResult) -> Callable[[Item], None]:
        def collect(item: Item) -> None:
            add(result, item)
            for name in self.signals:
                add(result.beside[name], item, name)
            if item.task is None:
                for rival in self.rivals:
                    add(result.beside[rival.name], item)

        return collect


def panel(flags: EvalFlags) -> Panel:
    """Load every model that `flags` name. Call it after the cheap checks."""
    scorer, plain = pipeline.load_scorer(flags), flags.scoring()
    options = plain | ({"signals": flags.compared} if flags.compared else {})
    if flags.reference_model:
        elsewhere = replace(flags, model=flags.reference_model, **dict.fromkeys(SOURCE))
        options["reference"] = pipeline.load_scorer(elsewhere)
    rivals = [Rival(f"judge, {name}", judge) for name, judge in pipeline.load_judges(flags.judges, scorer).items()]
    if flags.reward_model:
        rivals.append(Rival(REWARD_MODEL, pipeline.load_reward_model(flags, flags.reward_model)))
    return Panel(scorer, options, flags.compared, tuple(rivals), plain)


def add(result: FileResult, item: Item, signal: str | None = None) -> None:
    """One scored row, by its score or a signal of it, to `result`."""
    result.rows += 1
    problem = item.trouble(signal)
    if problem or item.task is None:
        result.errors.append(f"{item.record.where}: {problem}")
        return
    row = item.record.row or {}
    chosen, rejected = (_scores(item, item.task.layout[side], signal) for side in ("chosen", "rejected"))
    subset = None if row.get("subset") is None else str(row["subset"])
    part = rm_bench_part(row, result.name)
    result.judged.append(Judged(result.name, subset, part, row.get("id"), chosen, rejected))


def _scores(item: Item, layout: Any, signal: str | None) -> tuple[float, ...]:
    positions = layout if isinstance(layout, list) else [layout]
    return tuple(score for i in positions if (score := item.score(i, signal)) is not None)
