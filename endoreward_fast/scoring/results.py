"""The results of scoring: for each row, and for each of its tokens."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..text.row_flags import in_words
from ..view.notebook import html_of_table


@dataclass(frozen=True)
class TokenTable:
    """The scored tokens of one row; every field has one entry per token."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    """the text that each token adds; all "" without a tokenizer, or with texts=False"""
    rewards: tuple[float, ...]
    logprobs: tuple[float, ...]
    """nats"""
    values: tuple[float, ...]
    """V(s) of the state in which the token was chosen"""
    entropies: tuple[float, ...] | None = None
    """of pi(. | s), nats; only with entropy=True"""

    def _repr_html_(self) -> str:
        """Return a heatmap, for notebooks."""
        return html_of_table(self)


@dataclass(frozen=True)
class RowScore:
    """The score of one row, or why it has none."""

    score: float | None
    num_tokens: int
    """number of scored tokens"""
    logprob: float | None
    """sum of the scored tokens' log-probabilities, nats"""
    flags: tuple[str, ...] = ()
    """keys of `row_flags.FLAGS`, which explains them"""
    error: str | None = None
    """one line: why the row has no score"""
    tokens: TokenTable | None = None
    """only with per_token=True"""
    signals: Mapping[str, float] | None = None
    """{name: score}, only with signals; without those whose needs the row does not meet"""
    signal_errors: Mapping[str, str] | None = None
    """{name: one line that says why the row does not have this signal}; None: there is no such signal"""

    @property
    def note(self) -> str | None:
        """The error, or else the flags in words, or None."""
        return self.error or in_words(self.flags)

    def _repr_html_(self) -> str | None:
        """Return a heatmap if there are tokens. For None, notebooks show the plain text."""
        return None if self.tokens is None else html_of_table(self.tokens, self.score, self.note)


Scores = Iterator[tuple[int, RowScore]]
"""(position in rows, score) of each row, in the order in which batches finish"""
OnTokens = Callable[[int], None] | None
"""function that is called with the number of tokens of each finished batch"""


def in_order(scores: Scores) -> list[RowScore]:
    """Return the scores in the order of the rows."""
    results = dict(scores)
    return [results[i] for i in range(len(results))]


@dataclass(frozen=True)
class Ranked:
    """One completion of a ranking."""

    index: int
    """its position in the given completions"""
    completion: Any
    score: float | None
    """None if the completion is empty and no token ends it"""
