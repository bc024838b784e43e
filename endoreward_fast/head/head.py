"""How a causal language model turns hidden states into final logits, and how to get at those hidden states.

    z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)    each step where a family has it

hidden (B, T, D) is what the output embedding is fed, so whatever a family does before it (MiniCPM3 divides,
BERT-like heads transform) is in it already. What comes after it is the family's `HeadRecipe`, from the table
in `head_recipes.py`, which the model itself has to confirm (`head_check.py`). A model that disagrees is still
scored, from its own full logits, and a warning says so.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import EndoRewardError
from .check import logits_of, self_check, without_cache
from .gathered import behind, weights_come_and_go
from .kind import describe, find_head, is_dtensor, plain, refuse_bad_weights, why_not_plain
from .recipes import HeadRecipe, recipe_for

__all__ = ["Head", "HeadRecipe", "Seen", "logits_of", "recipe_for", "without_cache"]
Found = TypeVar("Found")


class Seen:
    """What one forward pass fed the head while it was being captured, or what was found in that."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.fed = 0
        """how many tokens of each row the head itself was given"""

    @property
    def once(self) -> Any:
        """What was found in the one call of the head; EndoRewardError unless it ran exactly once."""
        if len(self.calls) != 1:
            raise EndoRewardError(f"the output head ran {len(self.calls)} times in one forward pass, not once")
        return self.calls[0]

    @property
    def hidden(self) -> Tensor:
        """The head's input (B, T, D), with its autograd graph, on the device of the head's weight."""
        return self.once


class Head:
    """The output embedding of a loaded causal language model.

    After construction `linear` says whether hidden states and `weight`, `bias`, `logit_scale`, `softcap`
    give the model's final logits; if not, `reason` says why, and the model's own logits must be used
    (`logits_of`). `recipe` replaces the table's; it is checked in the same way. The model is left as it
    was: mode, hooks, random state.

    Raises EndoRewardError, naming the model: no output embedding, an encoder or encoder-decoder, weights
    that were never loaded or are NaN or infinite, a model that does not run on token ids, or that looks at
    later tokens.
    """

    def __init__(self, model: nn.Module, *, recipe: HeadRecipe | None = None) -> None:
        self.module = find_head(model)
        refuse_bad_weights(model, self.module)
        self.recipe = recipe_for(model) if recipe is None else recipe
        self.reason = self_check(model, self)
        if self.reason is not None:
            warnings.warn(
                f"{describe(model)}: {self.reason}; using its own full logits, which take more memory", stacklevel=2
            )

    @property
    def linear(self) -> bool:
        """Whether hidden states, weight and recipe give the model's final logits."""
        return self.reason is None

    @property
    def weight(self) -> Tensor:
        """(V, D), live: it follows the model when it is trained, moved or re-tied.

        A DTensor keeps its padding, since cutting one gathers it: what reads it is told `vocab_size`.
        """
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return self._words(weight)

    @property
    def bias(self) -> Tensor | None:
        """(V,) or None."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else self._words(bias)

    def _words(self, rows: Tensor) -> Tensor:
        return rows if self.vocab_size is None or is_dtensor(rows) else rows[: self.vocab_size]

    @property
    def vocab_size(self) -> int | None:
        """Rows of the weight from here on are padding; None: none is."""
        return self.recipe.vocab_size

    @property
    def logit_scale(self) -> float:
        return self.recipe.logit_scale

    @property
    def softcap(self) -> float | None:
        return self.recipe.softcap

    def read(self, model: nn.Module, arguments: dict[str, Any], reader: Callable[[Tensor], Found]) -> Found:
        """reader(hidden) of one forward pass of the model that makes no logits; `weight` and `bias` are whole in it.

        EndoRewardError if the head was sharded, offloaded or quantised after it was checked; FSDP may come at any time.
        """
        if weights_come_and_go(model):
            with self.capture(reader) as seen:
                output = model(**arguments)
            return behind(seen.once, logits_of(output))
        changed = why_not_plain(self.module)
        if changed is not None:
            raise EndoRewardError(f"{describe(model)} has changed ({changed}): make a new EndoRewardModel of it")
        with self.capture() as seen:
            model(**arguments)
        return reader(seen.hidden)

    @contextmanager
    def capture(self, reader: Callable[[Tensor], Any] | None = None) -> Iterator[Seen]:
        """While open, a forward pass of the model records the head's input and makes no logits.

        The head is fed an empty slice, (B, 0, D), so that it and everything after it (scale, softcap,
        slices) runs on (B, 0, V): right in shape and dtype, no memory, no matmul. Restored on the way out,
        whatever happens. One capture per model at a time: the hook sees every forward pass, those of other
        threads too.

        With a `reader` its result is recorded instead. It is called inside the head's forward, and the head's
        output is tied `behind` the result.
        """
        seen = Seen()

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = plain(args[0]).to(self.module.weight.device)
            seen.calls.append(hidden if reader is None else reader(hidden))
            seen.fed = int(is_dtensor(self.module.weight))  # whose matmul wants a row at least
            return (args[0][..., : seen.fed, :], *args[1:])

        def tie(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return behind(output.detach(), seen.calls)

        handles = [self.module.register_forward_pre_hook(keep)]
        if reader is not None:
            handles.append(self.module.register_forward_hook(tie, prepend=True))  # FSDP2's looks at the output, too
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()
