"""The most tokens that a model can read, from its config and its modules.

The number in a config says how long the training sequences were. Rotary, ALiBi and recurrent models can compute beyond
it, so it is a default that `max_length` overrides. A table of positions (GPT-2) cannot be read beyond its last row, so
its size is a limit.
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

TABLE = re.compile(r"(^|[._])(wpe|embed_positions|positions_embed|pos_encoding|pos_emb|position_embeddings?)([._]|$)")
"""names of modules that are tables of positions; relative positions are not"""
ORIGINAL = "original_max_position_embeddings"
INFERRED = ("linear", "dynamic")
"""rotary scalings whose parameters lack the original number of positions"""
UNKNOWN = 10**9
"""a tokenizer's model_max_length of this or more means that it has no limit"""
OTHER_INPUTS = re.compile(r"vision|visual|image|audio|video|patch")
"""names of modules whose tables are for inputs other than text"""
AHEAD = {"prophetnet": 1}
"""{model type: further positions that it looks up after the last token}"""
FIXED = {"mpt": "max_seq_len", "reformer": "max_position_embeddings"}
"""{model type: field of the config that is a limit}: MPT creates ALiBi biases for that many positions"""


@dataclass(frozen=True)
class Positions:
    """The most tokens in a row of one model. None: no limit is known."""

    default: int | None
    """the limit without max_length: the config's number times its rotary scaling, or the table's size if smaller"""
    table: int | None
    """the limit for any max_length: the number of positions in the model's table"""
    switches: tuple[tuple[int, bool], ...] = ()
    """(tokens, whether every length above is different): the lengths at which rotary frequencies change. They depend on
    the longest row of a batch. LongRoPE has two sets, below and above; dynamic scaling has one for each length above"""

    @classmethod
    def of(cls, model: nn.Module, config: Any, tokenizer: Any = None, *, firm: bool = False) -> "Positions":
        """Return the limits of a model with this (text) config.

        If `firm`, the tokenizer's model_max_length is a default as well. Otherwise it only helps to decide whether the
        config's number already includes a rotary scaling.
        """
        table = _fixed(config) or _table(model, AHEAD.get(getattr(config, "model_type", ""), 0))
        usual = getattr(tokenizer, "model_max_length", None)
        usual = usual if isinstance(usual, int) and 0 < usual < UNKNOWN else None
        found = [n for n in (_scaled(config, usual), usual if firm else None, table) if n is not None]
        return cls(min(found, default=None), table, _switches(config))

    def frequencies(self, length: int) -> tuple[int, ...]:
        """Return a key for the rotary frequencies of a row of this length.

        Only rows with equal keys share a batch, so that each has the frequencies that it has alone.
        """
        return tuple(0 if length <= at else length if each else 1 for at, each in self.switches)

    def keeps_frequencies(self, length: int) -> bool:
        """Return whether a batch of this width may get the frequencies of a longer batch before it.

        transformers keeps those of dynamic scaling until it reads a row shorter than the config's number.
        """
        return any(each and length >= at for at, each in self.switches)

    def limit(self, max_length: int | None) -> int | None:
        """Return the most tokens of a row, given the option `max_length` or None."""
        found = [n for n in (max_length, self.table) if n is not None]
        return self.default if max_length is None else min(found)


def _number(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None  # XLNet has -1


def _fixed(config: Any) -> int | None:
    name = FIXED.get(getattr(config, "model_type", ""))
    return None if name is None else _number(config, name)


def _scaled(config: Any, usual: int | None) -> int | None:
    """Return the config's number of positions, times the rotary scaling unless the number includes it."""
    number = _number(config, "model_max_length") or _number(config, "max_position_embeddings")  # Command R has both
    if number is None:
        return None
    ropes = _ropes(config)
    if len(ropes) == 1 and ropes[0].get("rope_type") in INFERRED and not ropes[0].get(ORIGINAL):
        # By convention the number is before scaling. DeepSeek Coder's is after it, as its tokenizer's limit shows.
        stretched = _times(number, ropes[0].get("factor"))
        return stretched if usual is None else min(stretched, max(number, usual))
    return max([number, *(_stretched(rope, number) for rope in ropes)])


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Return the rotary parameters: one dict, or one for each type of layer (Gemma 3)."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [part for part in rope.values() if isinstance(part, dict)] or [rope]


def _stretched(rope: dict[str, Any], number: int) -> int:
    """Return the original number of positions times the scaling; 0 if `number` includes it or the original is unknown.

    A number above the original one includes the scaling of Llama 3 and LongRoPE. That of YaRN may not: Qwen 3 has 40960
    with a factor of 4 and an original 32768.
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
    """Return the number of tokens for which the smallest table of positions has rows, less `ahead`. None: no table."""
    found = [rows - ahead for name, module in model.named_modules() if (rows := _rows(name, module)) is not None]
    return min(found, default=None)


def _rows(name: str, module: nn.Module) -> int | None:
    if OTHER_INPUTS.search(name):
        return None
    if isinstance(module, nn.Embedding):
        # OPT and BART do not use the first `offset` rows, RoBERTa none up to its padding row.
        unused = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
        return module.num_embeddings - unused if TABLE.search(name) else None
    if hasattr(module, "make_weights"):
        return None  # XGLM computes more sinusoids for a longer row
    tensors = [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]
    tables = [x for key, x in tensors if TABLE.search(key) and x.is_floating_point() and x.ndim >= 2]
    return min((x.shape[-2] for x in tables), default=None)


def forget_longer_rows(model: Any, input_ids: Tensor) -> None:
    """Run one token, which resets the rotary frequencies to those of a freshly loaded model."""
    model(input_ids=input_ids[:1, :1])
