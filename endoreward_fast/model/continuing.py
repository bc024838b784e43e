"""Read tokens behind a cache of keys and values.

Several prefixes of unequal length stand in one batch: padded on the left in the cache, with an attention mask and the
positions that the tokens have alone. The cache is a plain DynamicCache, which keeps every key: a sliding window is then
the mask's doing. Recurrent and hybrid models, whose cache is another, and models that count positions otherwise, give
other states. So a model is asked once: two rows, each behind its own prefix, must get the states that they have alone.
"""

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..head.gathered import weights_come_and_go
from ..head.module import describe, is_compiled
from ..head.self_check import check_tokens, left_as_it_was
from ..scoring.past import Past
from .batch_layout import accepted_arguments, same_states

NEEDED = ("past_key_values", "use_cache", "attention_mask")


class ReadsStates(Protocol):
    """The head of a model, such as `Head`."""

    @property
    def linear(self) -> bool:
        """Whether the model's output can be computed from states."""

    @property
    def instead(self) -> str:
        """How the model's output is read if it cannot."""

    def read(self, model: nn.Module, arguments: dict[str, Any], reader: Callable[[Tensor], Tensor]) -> Tensor:
        """Run the model and return reader(states)."""


class Continuing:
    """A model that reads tokens behind others."""

    def __init__(self, model: nn.Module, head: ReadsStates) -> None:
        self.model, self.head = model, head
        self._asked = False
        self._reason: str | None = None

    def obstacle(self) -> str | None:
        """Why this model does not go on behind its cache; None if it does. The model is asked the first time."""
        if not self._asked:
            self._reason, self._asked = self._find_obstacle(), True
            if self._reason is not None:
                warnings.warn(
                    f"{describe(self.model)} reads every row whole, also a prefix that rows share: {self._reason}",
                    stacklevel=2,
                )
        return self._reason

    def read_on(self, input_ids: Tensor, lengths: Tensor, past: Past | None) -> Past:
        """Read (B, S) tokens, padded on the right to S, the real ones (B,) `lengths`, behind `past` (B rows)."""
        from transformers import DynamicCache

        before = 0 if past is None else past.hidden.shape[1]
        stops, total = lengths + before, lengths if past is None else past.lengths + lengths
        if not input_ids.shape[1] and past is not None:
            return past
        cache = DynamicCache()
        arguments: dict[str, Any] = {"input_ids": input_ids, "past_key_values": cache, "use_cache": True}
        if past is not None:
            for layer, (keys, values) in enumerate(zip(past.keys, past.values, strict=True)):
                cache.update(keys, values, layer)
            columns = torch.arange(before + input_ids.shape[1], device=input_ids.device)
            first = (before - past.lengths)[:, None]
            arguments["attention_mask"] = (columns >= first).long()
            if "position_ids" in accepted_arguments(self.model):
                arguments["position_ids"] = (columns[before:] - first).clamp(min=0)
        hidden = self.head.read(self.model, arguments, lambda states: states)
        if past is not None:
            hidden = torch.cat([past.hidden, hidden], 1)
        layers: list[Any] = cache.layers
        return Past([layer.keys for layer in layers], [layer.values for layer in layers], hidden, stops, total)

    def _find_obstacle(self) -> str | None:
        if not self.head.linear:
            return self.head.instead
        if weights_come_and_go(self.model):
            return "FSDP shards its weights"
        if any(map(is_compiled, self.model.modules())):
            return "it is compiled"
        lacking = [name for name in NEEDED if name not in accepted_arguments(self.model)]
        if lacking:
            return f"its forward has no argument {lacking[0]}"
        try:
            with left_as_it_was(self.model), torch.no_grad():
                same = self._same_states()
        except Exception as error:  # whatever a model says of a cache that is not its own
            return (
                f"it does not run behind a cache ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
            )
        return None if same else "behind a cache, tokens have other states"

    def _same_states(self) -> bool:
        """Whether rows of 6 and 8 tokens have, behind the first 3 and 6 of them, the states that they have alone."""
        tokens = check_tokens(self.model)
        starts, stops = (torch.tensor(n, device=tokens.device) for n in ([3, 6], [6, 8]))
        prefixes = self.read_on(tokens[:, :6], starts, None)
        rests = torch.stack([tokens[1, [6, 7, 7]], tokens[0, 3:6]])
        order = torch.tensor([1, 0], device=tokens.device)  # rows are chosen from those that were read
        found = self.read_on(rests, (stops - starts)[order], prefixes.of(order))
        for place, row in enumerate(order.tolist()):
            start, stop = int(starts[row]), int(stops[row])
            arguments = {"input_ids": tokens[row : row + 1, :stop], "use_cache": False}
            alone = self.head.read(self.model, arguments, lambda states: states)[0, start:]
            last = int(found.stops[place])
            if not same_states(found.hidden[place, last - (stop - start) : last], alone):
                return False
        return True
