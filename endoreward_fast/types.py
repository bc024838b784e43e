"""What the public functions return."""

from typing import NamedTuple

from torch import Tensor

NO_TARGET = -100  # the ecosystem's "ignore" label: a row without a target


class VocabStats(NamedTuple):
    """Statistics of each row of logits z over the vocabulary; every field is float32 with the targets' shape (...)."""

    lse: Tensor
    """log sum_a exp(z_a / alpha), nats"""
    target_logit: Tensor
    """z[target]; 0 where target == -100"""
    entropy: Tensor | None
    """of softmax(z / alpha), nats; None unless asked for"""
    logit_mean: Tensor | None
    """mean of z over the vocabulary; None unless asked for"""


class TokenRewards(NamedTuple):
    """Rewards of tokens; every field is float32 with the tokens' shape (B, T), and 0 where the mask is off."""

    reward: Tensor
    """Q(s, a) - V(s'), in the unit of the logits"""
    logprob: Tensor
    """log pi(token | s), nats; pi = softmax(z / alpha)"""
    value: Tensor
    """V(s) = alpha * logsumexp(z(s) / alpha) of the state in which the token was chosen"""
    entropy: Tensor | None
    """of pi(. | s), nats; None unless asked for"""

    def _repr_html_(self) -> str | None:
        """For notebooks: one row as a heatmap, each token by its position; None, so their plain text, for several."""
        from .view.notebook import html_of_rewards

        return html_of_rewards(self)
