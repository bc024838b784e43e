"""Read the rewards of tokens from a model: one forward pass, and one pass over the vocabulary.

`linear_token_rewards` gets the model's hidden states, so logits never exist. Only if the model's head does something
unknown are its own logits used. `Head` then warns when the model is loaded.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..functional import Impl, linear_token_rewards, linear_vocab_stats, token_rewards, vocab_stats
from ..head.gathered import weights_come_and_go
from ..head.head import Head, logits_of
from ..head.module import is_dtensor
from ..scoring.batching import Budget, Room
from ..scoring.past import Past
from ..scoring.shared import Shared
from ..signals import TokenStats, linear_token_stats, token_stats
from ..types import TokenRewards
from ..vocab.checks import as_bool, check_input_ids, check_tensors
from .batch_layout import LayoutCheck, PaddingLast, lay_out
from .continuing import Continuing
from .positions import Positions, forget_longer_rows
from .vocabulary import refuse_larger_vocabulary

Read = TypeVar("Read", TokenRewards, TokenStats)
Found = TypeVar("Found")


class TokenReader(nn.Module):
    """A causal language model whose tokens' rewards and statistics can be read. `EndoRewardModel` adds text to it."""

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.head = Head(model)
        self.layouts = LayoutCheck(model, self._states)
        self.continuing = Continuing(model, self.head)
        self.positions = Positions.of(model, self._text_config(), tokenizer)
        self.room = Room()  # assign a new Room() to restore the batch size after memory ran out
        if tokenizer is not None:
            refuse_larger_vocabulary(tokenizer, self.vocab_size)

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the model can both read and predict."""
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        read, given = _rows(embedding, "num_embeddings"), _rows(self.head.module, "out_features")
        return min(size for size in (read, given, self.head.recipe.vocab_size) if size is not None)

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
                         change the states of a causal model, and the result is moved back. A prefix of several rows
                         is then read once. Rows padded on the right need no mask, because a causal model's tokens do
                         not see later ones
        states           (B, T, D), the states of these tokens from `read_on`; the model then does not run
        """
        if attention_mask is not None:
            rows = PaddingLast(attention_mask)
            moved = [rows.move(x) for x in (input_ids, scored, terminal)]
            states = self._shared_states(moved[0], rows.lengths)
            found = self.rewards_of_padded(*moved, alpha=alpha, entropy=entropy, states=states)
            entropies = None if found.entropy is None else rows.back(found.entropy)
            return TokenRewards(rows.back(found.reward), rows.back(found.logprob), rows.back(found.value), entropies)
        return self._read(
            token_rewards, linear_token_rewards, {"input_ids": input_ids}, scored, terminal, states=states,
            alpha=alpha, entropy=entropy,
        )  # fmt: skip

    def ready_for(self, input_ids: Tensor, *, held: int = 0) -> None:
        """Reset the rotary frequencies that longer rows have left in the model, before rows (B, T) are read behind
        `held` tokens."""
        if self.positions.keeps_frequencies(held + input_ids.shape[1]):
            forget_longer_rows(self.model, input_ids.to(self.device))

    def stats_of_padded(
        self, input_ids: Tensor, scored: Tensor, terminal: Tensor, *, alpha: float = 1.0, states: Tensor | None = None
    ) -> TokenStats:  # fmt: skip
        """Do the same as `stats`, without its checks, for rows that are padded on the right."""
        return self._read(
            token_stats, linear_token_stats, {"input_ids": input_ids}, scored, terminal, states=states, alpha=alpha
        )  # fmt: skip

    def names_tokens(self) -> bool:
        """Return whether `named_logprobs` can run: not for a head that is split over processes, or gathered by FSDP."""
        return not (is_dtensor(self.head.module.weight) or weights_come_and_go(self.model))

    def named_logprobs(
        self, input_ids: Tensor, chosen: Tensor, named: Tensor, *, alpha: float = 1.0, states: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Return log pi (N, K) of tokens `named` (K,) in N states, nats.

        input_ids   (B, T), padded on the right
        chosen      (B, T) bool: the states to read, N of them, row by row. State t is the one after token t
        states      (B, T, D), the states of these tokens from `read_on`; the model then does not run
        """

        def read(states: Tensor) -> Tensor:
            rows, names = states[chosen.to(states.device)], named.to(states.device)
            if not self.head.linear:
                logprobs = vocab_stats(rows, alpha=alpha, named=names).named_logprob
            else:
                logprobs = linear_vocab_stats(
                    rows, self.head.weight, bias=self.head.bias, logit_scale=self.head.logit_scale,
                    softcap=self.head.softcap, vocab_size=self.head.vocab_size, alpha=alpha, named=names,
                ).named_logprob  # fmt: skip
            assert logprobs is not None
            return logprobs

        return self._run({"input_ids": input_ids}, read) if states is None else read(states)

    def obstacle_to_sharing(self) -> str | None:
        """Return why a prefix of several rows is not read once for all of them; None if it is. See continuing.py."""
        return self.continuing.obstacle()

    def read_on(self, input_ids: Tensor, lengths: Tensor, past: Past | None, parents: Tensor, *, keep: bool) -> Past:
        """Read tokens (B, S), padded on the right, of which (B,) `lengths` are real, behind rows `parents` of `past`.

        If not `keep`, nothing is read behind them later. A model that does not continue behind a cache keeps only
        states, and takes no `past`.
        """
        self.ready_for(input_ids, held=0 if past is None else past.hidden.shape[1])
        if past is None and (not keep or self.obstacle_to_sharing() is not None):
            return Past([], [], self._states({"input_ids": input_ids}), lengths, lengths)
        return self.continuing.read_on(input_ids, lengths, past, parents, keep=keep)

    def states_last(self) -> bool:
        """Return whether states can be scored after the pass that gave them. FSDP gathers the head only within it."""
        return not weights_come_and_go(self.model)

    def _shared_states(self, input_ids: Tensor, lengths: Tensor) -> Tensor | None:
        """Return the states (B, T, D) of rows padded on the right, or None if the rows share no prefix.

        States of a cache have no gradient, so nothing is shared where autograd records.
        """
        if torch.is_grad_enabled() or not lengths.numel() or not bool(lengths.all()):
            return None
        tokens = [row[:length] for row, length in zip(input_ids.tolist(), lengths.tolist(), strict=True)]
        # The caller's batch fits. What is held besides are prefixes, and a copy of one for each row.
        budget = Budget(2 * input_ids.numel(), input_ids.numel())
        return Shared([self], tokens, lengths.tolist(), budget, self.room).states()

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
