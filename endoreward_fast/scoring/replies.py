"""Log-probabilities of completions, of which several may differ in their last token alone.

The replies to a judge's question are often one token each. Their log-probabilities are all read in one state, the one
behind the question: the model reads the question alone, and the vocabulary is read once for each question instead of
once for each reply. Where the tokenizer writes a rating as two tokens, of which the first is a space, two states of one
row give all ratings.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..text.encoding import Encoded
from ..text.rows import Row
from .batching import Budget, does_not_fit
from .evaluating import evaluating
from .options import ScoreOptions
from .prefixes import Segment
from .results import OnTokens, RowScore, Scores
from .score import encode_rows, score_rows
from .scorer import Scorer
from .shared import Held, Shared


class Question(NamedTuple):
    """Tokens that are read once, for every row that has one more. Rows have scored tokens from `start` on."""

    tokens: tuple[int, ...]
    start: int

    @property
    def states(self) -> range:
        """The places of the states in which the scored tokens are chosen."""
        return range(self.start - 1, len(self.tokens))


def logprob_rows(
    scorer: Scorer, rows: Sequence[Row | Encoded | RowScore], options: ScoreOptions, on_tokens: OnTokens
) -> Scores:  # fmt: skip
    """Yield (position in rows, result). Its score is its logprob: the sum over the scored tokens, nats.

    Rows that are equal but for their last token are read together, and so is a row with one scored token. The others
    are read as `score_rows` does.
    """
    encoded = encode_rows(scorer, rows, options)
    asked: dict[Question, list[int]] = {}
    if scorer.names_tokens():
        for position, row in enumerate(encoded):
            if isinstance(row, Encoded) and row.prompt_length and row.completion_mask is None:
                asked.setdefault(Question(tuple(row.input_ids[:-1]), row.prompt_length), []).append(position)
    asked = {found: users for found, users in asked.items() if len(users) > 1 or len(found.states) == 1}
    together = {position for users in asked.values() for position in users}
    apart = [position for position in range(len(encoded)) if position not in together]
    for place, result in score_rows(scorer, [encoded[i] for i in apart], options, on_tokens):
        yield apart[place], result if result.error else replace(result, score=result.logprob)
    ready = {i: row for i, row in enumerate(encoded) if isinstance(row, Encoded) and i in together}
    yield from _of_questions(scorer, asked, ready, options, on_tokens)


def _of_questions(
    scorer: Scorer, asked: dict[Question, list[int]], rows: dict[int, Encoded], options: ScoreOptions,
    on_tokens: OnTokens,
) -> Scores:  # fmt: skip
    """Yield (position, result) of the rows of questions. `asked` has their positions."""
    questions, users = list(asked), list(asked.values())
    named = sorted({token for row in rows.values() for token in row.input_ids[row.prompt_length :]})
    column = {token: k for k, token in enumerate(named)}
    names = torch.tensor(named, dtype=torch.long)

    def logprobs(tokens: Tensor, chosen: Tensor, places: Sequence[int], states: Tensor | None = None) -> list[Tensor]:
        """Return log pi (states, K) of each question in `places`, on the CPU."""
        with evaluating(scorer):
            if states is None:
                scorer.ready_for(tokens)
            found = scorer.named_logprobs(tokens, chosen, names, alpha=options.alpha, states=states).double().cpu()
        return list(found.split([len(questions[i].states) for i in places]))

    def run(places: list[int]) -> list[Tensor]:
        here = [questions[i] for i in places]
        length = torch.tensor([[len(question.tokens)] for question in here])
        start = torch.tensor([[question.start - 1] for question in here])
        padded = pad_sequence([torch.tensor(question.tokens) for question in here], batch_first=True)
        place = torch.arange(padded.shape[1])
        padded = torch.where(place < length, padded, padded[:, :1])
        return logprobs(padded.to(scorer.device), (place >= start) & (place < length), places)

    def finish(segments: Sequence[Segment], held: Held) -> list[Tensor]:
        past, first = held[0], held[0].first
        ends = [(n, row) for n, segment in enumerate(segments) for row in segment.rows()]
        at = torch.tensor([(n, first[n] + place) for n, row in ends for place in questions[row].states])
        n, place = at.to(past.hidden.device).unbind(1)
        blank = torch.zeros(len(at), 1, dtype=torch.long, device=scorer.device)
        return logprobs(blank, blank == 0, [row for _, row in ends], past.hidden[n, place].unsqueeze(1))

    budget = Budget.of(options.max_tokens_per_batch, scorer.device)
    tokens = [list(question.tokens) for question in questions]
    shared = Shared([scorer], tokens, [len(t) for t in tokens], budget, scorer.room)
    for places, found in shared.results(run, finish):
        if on_tokens is not None:
            on_tokens(sum(len(rows[i].input_ids) for place in places for i in users[place]))
        for k, place in enumerate(places):
            for i in users[place]:
                chosen = [column[token] for token in rows[i].input_ids[rows[i].prompt_length :]]
                logprob = None if found is None else float(found[k][range(len(chosen)), chosen].sum())
                yield i, _result(rows[i], logprob)


def _result(row: Encoded, logprob: float | None) -> RowScore:
    count = row.num_scored
    if logprob is None:
        return RowScore(None, count, None, row.flags, does_not_fit(len(row.input_ids)))
    if math.isnan(logprob):
        return RowScore(None, count, logprob, row.flags, "the model gave NaN for this row")
    return RowScore(logprob, count, logprob, row.flags)
