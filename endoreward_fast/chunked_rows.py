"""The chunked backend under the names that ops.py calls, on rows as rows.py defines them."""

import torch
from torch import Tensor

from . import chunked
from .rows import RowGrads, RowRewards, RowStats, rewards_of


def logits_forward(
    logits: Tensor, targets: Tensor, *, mask, alpha: float, entropy: bool, logit_mean: bool, successor=None
) -> tuple[RowStats, RowRewards | None]:
    kept = targets if mask is None else torch.where(mask, targets, -100)
    out = chunked.logits_forward(
        logits.reshape(-1, logits.shape[-1]), kept, alpha=alpha, entropy=entropy, logit_mean=logit_mean
    )
    stats = _row_stats(out, alpha)
    if mask is not None:
        stats = RowStats(*(None if f is None else torch.where(mask, f, 0.0) for f in stats))
    return stats, None if successor is None else rewards_of(stats, kept, successor, alpha)


def logits_backward(logits: Tensor, targets: Tensor, stats: RowStats, grads: RowGrads, *, mask, alpha: float) -> Tensor:
    flat = logits.reshape(-1, logits.shape[-1])
    grad = chunked.logits_backward(flat, targets, stats.lse, stats.entropy, *grads, alpha=alpha)
    if mask is not None:
        grad.masked_fill_(~mask.unsqueeze(1), 0.0)
    return grad.view(logits.shape)


def linear_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias, logit_scale: float, softcap, alpha: float,
    entropy: bool, logit_mean: bool, successor=None,
) -> tuple[RowStats, RowRewards | None]:  # fmt: skip
    out = chunked.linear_forward(
        hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, alpha=alpha,
        entropy=entropy, logit_mean=logit_mean,
    )  # fmt: skip
    stats = _row_stats(out, alpha)
    return stats, None if successor is None else rewards_of(stats, targets, successor, alpha)


def linear_backward(hidden, weight, targets, stats: RowStats, grads: RowGrads, *, alpha: float, **head):
    return chunked.linear_backward(hidden, weight, targets, stats.lse, stats.entropy, *grads, alpha=alpha, **head)


def _row_stats(out: tuple, alpha: float) -> RowStats:
    lse = out[0]
    return RowStats(*out, lse * alpha, torch.where(lse == -torch.inf, -torch.inf, 0.0))
