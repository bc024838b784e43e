"""Types and formulas shared by the public functions and the backends. States are flattened to N rows.

Row i = b T + t is the state after token t of sequence b. Its target is the token chosen in that state (token t + 1).
Its successor is the row of the state that this token leads to.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import NO_TARGET

SUM_SCALE = 2.0**-32
"""Scale of the sum behind the logit mean. Without it, words masked with their dtype's lowest number would overflow the
sum. A power of two keeps every bit of logits above 1e-28 in size."""


class RowStats(NamedTuple):
    """Statistics of N rows, each (N,) float32. lse = shift / alpha + log_total.

    Under a large common offset lse rounds away bits of log_total that the backward and the log-probability need. Both
    parts are therefore kept.
    """

    lse: Tensor
    target_logit: Tensor
    entropy: Tensor | None
    logit_mean: Tensor | None
    shift: Tensor
    """max_a z_a"""
    log_total: Tensor
    """ln sum_a exp((z_a - shift) / alpha); -inf for a row that is all -inf"""
    named: Tensor | None = None
    """log pi of K named tokens, (N, K)"""


class RowRewards(NamedTuple):
    """Rewards of N rows or of N tokens, each (N,) float32: see `rewards_of` and `at_tokens`."""

    reward: Tensor
    logprob: Tensor
    value: Tensor
    entropy: Tensor | None


class KeptRows:
    """The rows that a mask (N,) keeps; all rows if it is None. Their number is read back to the host."""

    def __init__(self, mask: Tensor | None):
        self.mask = mask
        self.index = None if mask is None else mask.nonzero().squeeze(1)

    def take(self, field: Tensor | None) -> Tensor | None:
        """Return the kept rows of field (N, ...). An empty or absent field stays what it is."""
        return field if self.index is None or field is None or not field.numel() else field[self.index]

    def spread(self, field: Tensor | None) -> Tensor | None:
        """Return a field of the kept rows as (N, ...), with 0 in the other rows."""
        if self.index is None or field is None:
            return field
        return field.new_zeros(len(self.mask), *field.shape[1:]).index_copy(0, self.index, field)

    def place(self) -> Tensor | None:
        """Return the index (N,) int32 among the kept rows of each row that is kept; None if all are."""
        return None if self.mask is None else self.mask.cumsum(0, dtype=torch.int32) - 1


class EveryRow(KeptRows):
    """All rows, with 0 in those off the mask: for a CUDA graph, which cannot depend on their number."""

    def __init__(self, mask: Tensor):
        self.mask, self.index = mask, None

    def take(self, field: Tensor | None) -> Tensor | None:
        if field is None or not field.numel() or not field.is_floating_point():
            return field
        return torch.where(self.mask.unsqueeze(1) if field.ndim == 2 else self.mask, field, 0.0)

    def place(self) -> None:
        return None


class RowGrads(NamedTuple):
    """Upstream gradients of the first four fields of RowStats, (N,) float32, and of named logits. None is zero."""

    lse: Tensor
    target_logit: Tensor
    entropy: Tensor | None
    logit_mean: Tensor | None
    named: Tensor | None = None
    """of the logits of K named tokens, (N, K)"""


def successor_among(successor: Tensor | None, mask: Tensor, rows: Tensor) -> Tensor | None:
    """Return `successor` of the rows that the mask keeps, renumbered among them. Every successor is a kept row."""
    if successor is None:
        return None
    place = mask.cumsum(0) - 1
    successor = successor[rows]
    return torch.where(successor >= 0, place[successor.clamp(min=0)], -1)


def with_rewards(
    stats: RowStats, targets: Tensor, mask: Tensor | None, vocab: int, successor: Tensor | None, alpha: float | Tensor
) -> tuple[RowStats, RowRewards | None]:
    """Return the statistics and, if `successor` is given, rewards at tokens; NaN where a target is outside [0, V).

    The row before such a row stays valid, because its successor's value is right. On the CPU the operator has already
    refused such targets.
    """
    targets = targets if mask is None else torch.where(mask, targets, NO_TARGET)
    rewards = None if successor is None else rewards_of(stats, targets, successor, alpha)
    lost = (targets != NO_TARGET) & ((targets < 0) | (targets >= vocab))
    if targets.device.type != "cpu" or lost.any():
        stats, rewards = poisoned(stats, lost), rewards and poisoned(rewards, lost)
    return stats, rewards and at_tokens(rewards)


def of_named(logits: Tensor, named: Tensor, vocab: int, stats: RowStats, alpha: float | Tensor) -> Tensor:
    """Return log pi (N, K) of named tokens from their logits (N, K) in rows with these statistics.

    It is NaN for a token outside the vocabulary, and -inf in a row that is all -inf.
    """
    dead = (stats.log_total == -torch.inf).unsqueeze(1)
    shift, log_total = stats.shift.unsqueeze(1), stats.log_total.unsqueeze(1)
    logprob = ((logits - shift) / per_row(alpha) - log_total).clamp(max=0.0)
    logprob = torch.where(dead, -torch.inf, logprob)
    return torch.where((named >= 0) & (named < vocab), logprob, torch.nan)


def per_row(alpha: float | Tensor) -> float | Tensor:
    """Return a temperature, or temperatures (N,) as (N, 1)."""
    return alpha.unsqueeze(1) if isinstance(alpha, Tensor) else alpha


def at(alpha: float | Tensor, rows: slice | Tensor) -> float | Tensor:
    """Return the temperature of these rows."""
    return alpha[rows] if isinstance(alpha, Tensor) else alpha


def rewards_of(stats: RowStats, targets: Tensor, successor: Tensor, alpha: float | Tensor) -> RowRewards:
    """Compute rewards from the statistics of rows, as the combine kernel does; 0 where the row has no target."""
    chosen = targets != NO_TARGET
    dead = stats.log_total == -torch.inf
    value = alpha * stats.lse
    after = successor.clamp(min=0)
    value_after = torch.where((successor < 0) | dead[after], 0.0, value[after])
    # lse itself may have been rounded; its parts are exact. Rounding can push a logprob above 0.
    logprob = ((stats.target_logit - stats.shift) / alpha - stats.log_total).clamp(max=0.0)
    fields = (
        torch.where(dead, -torch.inf, stats.target_logit - value_after),
        torch.where(dead, -torch.inf, logprob),
        value,
        stats.entropy,
    )
    return RowRewards(*(None if field is None else torch.where(chosen, field, 0.0) for field in fields))


def at_tokens(rewards: RowRewards) -> RowRewards:
    """Move each row's rewards to the token that was chosen in it."""
    return RowRewards(*(None if field is None else at_next(field) for field in rewards))


def at_next(field: Tensor) -> Tensor:
    """Move a field (N,) one place on: row i has the state in which token i + 1 was chosen. The last row has none."""
    return torch.cat([torch.zeros_like(field[:1]), field[:-1]])


def at_rows(field: Tensor) -> Tensor:
    """Move a field (N,) of tokens back to the rows in which they were chosen."""
    return torch.cat([field[1:], torch.zeros_like(field[:1])])


def poisoned(fields, lost: Tensor):
    """Return a RowStats or RowRewards with NaN in the `lost` rows."""

    def without(field: Tensor) -> Tensor:
        return torch.where(lost if field.ndim == 1 else lost.unsqueeze(1), torch.nan, field)

    return type(fields)(*(None if f is None else without(f) for f in fields))


def named_grads(grads: RowGrads, g_logprob: Tensor, log_total: Tensor, alpha: float | Tensor) -> RowGrads:
    """Add the gradient (N, K) of the log-probabilities of named tokens."""
    g = torch.where((log_total == -torch.inf).unsqueeze(1), 0.0, g_logprob)
    return grads._replace(lse=grads.lse - g.sum(1), named=g / per_row(alpha))


def stats_grads(
    targets: Tensor, successor: Tensor, log_total: Tensor, alpha: float | Tensor, grads: RowRewards
) -> RowGrads:
    """Turn gradients of the rewards of rows into gradients of the row statistics."""
    chosen = (targets != NO_TARGET) & (log_total != -torch.inf)
    g_reward, g_logprob, g_value, g_entropy = (None if g is None else torch.where(chosen, g, 0.0) for g in grads)
    leads_on = successor >= 0
    # A state follows at most one token, so each row gets one addend. The zeros added at row 0 change nothing.
    after = successor.clamp(min=0)
    g_lse = (alpha * g_value - g_logprob).index_add(0, after, torch.where(leads_on, -at(alpha, after) * g_reward, 0.0))
    return RowGrads(g_lse, g_reward + g_logprob / alpha, g_entropy, None)


def sequence_starts(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return bool (B, T): the first token of each sequence. It was chosen in no known state and has no reward.

    cu_seqlens (S + 1,) holds the offsets of S sequences packed into the B * T tokens in row-major order.
    """
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, :1] = True
    if cu_seqlens is None:
        return starts
    offsets = torch.zeros(tokens.numel() + 1, dtype=torch.bool, device=tokens.device)
    offsets[cu_seqlens.long()] = True  # the last offset is one past the last token
    return starts | offsets[:-1].view_as(starts)
