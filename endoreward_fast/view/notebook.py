"""Convert results to the tokens that `heatmap` draws, and to the HTML that notebooks display."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from .heatmap import Card, Row, Token, fragment

if TYPE_CHECKING:
    from torch import Tensor


class Table(Protocol):
    """The fields of a TokenTable that are drawn."""

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
    """The fields of TokenRewards that are drawn."""

    @property
    def reward(self) -> Tensor: ...
    @property
    def logprob(self) -> Tensor: ...
    @property
    def value(self) -> Tensor: ...
    @property
    def entropy(self) -> Tensor | None: ...


def tokens_of(table: Table) -> list[Token]:
    """Return the tokens of a table. Tokens that spell one character together are merged into one.

    A token without text is named by its id.
    """
    entropies = table.entropies or (None,) * len(table.ids)
    columns = zip(table.texts, table.ids, table.rewards, table.logprobs, table.values, entropies, strict=True)
    tokens = [Token(text, f"#{token_id}", *numbers) for text, token_id, *numbers in columns]
    return _merge_characters(_mark_terminal(tokens))


def _mark_terminal(tokens: list[Token]) -> list[Token]:
    """Mark the last token as terminal if its reward is alpha log pi + V(s), that is, if V(s') is 0."""
    if not tokens:
        return tokens
    last = tokens[-1]
    end = _alpha(tokens) * (last.logprob or 0.0) + (last.value or 0.0)
    return [*tokens[:-1], replace(last, terminal=math.isclose(last.reward, end, rel_tol=1e-4, abs_tol=1e-3))]


def _alpha(tokens: list[Token]) -> float:
    """Solve r = alpha log pi + V(s) - V(s') for alpha, at the token with the lowest log pi. 1 for a single token."""
    pairs = [
        (a.logprob, a.reward - a.value + b.value)
        for a, b in pairwise(tokens)
        if a.logprob and a.value is not None and b.value is not None
    ]
    logprob, part = min(pairs, default=(-1.0, -1.0))
    return part / logprob


def _merge_characters(tokens: list[Token]) -> list[Token]:
    """Merge tokens without text into the next token with text, if together they spell a character."""
    found: list[Token] = []
    parts: list[Token] = []
    for token in tokens:
        parts.append(token)
        if token.text:
            # A token without text holds a byte or more of a character that is not ASCII. What the next token with
            # text shows may begin before that character, with a space for example, and go on behind it.
            whole = not token.text.isascii() and len(parts) <= len(token.text.encode("utf-8", "replace"))
            found += [_merged(parts)] if whole else parts
            parts = []
    return found + parts


def _merged(parts: list[Token]) -> Token:
    """Merge tokens into one. Rewards telescope: their sum is the character's reward in the first token's state."""
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
    """Return the heatmap of one row. The score defaults to the sum of the rewards."""
    score = sum(table.rewards) if score is None and note is None else score
    return fragment([Row("", "", [Card("completion", score, tokens_of(table), note)])])


def html_of_rewards(rewards: Rewards) -> str | None:
    """Return the heatmap of one row, (T,) or (1, T), or None for any other shape.

    It shows the scored tokens: those whose reward, log-probability and value are not all 0.
    """
    if rewards.reward.ndim not in (1, 2) or (rewards.reward.ndim == 2 and len(rewards.reward) != 1):
        return None
    reward, logprob, value = map(_numbers, (rewards.reward, rewards.logprob, rewards.value))
    entropy = [None] * len(reward) if rewards.entropy is None else _numbers(rewards.entropy)
    scored = [t for t, fields in enumerate(zip(reward, logprob, value, strict=True)) if any(fields)]
    tokens = [Token("", f"@{t}", reward[t], logprob[t], value[t], entropy[t]) for t in scored]
    return fragment([Row("", "", [Card("tokens by position", sum(reward), _mark_terminal(tokens))])])


def _numbers(field: Tensor) -> list[float]:
    numbers: list[float] = field.detach().float().flatten().tolist()
    return numbers
