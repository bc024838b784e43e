"""Turn checked arguments of the public functions into what the operators take."""

import torch
from torch import Tensor


def as_3d(logits: Tensor) -> Tensor:
    """View (..., V) as (outer, inner, V), without a copy if the strides allow it, as they do for a slice [:, :-1]."""
    if logits.ndim == 3:
        return logits
    return logits[(None,) * (3 - logits.ndim)] if logits.ndim < 3 else logits.flatten(0, -3)


def flat(rows: Tensor | None) -> Tensor | None:
    """Return rows (...) as (N,); None stays."""
    return None if rows is None else rows.reshape(-1)


def autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast a head and its hidden states as autocast does for a linear layer."""
    device = hidden.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which raises for meta, a device without autocast
        return hidden, weight, bias
    if hidden.dtype == torch.float64:  # autocast leaves float64 alone
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
