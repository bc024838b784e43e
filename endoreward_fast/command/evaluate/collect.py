"""Turn scored rows into the rows that accuracies are computed over: preferences, prompts of RMGAP, and solutions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...data.benchmarks import PROCESS_BENCH, RMGAP
from ...data.items import Item
from ...errors import EndoRewardError
from .evaluation import rm_bench_part
from .judged import Judged
from .process_bench import Solution, subset_of
from .report import FileResult
from .steps import step_scores

Lengths = Mapping[int, int]
"""{position of a completion in its row: number of scored tokens}"""


def lengths_of(item: Item) -> Lengths:
    """Return the lengths of the completions by the model's own tokens. Every method's accuracy uses these."""
    return {position: result.num_tokens for position, result in item.results.items()}


def add(result: FileResult, item: Item, signal: str | None = None, lengths: Lengths | None = None) -> None:
    """Add one row's scores, or one signal of it, to `result`. A solution of ProcessBench has no score as a whole."""
    result.rows += 1
    task, lengths = item.task, lengths_of(item) if lengths is None else lengths
    if task is not None and task.benchmark == RMGAP:
        return _add_prompts(result, item, task.facts, signal, lengths)
    problem = item.trouble(signal)
    if problem or task is None:
        result.errors.append(f"{item.record.where}: {problem}")
        return
    row = item.record.row or {}
    part = None if task.benchmark else rm_bench_part(row, result.name)
    known = {"subset": row.get("subset"), "id": row.get("id"), "place": 0, **task.facts}
    subset = None if known["subset"] is None else str(known["subset"])
    scored = _scored(item, task.layout, signal, lengths)
    result.judged.append(Judged(result.name, subset, part, known["id"], *scored, task.benchmark, place=known["place"]))


def _add_prompts(
    result: FileResult, item: Item, facts: Mapping[str, Any], signal: str | None, lengths: Lengths
) -> None:  # fmt: skip
    """Add every prompt of a row of RMGAP whose four responses have a score, as the benchmark does."""
    assert item.task is not None
    for prompt, layout in zip(facts["prompts"], item.task.layout, strict=True):
        places = [layout["chosen"], *layout["rejected"]]
        if problem := next((p for i in places if (p := item.problem(i, signal))), None):
            where = f"group {prompt['group']}, prompt {prompt['prompt']}"
            result.errors.append(f"{item.record.where}: {where}: {problem}")
            continue
        scored = _scored(item, layout, signal, lengths)
        id = (item.record.row or {}).get("id")
        result.judged.append(
            Judged(result.name, facts["subset"], None, id, *scored, RMGAP, place=prompt["place"],
                   row=item.record.where, group=prompt["at"], group_name=prompt["group"])
        )  # fmt: skip


def _scored(item: Item, layout: Any, signal: str | None, lengths: Lengths) -> tuple[Any, Any, Any]:
    """Return (scores of the chosen, scores of the rejected, lengths of both)."""
    sides = [part if isinstance(part := layout[side], list) else [part] for side in ("chosen", "rejected")]
    # An empty completion without a score loses every comparison.
    scores = [
        tuple(-math.inf if item.says_nothing(i) else item.score(i, signal) for i in positions) for positions in sides
    ]
    return scores[0], scores[1], tuple(tuple(lengths.get(i, 0) for i in positions) for positions in sides)


def is_solution(item: Item) -> bool:
    """Return whether the row is one of ProcessBench."""
    return item.task is not None and item.task.benchmark == PROCESS_BENCH


def add_solution(result: FileResult, item: Item, *, strict: bool) -> None:
    """Add one solution of ProcessBench. If its tokens do not spell its steps, the row gets that as its error.

    Raises EndoRewardError instead if `strict`.
    """
    result.rows += 1
    assert item.task is not None
    scored = item.results[0]
    if item.trouble() is None:
        try:
            scores, tokens = step_scores(scored.tokens, item.task.facts["steps"])
        except EndoRewardError as error:
            if strict:
                raise EndoRewardError(f"{item.record.where}: {error} (--strict: stopped here)") from error
            item.results[0] = replace(scored, score=None, error=str(error))
    if problem := item.trouble():
        result.errors.append(f"{item.record.where}: {problem}")
        return
    id = item.task.facts["id"]
    result.solutions.append(
        Solution(result.name, subset_of(id, result.name), id, item.task.facts["label"], scores, tokens)
    )
