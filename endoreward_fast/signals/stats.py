"""The passes over the vocabulary that give `TokenStats`: from logits, and from hidden states without logits."""

import torch
from torch import Tensor

from ..functional import Impl, linear_vocab_stats, vocab_stats
from ..types import NO_TARGET, VocabStats
from ..vocab.checks import check_linear, check_logits, check_rewards
from ..vocab.plan import RowPlan, plan_rows
from ..vocab.reference import shift_left
from .tokens import TokenStats


def token_stats(
    logits: Tensor, tokens: Tensor, *, mask: Tensor | None = None, terminal: Tensor | None = None, alpha: float = 1.0,
    impl: Impl = "auto",
) -> TokenStats:  # fmt: skip
    """Compute TokenStats from logits (B, T, V) in one read. The arguments are as in `token_rewards`."""
    check_logits(logits)
    mask, terminal = check_rewards(tokens, mask, terminal, None, logits, "logits", alpha)
    plan = plan_rows(tokens, mask, terminal, None)
    stats = vocab_stats(
        logits, plan.targets.view_as(tokens), mask=plan.needed.view_as(tokens), alpha=alpha, entropy=True,
        logit_mean=True, impl=impl,
    )  # fmt: skip
    return _of_tokens(stats, plan, alpha, logits.shape[-1])


def linear_token_stats(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, mask: Tensor | None = None, terminal: Tensor | None = None,
    bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None, alpha: float = 1.0,
    impl: Impl = "auto", vocab_size: int | None = None,
) -> TokenStats:  # fmt: skip
    """Compute TokenStats from hidden states (B, T, D) and the head's weight (V, D), without writing the logits.

    The arguments are as in `linear_token_rewards`.
    """
    check_linear(hidden, weight, bias, logit_scale, softcap)
    mask, terminal = check_rewards(tokens, mask, terminal, None, hidden, "hidden", alpha)
    plan = plan_rows(tokens, mask, terminal, None)
    stats = linear_vocab_stats(
        hidden, weight, plan.targets.view_as(tokens), mask=plan.needed.view_as(tokens), bias=bias,
        logit_scale=logit_scale, softcap=softcap, alpha=alpha, entropy=True, logit_mean=True, impl=impl,
        vocab_size=vocab_size,
    )  # fmt: skip
    return _of_tokens(stats, plan, alpha, min(weight.shape[0], vocab_size or weight.shape[0]))


def _of_tokens(stats: VocabStats, plan: RowPlan, alpha: float, vocab: int) -> TokenStats:
    """Shift statistics of states to tokens. Row t is the state after token t, in which token t + 1 was chosen."""
    shape = stats.lse.shape
    chosen = (plan.targets != NO_TARGET).view(shape)
    leads_on = (plan.successor >= 0).view(shape) & (shift_left(stats.lse) != -torch.inf)
    here = (torch.where(chosen, f, 0.0) for f in (stats.target_logit, stats.lse, stats.entropy, stats.logit_mean))
    after = (torch.where(leads_on, shift_left(f), 0.0) for f in (stats.lse, stats.logit_mean))
    at_token = (torch.cat([torch.zeros_like(f[:, :1]), f[:, :-1]], 1) for f in (*here, *after, chosen))
    return TokenStats(*at_token, alpha, vocab)
