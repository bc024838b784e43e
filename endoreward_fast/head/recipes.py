"""The table of what each model family does between its output head and its final logits.

The table was read from the modeling files of transformers 5.23. self_check.py compares it with each loaded model.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadRecipe:
    """The steps from the head's raw output y = hidden @ weight.T + bias to the final logits."""

    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    """number of the head's rows that are words; the model cuts off the rest as padding. None: all rows"""

    def finish(self, y: Tensor) -> Tensor:
        """Return the final logits of raw head outputs y (..., V)."""
        z = y[..., : self.vocab_size] * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


@dataclass(frozen=True)
class Rule:
    """Names of the config fields that a family's recipe is made from."""

    multiply: str | None = None
    divide: str | None = None
    softcap: str | None = None
    vocab_size: str | None = None

    def read(self, config: Any) -> HeadRecipe:
        def number(name: str | None) -> float | None:
            value = None if name is None else getattr(config, name, None)  # paligemma with gemma 1 has no such field
            return None if value is None else float(value)

        multiply, divide, rows = number(self.multiply), number(self.divide), number(self.vocab_size)
        scale = (1.0 if multiply is None else multiply) / (1.0 if divide is None else divide)
        return HeadRecipe(scale, number(self.softcap), None if rows is None else int(rows))

    def formula(self, y: str) -> str:
        """Return what `read` computes in terms of the config's fields, for the docs: "logit_scale * (y)"."""
        z = y if self.multiply is None else f"{self.multiply} * ({y})"
        z = z if self.divide is None else f"({z}) / {self.divide}"
        z = z if self.softcap is None else f"softcap({z}, {self.softcap})"
        return z if self.vocab_size is None else f"({z})[:{self.vocab_size}]"


def _rules() -> dict[str, Rule]:
    """Return {model type: rule} as in the modeling files of transformers 5.23. Other types are plain."""
    families = (
        (
            Rule(softcap="final_logit_softcapping"),
            "beam gemma2 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified "
            "gemma4_unified_text nanochat paligemma vaultgemma",
        ),
        (Rule(softcap="logits_soft_cap"), "recurrent_gemma"),
        (Rule(softcap="output_logit_soft_cap"), "xlstm"),
        (Rule(multiply="logit_scale"), "cohere cohere2 cohere2_moe cohere_compass cohere_compass_text"),
        (
            Rule(divide="logits_scaling"),
            "granite granite4_vision granite_docling granite_swa granitemoe granitemoe_swa granitemoehybrid "
            "granitemoeshared",
        ),
        (Rule(multiply="logits_scaling"), "hyperclovax hyperclovax_vision_v2"),
        (Rule(multiply="lm_head_multiplier"), "falcon_h1"),
        (Rule(multiply="output_multiplier", softcap="final_logit_softcapping"), "muse_glimmer muse_spark"),
        (Rule(vocab_size="unpadded_vocab_size"), "inkling_text inkling_mm_model"),
        (Rule(softcap="final_logit_softcapping", vocab_size="unpadded_vocab_size"), "inkling2 inkling2_text"),
    )
    return {model_type: rule for rule, types in families for model_type in types.split()}


RULES = MappingProxyType(_rules())


def recipe_for(model: nn.Module) -> HeadRecipe:
    """Return the recipe of a model's family. The fields come from the text config, so composite models work as well.

    Some families are plain although their config suggests a recipe: mpt (`logit_scale` is never read), gemma3 with its
    image tower (`final_logit_softcapping`) and minicpm3 (`logits_scaling` acts before the head).
    """
    config = getattr(model, "config", None)
    rule = RULES.get(getattr(config, "model_type", ""))
    if config is None or rule is None:
        return HeadRecipe()
    return rule.read(config.get_text_config(decoder=True))
