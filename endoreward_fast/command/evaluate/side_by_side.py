"""`endoreward eval`: score rows with the model and with the methods that it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ...data.items import Item
from ...data.signal_columns import OF_ROWS
from ...model.checkpoint import weights_of
from ..flags.options import PAIRWISE, SOURCE, EvalFlags
from ..flags.signal_names import left_out
from ..flags.values import ALL
from ..run import pipeline
from ..run.monitor import Aside, Monitor
from ..run.pipeline import Scorer
from .collect import Lengths, add, add_solution, is_solution, lengths_of
from .report import FileResult

REWARD_MODEL = "reward model"


@dataclass(frozen=True)
class Rival:
    """Another scorer of the same rows."""

    name: str
    scorer: Scorer
    readings: str = "1"
    """how often it reads each completion"""


@dataclass(frozen=True)
class Panel:
    """The model and the methods that its score is compared with."""

    scorer: Scorer
    options: dict[str, Any]
    """the model's options, including its signals"""
    signals: tuple[str, ...]
    rivals: tuple[Rival, ...]
    rival_options: dict[str, Any]
    optional: tuple[str, ...] = ()
    """signals that count only on rows with the columns that they need"""

    @property
    def passes(self) -> int:
        """Number of times that every row is scored."""
        return 1 + len(self.rivals)

    @property
    def readings(self) -> str | None:
        """How often each completion is read, in words; None if once. This is the cost of the evaluation."""
        others = ["1 by the reference model"] if "reference" in self.options else []
        others += [f"{rival.readings} by the {rival.name}" for rival in self.rivals]
        return f"every completion is read more than once: {'; '.join(['1 by the model', *others])}" if others else None

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods besides the score, in the order of the tables."""
        return (*self.signals, *(rival.name for rival in self.rivals))

    def judge(self, items: list[Item], result: FileResult, monitor: Monitor, *, strict: bool) -> None:
        """Score one window of rows with every method and add the scores to `result`."""
        tables = {"per_token": True} if any(map(is_solution, items)) else {}
        collect = self._collect(result, monitor, strict=strict)
        pipeline.score_items(items, self.scorer, self.options | tables, collect, monitor, strict=strict)
        readable = [item for item in items if item.task and not is_solution(item)]
        lengths = {item.record.where: lengths_of(item) for item in readable}
        for rival in self.rivals:
            again, aside = [item.again() for item in readable], Aside(monitor, rival.name)
            collect = partial(_add_with, lengths, result.beside[rival.name])
            aside.advance(sum(map(is_solution, items)))
            pipeline.score_items(again, rival.scorer, self.rival_options, collect, aside, strict=strict)

    def _collect(self, result: FileResult, monitor: Monitor, *, strict: bool) -> Callable[[Item], None]:
        def collect(item: Item) -> None:
            if is_solution(item):
                return add_solution(result, item, strict=strict)
            add(result, item)
            for name in self.signals:
                if name not in self.optional or item.has(name):
                    add(result.beside[name], item, name)
                    Aside(monitor, name).on_row(item.record.where, item.signal_error(name))
            if item.task is None:
                for rival in self.rivals:
                    add(result.beside[rival.name], item)

        return collect


def _add_with(lengths: Mapping[str, Lengths], result: FileResult, item: Item) -> None:
    add(result, item, lengths=lengths[item.record.where])


def panel(flags: EvalFlags) -> Panel:
    """Load every model that `flags` name. Call this after the cheap checks."""
    pipeline.refuse_other_models(flags)
    scorer, plain = pipeline.load_scorer(flags), flags.scoring()
    # "all" leaves out what a row has no columns for. A signal that is named is an error of such a row.
    options = plain | ({"signals": ALL if flags.signals == ALL else flags.compared} if flags.compared else {})
    if flags.reference_model:
        elsewhere = replace(flags, model=flags.reference_model, **dict.fromkeys(SOURCE))
        options["reference"] = pipeline.load_scorer(elsewhere)
    judges = pipeline.load_judges(flags.judges, scorer)
    rivals = [Rival(f"judge, {name}", judge, _readings(name)) for name, judge in judges.items()]
    if flags.reward_model:
        rivals.append(Rival(REWARD_MODEL, pipeline.load_reward_model(flags, flags.reward_model)))
    optional = OF_ROWS if flags.signals == ALL else ()
    return Panel(scorer, options, flags.compared, tuple(rivals), plain, optional)


def leave_out(results: list[FileResult], flags: EvalFlags) -> str | None:
    """Drop the signals of --signals all whose columns no row has. Return why signals are left out, or None."""
    if flags.signals != ALL:
        return None
    unused = [name for name in OF_ROWS if not any(result.beside[name].rows for result in results)]
    for result in results:
        for name in unused:
            del result.beside[name]
    return left_out(one_model=not flags.reference_model, unused=unused)


def _readings(name: str) -> str:
    # A question is read once for all replies. A pair is asked about in both orders.
    return "2 for each rival" if name == PAIRWISE else "1"


def models(flags: EvalFlags) -> dict[str, dict[str, str]]:
    """Return name and weights of every model that `flags` name. Call this after loading: it does not ask the Hub."""
    where = {"model": flags.source}
    return {
        what.replace(" ", "_"): {"name": name, "weights": weights_of(name, **where.get(what, {}))}
        for what, name in flags.models.items()
    }


def heading(models: dict[str, dict[str, str]], flags: EvalFlags) -> str:
    """Return the lines above the tables: every model, and how rewards became a score."""
    lines = [f"{what.replace('_', ' '):<18}{found['name']}, {found['weights']}" for what, found in models.items()]
    return "\n".join([*lines, f"{'score':<18}{flags.score_described()}", ""])
