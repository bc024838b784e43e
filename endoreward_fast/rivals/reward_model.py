"""Trained reward models, for comparison: transformers' sequence classifiers with the methods of EndoRewardModel."""

import math
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..errors import EndoRewardError
from ..model.classifier import ClassifierHead
from ..model.continuing import Continuing
from ..model.kinds import refuse_other_than_one_output
from ..model.loading import load_classifier, naming
from ..model.positions import Positions, forget_longer_rows
from ..scoring.arguments import LoadKwargs, ScoreKwargs, list_of_rows, refuse_misspelt, refuse_name, refuse_no_name
from ..scoring.batching import Budget, Room, does_not_fit
from ..scoring.evaluating import evaluating
from ..scoring.options import ScoreOptions
from ..scoring.past import Past
from ..scoring.prefixes import Segment
from ..scoring.results import OnTokens, RowScore, Scores, in_order
from ..scoring.shared import Held, Shared
from ..text.boundary import tokenize
from ..text.chat import conversation
from ..text.encoding import Encoder, wants_chat
from ..text.rows import Row, begun_turn, dialogue, prompt_and_completion, refuse_no_row
from ..text.template import Extras


class RewardModel:
    """A transformers sequence classifier with one output, the score of a conversation, such as Skywork-Reward.

    The classifier's chat template renders the whole conversation. If it has none, its tokenizer reads
    prompt + completion as text. The model runs in evaluation mode, on batches of similar length, padded on the right.
    If its config has no padding token, each row runs alone, because transformers then refuses a batch.

    Raises EndoRewardError if the classifier has more than one output.
    """

    method = "Trained reward model"
    formula = "its output"
    source = "such as Skywork-Reward, 2410.18451"

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        refuse_name(RewardModel, model, tokenizer)
        self.model, self.tokenizer, self.room = model, tokenizer, Room()
        config: Any = model.config
        refuse_other_than_one_output(config, type(model).__name__)
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.pad: int | None = text_config.pad_token_id
        self.positions = Positions.of(model, text_config, tokenizer, firm=True)
        self.head = ClassifierHead(model)
        self.continuing = Continuing(model, self.head)

    @property
    def max_length(self) -> int | None:
        """The most tokens in a row without the option max_length: the tokenizer's or the model's limit."""
        return self.positions.default

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | PathLike[str], *, dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None, **options: Unpack[LoadKwargs],
    ) -> "RewardModel":  # fmt: skip
        """Load a classifier or an adapter of one. The arguments are those of `EndoRewardModel.from_pretrained`.

        Raises EndoRewardError, in one line, if there is no such model, it is not a sequence classifier with one output,
        its checkpoint lacks the output head, or it has no tokenizer.
        """
        refuse_no_name(RewardModel, name_or_path)
        refuse_misspelt(options, LoadKwargs.__annotations__)
        model, tokenizer, reason = load_classifier(name_or_path, dtype=dtype, device=device, options=dict(options))
        if tokenizer is None:
            raise EndoRewardError(f"reward model {str(name_or_path)!r} has no usable tokenizer: {reason}")
        with naming(name_or_path):
            return cls(model, tokenizer)

    @property
    def device(self) -> torch.device:
        """The device of the model's first weight."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's first weight. A quantised model's other weights may have another."""
        return next(self.model.parameters()).dtype

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> "RewardModel":
        """Move the model or change its dtype, as nn.Module.to does, and return self."""
        where: list[Any] = [x for x in (device, dtype) if x is not None]
        self.model.to(*where)
        return self

    def iter_scores(
        self, rows: Iterable[Row], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> Scores:  # fmt: skip
        """Yield (position in rows, score) as batches finish.

        Options as in `EndoRewardModel.score`. Only those that say how rows are encoded and batched have an effect.
        """
        return self._scores(list_of_rows(rows), ScoreOptions.of(options), on_tokens)

    def _scores(self, rows: list[Row], chosen: ScoreOptions, on_tokens: OnTokens) -> Scores:
        encoder = Encoder(self.tokenizer, date=chosen.date, extras=chosen.extras)
        ready: list[tuple[int, list[int], tuple[str, ...]]] = []
        for position, row in enumerate(rows):
            try:
                ready.append((position, *self._encode(row, chosen, encoder)))
            except EndoRewardError as error:
                yield position, RowScore(None, 0, None, error=str(error))
        budget = Budget.of(1 if self.pad is None else chosen.max_tokens_per_batch, self.device)
        tokens = [ids for _, ids, _ in ready]
        lengths = list(map(len, tokens))

        def run(batch: list[int]) -> list[float]:
            return self._classify([tokens[i] for i in batch])

        def finish(segments: Sequence[Segment], held: Held) -> list[float]:
            return self._classify_ends(tokens, segments, held[0])

        for batch, scores in Shared([self], tokens, lengths, budget, self.room).results(run, finish):
            if on_tokens is not None:
                on_tokens(sum(lengths[i] for i in batch))
            for i, score in zip(batch, scores or [None] * len(batch), strict=True):
                position, ids, flags = ready[i]
                if score is None:
                    yield position, RowScore(None, len(ids), None, flags, does_not_fit(len(ids)))
                elif math.isnan(score):
                    yield position, RowScore(None, len(ids), None, flags, "the reward model gave NaN for this row")
                else:
                    yield position, RowScore(score, len(ids), None, flags)

    def score(
        self, rows: Iterable[Row], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> list[RowScore]:  # fmt: skip
        """Return the scores of rows, in their order. Options as in `iter_scores`."""
        return in_order(self.iter_scores(rows, on_tokens=on_tokens, **options))

    def _encode(self, row: Row, options: ScoreOptions, encoder: Encoder) -> tuple[list[int], tuple[str, ...]]:
        """Return (token ids, flags) of a row."""
        refuse_no_row(row)
        if "prompt_ids" in row:
            raise EndoRewardError("a reward model reads text with its own tokenizer, but the row holds token ids")
        prompt, completion = prompt_and_completion(row)
        plain = isinstance(prompt, str) and isinstance(completion, str)
        if plain and not wants_chat(self.tokenizer, row.get("chat", options.chat)):
            before = f"{options.system}\n\n{prompt}" if options.system else prompt
            flags = () if completion else ("empty",)
            ids = self.tokenizer(before + completion, truncation=False, verbose=False)["input_ids"]
            leading, trailing = encoder.around
            if leading and tuple(ids[: 2 * len(leading)]) == leading * 2:  # the text already has them
                ids = ids[len(leading) :]
            if trailing and tuple(ids[-2 * len(trailing) :]) == trailing * 2:
                ids = ids[: -len(trailing)]
        else:
            begun = begun_turn(row, prompt, completion)
            turns, extras = dialogue(prompt, completion, begun), Extras.of(row, encoder.extras)
            text, flags = conversation(encoder.template, turns, extras, system=options.system)
            if encoder.date is None and encoder.template.asks_for_the_date(extras):
                flags = (*flags, "dated")
            ids = tokenize(self.tokenizer, text)
        limit = self.positions.limit(options.max_length)
        if not ids:
            raise EndoRewardError("the row is empty: there is nothing to classify")
        if limit is None or len(ids) <= limit:
            return ids, flags
        return _cut(ids, limit, options.truncate), (*flags, "truncated")

    def obstacle_to_sharing(self) -> str | None:
        """Return why a prefix of several rows is not read once for all of them; None if it is."""
        return self.continuing.obstacle()

    def states_last(self) -> bool:
        """Return whether a row's score is in the states of a longer row that begins with it.

        An encoder's are not: its tokens see later ones. Continuing behind a cache shows that a model's do not.
        """
        return self.obstacle_to_sharing() is None

    def read_on(self, input_ids: Tensor, lengths: Tensor, past: Past | None, parents: Tensor, *, keep: bool) -> Past:
        """Read tokens (B, S), padded on the right, the real ones (B,) `lengths`, behind rows `parents` of `past`."""
        return self.continuing.read_on(input_ids, lengths, past, parents, keep=keep)

    def modules(self) -> Iterator[nn.Module]:
        """The model's modules, as nn.Module has them."""
        return self.model.modules()

    def eval(self) -> "RewardModel":
        """Set the model to evaluation mode, as nn.Module.eval does."""
        self.model.eval()
        return self

    def _classify_ends(self, tokens: list[list[int]], segments: Sequence[Segment], past: Past) -> list[float]:
        """Return the scores of the rows that end in segments, from the state of each row's last token.

        As in transformers, that is the last one other than the padding token, which may also end a conversation.
        """
        first = past.first
        ending = [
            (n, first[n] + max((i for i, token in enumerate(tokens[row]) if token != self.pad), default=0))
            for n, segment in enumerate(segments) for row in segment.rows()
        ]  # fmt: skip
        with evaluating(self.model):
            states = past.hidden[[n for n, _ in ending], [place for _, place in ending]]
            return self.head.scores(states).double().tolist()

    def _classify(self, rows: list[list[int]]) -> list[float]:
        width = max(map(len, rows))
        padding = 0 if self.pad is None else self.pad
        lengths = torch.tensor([[len(ids)] for ids in rows])
        inputs = {"input_ids": torch.tensor([ids + [padding] * (width - len(ids)) for ids in rows])}
        inputs["attention_mask"] = (torch.arange(width) < lengths).long()
        with evaluating(self.model):
            if self.positions.keeps_frequencies(width):
                forget_longer_rows(self.model, inputs["input_ids"].to(self.device))
            logits: Tensor = self.model(**{name: x.to(self.device) for name, x in inputs.items()}).logits
        return logits[:, 0].double().tolist()


def _cut(ids: list[int], limit: int, truncate: str | None) -> list[int]:
    """Return `limit` tokens: the first and the newest ("prompt"), or the oldest ("completion")."""
    if truncate is None:
        raise EndoRewardError(
            f'{len(ids)} tokens, the limit is {limit}: set truncate (--truncate) to "prompt" or "completion"'
        )
    return ids[:limit] if truncate == "completion" else [*ids[:1], *ids[len(ids) - limit + 1 :]]
