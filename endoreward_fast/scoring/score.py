"""Score rows: encode, batch by length, run, reduce. `EndoRewardModel.score` and the command line use this."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EndoRewardError
from ..returns import sequence_score
from ..signals import SIGNALS, TokenStats
from ..text.boundary import token_texts
from ..text.encoding import Encoded, Encoder
from ..text.row_flags import NOTHING_TO_SCORE
from ..text.rows import Row
from ..types import TokenRewards
from .batching import Budget
from .evaluating import evaluating
from .options import ScoreOptions
from .prefixes import Segment
from .readings import Read, Readings, answer_mask, kept_stats, prepare, refuse_unknown_ids
from .results import OnTokens, RowScore, Scores, TokenTable
from .scorer import Scorer
from .shared import Held, Shared

EncodedRows = list[Encoded | RowScore]
"""the tokens of each row, or why it has no score"""


def encode_rows(
    scorer: Scorer, rows: Sequence[Row | Encoded | RowScore], options: ScoreOptions, encoder: Encoder | None = None
) -> EncodedRows:  # fmt: skip
    """Return the tokens of each row, or a RowScore that says why it has no score. Encoded rows are left as they are.

    encoder   of these options (`encoder_for`), if the caller has one
    """
    encoder = encoder_for(scorer, options) if encoder is None else encoder
    vocab_size = min(model.vocab_size for model in _models(scorer, options))
    return [row if isinstance(row, Encoded | RowScore) else _encode(encoder, row, vocab_size, options) for row in rows]


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

    readings = Readings([encoded for _, encoded in ready], options)
    for places, found in _scored(scorer, readings, options):
        if on_tokens is not None:
            on_tokens(sum(len(readings.all[i].input_ids) for i in places))
        for i, score in readings.add(places, found or [None] * len(places)):
            yield ready[i][0], score


def _scored(
    scorer: Scorer, readings: Readings, options: ScoreOptions
) -> Iterator[tuple[list[int], Sequence[Read] | None]]:
    """(readings, what is found): those that share prefixes, then the others. None: memory has no room for one."""
    every = list(range(len(readings.all)))
    models = _models(scorer, options)
    if len(models) == 1:
        yield from _scored_together(models, readings, every, options)
        return
    own = [i for i in every if readings.is_row(i)]
    yield from _scored_together(models, readings, own, options)
    # Only the rows themselves are compared with the second model.
    yield from _scored_together([scorer], readings, every[len(own) :], options)


def _scored_together(
    models: list[Scorer], readings: Readings, group: list[int], options: ScoreOptions
) -> Iterator[tuple[list[int], Sequence[Read] | None]]:
    """Do the same for the readings of `group`, which all `models` read."""
    budget = Budget.of(options.max_tokens_per_batch, models[0].device)

    def run(places: list[int]) -> list[Read]:
        return _score_batch(models, readings, [group[i] for i in places], options)

    def finish(segments: Sequence[Segment], held: Held) -> list[Read]:
        return _score_ends(models, readings, group, segments, held, budget.computed, options)

    rows = [readings.all[i] for i in group]
    tokens, lengths = [_read_tokens(row) for row in rows], [len(row.input_ids) for row in rows]
    for places, found in Shared(models, tokens, lengths, budget, models[0].room).results(run, finish):
        yield [group[i] for i in places], found


def _read_tokens(row: Encoded) -> list[int]:
    """The tokens whose states a score is made of: after a terminal token, V(s') is 0."""
    return row.input_ids[:-1] if row.terminal else row.input_ids


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


def _encode(encoder: Encoder, row: Row, vocab_size: int, options: ScoreOptions) -> Encoded | RowScore:
    """Return the tokens of a row, or a RowScore that says why it has no score."""
    try:
        encoded = encoder.encode(row)
        refuse_unknown_ids(encoded, vocab_size)
    except EndoRewardError as error:
        return RowScore(None, 0, None, error=str(error))
    if encoded.prompt_length == len(encoded.input_ids):
        return RowScore(None, 0, None, encoded.flags, NOTHING_TO_SCORE)
    return prepare(encoder, row, encoded, options, vocab_size) if options.row_needs else encoded


def _score_ends(
    models: list[Scorer], readings: Readings, group: Sequence[int], segments: Sequence[Segment], held: Held, most: int,
    options: ScoreOptions,
) -> list[Read]:  # fmt: skip
    """Score the readings of `group` that end in segments from the states that are held of them."""
    ending = [(n, group[row]) for n, segment in enumerate(segments) for row in segment.rows()]
    rows = readings.all
    first = held[0].first
    width = max(first[n] + len(rows[row].input_ids) for n, row in ending)
    count = max(len(segments), most // width)  # of riders there may be any number
    reads: list[Read] = []
    for part in (ending[i : i + count] for i in range(0, len(ending), count)):
        batch = [rows[row] for _, row in part]
        cut = min(first[n] + encoded.prompt_length - 1 for (n, _), encoded in zip(part, batch, strict=True))
        offsets = [first[n] - cut for n, _ in part]
        stop = max(offset + len(encoded.input_ids) for offset, encoded in zip(offsets, batch, strict=True))
        places = torch.tensor([n for n, _ in part])
        states = [past.hidden[:, cut : cut + stop][places.to(past.hidden.device)] for past in held]
        # No state was computed behind a last token that ends the episode.
        states = [F.pad(found, (0, 0, 0, stop - found.shape[1])) for found in states]
        reads += _score_batch(models, readings, [row for _, row in part], options, offsets, states)
    return reads


def _score_batch(
    models: list[Scorer], readings: Readings, places: list[int], options: ScoreOptions, offsets: Sequence[int] = (),
    states: Sequence[Tensor] = (),
) -> list[Read]:  # fmt: skip
    """Score readings, each `offsets` columns further right, from the `states` of every model if they are known."""
    scorer, batch = models[0], [readings.all[i] for i in places]
    offsets = offsets or [0] * len(batch)
    names = readings.now() if any(map(readings.is_row, places)) else ()
    with evaluating(scorer):  # must not enclose a yield: the caller's code would run in this mode
        padded = _pad(batch, offsets)
        for model in models if not states else ():
            model.ready_for(padded[0])
        read = _read(models, *padded, answer_mask(batch, offsets, padded[1]), names, options, states)
        totals = sequence_score(
            read.rewards.reward, read.mask, reduction=options.reduction, gamma=options.gamma, floor=options.floor
        )
        columns = torch.stack([totals.double(), read.rewards.logprob.double().sum(1), *read.signals.values()]).tolist()
        tables = _tables(scorer, batch, offsets, read.rewards, options) if options.per_token else [None] * len(batch)
        kept = kept_stats(batch, offsets, list(map(readings.is_row, places)), read.stats, read.given)
    results = []
    for place, encoded, table, (stats, given), score, logprob, *values in zip(
        places, batch, tables, kept, *columns, strict=True
    ):
        if not readings.is_row(place):
            results.append(Read(None, stats))
            continue
        count = encoded.num_scored
        named = readings.met(place, dict(zip(read.signals, values, strict=True))) if options.signals else None
        result = RowScore(score, count, logprob, encoded.flags, tokens=table, signals=named)
        if math.isnan(score):
            result = RowScore(None, count, None, encoded.flags, "the model gave NaN for this row")
        results.append(Read(result, stats, given))
    return results


class _Batch(NamedTuple):
    """What the models give for a padded batch."""

    rewards: TokenRewards
    mask: Tensor
    """scored tokens, on the device of the rewards"""
    stats: TokenStats | None = None
    """None without signals"""
    given: Mapping[str, Tensor] = MappingProxyType({})
    """inputs of signals, (B, T)"""
    signals: Mapping[str, Tensor] = MappingProxyType({})
    """those of one reading, float64 (B,)"""


def _read(
    models: list[Scorer], input_ids: Tensor, scored: Tensor, terminal: Tensor, answers: Tensor | None,
    names: Sequence[str], options: ScoreOptions, states: Sequence[Tensor],
) -> _Batch:  # fmt: skip
    """Return the rewards and the signals `names` of a padded batch, from one pass."""
    scorer = models[0]
    inputs = [t.to(scorer.device) for t in (input_ids, scored, terminal)]
    ours, theirs = (states[0], states[-1]) if states else (None, None)
    if not options.signals:
        rewards = scorer.rewards_of_padded(*inputs, alpha=options.alpha, entropy=options.entropy, states=ours)
        return _Batch(rewards, inputs[1].to(rewards.reward.device))
    stats = scorer.stats_of_padded(*inputs, alpha=options.alpha, states=ours)
    given: dict[str, Tensor] = {}
    if len(models) > 1 and any("reference" in SIGNALS[name].needs for name in options.signals):
        other = _logprob(models[1], input_ids, scored, terminal, options.alpha, theirs)
        given["reference"] = other.to(stats.lse.device)
    if answers is not None:
        given["answer_span"] = answers.to(stats.lse.device)
    known = [name for name in names if given.keys() >= set(SIGNALS[name].needs)]
    signals = {name: SIGNALS[name].score(stats, **given).double() for name in known}
    return _Batch(stats.rewards(), stats.mask, stats, given, signals)


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
