"""From tokens (B, T) to rows: which states are computed, and which token and which state follow each of them.

rows.py says how tokens and rows are numbered.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import NO_TARGET
from .ops import plan as plan_by_kernel
from .reference import alpha_of_states, scored_terminal_needed, shift_left


class RowPlan(NamedTuple):
    """Maps tokens (B, T) to rows. Each field is (B T,)."""

    targets: Tensor
    """int64: the token chosen in the state; -100 if it is not scored"""
    successor: Tensor
    """int64: row of the state after that token; -1 if the token is terminal or not scored"""
    needed: Tensor
    """bool: rows whose statistics the rewards need; the others are not computed"""


def alpha_of_rows(alpha: Tensor, plan: RowPlan) -> Tensor:
    """Return the temperature (B T,) of each row from those of tokens (B, T), as `reference.alpha_of_states` does."""
    chosen, needed = ((x.view_as(alpha)) for x in (plan.targets != NO_TARGET, plan.needed))
    return alpha_of_states(alpha, chosen, needed).flatten()


def plan_rows(
    tokens: Tensor, mask: Tensor | None, terminal: Tensor | None, cu_seqlens: Tensor | None, kernels: bool = False
) -> RowPlan:
    """Return the rows of tokens (B, T). `kernels`: by one kernel launch instead of some thirty of torch's."""
    if kernels:
        return RowPlan(*plan_by_kernel(tokens, mask, terminal, cu_seqlens))
    scored, ends, needed = scored_terminal_needed(tokens, mask, terminal, cu_seqlens)
    chosen = shift_left(scored)
    next_token = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)
    row = torch.arange(tokens.numel(), device=tokens.device).view_as(tokens)
    return RowPlan(
        torch.where(chosen, next_token, NO_TARGET).flatten(),
        torch.where(chosen & ~shift_left(ends), row + 1, -1).flatten(),
        needed.flatten(),
    )
