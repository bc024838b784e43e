"""Sequence scores, rewards-to-go and terminal tokens from the rewards of tokens."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .vocab.checks import as_bool, check_numbers, require_tensors


def sequence_score(
    reward: Tensor, mask: Tensor, *, reduction: Literal["sum", "mean"] = "sum", gamma: float = 1.0, floor: float = 0.0
) -> Tensor:
    """Return the discounted sum or mean of each row's rewards, float32 (B,).

        sum_h max(gamma^(h - 1), floor) r_h        h counts the scored tokens of the row from 1

    reward     (B, T)
    mask       (B, T) tokens to score, as bool or as integers 0 and 1
    reduction  "sum", or "mean": the same sum divided by the number of scored tokens

    A row without a scored token scores 0. The paper scores by the sum, which favours short completions, as a summed
    log-probability does.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction={reduction!r}: expected 'sum' or 'mean'")
    mask = _checked_mask(reward, mask, gamma)
    check_numbers(floor=floor)
    if not 0 <= floor < math.inf:
        raise ValueError(f"floor={floor}: expected a finite number >= 0")
    weighted = reward.float()
    if gamma != 1.0 or floor > 1.0:
        steps = mask.cumsum(-1) - 1
        discount = torch.pow(torch.tensor(gamma, dtype=torch.float32, device=reward.device), steps.float())
        weighted = _discounted(discount.clamp(min=floor), weighted)
    total = torch.where(mask, weighted, 0.0).sum(-1)
    return total / mask.sum(-1).clamp(min=1) if reduction == "mean" else total


def rewards_to_go(reward: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Return the rewards-to-go of each row, float32 (B, T), 0 off the mask.

        G_h = r_h + gamma G_{h+1}        h counts the scored tokens of the row

    A policy-gradient step weighs the log-probability of token h by G_h. Tokens off the mask are skipped: they add no
    reward and no discount.

    reward  (B, T)
    mask    (B, T) scored tokens, as bool or as integers 0 and 1
    """
    mask = _checked_mask(reward, mask, gamma)
    # G_t = r_t + c_t G_{t+1} with c = gamma on the mask and 1 off it. This linear recurrence is solved in log2(T) steps
    # by windows that double. `decay` is the product of c over a token's window.
    to_go = torch.where(mask, reward.float(), 0.0)
    decay = torch.full_like(to_go, gamma).masked_fill(~mask, 1.0)
    window = 1
    while window < reward.shape[1]:
        to_go = to_go + _discounted(decay, F.pad(to_go[:, window:], (0, window)))
        decay = decay * F.pad(decay[:, window:], (0, window))
        window *= 2
    return torch.where(mask, to_go, 0.0)


def _discounted(discount: Tensor, reward: Tensor) -> Tensor:
    """Return discount * reward; 0 where the discount has underflowed to 0, also for a reward of -inf."""
    return torch.where(discount == 0, 0.0, discount * reward)


def terminal_at(tokens: Tensor, mask: Tensor, eos_token_id: int | list[int]) -> Tensor:
    """Return bool (B, T): the scored tokens that are an end-of-sequence token.

    Pass it as `terminal` to `token_rewards`. Completions that a length limit cut off then bootstrap with V.

    tokens        (B, T) int64
    mask          (B, T) scored tokens, as bool or as integers 0 and 1
    eos_token_id  one id or a list of ids
    """
    require_tensors(tokens=tokens, mask=mask)
    scored = as_bool("mask", mask, tokens.shape, tokens.device)
    ends = sorted(eos_token_id) if isinstance(eos_token_id, set | frozenset) else eos_token_id
    listed = ends if isinstance(ends, list | tuple) else [ends]
    if not all(hasattr(end, "__index__") or hasattr(end, "__array__") for end in listed):
        found = type(ends).__name__ if ends is not None else None
        raise ValueError(f"eos_token_id is {found}: expected the id, or ids, that end a sequence")
    return scored & torch.isin(tokens, torch.as_tensor(ends, device=tokens.device))


def _checked_mask(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Check the arguments and return the mask as bool."""
    require_tensors(reward=reward, mask=mask)
    if reward.ndim != 2:
        raise ValueError(f"reward {tuple(reward.shape)}: expected (B, T)")
    check_numbers(gamma=gamma)
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma={gamma}: expected a discount in (0, 1]")
    return as_bool("mask", mask, reward.shape, reward.device)
