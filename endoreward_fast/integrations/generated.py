"""Score completions as sampled token ids. All trainer integrations use this module and scoring/sampled.py.

The sampled ids are scored. Tokenizing the completion's text again could give other tokens than the policy chose.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from typing_extensions import Unpack

from ..model.model import EndoRewardModel
from ..model.vocabulary import refuse_other_vocabulary
from ..remote.address import is_url
from ..remote.client import RemoteModel
from ..scoring.arguments import ScoreKwargs
from ..scoring.results import RowScore
from ..scoring.sampled import EMPTY

RewardScorer = EndoRewardModel | RemoteModel
"""what scores completions: a model in this process, or one behind a URL"""


def scorer_of(model: Any, tokenizer: Any = None, *, max_tokens_per_batch: int | None = None) -> RewardScorer:
    """Return `model` as an EndoRewardModel or, for the URL of a server, as a RemoteModel.

    It may be one of both, a loaded model, a name or folder ("pocket" is built in), or "http://HOST:PORT".

    Raises EndoRewardError as these do, and if `tokenizer` is not the model's. The batches of a server are its own, so
    it takes no `max_tokens_per_batch`.
    """
    scorer = _scorer_of(model, tokenizer)
    if isinstance(scorer, RemoteModel):
        scorer.encode((), max_tokens_per_batch=max_tokens_per_batch)
    refuse_other_tokenizer(scorer, tokenizer)
    return scorer


def refuse_other_tokenizer(scorer: RewardScorer, tokenizer: Any) -> None:
    """Raise EndoRewardError if the policy's `tokenizer` gives ids another meaning than the reward model does."""
    if tokenizer is None:
        return
    known: Any = SimpleNamespace(tokenizer=scorer.vocabulary()) if isinstance(scorer, RemoteModel) else scorer
    refuse_other_vocabulary(known, tokenizer)


def _scorer_of(model: Any, tokenizer: Any) -> RewardScorer:
    if isinstance(model, EndoRewardModel | RemoteModel):
        return model
    if is_url(model):
        return RemoteModel(model)
    if isinstance(model, torch.nn.Module):
        return EndoRewardModel(model, tokenizer)
    return EndoRewardModel.from_pretrained(model)


def score_completions(
    scorer: RewardScorer, rows: Sequence[dict[str, Any]], **options: Unpack[ScoreKwargs]
) -> list[RowScore]:
    """Call the scorer's `score`, but give a completion without tokens no score: no token was chosen.

    Nothing is truncated unless `options` say so, whatever a server does by default: trainers expect a reward for each
    token that they sent.
    """
    options.setdefault("truncate", None)
    results: list[RowScore | None] = [EMPTY if not len(row.get("completion_ids", "?")) else None for row in rows]
    asked = [row for row, known in zip(rows, results, strict=True) if known is None]
    scores = iter(scorer.score(asked, **options) if asked else ())
    found = [next(scores) if known is None else known for known in results]
    return [EMPTY if "empty" in score.flags and not score.num_tokens else score for score in found]
