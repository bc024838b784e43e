"""What scoring gives: a score for each row, and for each of its tokens."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..text.flags import in_words
from ..view.notebook import html_of_table


@dataclass(frozen=True)
class TokenTable:
    """The scored tokens of one row; every field has one entry per token."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    """what each token adds to the text; "" for each without a tokenizer, or with texts=False"""
    rewards: tuple[float, ...]
    logprobs: tuple[float, ...]
    """nats"""
    values: tuple[float, ...]
    """V(s) of the state in which the token was chosen"""
    entropies: tuple[float, ...] | None = None
    """of pi(. | s), nats; with entropy"""

    def _repr_html_(self) -> str:
        """For notebooks: a heatmap."""
        return html_of_table(self)


@dataclass(frozen=True)
class RowScore:
    """The score of one row, or why it has none."""

    score: float | None
    num_tokens: int
    """scored tokens"""
    logprob: float | None
    """their summed log-probability, nats"""
    flags: tuple[str, ...] = ()
    """what is worth knowing about the row: keys of `encoding.FLAGS`"""
    error: str | None = None
    """why the row has no score, in one line"""
    tokens: TokenTable | None = None
    """with per_token"""
    signals: Mapping[str, float] | None = None
    """with signals: each one's score by its name"""

    @property
    def note(self) -> str | None:
        """Why it has no score, or its flags in words, or None."""
        return self.error or in_words(self.flags)

    def _repr_html_(self) -> str | None:
        """For notebooks: with per_token a heatmap; else None, so their plain text."""
        return None if self.tokens is None else html_of_table(self.tokens, self.score, self.note)


Scores = Iterator[tuple[int, RowScore]]
"""(position in rows, score) as they come, in any order"""
OnTokens = Callable[[int], None] | None
"""called with the number of tokens of each finished batch"""


def in_order(scores: Scores) -> list[RowScore]:
    """Scores by position."""
    results = dict(scores)
    return [results[i] for i in range(len(results))]


@dataclass(frozen=True)
class Ranked:
    """One completion of a ranking."""

    index: int
    """its place among the completions given"""
    completion: Any
    score: float | None
    """None: it is empty, and no token ends it"""
