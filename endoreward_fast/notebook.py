"""What notebooks show of results, and results as the tokens that `heatmap` draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .heatmap import Card, Row, Token, fragment

if TYPE_CHECKING:
    from torch import Tensor

    from .scoring import TokenTable
    from .types import TokenRewards


def tokens_of(table: TokenTable) -> list[Token]:
    """The tokens of a table; by their ids where it has no texts."""
    entropies = table.entropies or (None,) * len(table.ids)
    columns = zip(table.texts, table.ids, table.rewards, table.logprobs, table.values, entropies, strict=True)
    return [Token(text, f"#{token_id}", *numbers) for text, token_id, *numbers in columns]


def html_of_table(table: TokenTable, score: float | None = None, note: str | None = None) -> str:
    """A heatmap of one row; its score, by default, the plain sum of the rewards."""
    score = sum(table.rewards) if score is None and note is None else score
    return fragment([Row("", "", [Card("completion", score, tokens_of(table), note)])])


def html_of_rewards(rewards: TokenRewards) -> str | None:
    """A heatmap of one row, (T,) or (1, T), of the tokens that were scored: whose fields are not all 0. Else None."""
    if rewards.reward.ndim not in (1, 2) or (rewards.reward.ndim == 2 and len(rewards.reward) != 1):
        return None
    reward, logprob, value = map(_numbers, rewards[:3])
    entropy = [None] * len(reward) if rewards.entropy is None else _numbers(rewards.entropy)
    scored = [t for t, fields in enumerate(zip(reward, logprob, value, strict=True)) if any(fields)]
    tokens = [Token("", f"@{t}", reward[t], logprob[t], value[t], entropy[t]) for t in scored]
    return fragment([Row("", "", [Card("tokens by position", sum(reward), tokens)])])


def _numbers(field: Tensor) -> list[float]:
    numbers: list[float] = field.detach().float().flatten().tolist()
    return numbers
