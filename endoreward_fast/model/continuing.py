"""Read tokens behind a cache of keys and values.

A model is asked once: two rows, each behind its own prefix, must get the states that they have alone. Recurrent and
hybrid models, whose cache is another, and models that count positions otherwise, give other states.

There are two ways, and each is asked. In the first, every row has a copy of its prefix. Prefixes of unequal length are
padded on the left, with an attention mask and the positions that the tokens have alone. The cache is a plain
DynamicCache, which keeps every key: a sliding window is then the mask's doing. In the second, rows read one copy in
place (prefix_attention.py). It is faster on a CPU, if the prefix is at least as long as the tokens behind it and there
is enough to copy, and fails for models whose attention is not torch's.
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

LEAST_COPIED = 512
"""tokens: to read in place takes 0.7 ms a layer longer, as much as it saves of fewer copies (pocket; bench/NOTES.md)"""
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
        self._in_place = False

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

    def read_on(self, input_ids: Tensor, lengths: Tensor, past: Past | None, parents: Tensor, *, keep: bool) -> Past:
        """Read (B, S) tokens, padded on the right to S, the real ones (B,) `lengths`, behind the rows (B,) `parents` of
        `past`. If not `keep`, nothing is read behind them later: keys and values are dropped."""
        if past is None:
            return self._read_first(input_ids, lengths)
        if not input_ids.shape[1]:
            return past.of(parents)
        rows, before = len(input_ids), past.hidden.shape[1]
        pays = before >= input_ids.shape[1] and rows * before >= LEAST_COPIED
        if self._in_place and input_ids.is_cpu and pays:
            from .prefix_attention import NeedsCopies

            try:
                return self._read_in_place(input_ids, lengths, past, parents, keep)
            except NeedsCopies:
                pass
        return self._read_behind_copies(input_ids, lengths, past.of(parents))

    def _read_first(self, input_ids: Tensor, lengths: Tensor) -> Past:
        from transformers import DynamicCache

        cache = DynamicCache()
        hidden = self._states({"input_ids": input_ids}, cache)
        return Past(*_keys_and_values(cache.layers), hidden, lengths, lengths)

    def _read_behind_copies(self, input_ids: Tensor, lengths: Tensor, past: Past) -> Past:
        """Read tokens behind the same rows of `past`, which is padded on the left."""
        from transformers import DynamicCache

        before = past.hidden.shape[1]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past.keys, past.values, strict=True)):
            cache.update(keys, values, layer)
        hidden = torch.cat([past.hidden, self._states(self._arguments(input_ids, past.lengths, before), cache)], 1)
        return Past(*_keys_and_values(cache.layers), hidden, before + lengths, past.lengths + lengths)

    def _read_in_place(self, input_ids: Tensor, lengths: Tensor, past: Past, parents: Tensor, keep: bool) -> Past:
        """Read tokens behind the rows (B,) `parents` of `past`, without a copy of these for each row."""
        from .prefix_attention import PrefixAttention

        order = parents.argsort(stable=True)
        back = order.argsort()
        attention = PrefixAttention(past, parents[order].tolist())
        arguments = self._arguments(input_ids[order], past.lengths[parents[order]], past.hidden.shape[1])
        if bool(arguments["attention_mask"].all()):
            del arguments["attention_mask"]  # without padding, the mask is the same for all rows
        with attention:
            states = self._states(arguments, attention.cache)[back]
        held = (past if keep else past._replace(keys=[], values=[])).of(parents)
        own = [layer.own for layer in attention.layers] if keep else []
        return Past(
            [torch.cat([before, keys[back]], 2) for before, (keys, _) in zip(held.keys, own, strict=True)],
            [torch.cat([before, values[back]], 2) for before, (_, values) in zip(held.values, own, strict=True)],
            torch.cat([held.hidden, states], 1), held.stops + lengths, held.lengths + lengths,
        )  # fmt: skip

    def _arguments(self, input_ids: Tensor, lengths: Tensor, before: int) -> dict[str, Any]:
        """Return arguments for tokens (B, S) behind (B,) `lengths` tokens, which are the last of `before` columns."""
        columns = torch.arange(before + input_ids.shape[1], device=input_ids.device)
        first = (before - lengths)[:, None]
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": (columns >= first).long()}
        if "position_ids" in accepted_arguments(self.model):
            arguments["position_ids"] = (columns[before:] - first).clamp(min=0)
        return arguments

    def _states(self, arguments: dict[str, Any], cache: Any) -> Tensor:
        return self.head.read(
            self.model, arguments | {"past_key_values": cache, "use_cache": True}, lambda states: states
        )

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
                same, self._in_place = self._same_states()
        except Exception as error:  # whatever a model says of a cache that is not its own
            return (
                f"it does not run behind a cache ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
            )
        return None if same else "behind a cache, tokens have other states"

    def _same_states(self) -> tuple[bool, bool]:
        """Whether rows of 6 and 8 tokens have, behind the first 3 and 6 of them, the states that they have alone:
        behind copies, and in place."""
        tokens = check_tokens(self.model)
        starts, stops = (torch.tensor(n, device=tokens.device) for n in ([3, 6], [6, 8]))
        prefixes = self._read_first(tokens[:, :6], starts)
        rests = torch.stack([tokens[1, [6, 7, 7]], tokens[0, 3:6]])
        order = torch.tensor([1, 0], device=tokens.device)  # rows are chosen from those that were read
        lengths = (stops - starts)[order]
        copied = self._read_behind_copies(rests, lengths, prefixes.of(order))
        try:
            in_place = self._read_in_place(rests, lengths, prefixes, order, keep=True) if tokens.is_cpu else None
        except Exception:  # whatever a model does with attention that is not its own: it reads behind copies
            in_place = None
        same = [True, in_place is not None]
        for place, row in enumerate(order.tolist()):
            start, stop = int(starts[row]), int(stops[row])
            arguments = {"input_ids": tokens[row : row + 1, :stop], "use_cache": False}
            alone = self.head.read(self.model, arguments, lambda states: states)[0, start:]
            for way, found in enumerate((copied, in_place)):
                if found is not None:
                    last = int(found.stops[place])
                    same[way] &= same_states(found.hidden[place, last - (stop - start) : last], alone)
        return same[0], same[1]


def _keys_and_values(layers: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    return [layer.keys for layer in layers], [layer.values for layer in layers]
