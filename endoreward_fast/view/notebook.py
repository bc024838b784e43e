"""What notebooks show of results, and results as the tokens that `heatmap` draws."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from .heatmap import Card, Row, Token, fragment

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 4
"""bytes of a character in UTF-8, and so the most tokens that spell one"""


class Table(Protocol):
    """What of a TokenTable is drawn."""

    @property
    def ids(self) -> tuple[int, ...]: ...
    @property
    def texts(self) -> tuple[str, ...]: ...
    @property
    def rewards(self) -> tuple[float, ...]: ...
    @property
    def logprobs(self) -> tuple[float, ...]: ...
    @property
    def values(self) -> tuple[float, ...]: ...
    @property
    def entropies(self) -> tuple[float, ...] | None: ...


class Rewards(Protocol):
    """What of TokenRewards is drawn."""

    @property
    def reward(self) -> Tensor: ...
    @property
    def logprob(self) -> Tensor: ...
    @property
    def value(self) -> Tensor: ...
    @property
    def entropy(self) -> Tensor | None: ...


def tokens_of(table: Table) -> list[Token]:
    """The tokens of a table; by their ids where it has no texts. Those that spell one character are one."""
    entropies = table.entropies or (None,) * len(table.ids)
    columns = zip(table.texts, table.ids, table.rewards, table.logprobs, table.values, entropies, strict=True)
    return _by_character(_ended([Token(text, f"#{token_id}", *numbers) for text, token_id, *numbers in columns]))


def _ended(tokens: list[Token]) -> list[Token]:
    """`tokens`, of which the last is marked if nothing was subtracted from its Q: if its reward is alpha log pi + V."""
    if not tokens:
        return tokens
    last = tokens[-1]
    end = _alpha(tokens) * (last.logprob or 0.0) + (last.value or 0.0)
    return [*tokens[:-1], replace(last, terminal=math.isclose(last.reward, end, rel_tol=1e-4, abs_tol=1e-3))]


def _alpha(tokens: list[Token]) -> float:
    """From r = alpha log pi + V(s) - V(s') of the token whose log pi tells most; 1 where there is but one token."""
    pairs = [
        (a.logprob, a.reward - a.value + b.value)
        for a, b in pairwise(tokens)
        if a.logprob and a.value is not None and b.value is not None
    ]
    logprob, part = min(pairs, default=(-1.0, -1.0))
    return part / logprob


def _by_character(tokens: list[Token]) -> list[Token]:
    """`tokens`, where those without a text that spell a character with the next one that has are joined to it."""
    found: list[Token] = []
    parts: list[Token] = []
    for token in tokens:
        parts.append(token)
        if token.text:
            whole = len(parts) <= LONGEST and not token.text[0].isascii()
            found += [_joined(parts)] if whole else parts
            parts = []
    return found + parts


def _joined(parts: list[Token]) -> Token:
    """One token: rewards telescope, so that their sum is that of the character, chosen in the first one's state."""
    first, last = parts[0], parts[-1]
    return Token(
        last.text,
        " ".join(part.name for part in parts),
        sum(part.reward for part in parts),
        _sum(part.logprob for part in parts),
        first.value,
        _sum(part.entropy for part in parts),
        count=len(parts),
        terminal=last.terminal,
    )


def _sum(numbers: Iterable[float | None]) -> float | None:
    known = list(numbers)
    return None if None in known else sum(n for n in known if n is not None)


def html_of_table(table: Table, score: float | None = None, note: str | None = None) -> str:
    """A heatmap of one row; its score, by default, the plain sum of the rewards."""
    score = sum(table.rewards) if score is None and note is None else score
    return fragment([Row("", "", [Card("completion", score, tokens_of(table), note)])])


def html_of_rewards(rewards: Rewards) -> str | None:
    """A heatmap of one row, (T,) or (1, T), of the tokens that were scored: whose fields are not all 0. Else None."""
    if rewards.reward.ndim not in (1, 2) or (rewards.reward.ndim == 2 and len(rewards.reward) != 1):
        return None
    reward, logprob, value = map(_numbers, (rewards.reward, rewards.logprob, rewards.value))
    entropy = [None] * len(reward) if rewards.entropy is None else _numbers(rewards.entropy)
    scored = [t for t, fields in enumerate(zip(reward, logprob, value, strict=True)) if any(fields)]
    tokens = [Token("", f"@{t}", reward[t], logprob[t], value[t], entropy[t]) for t in scored]
    return fragment([Row("", "", [Card("tokens by position", sum(reward), _ended(tokens))])])


def _numbers(field: Tensor) -> list[float]:
    numbers: list[float] = field.detach().float().flatten().tolist()
    return numbers
