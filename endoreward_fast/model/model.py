"""`EndoRewardModel`: the reward inside a loaded causal language model, of tokens or of text.

    scorer = EndoRewardModel.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
    scorer.rank("What is 2 + 3?", ["5", "6"])[0].completion

Hidden states go from the model straight to `linear_token_rewards`: logits never exist. Only a model whose head does
something unknown is read through its own logits (`Head` warns when it is loaded).
"""

import math
import warnings
from collections.abc import Callable, Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..errors import EndoRewardError
from ..functional import Impl, linear_token_rewards, token_rewards
from ..head.head import Head, logits_of
from ..scoring.arguments import (
    LoadKwargs,
    ScoreKwargs,
    list_of_completions,
    list_of_rows,
    refuse_misspelt,
    refuse_name,
    refuse_no_name,
)
from ..scoring.batching import Room
from ..scoring.options import ScoreOptions
from ..scoring.past import Past
from ..scoring.results import OnTokens, Ranked, RowScore, Scores, TokenTable, in_order
from ..scoring.score import score_rows
from ..signals import TokenStats, linear_token_stats, token_stats
from ..text.flags import NOTHING_TO_SCORE
from ..text.rows import Row
from ..types import TokenRewards
from ..vocab.checks import as_bool, check_input_ids, check_tensors
from .checkpoint import pocket_path
from .continuing import Continuing
from .layout import LayoutCheck, PaddingLast, lay_out
from .loading import load, naming
from .positions import Positions, forget_longer_rows
from .vocabulary import refuse_larger_vocabulary, refuse_other_vocabulary

__all__ = ["EndoRewardModel", "Ranked", "RowScore", "ScoreOptions", "TokenTable", "pocket_path"]
Read = TypeVar("Read", TokenRewards, TokenStats)
Found = TypeVar("Found")


class EndoRewardModel(nn.Module):
    """Endogenous rewards r(s, a) = Q(s, a) - V(s') of the tokens that a causal language model reads.

    `model` is one of transformers, or anything with its interface; it is used as it is, on its own device and in its
    own dtype, and trains through `forward`. `tokenizer` is needed only for text.

    Raises EndoRewardError: a model that is not causal or has NaN weights (see `Head`), a tokenizer with more words
    than the model has.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        super().__init__()
        refuse_name(EndoRewardModel, model, tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.head = Head(model)
        self.layouts = LayoutCheck(model, self._states)
        self.continuing = Continuing(model, self.head)
        self.positions = Positions.of(model, self._text_config(), tokenizer)
        self.room = Room()  # of scoring; a new one forgets that memory ran out
        if tokenizer is not None:
            refuse_larger_vocabulary(tokenizer, self.vocab_size)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | PathLike[str], *, dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None, **options: Unpack[LoadKwargs],
    ) -> "EndoRewardModel":  # fmt: skip
        """Load a model and its tokenizer: by folder, Hugging Face name or GGUF file. "pocket" is the embedded
        demonstration model. The folder of a PEFT adapter names its base model, which is loaded first.

        dtype     None or "auto": the checkpoint's; or a torch dtype or its name ("bfloat16", "bf16")
        device    None or "auto": a CUDA device if there is one, under a launcher the local rank's; with device_map
                  among the options, that decides
        options   what AutoModelForCausalLM.from_pretrained takes (`arguments.LoadKwargs`): revision, subfolder,
                  gguf_file, trust_remote_code, attn_implementation, device_map, quantization_config, ...

        Raises EndoRewardError, in one line: no such model, not a causal one, a checkpoint without its output head (a
        classifier's, say), an unknown dtype or device, a misspelt option.
        """
        refuse_no_name(EndoRewardModel, name_or_path)
        refuse_misspelt(options, LoadKwargs.__annotations__)
        model, tokenizer, reason = load(name_or_path, dtype=dtype, device=device, options=dict(options))
        if reason is not None:
            warnings.warn(f"{str(name_or_path)!r} has no usable tokenizer, so only token ids: {reason}", stacklevel=2)
        with naming(name_or_path):
            return cls(model, tokenizer)

    @property
    def vocab_size(self) -> int:
        """Tokens that the model can both read and predict."""
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        read, given = _rows(embedding, "num_embeddings"), _rows(self.head.module, "out_features")
        return min(size for size in (read, given, self.head.recipe.vocab_size) if size is not None)

    @property
    def max_positions(self) -> int | None:
        """Most tokens in a row unless a max_length says otherwise; None: no limit. `positions.table` is a firm one."""
        return self.positions.default

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token that ends the model's generation."""
        ids = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ids = getattr(self._text_config(), "eos_token_id", None) if ids is None else ids
        return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self._first_weight().device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that token ids are looked up in: a quantised model's other weights may have another."""
        return self._first_weight().dtype

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, completion_mask: Tensor | None = None, *,
        terminal: Tensor | None = None, position_ids: Tensor | None = None, alpha: float = 1.0,
        entropy: bool = False, impl: Impl = "auto",
    ) -> TokenRewards:  # fmt: skip
        """Rewards of tokens (B, T); differentiable in the model's parameters.

        attention_mask   (B, T), 1 for real tokens, padding on either side. Default: all are real
        completion_mask  (B, T): tokens to score. Default: all. Padding, the first token of each sequence, and a token
                         behind padding are never scored
        terminal         (B, T): tokens after which the episode ends (V(s') = 0). Default: the last of each
                         unbroken run of scored tokens; all False bootstraps; see `terminal_at`
        position_ids     (B, T) or (1, T). Default: counted from the first real token. Where they do not go on by one,
                         the next of several packed sequences begins, and attention is kept apart
        alpha, entropy, impl   as in `linear_token_rewards`

        Masks are bool, or integers 0 and 1.
        Returns TokenRewards, float32 (B, T), 0 where nothing is scored.
        Raises ValueError for types, shapes and dtypes; IndexError for ids outside the vocabulary (on the CPU; a GPU
        stops at its embedding); EndoRewardError for a model that does not keep packed sequences apart, or that
        needs its padding on the right.
        """
        arguments, scored, ends = self._laid_out(input_ids, attention_mask, completion_mask, terminal, position_ids)
        return self._read(
            token_rewards, linear_token_rewards, arguments, scored, ends, alpha=alpha, entropy=entropy, impl=impl
        )

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's own returns Any

    def stats(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, completion_mask: Tensor | None = None, *,
        terminal: Tensor | None = None, position_ids: Tensor | None = None, alpha: float = 1.0, impl: Impl = "auto",
    ) -> TokenStats:  # fmt: skip
        """Statistics of the states on either side of each scored token, which every one of `signals.SIGNALS` is made
        of: one forward pass and one over the vocabulary, as in `forward`, which has the same arguments."""
        arguments, scored, ends = self._laid_out(input_ids, attention_mask, completion_mask, terminal, position_ids)
        return self._read(token_stats, linear_token_stats, arguments, scored, ends, alpha=alpha, impl=impl)

    def rewards_of_padded(
        self, input_ids: Tensor, scored: Tensor, terminal: Tensor, *, alpha: float = 1.0,
        attention_mask: Tensor | None = None, entropy: bool = False, states: Tensor | None = None,
    ) -> TokenRewards:  # fmt: skip
        """`forward` of rows whose masks are right already: `scored` holds no padding and no first token.

        attention_mask   (B, T), for rows that are padded on the left. They are run with their padding moved to the
                         right, which no causal model minds, and the result is moved back. Rows padded on the right
                         need none: a causal model's tokens do not see what is behind them
        states           (B, T, D), what `read_on` found of these tokens: the model does not run
        """
        if attention_mask is not None:
            rows = PaddingLast(attention_mask)
            moved = (rows.move(x) for x in (input_ids, scored, terminal))
            found = self.rewards_of_padded(*moved, alpha=alpha, entropy=entropy)
            entropies = None if found.entropy is None else rows.back(found.entropy)
            return TokenRewards(rows.back(found.reward), rows.back(found.logprob), rows.back(found.value), entropies)
        return self._read(
            token_rewards, linear_token_rewards, {"input_ids": input_ids}, scored, terminal, states=states,
            alpha=alpha, entropy=entropy,
        )  # fmt: skip

    def ready_for(self, input_ids: Tensor) -> None:
        """Before rows (B, T) are read: drop the rotary frequencies that longer rows have left in the model."""
        if self.positions.keeps_frequencies(input_ids.shape[1]):
            forget_longer_rows(self.model, input_ids.to(self.device))

    def stats_of_padded(
        self, input_ids: Tensor, scored: Tensor, terminal: Tensor, *, alpha: float = 1.0, states: Tensor | None = None
    ) -> TokenStats:  # fmt: skip
        """`stats` of such rows, padded on the right."""
        return self._read(
            token_stats, linear_token_stats, {"input_ids": input_ids}, scored, terminal, states=states, alpha=alpha
        )  # fmt: skip

    def obstacle_to_sharing(self) -> str | None:
        """Why a prefix of several rows is not read once for all of them; None if it is. See continuing.py."""
        return self.continuing.obstacle()

    def read_on(self, input_ids: Tensor, lengths: Tensor, past: Past | None) -> Past:
        """Read tokens (B, S), padded on the right, of which (B,) `lengths` are real, behind the rows of `past`."""
        width = input_ids.shape[1] + (0 if past is None else past.hidden.shape[1])
        if self.positions.keeps_frequencies(width):
            forget_longer_rows(self.model, input_ids)
        return self.continuing.read_on(input_ids, lengths, past)

    def score(
        self, rows: Iterable[Row], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> list[RowScore]:  # fmt: skip
        """Scores of rows, in their order. `encoding` has the table of rows, `ScoreOptions` the options:

        alpha, reduction, gamma, floor, system, chat, max_length, truncate, append_eos, max_tokens_per_batch,
        per_token, texts, entropy, signals, reference

        A row that cannot be scored gets an `error` and stops no other. Runs in evaluation mode and without autograd,
        in batches of like length. A prefix that rows share, such as the prompt of several completions, is read once if
        the model can go on behind its cache (`obstacle_to_sharing`). A row's companions change its score only by the
        rounding of the model's matmuls. Seen on a CPU, alone against in a batch, 240 rows of the embedded model: at
        most 2e-5 in float32 and 0.19 in bfloat16 (half of the rows: 0), of scores from -82 to 19; a larger model in
        bfloat16: 0.51, of a score of -0.99.
        dtype="float32" makes it small; max_tokens_per_batch=1 runs each row alone, which leaves none.
        """
        return in_order(self.iter_scores(rows, on_tokens=on_tokens, **options))

    def iter_scores(
        self, rows: Iterable[Row], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> Scores:  # fmt: skip
        """(position in rows, score) as batches finish, in any order; options as in `score`.

        `on_tokens` is called with the number of tokens of each finished batch.
        """
        chosen, listed = ScoreOptions.of(options), list_of_rows(rows)
        if chosen.reference is not None:
            refuse_other_vocabulary(chosen.reference, self.tokenizer, asked="the model", known="the reference model")
        return score_rows(self, listed, chosen, on_tokens)

    def rank(
        self, prompt: Any, completions: Iterable[Any], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> list[Ranked]:  # fmt: skip
        """Completions of one prompt, best first; ties in their order. Options as in `score`.

        An empty completion is its end-of-turn token; where no token ends it, it has no score and comes last.

        Raises EndoRewardError if one of them cannot be scored, naming it by its index.
        """
        listed = list_of_completions(completions)
        rows = [{"prompt": prompt, "completion": completion} for completion in listed]
        scores = self.score(rows, on_tokens=on_tokens, **options)
        ranked = []
        for index, (completion, result) in enumerate(zip(listed, scores, strict=True)):
            if result.score is None and result.error != NOTHING_TO_SCORE:
                raise EndoRewardError(f"completion {index}: {result.error}")
            ranked.append(Ranked(index, completion, result.score))
        return sorted(ranked, key=lambda r: math.inf if r.score is None else -r.score)

    def _laid_out(
        self, input_ids: Tensor, attention_mask: Tensor | None, completion_mask: Tensor | None,
        terminal: Tensor | None, position_ids: Tensor | None,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:  # fmt: skip
        """What the model is called with, which tokens are scored, and which are terminal. See `forward`."""
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        check_input_ids(input_ids, _rows(embedding, "num_embeddings"))
        if attention_mask is not None:
            as_bool("attention_mask", attention_mask, input_ids.shape)  # the model is given it as it is
        if position_ids is not None:
            position_ids = _broadcast_positions(position_ids, input_ids)
        layout = lay_out(input_ids, attention_mask, position_ids)
        if position_ids is not None:
            self.layouts.ask("packed", len(input_ids))
        if attention_mask is not None:
            self.layouts.ask("left-padded", len(input_ids))
        self.layouts.refuse_if_known_wrong(layout.kind, len(input_ids))
        scored = layout.scorable
        if completion_mask is not None:
            scored = scored & as_bool("completion_mask", completion_mask, input_ids.shape)
        ends = None if terminal is None else as_bool("terminal", terminal, input_ids.shape)
        return self.layouts.arguments(layout), scored, ends

    def _read(
        self, of_logits: Callable[..., Read], of_hidden: Callable[..., Read], arguments: dict[str, Tensor],
        scored: Tensor, terminal: Tensor | None, *, states: Tensor | None = None, **wanted: Any,
    ) -> Read:  # fmt: skip
        """One forward pass and one over the vocabulary: `of_hidden`, or `of_logits` where the head is not linear.

        With `states`, which a forward pass has found, only the latter.
        """

        def read(states: Tensor) -> Read:
            tokens = arguments["input_ids"].to(states.device)
            wanted["mask"] = scored.to(states.device)
            wanted["terminal"] = None if terminal is None else terminal.to(states.device)
            if not self.head.linear:
                return of_logits(states, tokens, **wanted)
            return of_hidden(
                states, self.head.weight, tokens, bias=self.head.bias, logit_scale=self.head.logit_scale,
                softcap=self.head.softcap, vocab_size=self.head.vocab_size, **wanted,
            )  # fmt: skip

        return self._run(arguments, read) if states is None else read(states)

    def _run(self, arguments: dict[str, Tensor], reader: Callable[[Tensor], Found]) -> Found:
        """reader((B, T, D) hidden states fed to the head), or ((B, T, V) final logits) where it is not linear."""
        # A cache would be of no use, and keeps Hugging Face models from telling packed sequences apart.
        inputs: dict[str, Any] = arguments | ({"use_cache": False} if "use_cache" in self.layouts.accepted else {})
        if not self.head.linear:
            return reader(logits_of(self.model(**inputs)))
        return self.head.read(self.model, inputs, reader)

    def _states(self, arguments: dict[str, Tensor]) -> Tensor:
        return self._run(arguments, lambda states: states)

    def _first_weight(self) -> Tensor:
        embedding = getattr(self.model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
        return embedding if embedding is not None else next(self.model.parameters())

    def _text_config(self) -> Any:
        config: Any = getattr(self.model, "config", None)
        return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _rows(module: nn.Module, name: str) -> int | None:
    """Of the module's weight; by its own word where that is flattened and elsewhere: FullyShardedDataParallel."""
    weight = getattr(module, "weight", None)
    return getattr(module, name, None) if weight is None or weight.ndim < 2 else weight.shape[0]


def _broadcast_positions(position_ids: Tensor, input_ids: Tensor) -> Tensor:
    check_tensors(position_ids=position_ids)
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise ValueError(f"position_ids is {position_ids.dtype}: expected integers")
    if position_ids.ndim != 2 or position_ids.shape not in (input_ids.shape, (1, input_ids.shape[1])):
        raise ValueError(f"position_ids {tuple(position_ids.shape)}: expected {tuple(input_ids.shape)}, or one row")
    return position_ids.expand_as(input_ids)
