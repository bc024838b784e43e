"""Rows and rewards of sampled completions, as trainers need them: token ids in, one number out for each completion."""

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import torch

from ..returns import sequence_score
from .options import ScoreOptions
from .results import RowScore

Ids = Sequence[int]
Own = Sequence[int]
"""1 for a token that the policy chose, 0 for a token from a tool or an environment"""
NOT_FINITE = "the model gave a reward that is not finite"
EMPTY = RowScore(None, 0, None, ("empty",), "the completion is empty: there is no token to reward")
UNSCORED = -1e6
"""The reward of a completion that cannot be scored. It is below the score of any real completion (16,384 tokens of -61
nats), and its square is precise enough in float32"""


def ending_ids(scorer: Any, tokenizer: Any = None) -> frozenset[int]:
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


class Rewarded(NamedTuple):
    """The reward of one completion."""

    score: float
    """score by the given reduction; `unscored` if there is none"""
    tokens: tuple[float, ...]
    """each token's part of the score; they sum to it"""
    token: float
    """mean reward of a token"""
    first_value: float
    """V of the prompt"""
    error: str | None
    """the reason for a missing score, in one line"""
    rewards: tuple[float, ...] = ()
    """the reward of each token, without the weights of a reduction"""

    @classmethod
    def of(cls, row: RowScore, options: ScoreOptions, unscored: float = UNSCORED) -> "Rewarded":
        """Return the reward of a row that was scored with per_token=True, by the reduction of `options`.

        `unscored` is never the best reward: a row that scores no higher counts as unscored too.
        """
        if row.error or row.tokens is None or not all(map(math.isfinite, row.tokens.rewards)):
            return cls.without(row.error or NOT_FINITE, unscored)
        rewards, o = row.tokens.rewards, options
        parts = score_parts(rewards, reduction=o.reduction, gamma=o.gamma, floor=o.floor)
        score = math.fsum(parts)
        if score <= unscored:
            return cls.without(f"its score is not above unscored={unscored:g}", unscored)
        return cls(score, parts, math.fsum(rewards) / len(rewards), row.tokens.values[0], None, tuple(rewards))

    @classmethod
    def without(cls, reason: str, unscored: float = UNSCORED) -> "Rewarded":
        """Return the answer for a completion that cannot be scored."""
        return cls(unscored, (), 0.0, 0.0, reason)

    def metrics(self) -> dict[str, float]:
        """Return the metrics to log. Every completion has the same names, because trainers stack them."""
        found = {"token": self.token, "first_value": self.first_value, "length": float(len(self.tokens))}
        return found | {"unscored": float(self.error is not None)}


def score_parts(
    rewards: Sequence[float], *, reduction: Literal["sum", "mean"], gamma: float, floor: float
) -> tuple[float, ...]:
    """Return each token's part of `sequence_score`, which is linear in the rewards: reward times derivative."""
    reward = torch.tensor([rewards], requires_grad=True)
    everywhere = torch.ones_like(reward, dtype=torch.bool)
    sequence_score(reward, everywhere, reduction=reduction, gamma=gamma, floor=floor).sum().backward()
    assert reward.grad is not None
    return tuple((reward.detach() * reward.grad)[0].tolist())
