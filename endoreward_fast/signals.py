"""Intrinsic rewards of tokens. One pass over the vocabulary gives the statistics for all of them.

    stats = linear_token_stats(hidden, weight, tokens, mask=completion)   # or EndoRewardModel.stats(input_ids, ...)
    SIGNALS["self-certainty"].score(stats)                                # (B,)

`SIGNALS` lists them by name with their formula, their source and the source's reduction of tokens to a score. A larger
score is better for every signal. s is the state in which a token was chosen, and s' the state that it leads to. As in
vocab/reference.py, Q(s, a) = z(s)[a], V(s) = alpha lse(s), pi = softmax(z / alpha), H is the entropy of pi, and mean is
the logit_mean.

A state that is all -inf allows no action. A token chosen in it has reward and log-probability -inf, and entropy and
certainty 0. A token that leads to it counts as terminal.

Logits of -inf, or of the lowest number of bfloat16 or float32, rule words out. The self-certainty of such a state is
KL(uniform || pi) as defined: infinite, or up to 3e38 / alpha, which can overflow in a sum over tokens. The centred
reward does not subtract the mean of such a state. Words at -65504 (float16) are treated like any others.
No signal is NaN unless the logits are.
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
from .vocab.plan import RowPlan, plan_rows
from .vocab.reference import shift_left

IMMENSE = 1e30
"""Only words at the lowest number of bfloat16 or float32 make a mean this large: one word in 2^24 makes it 2e31."""


class TokenStats(NamedTuple):
    """Statistics of the states before and after each scored token. Tensors are float32 (B, T), 0 off the mask."""

    target_logit: Tensor
    """Q(s, a)"""
    lse: Tensor
    """of s, nats"""
    entropy: Tensor
    """of pi(. | s), nats"""
    logit_mean: Tensor
    """of s"""
    next_lse: Tensor
    """of s', nats; 0 where the episode ends, so that V(s') = 0"""
    next_logit_mean: Tensor
    """of s'; 0 where the episode ends"""
    mask: Tensor
    """bool: scored tokens"""
    alpha: float
    vocab: int
    """number of words in the vocabulary"""

    def rewards(self) -> TokenRewards:
        """Return what `linear_token_rewards` returns. The log-probability differs by the rounding of lse."""
        return TokenRewards(endogenous_reward(self), logprob(self), self.alpha * self.lse, self.entropy)


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


# ------------------------------------------------------------------------------------------ per token, (B, T) float32


def endogenous_reward(stats: TokenStats) -> Tensor:
    """Return Q(s, a) - V(s')."""
    return stats.target_logit - stats.alpha * stats.next_lse


def centred_reward(stats: TokenStats) -> Tensor:
    """Return Q(s, a) - mean(s) - (V(s') - mean(s')), the endogenous reward of logits with mean 0 over the vocabulary.

    A constant added to a state's logits does not change it. Its sum up to a terminal token differs from that of the
    endogenous reward by mean(s_1), which is the same for all completions of a prompt. The two therefore differ only in
    discounted sums, token means, token-level credit and bootstrapped ends.

    A mean beyond 1e30 in size is not subtracted. Words that are ruled out, by -inf or by their dtype's lowest number,
    make up all of its bits.
    """
    here, after = (torch.where(m.abs() < IMMENSE, m, 0.0) for m in (stats.logit_mean, stats.next_logit_mean))
    return (stats.target_logit - here) - (stats.alpha * stats.next_lse - after)


def logprob(stats: TokenStats) -> Tensor:
    """Return log pi(a | s), nats."""
    dead = stats.lse == -torch.inf
    living = (stats.target_logit / stats.alpha - torch.where(dead, 0.0, stats.lse)).clamp(max=0.0)
    return torch.where(dead, -torch.inf, living)


def negative_entropy(stats: TokenStats) -> Tensor:
    """Return -H(pi(. | s)), nats."""
    return -stats.entropy


def self_certainty(stats: TokenStats) -> Tensor:
    """Return KL(uniform || pi(. | s)) = lse - mean / alpha - ln V, nats. It forms no probability that underflows."""
    certain = (stats.lse - stats.logit_mean / stats.alpha - math.log(stats.vocab)).clamp(min=0.0)
    return torch.where(stats.mask & (stats.lse != -torch.inf), certain, 0.0)


def token_probability(stats: TokenStats) -> Tensor:
    """Return pi(a | s)."""
    return torch.where(stats.mask, logprob(stats).exp(), 0.0)


def log_ratio(stats: TokenStats, reference: Tensor, *, beta: float = 1.0) -> Tensor:
    """Return beta (log pi(a | s) - log pi_ref(a | s)), nats; -inf for a token that pi rules out.

    reference  (B, T) log-probability of each token under the second model, nats
    """
    ours = logprob(stats)
    ruled_out = ours == -torch.inf
    ratio = beta * (torch.where(ruled_out, 0.0, ours) - torch.where(stats.mask & ~ruled_out, reference, 0.0))
    return torch.where(ruled_out, -torch.inf, ratio)


# --------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Signal:
    """One intrinsic reward, as the documentation and the command line list it."""

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
    """whether it compares the model with a second one"""

    def score(self, stats: TokenStats, reference: Tensor | None = None) -> Tensor:
        """Return the score of each row, float32 (B,); larger is better.

        A row without a scored token scores 0. A row with a token of -inf scores -inf.

        reference  (B, T) log-probability of each token under the second model, for signals that need it
        """
        if self.needs_reference and reference is None:
            raise EndoRewardError(f"signal {self.name!r} needs `reference`, the second model's log-probabilities")
        tokens = self.per_token(stats, reference) if self.needs_reference else self.per_token(stats)
        score = sequence_score(tokens, stats.mask, reduction=self.reduction)
        # Next to a token of +inf, the sum would be NaN.
        return torch.where((tokens == -torch.inf).any(1), -torch.inf, score)


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
    """Return names of signals from a comma-separated string or from several names.

    "all" stands for every signal; without a second model (`reference`), for every signal that does not need one.
    Raises EndoRewardError for an unknown name, and lists the known ones.
    """
    if not isinstance(wanted, Iterable):
        raise EndoRewardError(f"signals={wanted!r}: expected all, or some of {', '.join(SIGNALS)}")
    names = [n.strip() for n in wanted.split(",")] if isinstance(wanted, str) else list(wanted)
    found: list[str] = []
    for name in names:
        if name != "all" and name not in SIGNALS:
            raise EndoRewardError(f"unknown signal {name!r}: expected all, or some of {', '.join(SIGNALS)}")
        if name != "all" and SIGNALS[name].needs_reference and not reference:
            raise EndoRewardError(f"signal {name!r} compares two models: give a reference model")
        found += [name] if name != "all" else [n for n, s in SIGNALS.items() if reference or not s.needs_reference]
    return tuple(dict.fromkeys(found))
