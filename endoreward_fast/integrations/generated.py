"""Score completions as sampled token ids. All trainer integrations use this module and scoring/sampled.py.

The sampled ids are scored. Tokenizing the completion's text again could give other tokens than the policy chose.
"""

from collections.abc import Sequence
from typing import Any

import torch
from typing_extensions import Unpack

from ..model.model import EndoRewardModel
from ..scoring.arguments import ScoreKwargs
from ..scoring.results import RowScore
from ..scoring.sampled import EMPTY


def scorer_of(model: Any, tokenizer: Any = None) -> EndoRewardModel:
    """Return `model` as an EndoRewardModel. It may be one, a loaded model, or a name or folder ("pocket" is built in).

    Raises EndoRewardError as EndoRewardModel does.
    """
    if isinstance(model, EndoRewardModel):
        return model
    if isinstance(model, torch.nn.Module):
        return EndoRewardModel(model, tokenizer)
    return EndoRewardModel.from_pretrained(model)


def score_completions(
    scorer: EndoRewardModel, rows: Sequence[dict[str, Any]], **options: Unpack[ScoreKwargs]
) -> list[RowScore]:
    """Call EndoRewardModel.score, but give a completion without tokens no score: no token was chosen."""
    results: list[RowScore | None] = [EMPTY if not len(row.get("completion_ids", "?")) else None for row in rows]
    asked = [row for row, known in zip(rows, results, strict=True) if known is None]
    scores = iter(scorer.score(asked, **options) if asked else ())
    found = [next(scores) if known is None else known for known in results]
    return [EMPTY if "empty" in score.flags and not score.num_tokens else score for score in found]
