r"""The oracle: what every faster path must agree with. Eager torch, no tricks, readable top to bottom.

Nats throughout; alpha is the soft-RL temperature, z the model's final logits, x = z / alpha, pi = softmax(x).

    z        = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)
    lse      = log sum_a exp(x_a)                    entropy = lse - sum_a pi_a x_a
    mean     = sum_a z_a / V
    V(s)     = alpha * lse(s)                        logprob = x_target - lse
    r(s, a)  = z(s)[a] - V(s')                       V(s') = 0 after a terminal token

A state whose logits are all -inf allows no action, so nothing can follow it: its lse is -inf, its entropy 0, neither
has a gradient, a token chosen there has logprob and reward -inf, and reaching it counts as terminal (V(s') = 0).

`dtype` is the dtype computed and returned in: float32 for impl="reference", float64 when the tests need an oracle.
Source of the reward: Li et al., "Generalist Reward Models: Found Inside Large Language Models", arXiv 2506.23235.
"""

import torch
from torch import Tensor

from ..types import NO_TARGET, TokenRewards, VocabStats


def final_logits(hidden, weight, *, bias=None, logit_scale=1.0, softcap=None, dtype=torch.float32) -> Tensor:
    """z (..., V) in `dtype`: the head's matmul, then bias, scale and softcap, each only where it is given."""
    with torch.autocast(hidden.device.type, enabled=False):  # it would take the matmul back to low precision
        z = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    if logit_scale != 1.0:
        z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z


def vocab_stats(
    logits, targets, *, mask=None, alpha=1.0, entropy=False, logit_mean=False, dtype=torch.float32
) -> VocabStats:
    """Statistics of logits (..., V) over the vocabulary for targets (...): see the module's formulas."""
    z = _only(mask, logits.to(dtype))
    x = z / alpha
    top = x.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    shifted = x - top
    weights = torch.exp(shifted)
    total = weights.sum(-1)
    alive = total != 0  # not all -inf; NaN stays alive, and spreads
    safe_total = torch.where(alive, total, 1.0)
    lse = torch.where(alive, torch.log(safe_total) + top.squeeze(-1), -torch.inf)

    has_target = targets != NO_TARGET
    lost = outside_vocabulary(targets, mask, z.shape[-1])
    index = targets.clamp(0, z.shape[-1] - 1)  # a lost row, or one off the mask, may read anything
    target_logit = torch.where(has_target, z.gather(-1, index.unsqueeze(-1)).squeeze(-1), 0.0)

    h = mean = None
    if entropy:
        # sum pi (lse - x), with 0 * -inf = 0: an action that is ruled out carries no uncertainty.
        finite = torch.where(weights == 0, 0.0, shifted)
        h = torch.log(safe_total) - (weights * finite).sum(-1) / safe_total
        h = torch.where(alive, h, 0.0)
    if logit_mean:
        mean = (z / z.shape[-1]).sum(-1)  # the sum alone overflows where words are masked by the lowest number
    stats = VocabStats(*(None if f is None else torch.where(lost, torch.nan, f) for f in (lse, target_logit, h, mean)))
    return _masked(stats, mask)


def linear_vocab_stats(
    hidden, weight, targets, *, mask=None, bias=None, logit_scale=1.0, softcap=None,
    alpha=1.0, entropy=False, logit_mean=False, dtype=torch.float32,
) -> VocabStats:  # fmt: skip
    """`vocab_stats` of the logits that hidden (..., D) and weight (V, D) make."""
    z = final_logits(_only(mask, hidden), weight, bias=bias, logit_scale=logit_scale, softcap=softcap, dtype=dtype)
    return vocab_stats(z, targets, mask=mask, alpha=alpha, entropy=entropy, logit_mean=logit_mean, dtype=dtype)


def token_rewards(
    logits, tokens, *, mask=None, terminal=None, cu_seqlens=None, alpha=1.0, entropy=False, dtype=torch.float32
) -> TokenRewards:
    """Rewards of tokens (B, T) under logits (B, T, V), written as the definition reads: one token after the other."""
    scored, ends, needed = scored_terminal_needed(tokens, mask, terminal, cu_seqlens)

    # state[:, t] is the state after tokens[:, :t + 1]; token t was chosen in state t - 1 and leads to state t.
    chosen_next = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], NO_TARGET)], 1)
    targets = torch.where(shift_left(scored), chosen_next, NO_TARGET)
    lost = outside_vocabulary(targets, needed, logits.shape[-1])
    targets = torch.where(lost, NO_TARGET, targets)
    states = vocab_stats(logits, targets, mask=needed, alpha=alpha, entropy=entropy, dtype=dtype)

    def before(field):  # the value of a field in the state in which the token was chosen
        return torch.cat([torch.zeros_like(field[:, :1]), field[:, :-1]], 1)

    value_here = alpha * states.lse
    dead_end = value_here == -torch.inf
    value_after = torch.where(ends | dead_end, 0.0, value_here)
    q = before(states.target_logit)
    lse = before(states.lse)
    logprob = torch.where(lse == -torch.inf, -torch.inf, q / alpha - torch.where(lse == -torch.inf, 0.0, lse))
    in_dead_state = before(dead_end.to(dtype)) != 0
    reward = torch.where(in_dead_state, -torch.inf, q - value_after)
    fields = (reward, logprob, alpha * lse, before(states.entropy) if entropy else None)
    fields = (None if f is None else torch.where(before(lost), torch.nan, f) for f in fields)
    return TokenRewards(*(None if f is None else torch.where(scored, f, 0.0) for f in fields))


def linear_token_rewards(
    hidden, weight, tokens, *, mask=None, terminal=None, cu_seqlens=None, bias=None, logit_scale=1.0,
    softcap=None, alpha=1.0, entropy=False, dtype=torch.float32,
) -> TokenRewards:  # fmt: skip
    """`token_rewards` of the logits that hidden (B, T, D) and weight (V, D) make."""
    _, _, needed = scored_terminal_needed(tokens, mask, terminal, cu_seqlens)
    z = final_logits(_only(needed, hidden), weight, bias=bias, logit_scale=logit_scale, softcap=softcap, dtype=dtype)
    return token_rewards(
        z, tokens, mask=mask, terminal=terminal, cu_seqlens=cu_seqlens, alpha=alpha, entropy=entropy, dtype=dtype
    )


def scored_terminal_needed(tokens, mask, terminal, cu_seqlens) -> tuple[Tensor, Tensor, Tensor]:
    """Bool (B, T) each: tokens that get a reward; tokens that end their episode; states whose statistics that takes.

    A token of -100 (labels, where nothing is to be learnt) gets none, whatever the mask says.
    """
    starts = sequence_starts(tokens, cu_seqlens)
    scored = ~starts & (tokens != NO_TARGET)
    if mask is not None:
        scored = scored & mask
    ends = (scored & ~shift_left(scored)) if terminal is None else terminal
    return scored, ends, shift_left(scored) | (scored & ~ends)


def outside_vocabulary(targets: Tensor, mask: Tensor | None, vocab: int) -> Tensor:
    """Bool (...): rows whose target is no vocabulary entry; their statistics are NaN. On the CPU an IndexError says so
    at once; on a device a check would stall the stream."""
    lost = (targets != NO_TARGET) & ((targets < 0) | (targets >= vocab))
    if mask is not None:
        lost = lost & mask
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and lost.any():
        row = lost.nonzero()[0].tolist()
        raise IndexError(f"target {int(targets[tuple(row)])} at row {row} is outside the vocabulary [0, {vocab})")
    return lost


def sequence_starts(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Bool (B, T): the first token of each sequence. It was chosen in no state we know, so it has no reward.

    cu_seqlens (S + 1,) holds the offsets of S sequences packed into the B * T tokens, in row-major order.
    """
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, :1] = True
    if cu_seqlens is None:
        return starts
    offsets = torch.zeros(tokens.numel() + 1, dtype=torch.bool, device=tokens.device)
    offsets[cu_seqlens.long()] = True  # the last offset is one past the last token, hence the extra place
    return starts | offsets[:-1].view_as(starts)


def shift_left(flags: Tensor) -> Tensor:
    """flags[:, t + 1] at place t; False at the end."""
    return torch.cat([flags[:, 1:], torch.zeros_like(flags[:, :1])], 1)


def _only(mask: Tensor | None, rows: Tensor) -> Tensor:
    """Rows (..., K) with those off the mask (...) zeroed, so that a NaN there reaches neither results nor gradients."""
    return rows if mask is None else torch.where(mask.unsqueeze(-1), rows, 0.0)


def _masked(stats: VocabStats, mask: Tensor | None) -> VocabStats:
    if mask is None:
        return stats
    return VocabStats(*(None if field is None else torch.where(mask, field, 0.0) for field in stats))
