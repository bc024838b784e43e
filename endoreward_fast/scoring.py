"""Rows -> scores: encode, batch by length, run, reduce. What `EndoRewardModel.score` and the command line stand on."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .arguments import refuse_unknown
from .batching import does_not_fit, in_batches
from .boundary import token_texts
from .encoding import NOTHING_TO_SCORE, Encoded, Encoder, Row, Truncate, in_words
from .errors import EndoRewardError
from .gathered import weights_come_and_go
from .messages import check_text
from .notebook import html_of_table
from .positions import forget_longer_rows
from .returns import sequence_score
from .signals import SIGNALS, select
from .template import Extras, as_date
from .types import TokenRewards

if TYPE_CHECKING:
    from .model import EndoRewardModel


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


SWITCHES = ("append_eos", "per_token", "texts", "entropy")
"""fields of ScoreOptions that are on or off"""


@dataclass(frozen=True)
class ScoreOptions:
    """How rows are encoded, batched and reduced. Raises EndoRewardError, naming the option, for what cannot work."""

    alpha: float = 1.0
    """soft-RL temperature, > 0"""
    reduction: Literal["sum", "mean"] = "sum"
    """of token rewards to a score"""
    gamma: float = 1.0
    """discount per token, in (0, 1]"""
    floor: float = 0.0
    """the least weight that the discount leaves a token"""
    system: str | None = None
    """a system prompt; a row's own follows it"""
    chat: bool | None = None
    """None: the chat template where there is one; False: plain text; True: insist on it"""
    max_length: int | None = None
    """most tokens of prompt and completion; None: the model's limit (`EndoRewardModel.max_positions`). A model with a
    table of positions reads no more than the table has"""
    truncate: Truncate = None
    """beyond that: None, an error for the row; "prompt" or "completion", cut there (see `encode_row`)"""
    append_eos: bool = True
    """end completions of text with an end-of-sequence or end-of-turn token"""
    max_tokens_per_batch: int = 8192
    """padding included; a longer row runs alone. Where memory runs out it is halved, for the scorer's later calls too
    (`EndoRewardModel.room`)"""
    per_token: bool = False
    """fill RowScore.tokens"""
    texts: bool = True
    """and its texts, which take longer to find than everything else in it"""
    entropy: bool = False
    """and its entropies"""
    signals: str | Sequence[str] = ()
    """fill RowScore.signals with these of `signals.SIGNALS`, from the same pass: names, or "all" that can be had. Each
    has its own reduction; `reduction`, `gamma` and `floor` are the score's alone"""
    reference: "EndoRewardModel | None" = None
    """a second model with the same tokenizer, for signals that compare two: one more forward pass"""
    tools: Sequence[Any] | None = None
    """JSON schemas (or functions) of tools, for the chat template; a row's own `tools` come in their place"""
    documents: Sequence[Mapping[str, str]] | None = None
    """documents for the chat template, likewise"""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """further variables of the chat template, such as enable_thinking; a row's own come before them"""
    date: str | None = None
    """ "YYYY-MM-DD": the day that a chat template is told which writes one; None: today"""

    @property
    def extras(self) -> Extras:
        """What every row gives its chat template. EndoRewardError: it is no tools, documents or arguments."""
        names = ("tools", "documents", "chat_template_kwargs")
        return Extras.of({name: getattr(self, name) for name in names}, Extras())

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "ScoreOptions":
        """From keyword arguments (`arguments.ScoreKwargs`). EndoRewardError names one that is no option."""
        refuse_unknown(given, cls.__dataclass_fields__)
        return cls(**given)

    def __post_init__(self) -> None:
        _ = self.extras, self.date is None or as_date(self.date)  # what is wrong with them is said before any row
        if isinstance(self.system, str):
            check_text(self.system, "system")
        object.__setattr__(self, "signals", select(self.signals, reference=self.reference is not None))
        for name, fine, wanted in (
            ("alpha", isinstance(self.alpha, Real) and 0 < self.alpha < math.inf, "a number above 0"),
            ("reduction", self.reduction in ("sum", "mean"), "'sum' or 'mean'"),
            ("gamma", isinstance(self.gamma, Real) and 0 < self.gamma <= 1, "a number above 0, at most 1"),
            ("floor", isinstance(self.floor, Real) and 0 <= self.floor < math.inf, "a number, 0 or more"),
            ("system", isinstance(self.system, str | None), "text, or None"),
            ("chat", self.chat in (None, True, False), "True, False or None"),
            ("truncate", self.truncate in (None, "prompt", "completion"), "None, 'prompt' or 'completion'"),
            ("max_length", self.max_length is None or _is_count(self.max_length), "a whole number, 1 or more, or None"),
            ("max_tokens_per_batch", _is_count(self.max_tokens_per_batch), "a whole number, 1 or more"),
            ("reference", self.reference is None or hasattr(self.reference, "rewards_of_padded"), "an EndoRewardModel"),
            *((name, getattr(self, name) in (True, False), "True or False") for name in SWITCHES),
        ):
            if not fine:
                raise EndoRewardError(f"{name}={getattr(self, name)!r}: expected {wanted}")


def _is_count(x: Any) -> bool:
    return isinstance(x, Integral) and x >= 1


def score_rows(scorer: "EndoRewardModel", rows: Sequence[Row], options: ScoreOptions, on_tokens: OnTokens) -> Scores:
    """(position in rows, score) as batches finish. Rows that need no model come first, then the longest."""
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


def encoder_for(scorer: "EndoRewardModel", options: ScoreOptions) -> Encoder:
    """Options and the models' own limits -> how rows are encoded."""
    limits = [model.positions.limit(options.max_length) for model in _models(scorer, options)]
    limits = [limit for limit in limits if limit is not None]
    return Encoder(
        scorer.tokenizer, system=options.system, chat=options.chat, max_length=min(limits, default=None),
        truncate=options.truncate, append_eos=options.append_eos, eos_ids=scorer.eos_ids, extras=options.extras,
        date=options.date,
    )  # fmt: skip


def _models(scorer: "EndoRewardModel", options: ScoreOptions) -> list["EndoRewardModel"]:
    return [scorer] if options.reference is None else [scorer, options.reference]


def _encode(encoder: Encoder, row: Row, vocab_size: int) -> Encoded | RowScore:
    """Tokens of a row, or why it has no score."""
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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode, and no autograd. Each module's own mode is restored.

    Inference mode costs least, but FSDP keeps the buffers that it gathers weights into, and a tensor born in inference
    mode can take part in no training step afterwards.
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


def _score_batch(scorer: "EndoRewardModel", batch: list[Encoded], options: ScoreOptions) -> list[RowScore]:
    with evaluating(scorer):  # not around a yield: the caller's code would run in it
        for model in _models(scorer, options):
            if model.positions.keeps_frequencies(max(len(encoded.input_ids) for encoded in batch)):
                forget_longer_rows(model.model, torch.tensor([batch[0].input_ids], device=model.device))
        rewards, mask, signals = _read(scorer, *_pad(batch), options)
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
    scorer: "EndoRewardModel", input_ids: Tensor, scored: Tensor, terminal: Tensor, options: ScoreOptions
) -> tuple[TokenRewards, Tensor, list[Tensor]]:
    """Rewards (B, T), the mask on their device, and each signal's float64 (B,): one pass for all of them."""
    inputs = [t.to(scorer.device) for t in (input_ids, scored, terminal)]
    if not options.signals:
        rewards = scorer.rewards_of_padded(*inputs, alpha=options.alpha, entropy=options.entropy)
        return rewards, inputs[1].to(rewards.reward.device), []
    stats = scorer.stats_of_padded(*inputs, alpha=options.alpha)
    other = None
    if any(SIGNALS[name].needs_reference for name in options.signals):
        other = _logprob(options.reference, input_ids, scored, terminal, options.alpha).to(stats.lse.device)
    return stats.rewards(), stats.mask, [SIGNALS[name].score(stats, other).double() for name in options.signals]


def _logprob(
    model: "EndoRewardModel", input_ids: Tensor, scored: Tensor, terminal: Tensor, alpha: float
) -> Tensor:  # fmt: skip
    with evaluating(model):
        inputs = (t.to(model.device) for t in (input_ids, scored, terminal))
        return model.rewards_of_padded(*inputs, alpha=alpha).logprob


def _pad(batch: list[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T), padded on the right: ids, and bool which are scored, after which the episode ends.

    Rows are padded with their own first token: any id in the vocabulary would do, but some models warn of their
    padding token where no attention mask comes with it.
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
    scorer: "EndoRewardModel", batch: list[Encoded], rewards: TokenRewards, options: ScoreOptions
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
