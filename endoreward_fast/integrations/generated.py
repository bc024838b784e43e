"""Score completions as sampled token ids. All trainer integrations use this module.

The sampled ids are scored. Tokenizing the completion's text again could give other tokens than the policy chose.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from typing_extensions import Unpack

from ..model.model import EndoRewardModel
from ..scoring.arguments import ScoreKwargs
from ..scoring.results import RowScore

Ids = Sequence[int]
Own = Sequence[int]
"""1 for a token that the policy chose, 0 for a token from a tool or an environment"""
NOT_FINITE = "the model gave a reward that is not finite"
EMPTY = RowScore(None, 0, None, ("empty",), "the completion is empty: there is no token to reward")


def scorer_of(model: Any, tokenizer: Any = None) -> EndoRewardModel:
    """Return `model` as an EndoRewardModel. It may be one, a loaded model, or a name or folder ("pocket" is built in).

    Raises EndoRewardError as EndoRewardModel does.
    """
    if isinstance(model, EndoRewardModel):
        return model
    if isinstance(model, torch.nn.Module):
        return EndoRewardModel(model, tokenizer)
    return EndoRewardModel.from_pretrained(model)


def ending_ids(scorer: EndoRewardModel, tokenizer: Any = None) -> frozenset[int]:
    """Return the ids that end an episode: those that stop the model's generation, and the tokenizers' eos tokens."""
    own = (getattr(t, "eos_token_id", None) for t in (tokenizer, scorer.tokenizer))
    return frozenset(scorer.eos_ids) | {i for i in own if i is not None}


def generated_row(prompt: Ids, completion: Ids, ends: Collection[int], own: Own | None = None) -> dict[str, Any]:
    """Return the row of a sampled completion, for EndoRewardModel.score.

    A completion whose last token is in `ends` is complete: V(s') = 0 after it. Any other completion was cut off and
    keeps V(s'). The last token of a turn that a tool answered also keeps V(s'), because the episode went on. There s'
    is the state before the tool's answer, which the policy did not choose. `own` marks the policy's tokens; default:
    all.
    """
    whole = bool(len(completion)) and int(completion[-1]) in ends and (own is None or bool(own[-1]))
    row = {"prompt_ids": prompt, "completion_ids": completion, "terminal": whole}
    return row if own is None else row | {"completion_mask": own}


def score_completions(
    scorer: EndoRewardModel, rows: Sequence[dict[str, Any]], **options: Unpack[ScoreKwargs]
) -> list[RowScore]:
    """Call EndoRewardModel.score, but give a completion without tokens no score: no token was chosen."""
    results: list[RowScore | None] = [EMPTY if not len(row.get("completion_ids", "?")) else None for row in rows]
    asked = [row for row, known in zip(rows, results, strict=True) if known is None]
    scores = iter(scorer.score(asked, **options) if asked else ())
    found = [next(scores) if known is None else known for known in results]
    return [EMPTY if "empty" in score.flags and not score.num_tokens else score for score in found]
