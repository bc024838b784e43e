"""Score rows: encode, batch by length, run, reduce. `EndoRewardModel.score` and the command line use this."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import compress

import torch
from torch import Tensor, nn

from ..errors import EndoRewardError
from ..head.gathered import weights_come_and_go
from ..returns import sequence_score
from ..signals import SIGNALS
from ..text.boundary import token_texts
from ..text.encoding import Encoded, Encoder
from ..text.row_flags import NOTHING_TO_SCORE
from ..text.rows import Row
from ..types import TokenRewards
from .batching import does_not_fit, in_batches
from .options import ScoreOptions
from .results import OnTokens, RowScore, Scores, TokenTable
from .scorer import Scorer


def score_rows(scorer: Scorer, rows: Sequence[Row], options: ScoreOptions, on_tokens: OnTokens) -> Scores:
    """Yield (position in rows, score). Rows that cannot be scored come first, then batches, the longest rows first."""
    encoder = encoder_for(scorer, options)
    vocab_size = min(model.vocab_size for model in _models(scorer, options))
    ready: list[tuple[int, Encoded]] = []
    for position, row in enumerate(rows):
        result = _encode(encoder, row, vocab_size)
        if isinstance(result, Encoded):
            ready.append((position, result))
        else:
            yield position, result

    def run(batch: list[int]) -> list[RowScore]:
        return _score_batch(scorer, [ready[i][1] for i in batch], options)

    def frequencies(length: int) -> list[tuple[int, ...]]:
        return [model.positions.frequencies(length) for model in _models(scorer, options)]

    lengths = [len(encoded.input_ids) for _, encoded in ready]
    for batch, scores in in_batches(run, lengths, options.max_tokens_per_batch, scorer.room, frequencies):
        if on_tokens is not None:
            on_tokens(sum(lengths[i] for i in batch))
        for i, score in zip(batch, scores or [_does_not_fit(ready[i][1]) for i in batch], strict=True):
            yield ready[i][0], score


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


@contextmanager
def evaluating(model: Scorer | nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode and without autograd. Each module's own mode is restored afterwards.

    Inference mode is fastest. FSDP gets no_grad instead, because it keeps the buffers into which it gathers weights,
    and a tensor created in inference mode cannot be used in a training step.
    """
    without_autograd = torch.no_grad if weights_come_and_go(model) else torch.inference_mode
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with without_autograd():
            yield
    finally:
        for module in training:
            module.training = True


def _score_batch(scorer: Scorer, batch: list[Encoded], options: ScoreOptions) -> list[RowScore]:
    with evaluating(scorer):  # must not enclose a yield: the caller's code would run in this mode
        padded = _pad(batch)
        for model in _models(scorer, options):
            model.ready_for(padded[0])
        rewards, mask, signals = _read(scorer, *padded, options)
        totals = sequence_score(
            rewards.reward, mask, reduction=options.reduction, gamma=options.gamma, floor=options.floor
        )
        columns = torch.stack([totals.double(), rewards.logprob.double().sum(1), *signals]).tolist()
        tables = _tables(scorer, batch, rewards, options) if options.per_token else [None] * len(batch)
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
    scorer: Scorer, input_ids: Tensor, scored: Tensor, terminal: Tensor, options: ScoreOptions
) -> tuple[TokenRewards, Tensor, list[Tensor]]:
    """Return rewards (B, T), the mask on the same device, and each signal as float64 (B,), from one pass."""
    inputs = [t.to(scorer.device) for t in (input_ids, scored, terminal)]
    if not options.signals:
        rewards = scorer.rewards_of_padded(*inputs, alpha=options.alpha, entropy=options.entropy)
        return rewards, inputs[1].to(rewards.reward.device), []
    stats = scorer.stats_of_padded(*inputs, alpha=options.alpha)
    other = None
    if options.reference is not None and any(SIGNALS[name].needs_reference for name in options.signals):
        other = _logprob(options.reference, input_ids, scored, terminal, options.alpha).to(stats.lse.device)
    return stats.rewards(), stats.mask, [SIGNALS[name].score(stats, other).double() for name in options.signals]


def _logprob(
    model: Scorer, input_ids: Tensor, scored: Tensor, terminal: Tensor, alpha: float
) -> Tensor:  # fmt: skip
    with evaluating(model):
        inputs = (t.to(model.device) for t in (input_ids, scored, terminal))
        return model.rewards_of_padded(*inputs, alpha=alpha).logprob


def _pad(batch: list[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids, scored, terminal), each (B, T) and padded on the right.

    A row is padded with its own first token. Any id of the vocabulary would do, but some models warn about their
    padding token when there is no attention mask.
    """
    width = max(len(encoded.input_ids) for encoded in batch)
    rows = [encoded.input_ids + encoded.input_ids[:1] * (width - len(encoded.input_ids)) for encoded in batch]
    place = torch.arange(width)
    lengths = torch.tensor([[len(encoded.input_ids)] for encoded in batch])
    scored = (place < lengths) & (place >= torch.tensor([[encoded.prompt_length] for encoded in batch]))
    for i, encoded in enumerate(batch):
        if encoded.completion_mask is not None:
            stop = encoded.prompt_length + len(encoded.completion_mask)
            scored[i, encoded.prompt_length : stop] = torch.tensor(encoded.completion_mask)
    terminal = (place == lengths - 1) & torch.tensor([[encoded.terminal] for encoded in batch])
    return torch.tensor(rows), scored, terminal


def _tables(
    scorer: Scorer, batch: list[Encoded], rewards: TokenRewards, options: ScoreOptions
) -> list[TokenTable]:  # fmt: skip
    wanted = [rewards.reward, rewards.logprob, rewards.value]
    if options.entropy and rewards.entropy is not None:
        wanted.append(rewards.entropy)
    fields = torch.stack(wanted).tolist()
    tables = []
    for i, encoded in enumerate(batch):
        start, stop = encoded.prompt_length, len(encoded.input_ids)
        ids = encoded.input_ids[start:]
        named = ("",) * len(ids)
        if options.texts and scorer.tokenizer is not None:
            named = token_texts(scorer.tokenizer, encoded.input_ids, start)
        columns = (ids, named, *(field[i][start:stop] for field in fields))
        chosen = encoded.completion_mask or (True,) * len(ids)
        tables.append(TokenTable(*(tuple(compress(column, chosen)) for column in columns)))
    return tables
