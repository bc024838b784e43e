"""How many tokens a model reads: what its config says, and what its modules can index.

A config's number is where training ended; rotary, ALiBi and recurrent models compute beyond it. A table of positions
has no more rows than it has. So a number is a default that `max_length` overrides, and a table is a limit.
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

TABLE = re.compile(r"(^|[._])(wpe|embed_positions|positions_embed|pos_encoding|pos_emb|position_embeddings?)([._]|$)")
"""names of tables; relative positions are no table"""
OTHER_INPUTS = re.compile(r"vision|visual|image|audio|video|patch")
FIXED = {"mpt": "max_seq_len", "reformer": "max_position_embeddings"}
"""model types whose own code stops at this number of the config: MPT makes its ALiBi biases for so many positions"""


@dataclass(frozen=True)
class Positions:
    """Most tokens in a row of one model. None: no limit is known."""

    default: int | None
    """without a max_length: the config's number with its rotary scaling, and never more than the table has"""
    table: int | None
    """whatever max_length says"""

    @classmethod
    def of(cls, model: nn.Module, config: Any, usual: int | None = None) -> "Positions":
        """Of a model with this (text) config; `usual` is one more default, such as the tokenizer's."""
        table = _fixed(config) or _table(model)
        found = [n for n in (_scaled(config), usual, table) if n is not None]
        return cls(min(found, default=None), table)

    def limit(self, max_length: int | None) -> int | None:
        """Of a row, where `max_length` is asked for or None."""
        found = [n for n in (max_length, self.table) if n is not None]
        return self.default if max_length is None else min(found)


def _number(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None  # XLNet says -1


def _fixed(config: Any) -> int | None:
    name = FIXED.get(getattr(config, "model_type", ""))
    return None if name is None else _number(config, name)


def _scaled(config: Any) -> int | None:
    """max_position_embeddings, times the factor of a rotary scaling that it does not include yet."""
    number = _number(config, "max_position_embeddings")
    rope = getattr(config, "rope_parameters", None)
    if number is None or not isinstance(rope, dict):
        return number
    layers = [part for part in rope.values() if isinstance(part, dict)]
    if layers:  # Gemma 3: each kind of layer has a scaling, and the number includes them unless the original is named
        return max([number, *(_stretched(part, 0) for part in layers)])
    return max(number, _stretched(rope, number))


def _stretched(rope: dict[str, Any], number: int) -> int:
    """Positions that a scaling stretches the original ones to; 0 where it does not say.

    YaRN, LongRoPE and Llama 3 name the original number. Linear and dynamic scaling count from `number` by convention.
    """
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings") or 0
    if rope.get("rope_type") in ("linear", "dynamic"):
        original = original or number
    return int(original * factor) if isinstance(factor, int | float) and factor > 1 else 0


def _table(model: nn.Module) -> int | None:
    """Tokens that the smallest table of positions in `model` has rows for."""
    found = [rows for name, module in model.named_modules() if (rows := _rows(name, module)) is not None]
    return min(found, default=None)


def _rows(name: str, module: nn.Module) -> int | None:
    if OTHER_INPUTS.search(name):
        return None
    if isinstance(module, nn.Embedding):
        # OPT and BART leave rows unused at the start, RoBERTa all up to the one for padding.
        unused = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
        return module.num_embeddings - unused if TABLE.search(name) else None
    if hasattr(module, "make_weights"):
        return None  # sinusoids that grow with the row: XGLM
    tensors = [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]
    tables = [x for key, x in tensors if TABLE.search(key) and x.is_floating_point() and x.ndim >= 2]
    return min((x.shape[-2] for x in tables), default=None)
