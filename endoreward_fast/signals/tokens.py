"""`TokenStats`, what one pass gives for each scored token, and the signals of single tokens, each float32 (B, T)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..returns import sequence_score
from ..types import TokenRewards

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


# ------------------------------------------------------------------------ of a second model, a span or another reading


def prefix_value(stats: TokenStats, reference: Tensor, *, beta: float = 1.0) -> Tensor:
    """Return the length-normalised value of the prefix that ends with each token.

        V_t / t,    V_t = sum_{i <= t} beta (log pi(a_i | s_i) - log pi_ref(a_i | s_i))    t counts the scored tokens

    V_t - V_(t-1), the temporal difference of two prefix values, is the token's `log_ratio`. A prefix with a token that
    pi rules out has the value -inf, and other prefixes with a token that only pi_ref rules out have +inf.

    reference  (B, T) log-probability of each token under the second model, nats
    Source: IPVRM, arXiv 2604.13197, equations 5, 9 and 10. There pi is trained so that sigmoid(V_t / t) is the
    probability that the answer will be right.
    """
    ratio = log_ratio(stats, reference, beta=beta)
    total = torch.where(ratio.isinf(), 0.0, ratio).cumsum(1)
    for endless in (torch.inf, -torch.inf):
        total = torch.where((ratio == endless).cumsum(1) > 0, endless, total)
    return torch.where(stats.mask, total / stats.mask.cumsum(1).clamp(min=1), 0.0)


def privileged_log_ratio(stats: TokenStats, privileged: Tensor) -> Tensor:
    """Return log pi(a | s, privileged context) - log pi(a | s), nats.

    -inf for a token that the privileged context rules out, and +inf for a token that only pi(. | s) rules out.

    privileged  (B, T) log-probability of each token behind the prompt with the privileged context, nats
    Source: SDPO, arXiv 2601.20802: the policy with feedback in its prompt is the teacher of the policy without.
    """
    theirs = torch.where(stats.mask, privileged, 0.0)
    ruled_out = theirs == -torch.inf
    ratio = torch.where(ruled_out, 0.0, theirs) - torch.where(ruled_out, 0.0, logprob(stats))
    return torch.where(stats.mask, torch.where(ruled_out, -torch.inf, ratio), 0.0)


def answer_logprob(stats: TokenStats, answer_span: Tensor) -> Tensor:
    """Return log pi(a | s) of the tokens of the final answer, (B, T) bool `answer_span`, nats; 0 elsewhere."""
    return torch.where(stats.mask & answer_span, logprob(stats), 0.0)


def answer_probability(stats: TokenStats, answer_span: Tensor) -> Tensor:
    """Return pi(a | s) of the tokens of the final answer, (B, T) bool `answer_span`; 0 elsewhere.

    Source: CRew, arXiv 2510.13501.
    """
    return torch.where(answer_span, token_probability(stats), 0.0)


def reference_logprob(stats: TokenStats, reference_answer: TokenStats) -> Tensor:
    """Return log pi of the tokens of a reference answer after the completion's thought, (B, A), nats.

    reference_answer  statistics (B, A) of prompt, thought and reference answer; the mask marks the reference answer
    """
    return logprob(reference_answer)


def reference_probability(stats: TokenStats, reference_answer: TokenStats) -> Tensor:
    """Return pi of the tokens of a reference answer after the completion's thought, (B, A)."""
    return token_probability(reference_answer)


def reference_gain(stats: TokenStats, reference_answer: TokenStats, direct_answer: TokenStats) -> Tensor:
    """Return pi of the tokens of a reference answer after the thought, less their mean without the thought, (B, A).

    direct_answer  statistics (B, A') of prompt and reference answer; the mask marks the reference answer
    Source: the debiased reward of RLPR, arXiv 2506.18254.
    """
    without = sequence_score(token_probability(direct_answer), direct_answer.mask, reduction="mean")
    return torch.where(reference_answer.mask, token_probability(reference_answer) - without[:, None], 0.0)
