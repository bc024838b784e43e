r"""The oracle, in plain eager torch. Every faster implementation must agree with it.

All logarithms are natural (nats). alpha is the soft-RL temperature, z the model's final logits, x = z / alpha and
pi = softmax(x).

    z        = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)
    lse      = log sum_a exp(x_a)                    entropy = lse - sum_a pi_a x_a
    mean     = sum_a z_a / V
    V(s)     = alpha * lse(s)                        logprob = x_target - lse
    r(s, a)  = z(s)[a] - V(s')                       V(s') = 0 after a terminal token

alpha may be a tensor, with a temperature for each row or token. The alpha of a token is the one under which it was
chosen, so it belongs to the state before the token. V(s') has the alpha of the token that is chosen in s'. A state in
which no scored token is chosen (the bootstrapped end of a run) has the alpha of the token that led to it. Rewards up to
a terminal token then sum to sum alpha_t logprob_t + V(s_1).

A state whose logits are all -inf allows no action. Its lse is -inf and its entropy is 0; neither has a gradient. A
token chosen in it has logprob and reward -inf. A token that leads to it counts as terminal (V(s') = 0).

`dtype` is the dtype of the computation and of the results: float32 for impl="reference", float64 for the tests' oracle.
Source of the reward: Li et al., "Generalist Reward Models: Found Inside Large Language Models", arXiv 2506.23235.
"""

import torch
from torch import Tensor

from ..types import NO_TARGET, TokenRewards, VocabStats
from .checks import check_named_inside
from .rows import sequence_starts


def final_logits(hidden, weight, *, bias=None, logit_scale=1.0, softcap=None, dtype=torch.float32) -> Tensor:
    """Return z (..., V) in `dtype`: the head's matmul, then those of bias, scale and softcap that are given."""
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would lower the precision of the matmul
        z = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    if logit_scale != 1.0:
        z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z


def vocab_stats(
    logits, targets, *, mask=None, alpha=1.0, entropy=False, logit_mean=False, named=None, dtype=torch.float32
) -> VocabStats:
    """Compute the statistics of logits (..., V) for targets (...) by the formulas at the top of this file."""
    z = _only(mask, logits.to(dtype))
    x = z / (_only(mask, alpha, 1.0).to(dtype).unsqueeze(-1) if isinstance(alpha, Tensor) else alpha)
    top = x.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    shifted = x - top
    weights = torch.exp(shifted)
    total = weights.sum(-1)
    alive = total != 0  # not all -inf; a row with NaN counts as alive and gives NaN
    safe_total = torch.where(alive, total, 1.0)
    lse = torch.where(alive, torch.log(safe_total) + top.squeeze(-1), -torch.inf)

    has_target = targets != NO_TARGET
    lost = outside_vocabulary(targets, mask, z.shape[-1])
    index = targets.clamp(0, z.shape[-1] - 1)  # any index will do for a lost row or a row off the mask
    target_logit = torch.where(has_target, z.gather(-1, index.unsqueeze(-1)).squeeze(-1), 0.0)

    h = mean = named_logprob = None
    if entropy:
        # sum pi (lse - x), with 0 * -inf = 0: an action with probability 0 adds no entropy.
        finite = torch.where(weights == 0, 0.0, shifted)
        h = torch.log(safe_total) - (weights * finite).sum(-1) / safe_total
        h = torch.where(alive, h, 0.0)
    if logit_mean:
        mean = (z / z.shape[-1]).sum(-1)  # words masked with the lowest number overflow the plain sum
    if named is not None:
        check_named_inside(named, z.shape[-1])
        inside = named.clamp(0, z.shape[-1] - 1)
        logprob = shifted.index_select(-1, inside) - torch.log(safe_total).unsqueeze(-1)
        named_logprob = torch.where(named == inside, torch.where(alive.unsqueeze(-1), logprob, -torch.inf), torch.nan)
    fields = (lse, target_logit, h, mean, named_logprob)
    stats = VocabStats(*(None if f is None else torch.where(_like(f, lost), torch.nan, f) for f in fields))
    return _masked(stats, mask)


def linear_vocab_stats(
    hidden, weight, targets, *, mask=None, bias=None, logit_scale=1.0, softcap=None,
    alpha=1.0, entropy=False, logit_mean=False, named=None, dtype=torch.float32,
) -> VocabStats:  # fmt: skip
    """Compute `vocab_stats` of the logits of hidden (..., D) and weight (V, D)."""
    z = final_logits(_only(mask, hidden), weight, bias=bias, logit_scale=logit_scale, softcap=softcap, dtype=dtype)
    return vocab_stats(
        z, targets, mask=mask, alpha=alpha, entropy=entropy, logit_mean=logit_mean, named=named, dtype=dtype
    )


def token_rewards(
    logits, tokens, *, mask=None, terminal=None, cu_seqlens=None, alpha=1.0, entropy=False, dtype=torch.float32
) -> TokenRewards:
    """Compute the rewards of tokens (B, T) under logits (B, T, V), term by term as in the definition."""
    scored, ends, needed = scored_terminal_needed(tokens, mask, terminal, cu_seqlens)

    # State t is the state after tokens[:, : t + 1]. Token t was chosen in state t - 1 and leads to state t.
    chosen_next = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], NO_TARGET)], 1)
    targets = torch.where(shift_left(scored), chosen_next, NO_TARGET)
    if isinstance(alpha, Tensor):
        alpha = alpha_of_states(alpha, shift_left(scored), needed).to(dtype)
    lost = outside_vocabulary(targets, needed, logits.shape[-1])
    targets = torch.where(lost, NO_TARGET, targets)
    states = vocab_stats(logits, targets, mask=needed, alpha=alpha, entropy=entropy, dtype=dtype)

    def before(field):  # the field's value in the state in which the token was chosen
        return torch.cat([torch.zeros_like(field[:, :1]), field[:, :-1]], 1)

    value_here = alpha * states.lse
    dead_end = value_here == -torch.inf
    value_after = torch.where(ends | dead_end, 0.0, value_here)
    q = before(states.target_logit)
    lse = before(states.lse)
    at_choice = before(alpha) if isinstance(alpha, Tensor) else alpha
    if isinstance(alpha, Tensor):
        at_choice = torch.where(scored, at_choice, 1.0)
    logprob = torch.where(lse == -torch.inf, -torch.inf, q / at_choice - torch.where(lse == -torch.inf, 0.0, lse))
    in_dead_state = before(dead_end.to(dtype)) != 0
    reward = torch.where(in_dead_state, -torch.inf, q - value_after)
    fields = (reward, logprob, at_choice * lse, before(states.entropy) if entropy else None)
    fields = (None if f is None else torch.where(before(lost), torch.nan, f) for f in fields)
    return TokenRewards(*(None if f is None else torch.where(scored, f, 0.0) for f in fields))


def linear_token_rewards(
    hidden, weight, tokens, *, mask=None, terminal=None, cu_seqlens=None, bias=None, logit_scale=1.0,
    softcap=None, alpha=1.0, entropy=False, dtype=torch.float32,
) -> TokenRewards:  # fmt: skip
    """Compute `token_rewards` of the logits of hidden (B, T, D) and weight (V, D)."""
    _, _, needed = scored_terminal_needed(tokens, mask, terminal, cu_seqlens)
    z = final_logits(_only(needed, hidden), weight, bias=bias, logit_scale=logit_scale, softcap=softcap, dtype=dtype)
    return token_rewards(
        z, tokens, mask=mask, terminal=terminal, cu_seqlens=cu_seqlens, alpha=alpha, entropy=entropy, dtype=dtype
    )


def scored_terminal_needed(tokens, mask, terminal, cu_seqlens) -> tuple[Tensor, Tensor, Tensor]:
    """Return three bool (B, T): scored tokens, tokens that end their episode, states whose statistics are needed.

    A token of -100 (the ignore label) is never scored, whatever the mask says.
    """
    starts = sequence_starts(tokens, cu_seqlens)
    scored = ~starts & (tokens != NO_TARGET)
    if mask is not None:
        scored = scored & mask
    ends = (scored & ~shift_left(scored)) if terminal is None else terminal
    return scored, ends, shift_left(scored) | (scored & ~ends)


def alpha_of_states(alpha: Tensor, chosen: Tensor, needed: Tensor) -> Tensor:
    """Return the temperature (B, T) of each state from those of tokens (B, T); 1 in states that are not needed.

    chosen   bool (B, T): states in which a scored token is chosen. They have the alpha of that token
    needed   bool (B, T): states whose statistics are needed. Where no token is chosen, they have the alpha of the token
             that led to them
    """
    return torch.where(needed, torch.where(chosen, shift_left(alpha), alpha), 1.0)


def outside_vocabulary(targets: Tensor, mask: Tensor | None, vocab: int) -> Tensor:
    """Return bool (...): rows whose target is outside the vocabulary. Their statistics become NaN.

    On the CPU such a row raises IndexError. On a GPU a check would stall the stream.
    """
    lost = (targets != NO_TARGET) & ((targets < 0) | (targets >= vocab))
    if mask is not None:
        lost = lost & mask
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and lost.any():
        row = lost.nonzero()[0].tolist()
        raise IndexError(f"target {int(targets[tuple(row)])} at row {row} is outside the vocabulary [0, {vocab})")
    return lost


def shift_left(flags: Tensor) -> Tensor:
    """Shift flags (B, T) left by one: place t gets flags[:, t + 1], and the last place 0 or False."""
    return torch.cat([flags[:, 1:], torch.zeros_like(flags[:, :1])], 1)


def _only(mask: Tensor | None, rows: Tensor, other: float = 0.0) -> Tensor:
    """Set rows (..., K) or (...) off the mask (...) to `other`, so that a NaN there reaches no result or gradient."""
    return rows if mask is None else torch.where(_like(rows, mask), rows, other)


def _like(field: Tensor, flags: Tensor) -> Tensor:
    """Return flags (...) as they broadcast to field (...) or (..., K)."""
    return flags if field.ndim == flags.ndim else flags.unsqueeze(-1)


def _masked(stats: VocabStats, mask: Tensor | None) -> VocabStats:
    if mask is None:
        return stats
    return VocabStats(*(None if field is None else _only(mask, field) for field in stats))
