"""The states of a sequence classifier, and the scores that its last layer makes of them.

A classifier of transformers is a body and a linear layer, and its output is the layer's for the last token. Where that
is so, conversations with a common prefix (the answers to one question) can share it, as in EndoRewardModel.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..head.gathered import weights_come_and_go
from ..head.self_check import check_tokens, left_as_it_was
from .batch_layout import same_states

Found = TypeVar("Found")


class ClassifierHead:
    """The layer that turns a state (..., D) into a score."""

    def __init__(self, model: nn.Module) -> None:
        self.module = _last_layer(model)
        self._model = model
        self._linear: bool | None = None

    @property
    def linear(self) -> bool:
        """Whether the model's output is this layer's, read from the body's states. The model is asked once."""
        if self._linear is None:
            self._linear = self.module is not None and not weights_come_and_go(self._model) and self._is_its_output()
        return self._linear

    @property
    def instead(self) -> str:
        """How the output is read if it is not this layer's."""
        return "its output is not that of its last layer for the last token"

    def read(self, model: nn.Module, arguments: dict[str, Any], reader: Callable[[Tensor], Found]) -> Found:
        """Run the body and return reader(states)."""
        body: Any = model.base_model
        return reader(body(**arguments).last_hidden_state)

    def scores(self, states: Tensor) -> Tensor:
        """Return the scores (N,) of states (N, D). Equal states have equal scores, which a matmul does not promise."""
        if self.module is None:
            raise TypeError("this classifier has no last layer with one output")
        weight, bias = self.module.weight[0].float(), self.module.bias
        found = (states.to(weight.device).float() * weight).sum(-1)
        return (found if bias is None else found + bias.float()).to(states.dtype)

    def _is_its_output(self) -> bool:
        """Whether it is the score of the last token, and of the last before a padding token that ends a row."""
        tokens = check_tokens(self._model)[:1]
        config: Any = self._model.config
        pad = (config.get_text_config() if hasattr(config, "get_text_config") else config).pad_token_id
        ended = [] if pad is None else [torch.cat([tokens, torch.full_like(tokens[:, :1], pad)], 1)]
        try:
            with left_as_it_was(self._model), torch.no_grad():
                for row in (tokens, *ended):
                    whole = self._model(input_ids=row, attention_mask=torch.ones_like(row)).logits[:, :1]
                    states = self.read(self._model, {"input_ids": row, "use_cache": False}, lambda states: states)
                    if not same_states(self.scores(states[:, tokens.shape[1] - 1])[:, None], whole):
                        return False
                return True
        except Exception:  # whatever a model says of arguments that are not its own: its rows are then read whole
            return False


def _last_layer(model: nn.Module) -> nn.Linear | None:
    """Return the only linear layer with one output that stands beside the body, or None."""
    body = getattr(model, "base_model", None)
    found = [m for m in model.children() if m is not body and isinstance(m, nn.Linear) and m.out_features == 1]
    return found[0] if len(found) == 1 and body is not model else None
