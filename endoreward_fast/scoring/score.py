"""Score rows: encode, batch by length, run, reduce. `EndoRewardModel.score` and the command line use this."""

import math
from collections.abc import Iterator, Sequence
from itertools import compress

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EndoRewardError
from ..returns import sequence_score
from ..signals import SIGNALS
from ..text.boundary import token_texts
from ..text.encoding import Encoded, Encoder
from ..text.row_flags import NOTHING_TO_SCORE
from ..text.rows import Row
from ..types import TokenRewards
from .batching import Budget, does_not_fit
from .evaluating import evaluating
from .options import ScoreOptions
from .prefixes import Segment
from .results import OnTokens, RowScore, Scores, TokenTable
from .scorer import Scorer
from .shared import Held, Shared

EncodedRows = list[Encoded | RowScore]
"""the tokens of each row, or why it has no score"""


def encode_rows(scorer: Scorer, rows: Sequence[Row | Encoded | RowScore], options: ScoreOptions) -> EncodedRows:
    """Return the tokens of each row, or a RowScore that says why it has no score. Encoded rows are left as they are."""
    encoder = encoder_for(scorer, options)
    vocab_size = min(model.vocab_size for model in _models(scorer, options))
    return [row if isinstance(row, Encoded | RowScore) else _encode(encoder, row, vocab_size) for row in rows]


def score_rows(
    scorer: Scorer, rows: Sequence[Row | Encoded | RowScore], options: ScoreOptions, on_tokens: OnTokens
) -> Scores:  # fmt: skip
    """Yield (position in rows, score): rows without a score, rows that share prefixes, then others, longest first."""
    ready: list[tuple[int, Encoded]] = []
    for position, result in enumerate(encode_rows(scorer, rows, options)):
        if isinstance(result, Encoded):
            ready.append((position, result))
        else:
            yield position, result

    lengths = [len(encoded.input_ids) for _, encoded in ready]
    for batch, scores in _scored(scorer, [encoded for _, encoded in ready], options):
        if on_tokens is not None:
            on_tokens(sum(lengths[i] for i in batch))
        for i, score in zip(batch, scores or [_does_not_fit(ready[i][1]) for i in batch], strict=True):
            yield ready[i][0], score


def _scored(
    scorer: Scorer, rows: list[Encoded], options: ScoreOptions
) -> Iterator[tuple[list[int], list[RowScore] | None]]:
    """(rows, their scores): those that share prefixes, then the others. None: memory has no room for a row."""
    models = _models(scorer, options)
    budget = Budget.of(options.max_tokens_per_batch, scorer.device)

    def run(places: list[int]) -> list[RowScore]:
        return _score_batch(scorer, [rows[i] for i in places], options)

    def finish(segments: Sequence[Segment], held: Held) -> list[RowScore]:
        return _score_ends(scorer, rows, segments, held, budget.computed, options)

    tokens, lengths = [_read_tokens(row) for row in rows], [len(row.input_ids) for row in rows]
    return Shared(models, tokens, lengths, budget, scorer.room).results(run, finish)


def _read_tokens(row: Encoded) -> list[int]:
    """The tokens whose states a score is made of: after a terminal token, V(s') is 0."""
    return row.input_ids[:-1] if row.terminal else row.input_ids


def _does_not_fit(encoded: Encoded) -> RowScore:
    return RowScore(None, encoded.num_scored, None, encoded.flags, does_not_fit(len(encoded.input_ids)))


def encoder_for(scorer: Scorer, options: ScoreOptions) -> Encoder:
    """Return the encoder for these options and the length limits of the models."""
    found = (model.positions.limit(options.max_length) for model in _models(scorer, options))
    limits = [limit for limit in found if limit is not None]
    return Encoder(
        scorer.tokenizer, system=options.system, chat=options.chat, max_length=min(limits, default=None),
        truncate=options.truncate, append_eos=options.append_eos, eos_ids=scorer.eos_ids, extras=options.extras,
        date=options.date,
    )  # fmt: skip


def _models(scorer: Scorer, options: ScoreOptions) -> list[Scorer]:
    return [scorer] if options.reference is None else [scorer, options.reference]


def _encode(encoder: Encoder, row: Row, vocab_size: int) -> Encoded | RowScore:
    """Return the tokens of a row, or a RowScore that says why it has no score."""
    try:
        encoded = encoder.encode(row)
        odd = next((i for i in encoded.input_ids if not 0 <= i < vocab_size), None)
        if odd is not None:
            raise EndoRewardError(f"token id {odd} is not in the model's vocabulary of {vocab_size}")
    except EndoRewardError as error:
        return RowScore(None, 0, None, error=str(error))
    if encoded.prompt_length == len(encoded.input_ids):
        return RowScore(None, 0, None, encoded.flags, NOTHING_TO_SCORE)
    return encoded


def _score_ends(
    scorer: Scorer, rows: list[Encoded], segments: Sequence[Segment], held: Held, most: int, options: ScoreOptions
) -> list[RowScore]:
    """Score the rows that end in segments from the states that are held of them."""
    ending = [(n, row) for n, segment in enumerate(segments) for row in segment.rows()]
    first = held[0].first
    width = max(first[n] + len(rows[row].input_ids) for n, row in ending)
    count = max(len(segments), most // width)  # of riders there may be any number
    scores = []
    for part in (ending[i : i + count] for i in range(0, len(ending), count)):
        batch = [rows[row] for _, row in part]
        cut = min(first[n] + encoded.prompt_length - 1 for (n, _), encoded in zip(part, batch, strict=True))
        offsets = [first[n] - cut for n, _ in part]
        stop = max(offset + len(encoded.input_ids) for offset, encoded in zip(offsets, batch, strict=True))
        places = torch.tensor([n for n, _ in part])
        states = [past.hidden[:, cut : cut + stop][places.to(past.hidden.device)] for past in held]
        # No state was computed behind a last token that ends the episode.
        states = [F.pad(found, (0, 0, 0, stop - found.shape[1])) for found in states]
        scores += _score_batch(scorer, batch, options, offsets, states)
    return scores


def _score_batch(
    scorer: Scorer, batch: list[Encoded], options: ScoreOptions, offsets: Sequence[int] = (),
    states: Sequence[Tensor] = (),
) -> list[RowScore]:  # fmt: skip
    """Score rows, each `offsets` columns further right, from the `states` of every model if they are known."""
    offsets = offsets or [0] * len(batch)
    with evaluating(scorer):  # must not enclose a yield: the caller's code would run in this mode
        padded = _pad(batch, offsets)
        for model in _models(scorer, options) if not states else ():
            model.ready_for(padded[0])
        rewards, mask, signals = _read(scorer, *padded, options, states)
        totals = sequence_score(
            rewards.reward, mask, reduction=options.reduction, gamma=options.gamma, floor=options.floor
        )
        columns = torch.stack([totals.double(), rewards.logprob.double().sum(1), *signals]).tolist()
        tables = _tables(scorer, batch, offsets, rewards, options) if options.per_token else [None] * len(batch)
    results = []
    for encoded, table, score, logprob, *values in zip(batch, tables, *columns, strict=True):
        count = encoded.num_scored
        named = dict(zip(options.signals, values, strict=True)) if values else None
        result = RowScore(score, count, logprob, encoded.flags, tokens=table, signals=named)
        if math.isnan(score):
            result = RowScore(None, count, None, encoded.flags, "the model gave NaN for this row")
        results.append(result)
    return results


def _read(
    scorer: Scorer, input_ids: Tensor, scored: Tensor, terminal: Tensor, options: ScoreOptions,
    states: Sequence[Tensor],
) -> tuple[TokenRewards, Tensor, list[Tensor]]:  # fmt: skip
    """Return rewards (B, T), the mask on the same device, and each signal as float64 (B,), from one pass."""
    inputs = [t.to(scorer.device) for t in (input_ids, scored, terminal)]
    ours, theirs = (states[0], states[-1]) if states else (None, None)
    if not options.signals:
        rewards = scorer.rewards_of_padded(*inputs, alpha=options.alpha, entropy=options.entropy, states=ours)
        return rewards, inputs[1].to(rewards.reward.device), []
    stats = scorer.stats_of_padded(*inputs, alpha=options.alpha, states=ours)
    other = None
    if options.reference is not None and any(SIGNALS[name].needs_reference for name in options.signals):
        other = _logprob(options.reference, input_ids, scored, terminal, options.alpha, theirs).to(stats.lse.device)
    return stats.rewards(), stats.mask, [SIGNALS[name].score(stats, other).double() for name in options.signals]


def _logprob(
    model: Scorer, input_ids: Tensor, scored: Tensor, terminal: Tensor, alpha: float, states: Tensor | None
) -> Tensor:  # fmt: skip
    with evaluating(model):
        inputs = (t.to(model.device) for t in (input_ids, scored, terminal))
        return model.rewards_of_padded(*inputs, alpha=alpha, states=states).logprob


def _pad(batch: list[Encoded], offsets: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids, scored, terminal), each (B, T) and padded.

    A row's first token is in column `offset`. If that is negative, so many of its first tokens are left out.

    A row is padded with its own first token. Any id of the vocabulary would do, but some models warn about their
    padding token when there is no attention mask.
    """
    width = max(offset + len(encoded.input_ids) for encoded, offset in zip(batch, offsets, strict=True))
    rows = []
    for encoded, offset in zip(batch, offsets, strict=True):
        ids, fill = encoded.input_ids, encoded.input_ids[:1]
        rows.append(fill * max(0, offset) + ids[max(0, -offset) :] + fill * (width - offset - len(ids)))
    starts = torch.tensor([[offset] for offset in offsets])
    place = torch.arange(width) - starts
    lengths = torch.tensor([[len(encoded.input_ids)] for encoded in batch])
    scored = (place < lengths) & (place >= torch.tensor([[encoded.prompt_length] for encoded in batch]))
    for i, (encoded, offset) in enumerate(zip(batch, offsets, strict=True)):
        if encoded.completion_mask is not None:
            start = encoded.prompt_length + offset
            scored[i, start : start + len(encoded.completion_mask)] = torch.tensor(encoded.completion_mask)
    terminal = (place == lengths - 1) & torch.tensor([[encoded.terminal] for encoded in batch])
    return torch.tensor(rows), scored, terminal


def _tables(
    scorer: Scorer, batch: list[Encoded], offsets: Sequence[int], rewards: TokenRewards, options: ScoreOptions
) -> list[TokenTable]:  # fmt: skip
    wanted = [rewards.reward, rewards.logprob, rewards.value]
    if options.entropy and rewards.entropy is not None:
        wanted.append(rewards.entropy)
    fields = torch.stack(wanted).tolist()
    tables = []
    for i, (encoded, offset) in enumerate(zip(batch, offsets, strict=True)):
        start, stop = encoded.prompt_length, len(encoded.input_ids)
        ids = encoded.input_ids[start:]
        named = ("",) * len(ids)
        if options.texts and scorer.tokenizer is not None:
            named = token_texts(scorer.tokenizer, encoded.input_ids, start)
        columns = (ids, named, *(field[i][offset + start : offset + stop] for field in fields))
        chosen = encoded.completion_mask or (True,) * len(ids)
        tables.append(TokenTable(*(tuple(compress(column, chosen)) for column in columns)))
    return tables
