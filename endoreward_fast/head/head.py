"""The head of a causal language model: its weight, its recipe, and access to the hidden states that it reads.

    z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)    with the steps that the family has

hidden (B, T, D) is the input of the output embedding. It contains everything that a family does before that: MiniCPM3
divides, BERT-like heads transform. The steps after it are the family's `HeadRecipe`, from the table in recipes.py. The
check in self_check.py compares the recipe with the model's own logits. A model that disagrees is still scored from its
own full logits, and a warning says so.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import EndoRewardError
from .gathered import behind, weights_come_and_go
from .module import describe, find_head, is_dtensor, plain, refuse_bad_weights, why_not_plain
from .recipes import HeadRecipe, recipe_for
from .self_check import logits_of, self_check, without_cache

__all__ = ["Head", "HeadRecipe", "Seen", "logits_of", "recipe_for", "without_cache"]
Found = TypeVar("Found")


class Seen:
    """The inputs of the head in one captured forward pass, or the reader's results for them."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.fed = 0
        """number of tokens of each row that the head itself processed"""

    @property
    def once(self) -> Any:
        """The result of the one call of the head. Raises EndoRewardError unless the head ran exactly once."""
        if len(self.calls) != 1:
            raise EndoRewardError(f"the output head ran {len(self.calls)} times in one forward pass: expected once")
        return self.calls[0]

    @property
    def hidden(self) -> Tensor:
        """The head's input (B, T, D), with its autograd graph, on the device of the head's weight."""
        return self.once


class Head:
    """The output embedding of a loaded causal language model.

    `linear` says whether hidden states and `weight`, `bias`, `logit_scale`, `softcap` give the model's final logits. If
    they do not, `reason` says why, and callers must use the model's own logits (`logits_of`). The argument `recipe`
    replaces the table's recipe and is checked in the same way. Construction changes neither the model's mode and hooks
    nor the random state.

    Raises EndoRewardError with the model's name if it has no output embedding, is an encoder or encoder-decoder, has
    weights that were never loaded or are NaN or infinite, does not run on token ids alone, or looks at later tokens.
    """

    def __init__(self, model: nn.Module, *, recipe: HeadRecipe | None = None) -> None:
        self.module = find_head(model)
        refuse_bad_weights(model, self.module)
        self.recipe = recipe_for(model) if recipe is None else recipe
        self.reason = self_check(model, self)
        if self.reason is not None:
            warnings.warn(
                f"{describe(model)}: {self.reason}; using its full logits, which takes more memory", stacklevel=2
            )

    @property
    def linear(self) -> bool:
        """Whether hidden states, weight and recipe give the model's final logits."""
        return self.reason is None

    @property
    def instead(self) -> str:
        """How the head is read if it is not linear."""
        return "its head is read through its own logits"

    @property
    def weight(self) -> Tensor:
        """The model's current weight (V, D). It follows training, moves and tying.

        A DTensor keeps its padding, because slicing one gathers it. Pass `vocab_size` to the function that reads it.
        """
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return self._words(weight)

    @property
    def bias(self) -> Tensor | None:
        """The model's current bias (V,), or None."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else self._words(bias)

    def _words(self, rows: Tensor) -> Tensor:
        return rows if self.vocab_size is None or is_dtensor(rows) else rows[: self.vocab_size]

    @property
    def vocab_size(self) -> int | None:
        """Number of rows of the weight that are vocabulary; the rest is padding. None: all rows."""
        return self.recipe.vocab_size

    @property
    def logit_scale(self) -> float:
        return self.recipe.logit_scale

    @property
    def softcap(self) -> float | None:
        return self.recipe.softcap

    def read(self, model: nn.Module, arguments: dict[str, Any], reader: Callable[[Tensor], Found]) -> Found:
        """Run the model without making logits and return reader(hidden). The reader sees whole `weight` and `bias`.

        Raises EndoRewardError if the head was offloaded, quantised or split after the check. FSDP may be applied later.
        """
        if weights_come_and_go(model):
            with self.capture(reader) as seen:
                output = model(**arguments)
            return behind(seen.once, logits_of(output))
        changed = why_not_plain(self.module)
        if changed is not None:
            raise EndoRewardError(f"{describe(model)} has changed ({changed}): create a new EndoRewardModel from it")
        with self.capture() as seen:
            model(**arguments)
        return reader(seen.hidden)

    @contextmanager
    def capture(self, reader: Callable[[Tensor], Any] | None = None) -> Iterator[Seen]:
        """Within this context, forward passes of the model record the head's input and make no logits.

        The head gets an empty slice (B, 0, D), so it and all later steps (scale, softcap, slices) run on (B, 0, V).
        Shape and dtype are right, and there is neither a matmul nor memory for logits. The hooks are removed on exit,
        also after an exception. Open one capture per model at a time: the hooks see every forward pass, also those of
        other threads.

        With a `reader`, its result is recorded instead. It runs inside the head's forward, and the head's output is
        tied `behind` its result.
        """
        seen = Seen()

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = plain(args[0]).to(self.module.weight.device)
            seen.calls.append(hidden if reader is None else reader(hidden))
            seen.fed = int(is_dtensor(self.module.weight))  # a DTensor matmul needs at least one row
            return (args[0][..., : seen.fed, :], *args[1:])

        def tie(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return behind(output.detach(), seen.calls)

        handles = [self.module.register_forward_pre_hook(keep)]
        if reader is not None:
            # Before FSDP2's hook, which also reads the output.
            handles.append(self.module.register_forward_hook(tie, prepend=True))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()
