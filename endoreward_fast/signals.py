"""Intrinsic rewards of tokens, side by side: everything that one pass over the vocabulary can say about a completion.

    stats = linear_token_stats(hidden, weight, tokens, mask=completion)   # or EndoRewardModel.stats(input_ids, ...)
    SIGNALS["self-certainty"].score(stats)                                # (B,)

`SIGNALS` has them by name, each with its formula, its source and the reduction of tokens to a score that the source
uses; larger is better in all. A token's state s is where it was chosen, s' where it leads. With the definitions of
reference.py: Q(s, a) = z(s)[a], V(s) = alpha lse(s), pi = softmax(z / alpha), H its entropy, mean = logit_mean.

A state that is all -inf allows no action, as everywhere here: a token chosen in it has reward and log-probability
-inf, entropy and certainty 0, and reaching it counts as terminal. Words that are ruled out, by -inf or by the
lowest number of bfloat16 or float32, make certainty what KL(uniform || pi) then is: infinite, or up to 3e38 / alpha, so
that it may overflow when tokens are summed; their state is not centred. Words at -65504 (float16) count as any others.
No signal is NaN where the logits are not.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .errors import EndoRewardError
from .functional import Impl, linear_vocab_stats, vocab_stats
from .returns import sequence_score
from .types import NO_TARGET, TokenRewards, VocabStats
from .vocab.checks import check_linear, check_logits, check_rewards
from .vocab.reference import shift_left
from .vocab.rows import RowPlan, plan_rows

IMMENSE = 1e30
"""A mean of this size has words at the lowest number of bfloat16 or float32 in it: one in 2^24 would make it 2e31."""


class TokenStats(NamedTuple):
    """VocabStats of the states on either side of each scored token. Tensors are float32 (B, T), 0 off the mask."""

    target_logit: Tensor
    """Q(s, a)"""
    lse: Tensor
    """of s, nats"""
    entropy: Tensor
    """of pi(. | s), nats"""
    logit_mean: Tensor
    """of s"""
    next_lse: Tensor
    """of s', nats; 0 where the episode ends, so that V(s') is"""
    next_logit_mean: Tensor
    """of s'; 0 where the episode ends"""
    mask: Tensor
    """bool: tokens that are scored"""
    alpha: float
    vocab: int
    """words in the vocabulary"""

    def rewards(self) -> TokenRewards:
        """What `linear_token_rewards` gives; the log-probability up to the rounding of lse."""
        return TokenRewards(endogenous_reward(self), logprob(self), self.alpha * self.lse, self.entropy)


def token_stats(
    logits: Tensor, tokens: Tensor, *, mask: Tensor | None = None, terminal: Tensor | None = None, alpha: float = 1.0,
    impl: Impl = "auto",
) -> TokenStats:  # fmt: skip
    """TokenStats from logits (B, T, V), read once. Arguments as in `token_rewards`."""
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
    """TokenStats from hidden states (B, T, D) and the head's weight (V, D), logits never written to memory. Arguments
    as in `linear_token_rewards`."""
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
    """States (row t is the one after token t) -> tokens: one place to the right."""
    shape = stats.lse.shape
    chosen = (plan.targets != NO_TARGET).view(shape)
    leads_on = (plan.successor >= 0).view(shape) & (shift_left(stats.lse) != -torch.inf)
    here = (torch.where(chosen, f, 0.0) for f in (stats.target_logit, stats.lse, stats.entropy, stats.logit_mean))
    after = (torch.where(leads_on, shift_left(f), 0.0) for f in (stats.lse, stats.logit_mean))
    at_token = (torch.cat([torch.zeros_like(f[:, :1]), f[:, :-1]], 1) for f in (*here, *after, chosen))
    return TokenStats(*at_token, alpha, vocab)


# ------------------------------------------------------------------------------------------ per token, (B, T) float32


def endogenous_reward(stats: TokenStats) -> Tensor:
    """Q(s, a) - V(s')."""
    return stats.target_logit - stats.alpha * stats.next_lse


def centred_reward(stats: TokenStats) -> Tensor:
    """Q(s, a) - mean(s) - (V(s') - mean(s')): endogenous reward of logits whose mean over the vocabulary is 0.

    A constant added to a state's logits changes nothing here. Summed to a terminal token it differs from the
    endogenous reward by mean(s_1), the same for all completions of a prompt: only discounts, token means, token-level
    credit and bootstrapped ends can tell the two apart. A mean beyond 1e30 in size is left out: some words are ruled
    out, by -inf or by their dtype's lowest number, and it has no bit left of the others.
    """
    here, after = (torch.where(m.abs() < IMMENSE, m, 0.0) for m in (stats.logit_mean, stats.next_logit_mean))
    return (stats.target_logit - here) - (stats.alpha * stats.next_lse - after)


def logprob(stats: TokenStats) -> Tensor:
    """log pi(a | s), nats."""
    dead = stats.lse == -torch.inf
    living = (stats.target_logit / stats.alpha - torch.where(dead, 0.0, stats.lse)).clamp(max=0.0)
    return torch.where(dead, -torch.inf, living)


def negative_entropy(stats: TokenStats) -> Tensor:
    """-H(pi(. | s)), nats."""
    return -stats.entropy


def self_certainty(stats: TokenStats) -> Tensor:
    """KL(uniform || pi(. | s)) = lse - mean / alpha - ln V, nats. No probability is formed, so none underflows."""
    certain = (stats.lse - stats.logit_mean / stats.alpha - math.log(stats.vocab)).clamp(min=0.0)
    return torch.where(stats.mask & (stats.lse != -torch.inf), certain, 0.0)


def token_probability(stats: TokenStats) -> Tensor:
    """pi(a | s)."""
    return torch.where(stats.mask, logprob(stats).exp(), 0.0)


def log_ratio(stats: TokenStats, reference: Tensor, *, beta: float = 1.0) -> Tensor:
    """beta (log pi(a | s) - log pi_ref(a | s)); `reference` (B, T) is the second model's log-probability, nats.

    -inf for a token that pi rules out, whatever the second model says of it.
    """
    ours = logprob(stats)
    ruled_out = ours == -torch.inf
    ratio = beta * (torch.where(ruled_out, 0.0, ours) - torch.where(stats.mask & ~ruled_out, reference, 0.0))
    return torch.where(ruled_out, -torch.inf, ratio)


# --------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Signal:
    """One intrinsic reward: its name, its formula, its source and how to compute it."""

    name: str
    method: str
    formula: str
    """of the score"""
    source: str
    per_token: Callable[..., Tensor]
    """(TokenStats) -> (B, T); (TokenStats, reference) if it needs one"""
    reduction: Literal["sum", "mean"]
    """of tokens to a score, as in the source"""
    needs_reference: bool = False
    """whether it compares two models"""

    def score(self, stats: TokenStats, reference: Tensor | None = None) -> Tensor:
        """float32 (B,), larger is better; 0 for a row without a scored token, -inf if one of its tokens is.

        `reference`: the second model's log-probability of each token (B, T), for those signals that need it.
        """
        if self.needs_reference and reference is None:
            raise EndoRewardError(f"signal {self.name!r} needs the second model's log-probability of each token")
        tokens = self.per_token(stats, reference) if self.needs_reference else self.per_token(stats)
        score = sequence_score(tokens, stats.mask, reduction=self.reduction)
        return torch.where((tokens == -torch.inf).any(1), -torch.inf, score)  # beside +inf too


SIGNALS = MappingProxyType(
    {
        signal.name: signal
        for signal in (
            Signal(
                "endogenous", "Endogenous reward", "sum Q(s, a) - V(s')", "EndoRM, 2506.23235", endogenous_reward, "sum"
            ),
            Signal(
                "centred", "Centred endogenous reward", "sum Q(s, a) - mean(s) - (V(s') - mean(s'))",
                "EndoRM, with mean-free logits", centred_reward, "sum",
            ),
            Signal(
                "logprob", "Log-probability of the answer", "sum log pi(a|s)",
                "VeriFree, 2505.21493: its exp, which underflows, ranks alike", logprob, "sum",
            ),
            Signal("mean-logprob", "Log-probability of a token", "mean log pi(a|s)", "perplexity", logprob, "mean"),
            Signal("entropy", "Negative entropy", "mean -H(pi(.|s))", "RENT, 2505.22660", negative_entropy, "mean"),
            Signal(
                "self-certainty", "Self-certainty", "mean KL(uniform || pi) = mean lse - mean(s) / alpha - ln V",
                "Intuitor, 2505.19590", self_certainty, "mean",
            ),
            Signal(
                "probability", "Probability of a token", "mean pi(a|s)", "RLPR, 2506.18254", token_probability, "mean"
            ),
            Signal(
                "log-ratio", "Log-ratio of two models", "sum beta (log pi(a|s) - log pi_ref(a|s))",
                "DPO, 2305.18290; implicit PRM, 2412.01981; PRIME, 2502.01456", log_ratio, "sum", needs_reference=True,
            ),
        )
    }
)  # fmt: skip


def select(wanted: str | Iterable[str], *, reference: bool) -> tuple[str, ...]:
    """Names of signals, from a comma-separated text or several names; "all" is every one that can be had, which
    without a second model (`reference`) leaves out those that compare two.

    Raises EndoRewardError, naming the choices.
    """
    if not isinstance(wanted, Iterable):
        raise EndoRewardError(f"signals={wanted!r}: expected all, or some of {', '.join(SIGNALS)}")
    names = [n.strip() for n in wanted.split(",")] if isinstance(wanted, str) else list(wanted)
    found: list[str] = []
    for name in names:
        if name != "all" and name not in SIGNALS:
            raise EndoRewardError(f"no signal {name!r}: expected all, or some of {', '.join(SIGNALS)}")
        if name != "all" and SIGNALS[name].needs_reference and not reference:
            raise EndoRewardError(f"signal {name!r} compares two models: it needs a reference model")
        found += [name] if name != "all" else [n for n, s in SIGNALS.items() if reference or not s.needs_reference]
    return tuple(dict.fromkeys(found))
