"""Attend from many rows to the one copy of a prefix that they share.

A cache of transformers returns the keys of a row's prefix and its own as one tensor, so each row needs a copy of its
prefix. Here, the layers of the cache return a row's own keys only, and the next call of `scaled_dot_product_attention`
reads those of the prefix where they are held. Log-sum-exp merges the two attentions:

    output = own + sigmoid(lse_prefix - lse_own) * (prefix - own)

A `TorchFunctionMode` sees the call. It acts within one block of one thread; the model and its config stay as they are.
"""

from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Cache, DynamicLayer

from ..scoring.past import Past

attention_and_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""the only kernel for the CPU that returns the log-sum-exp; it takes grouped heads and expanded keys without copies"""


class NeedsCopies(Exception):
    """The model does not attend by `scaled_dot_product_attention` with a mask of all tokens."""


class Group(NamedTuple):
    """Rows behind one prefix."""

    rows: slice
    prefix: int
    columns: slice
    """the columns of `Past` in which the prefix is held"""


class Sight(NamedTuple):
    """What the tokens of a group see. Masks are added to logits: (1, 1 or heads, T, tokens)."""

    own: Tensor | None
    """None: all tokens before them"""
    prefix: Tensor | None
    """None: all of it"""
    skipped: int
    """tokens at the beginning of the prefix that no token sees"""
    blind: Tensor | None
    """(1, 1 or heads, T), the tokens that see none of the prefix"""


ALL = Sight(None, None, 0, None)


class PrefixAttention(TorchFunctionMode):
    """Within: the model's attention reads the prefixes in `past`. Raises NeedsCopies if it is of another kind.

    past      what is held of the prefixes
    parents   of each row that the model reads, the row of `past` that it is behind, in ascending order
    """

    def __init__(self, past: Past, parents: list[int]) -> None:
        super().__init__()
        self.layers = [_Layer(self, keys, values) for keys, values in zip(past.keys, past.values, strict=True)]
        self.cache = Cache(layers=self.layers)
        self.width = past.hidden.shape[1]
        self.groups = []
        for parent, group in groupby(range(len(parents)), key=parents.__getitem__):
            rows = list(group)
            columns = slice(past.first[parent], int(past.stops[parent]))
            self.groups.append(Group(slice(rows[0], rows[-1] + 1), parent, columns))
        self.pending: _Layer | None = None
        """the layer whose keys the next attention reads"""
        self.sights: dict[int, tuple[Tensor, list[Sight]]] = {}
        """of each mask of the model, by its id: the mask, and what each group sees"""

    def expect(self, layer: "_Layer | None") -> None:
        """Say that the next attention is of this layer."""
        if self.pending is not None:
            raise NeedsCopies("its attention is of another kind")
        self.pending = layer

    def __exit__(self, kind: Any, *error: Any) -> None:
        super().__exit__(kind, *error)
        self.expect(None)  # also after an error: other attention does not expect a mask wider than the keys

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        layer = self.pending
        if layer is None or func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.pending = None
        return self._attend(layer, *args, **(kwargs or {}))

    def _attend(
        self, layer: "_Layer", query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Do as `scaled_dot_product_attention` does if the prefix stands before `key` and `value`."""
        dtype = query.dtype
        # Two rounded outputs, merged, are further from the truth than one. The kernel is as fast in float32 on Zen 4.
        query, key, value = _wide(query), _wide(key), _wide(value)
        causal = is_causal or attn_mask is not None
        sights = [ALL] * len(self.groups) if attn_mask is None else self._sights(attn_mask, key)
        found = []
        for (rows, prefix, columns), sight in zip(self.groups, sights, strict=True):
            q, k, v = query[rows], key[rows], value[rows]
            output, lse = attention_and_lse(
                q, k, v, dropout_p, causal and sight.own is None, attn_mask=sight.own, scale=scale
            )
            seen = slice(columns.start + sight.skipped, columns.stop)
            if seen.start < seen.stop:
                k, v = (_wide(x[prefix, :, seen]).expand(len(q), -1, -1, -1) for x in (layer.keys, layer.values))
                before, lse_before = attention_and_lse(q, k, v, dropout_p, attn_mask=sight.prefix, scale=scale)
                if sight.blind is not None:
                    lse_before = lse_before.masked_fill(sight.blind, -torch.inf)
                output = torch.lerp(output, before, torch.sigmoid(lse_before - lse)[..., None].to(output.dtype))
            found.append(output.to(dtype))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _sights(self, mask: Tensor, key: Tensor) -> list[Sight]:
        if id(mask) not in self.sights:
            if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[-1] != self.width + key.shape[2]:
                raise NeedsCopies("its mask is of another kind")
            self.sights[id(mask)] = mask, [self._sight(mask, group, key.dtype) for group in self.groups]
        return self.sights[id(mask)][1]

    def _sight(self, mask: Tensor, group: Group, dtype: torch.dtype) -> Sight:
        """Return what the rows of a group see. Their masks are equal, because they stand behind the same tokens."""
        mask = mask[group.rows][:1] if len(mask) > 1 else mask
        length = group.columns.stop - group.columns.start
        prefix, own = mask[..., self.width - length : self.width], mask[..., self.width :]
        anywhere = prefix.flatten(0, 2).any(0)
        skipped = int(anywhere.int().argmax()) if anywhere.any() else length
        prefix = prefix[..., skipped:]
        blind = ~prefix.any(-1)
        return Sight(
            None if torch.equal(own, torch.ones_like(own).tril()) else _added(own, dtype),
            None if prefix.all() else _added(prefix, dtype), skipped, blind if blind.any() else None,
        )  # fmt: skip


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)


class _Layer(DynamicLayer):
    """A layer of the cache: it holds the prefixes' keys and values, and returns the rows' own."""

    def __init__(self, attention: PrefixAttention, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.attention, self.keys, self.values = attention, keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.own: tuple[Tensor, Tensor] | None = None
        """what the model has read behind the prefixes"""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.attention.expect(self)
        self.own = key_states, value_states
        return self.own
