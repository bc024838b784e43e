"""The return types of the public functions."""

from typing import NamedTuple

from torch import Tensor

NO_TARGET = -100  # marks a row without a target, as the ignore_index of torch and transformers


class VocabStats(NamedTuple):
    """Statistics of each row of logits z over the vocabulary, float32. All but the last have targets' shape (...)."""

    lse: Tensor
    """log sum_a exp(z_a / alpha), nats"""
    target_logit: Tensor
    """z[target]; 0 where target == -100"""
    entropy: Tensor | None
    """of softmax(z / alpha), nats; None unless requested"""
    logit_mean: Tensor | None
    """mean of z over the vocabulary; None unless requested"""
    named_logprob: Tensor | None = None
    """log pi of the K tokens of `named`, (..., K), nats; None unless requested"""


class TokenRewards(NamedTuple):
    """Rewards of tokens. Every field is float32 with the tokens' shape (B, T), and 0 off the mask."""

    reward: Tensor
    """Q(s, a) - V(s'), in the unit of the logits"""
    logprob: Tensor
    """log pi(token | s), nats; pi = softmax(z / alpha)"""
    value: Tensor
    """V(s) = alpha * logsumexp(z(s) / alpha), with s the state in which the token was chosen"""
    entropy: Tensor | None
    """of pi(. | s), nats; None unless requested"""

    def _repr_html_(self) -> str | None:
        """Return a heatmap for notebooks, with a cell for each position, if there is one row; None for several rows."""
        from .view.notebook import html_of_rewards

        return html_of_rewards(self)
