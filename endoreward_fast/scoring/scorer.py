"""The interface of a model that can be scored with."""

from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..signals import TokenStats
from ..types import TokenRewards
from .batching import Room
from .past import Past


class Limit(Protocol):
    """How long a row may be."""

    def limit(self, asked: int | None) -> int | None:
        """Return the most tokens of a row, given the option max_length or None. None means no limit."""

    def frequencies(self, length: int) -> tuple[int, ...]:
        """Return a key of this row length. Only rows with equal keys share a batch."""


class Reader(Protocol):
    """A model that reads tokens, and keeps what others can be read behind."""

    @property
    def positions(self) -> Limit: ...
    @property
    def device(self) -> torch.device: ...
    def modules(self) -> Iterator[nn.Module]: ...

    def obstacle_to_sharing(self) -> str | None:
        """Return why tokens cannot be read behind others; None if they can."""

    def states_last(self) -> bool:
        """Return whether states that `read_on` has returned can be scored later."""

    def read_on(self, input_ids: Tensor, lengths: Tensor, past: Past | None, parents: Tensor, *, keep: bool) -> Past:
        """Read (B, S) tokens, padded on the right, the real ones (B,) `lengths`, behind rows (B,) `parents` of `past`.

        If not `keep`, nothing is read behind them later, so what is returned may lack keys and values.
        """


class Scorer(Reader, Protocol):
    """A causal language model that gives the rewards of tokens, such as `EndoRewardModel`."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def room(self) -> Room: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_ids(self) -> Collection[int]: ...

    def ready_for(self, input_ids: Tensor) -> None:
        """Drop the state that earlier batches have left in the model, before this batch (B, T) is read."""

    def rewards_of_padded(
        self, input_ids: Tensor, scored: Tensor, terminal: Tensor, *, alpha: float = 1.0, entropy: bool = False,
        states: Tensor | None = None,
    ) -> TokenRewards:  # fmt: skip
        """Return rewards (B, T) of rows that are padded on the right, from their `states` (B, T, D) if given."""

    def stats_of_padded(
        self, input_ids: Tensor, scored: Tensor, terminal: Tensor, *, alpha: float = 1.0, states: Tensor | None = None
    ) -> TokenStats:  # fmt: skip
        """Return the statistics from which all signals are computed, likewise."""

    def names_tokens(self) -> bool:
        """Return whether `named_logprobs` can run."""

    def named_logprobs(
        self, input_ids: Tensor, chosen: Tensor, named: Tensor, *, alpha: float = 1.0, states: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Return log pi (N, K) of tokens `named` (K,) in the N `chosen` states (B, T) of rows padded on the right.

        Row by row; from their `states` (B, T, D) if given.
        """
