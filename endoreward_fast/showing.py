"""`endoreward show`: rows, or one prompt and its completions, scored token by token."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from . import pipeline
from .candidates import plan
from .data import open_source
from .errors import EndoRewardError
from .heatmap import Shown
from .options import ShowFlags
from .output import one_line

TITLE = 90  # characters


def shown(file: str | None, flags: ShowFlags) -> tuple[list[Shown], int]:
    """What can be shown, in order, and how many rows or completions cannot: each is named on standard error."""
    if (file is None) == (flags.prompt is None):
        raise EndoRewardError("what to show: FILE, or --prompt with --completion")
    failed = 0

    def say(where: str, error: str) -> None:
        nonlocal failed
        failed += 1
        print(f"endoreward: {where}: {one_line(error)}", file=sys.stderr)

    asked = []
    for where, row, error in _rows(file, flags):
        try:
            if error is not None:
                raise EndoRewardError(error)
            asked += [(where, sample) for sample in plan(row, "score").samples]
        except EndoRewardError as problem:
            say(where, str(problem))
    if not asked:
        raise EndoRewardError("there is nothing to show")
    scorer = pipeline.load_scorer(flags)
    found = scorer.score([sample for _, sample in asked], per_token=True, **flags.scoring())
    answers = []
    for (where, sample), result in zip(asked, found, strict=True):
        if result.error or result.score is None:
            say(where, result.error or "it has no score")
        else:
            answers.append(Shown(_title(sample), result.score, result.tokens))
    return answers, failed


def _rows(file: str | None, flags: ShowFlags) -> Iterator[tuple[str, Any, str | None]]:
    """(where it stands, row, why it cannot be read)"""
    if file is None:
        for n, completion in enumerate(flags.completion or (), 1):
            yield f"completion {n}", {"prompt": flags.prompt, "completion": completion}, None
        return
    for record in open_source(file, flags.limit).records:
        yield record.where, record.row, record.error


def _title(sample: dict[str, Any]) -> str:
    """What was asked, in a line: of messages the last one before the answer."""
    asked = sample.get("prompt")
    if asked is None:
        asked = sample.get("messages", ())[:-1]
    if isinstance(asked, list | tuple):
        asked = str(asked[-1].get("content", "")) if asked else ""
    text = " ".join(str(asked or "token ids").split())
    return text if len(text) <= TITLE else text[: TITLE - 1] + "…"
