"""Intrinsic rewards of tokens. One pass over the vocabulary gives the statistics for all of them.

    stats = linear_token_stats(hidden, weight, tokens, mask=completion)   # or EndoRewardModel.stats(input_ids, ...)
    SIGNALS["self-certainty"].score(stats)                                # (B,)

`SIGNALS` lists them by name with their formula, their source and the source's reduction of tokens to a score. A larger
score is better for every signal. s is the state in which a token was chosen, and s' the state that it leads to. As in
vocab/reference.py, Q(s, a) = z(s)[a], V(s) = alpha lse(s), pi = softmax(z / alpha), H is the entropy of pi, and mean is
the logit_mean.

Some signals need more than the statistics of their row: a second model, the span of the final answer, a reference
answer, a privileged context. `Signal.needs` names these inputs, and NEEDS says what each is.

A state that is all -inf allows no action. A token chosen in it has reward and log-probability -inf, and entropy and
certainty 0. A token that leads to it counts as terminal.

Logits of -inf, or of the lowest number of bfloat16 or float32, rule words out. The self-certainty of such a state is
KL(uniform || pi) as defined: infinite, or up to 3e38 / alpha, which can overflow in a sum over tokens. The centred
reward does not subtract the mean of such a state. Words at -65504 (float16) are treated like any others.
No signal is NaN unless the logits are.
"""

from .needs import NEEDS, Need
from .stats import linear_token_stats, token_stats
from .table import ALL, SIGNALS, Signal, names_in, select
from .tokens import (
    TokenStats,
    answer_logprob,
    answer_probability,
    centred_reward,
    endogenous_reward,
    log_ratio,
    logprob,
    negative_entropy,
    prefix_value,
    privileged_log_ratio,
    reference_gain,
    reference_logprob,
    reference_probability,
    self_certainty,
    token_probability,
)

__all__ = [
    "ALL",
    "NEEDS",
    "SIGNALS",
    "Need",
    "Signal",
    "TokenStats",
    "answer_logprob",
    "answer_probability",
    "centred_reward",
    "endogenous_reward",
    "linear_token_stats",
    "log_ratio",
    "logprob",
    "names_in",
    "negative_entropy",
    "prefix_value",
    "privileged_log_ratio",
    "reference_gain",
    "reference_logprob",
    "reference_probability",
    "select",
    "self_certainty",
    "token_probability",
    "token_stats",
]
