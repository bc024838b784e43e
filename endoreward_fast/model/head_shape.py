"""The shape of a model's head, from its config."""

from typing import NamedTuple

import torch

from ..errors import EndoRewardError, first_line
from ..head.module import find_head
from ..head.recipes import recipe_for
from .loading import config_of, naming


class HeadShape(NamedTuple):
    dim: int
    vocab: int
    """rows of the weight that are vocabulary; padding behind them is never read"""
    dtype: str | None
    """as the config states it"""


def head_shape(name: str) -> HeadShape:
    """Return the shape of the head of a causal model. Builds the model without memory for its weights, and reads none.

    Raises EndoRewardError if there is no such model, or if its config makes none.
    """
    import transformers

    config = config_of(name)
    with naming(name):
        try:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # a config may be wrong in any way
            raise EndoRewardError(f"its config makes no model: {first_line(error)}") from error
        weight = find_head(model).weight
        rows = recipe_for(model).vocab_size or weight.shape[0]
    stated = getattr(config, "dtype", None)
    return HeadShape(weight.shape[1], rows, None if stated is None else str(stated).removeprefix("torch."))
