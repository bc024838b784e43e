"""Peers of token rewards and of masks: endoreward_fast with and without them."""

import functools
from collections.abc import Callable

from bench.harness.peers import OURS, Inputs, Peer
from endoreward_fast import linear_token_rewards, linear_vocab_stats, token_rewards, vocab_stats
from endoreward_fast.vocab.plan import plan_rows

STATISTICS_ALONE, TOKEN_REWARDS = f"{OURS}, statistics alone", f"{OURS}, token rewards"


def ours_linear(impl: str, i: Inputs, mask=None):
    stats = linear_vocab_stats(i.hidden, i.weight, i.targets, mask=mask, softcap=i.shape.softcap, impl=impl)
    return stats.lse, stats.target_logit


def masked(impls: dict[str, str]) -> dict[str, Peer]:
    calls = {}
    for name, impl in impls.items():
        calls[f"{name}, every row"] = Peer(functools.partial(ours_linear, impl))
        calls[f"{name}, a fifth"] = Peer(lambda i, impl=impl: ours_linear(impl, i, i.mask))
    return calls


def linear_rewards() -> dict[str, Peer]:
    return {
        STATISTICS_ALONE: Peer(_in_sequences(lambda i, needed, _: ours_linear("fused", i, needed)), in_two_steps=True),
        TOKEN_REWARDS: _rewards(lambda i, tokens: linear_token_rewards(
            i.hidden.view(*tokens.shape, -1), i.weight, tokens, softcap=i.shape.softcap, impl="fused"
        )),
    }  # fmt: skip


def logits_rewards() -> dict[str, Peer]:
    def statistics(i, needed, _):
        stats = vocab_stats(i.logits, i.targets, mask=needed, impl="fused")
        return stats.lse, stats.target_logit

    return {
        STATISTICS_ALONE: Peer(_in_sequences(statistics), in_two_steps=True),
        TOKEN_REWARDS: _rewards(lambda i, tokens: token_rewards(
            i.logits.view(*tokens.shape, -1), tokens, impl="fused"
        )),
    }  # fmt: skip


def _in_sequences(run: Callable) -> Callable:
    """Return a peer's `run` in two steps that calls run(inputs, rows that rewards need, tokens (B, T)).

    T is at most 2048. Row k's target is the next token, so statistics and rewards need the same numbers.
    """

    def prepare(i: Inputs):
        tokens = i.targets.roll(1).view(-1, min(len(i.targets), 2048))
        needed = plan_rows(tokens, None, None, None).needed
        return lambda: run(i, needed, tokens)

    return prepare


def _rewards(function: Callable) -> Peer:
    def run(i, _, tokens):
        out = function(i, tokens)
        # Row k predicts token k + 1, so the fields of token k + 1 belong to row k.
        return -out.logprob.flatten()[1:], out.reward.flatten()[1:]

    return Peer(_in_sequences(run), gives="rewards", in_two_steps=True)
