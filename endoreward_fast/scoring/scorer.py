"""What scoring asks of a model."""

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
        """Most tokens of a row, where `asked` is what an option says; None: there is no limit."""

    def frequencies(self, length: int) -> tuple[int, ...]:
        """Rows share a batch only where this is the same for each."""


class Scorer(Protocol):
    """A causal language model whose tokens can be read: `EndoRewardModel` is one."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def room(self) -> Room: ...
    @property
    def positions(self) -> Limit: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_ids(self) -> Collection[int]: ...
    @property
    def device(self) -> torch.device: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def eval(self) -> Any: ...

    def ready_for(self, input_ids: Tensor) -> None:
        """Drop what batches before this one, (B, T), have left in the model."""

    def rewards_of_padded(
        self, input_ids: Tensor, scored: Tensor, terminal: Tensor, *, alpha: float = 1.0, entropy: bool = False,
        states: Tensor | None = None,
    ) -> TokenRewards:  # fmt: skip
        """Rewards (B, T) of rows that are padded on the right; from their `states` (B, T, D), if they are known."""

    def stats_of_padded(
        self, input_ids: Tensor, scored: Tensor, terminal: Tensor, *, alpha: float = 1.0, states: Tensor | None = None
    ) -> TokenStats:  # fmt: skip
        """All that signals are made of, likewise."""

    def obstacle_to_sharing(self) -> str | None:
        """Why tokens cannot be read behind others, if so."""

    def read_on(self, input_ids: Tensor, lengths: Tensor, past: Past | None) -> Past:
        """Read (B, S) tokens, padded on the right, the real ones (B,) `lengths`, behind `past` (B rows)."""
