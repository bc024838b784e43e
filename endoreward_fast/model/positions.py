"""How many tokens a model reads: what its config says, and what its modules can index.

A config's number is where training ended; rotary, ALiBi and recurrent models compute beyond it. A table of positions
has no more rows than it has. So a number is a default that `max_length` overrides, and a table is a limit.
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

TABLE = re.compile(r"(^|[._])(wpe|embed_positions|positions_embed|pos_encoding|pos_emb|position_embeddings?)([._]|$)")
"""names of tables; relative positions are no table"""
ORIGINAL = "original_max_position_embeddings"
INFERRED = ("linear", "dynamic")
"""scalings that do not name the original number of positions"""
UNKNOWN = 10**9
"""a tokenizer's model_max_length from here on means that it does not know"""
OTHER_INPUTS = re.compile(r"vision|visual|image|audio|video|patch")
AHEAD = {"prophetnet": 1}
"""model types that look up the position behind a row's last token as well"""
FIXED = {"mpt": "max_seq_len", "reformer": "max_position_embeddings"}
"""model types whose own code stops at this number of the config: MPT makes its ALiBi biases for so many positions"""


@dataclass(frozen=True)
class Positions:
    """Most tokens in a row of one model. None: no limit is known."""

    default: int | None
    """without a max_length: the config's number with its rotary scaling, and never more than the table has"""
    table: int | None
    """whatever max_length says"""
    switches: tuple[tuple[int, bool], ...] = ()
    """(tokens, whether each length beyond them counts): where rotary frequencies change with the length of the longest
    row of a batch. LongRoPE has two sets of them, dynamic scaling one for each length"""

    @classmethod
    def of(cls, model: nn.Module, config: Any, tokenizer: Any = None, *, firm: bool = False) -> "Positions":
        """Of a model with this (text) config. The tokenizer's model_max_length is one more default where it is `firm`;
        otherwise it only decides whether the config's number includes a scaling already."""
        table = _fixed(config) or _table(model, AHEAD.get(getattr(config, "model_type", ""), 0))
        usual = getattr(tokenizer, "model_max_length", None)
        usual = usual if isinstance(usual, int) and 0 < usual < UNKNOWN else None
        found = [n for n in (_scaled(config, usual), usual if firm else None, table) if n is not None]
        return cls(min(found, default=None), table, _switches(config))

    def frequencies(self, length: int) -> tuple[int, ...]:
        """Rows share a batch only where this is the same for each: their rotary frequencies are then those they have
        alone."""
        return tuple(0 if length <= at else length if each else 1 for at, each in self.switches)

    def keeps_frequencies(self, length: int) -> bool:
        """Whether a batch of this width may find the frequencies of a longer one before it: transformers keeps those of
        dynamic scaling until a row shorter than the config's number comes."""
        return any(each and length >= at for at, each in self.switches)

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


def _scaled(config: Any, usual: int | None) -> int | None:
    """The config's number, times the factor of a rotary scaling that it does not include yet."""
    number = _number(config, "model_max_length") or _number(config, "max_position_embeddings")  # Command R has both
    if number is None:
        return None
    ropes = _ropes(config)
    if len(ropes) == 1 and ropes[0].get("rope_type") in INFERRED and not ropes[0].get(ORIGINAL):
        # By convention the number is the original one. DeepSeek Coder's is not, as its tokenizer tells.
        stretched = _times(number, ropes[0].get("factor"))
        return stretched if usual is None else min(stretched, max(number, usual))
    return max([number, *(_stretched(rope, number) for rope in ropes)])


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Rotary parameters: one dict, or one of each kind of layer (Gemma 3)."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [part for part in rope.values() if isinstance(part, dict)] or [rope]


def _stretched(rope: dict[str, Any], number: int) -> int:
    """Positions that a scaling stretches the original ones to; 0 where it does not say.

    A number above the original one includes the scaling. Only YaRN's need not: Qwen 3 has 40960, and stretches an
    original 32768 four times.
    """
    original = rope.get(ORIGINAL) or 0
    if original < number and rope.get("rope_type") in ("llama3", "longrope"):
        return 0
    return _times(original, rope.get("factor"))


def _times(number: int, factor: Any) -> int:
    return int(number * factor) if isinstance(factor, int | float) and factor > 1 else number


def _switches(config: Any) -> tuple[tuple[int, bool], ...]:
    number, found = _number(config, "max_position_embeddings"), set()
    for rope in _ropes(config):
        if rope.get("rope_type") == "dynamic" and number is not None:
            found.add((number, True))
        if rope.get("rope_type") == "longrope" and isinstance(rope.get(ORIGINAL), int):
            found.add((rope[ORIGINAL], False))
    return tuple(sorted(found))


def _table(model: nn.Module, ahead: int) -> int | None:
    """Tokens that the smallest table of positions in `model` has rows for, with `ahead` more of them."""
    found = [rows - ahead for name, module in model.named_modules() if (rows := _rows(name, module)) is not None]
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


def forget_longer_rows(model: Any, input_ids: Tensor) -> None:
    """Run one token: rotary frequencies are then those of a model that has read nothing yet."""
    model(input_ids=input_ids[:1, :1])
