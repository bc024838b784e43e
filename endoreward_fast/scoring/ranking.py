"""Rank the completions of one prompt by their scores."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import EndoRewardError
from ..text.row_flags import NOTHING_TO_SCORE
from .arguments import list_of_completions
from .results import Ranked, RowScore


def ranked(
    score: Callable[[list[dict[str, Any]]], list[RowScore]], prompt: Any, completions: Iterable[Any]
) -> list[Ranked]:
    """Return the completions of one prompt, best first. Ties keep their order. `score` scores rows, in their order.

    Raises EndoRewardError if a completion cannot be scored, and names its index. An empty completion that no token ends
    has no score and comes last.
    """
    listed = list_of_completions(completions)
    scores = score([{"prompt": prompt, "completion": completion} for completion in listed])
    found = []
    for index, (completion, result) in enumerate(zip(listed, scores, strict=True)):
        if result.score is None and result.error != NOTHING_TO_SCORE:
            raise EndoRewardError(f"completion {index}: {result.error}")
        found.append(Ranked(index, completion, result.score))
    return sorted(found, key=lambda r: math.inf if r.score is None else -r.score)
