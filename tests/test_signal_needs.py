"""Signals that need more than the statistics of their row, in float64, and the discounted sums."""

import dataclasses
import inspect
import math

import pytest
import torch

from endoreward_fast import EndoRewardError, signals
from endoreward_fast.signals import NEEDS, SIGNALS, token_stats

B, T, V = 3, 9, 70
GAMMA = 0.93


def reading(scale, start, stop):
    """Return (logits, tokens, mask) of rows whose tokens start ... stop are scored."""
    place = torch.arange(T).expand(B, -1)
    return torch.randn(B, T, V) * scale, torch.randint(0, V, (B, T)), (place >= start) & (place < stop)


def log_pi(logits, tokens, alpha, dtype):
    found = torch.zeros(tokens.shape, dtype=dtype)
    found[:, 1:] = torch.log_softmax(logits.to(dtype) / alpha, -1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    return found


def by_hand(own, span, after, direct, theirs, reference, alpha, dtype):
    """Return {signal: score (B,)} in `dtype`. own, after and direct are readings."""
    logp = log_pi(*own[:2], alpha, dtype)
    answer, plain = log_pi(*after[:2], alpha, dtype), log_pi(*direct[:2], alpha, dtype)
    ratio = torch.where(own[2], logp - reference.to(dtype), 0)

    def mean(x, mask):
        return (x * mask).sum(1) / mask.sum(1)

    gain = mean(answer.exp(), after[2]) - mean(plain.exp(), direct[2])
    return {
        "prefix-value": mean(ratio, own[2]),
        "answer-logprob": (logp * span).sum(1),
        "answer-probability": mean(logp.exp(), span),
        "reference-logprob": (answer * after[2]).sum(1),
        "reference-probability": mean(answer.exp(), after[2]),
        "reference-gain": gain.clamp(0, 1),
        "privileged-log-ratio": ((theirs.to(dtype) - logp) * own[2]).sum(1),
    }


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_signals_with_needs_match_their_formulas(assert_within_budget, device, alpha):
    own, after, direct = reading(2.0, 2, T), reading(1.0, 5, 8), reading(1.0, 1, 4)
    span = own[2] & (torch.arange(T) >= 5) & (torch.arange(T) < 7)
    theirs, reference = (torch.where(own[2], -torch.rand(B, T) * 9, 0.0) for _ in range(2))
    stats, second, third = (token_stats(z.to(device), t.to(device), mask=m.to(device), alpha=alpha)
                            for z, t, m in (own, after, direct))  # fmt: skip
    given = {
        "reference": reference.to(device), "answer_span": span.to(device), "reference_answer": second,
        "direct_answer": third, "privileged": theirs.to(device),
    }  # fmt: skip
    assert given.keys() == NEEDS.keys()
    inputs = (own, span, after, direct, theirs, reference, alpha)
    exact, eager = (by_hand(*inputs, dtype) for dtype in (torch.float64, torch.float32))
    scale = T * float(own[0].abs().max()) / alpha
    for name, signal in SIGNALS.items():
        if signal.needs and name != "log-ratio":
            score = signal.score(stats, **given)
            assert score.dtype == torch.float32
            assert_within_budget(score, eager[name], exact[name], scale=scale, name=name)
    assert 0 < exact["reference-gain"].max() < 1  # not all are clipped


def test_prefix_values_differ_by_the_log_ratio_of_a_token():
    """V_t - V_(t-1) = beta log(pi / pi_ref), with V_t = t times the length-normalised value (IPVRM, equation 10)."""
    logits, tokens, mask = reading(2.0, 3, T)
    stats, reference = token_stats(logits, tokens, mask=mask), -torch.rand(B, T) * 5
    value = signals.prefix_value(stats, reference, beta=0.1)
    total = (value * mask.cumsum(1))[:, 3:].double()
    ratio = signals.log_ratio(stats, reference, beta=0.1)[:, 3:].double()
    torch.testing.assert_close(torch.diff(total, dim=1), ratio[:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total[:, 0], ratio[:, 0], rtol=1e-4, atol=1e-5)
    assert torch.equal(SIGNALS["prefix-value"].score(stats, reference), signals.prefix_value(stats, reference)[:, -1])
    mean = SIGNALS["log-ratio"].score(stats, reference) / mask.sum(1)
    torch.testing.assert_close(SIGNALS["prefix-value"].score(stats, reference), mean, rtol=1e-5, atol=1e-5)


# --- the discounted sums


def test_the_two_discounted_sums_differ_by_the_values_of_later_states():
    """sum g^(h-1) r_h = alpha sum g^(h-1) log pi_h + V(s_1) - (1 - g) sum_{h >= 2} g^(h-2) V(s_h)."""
    logits, tokens, mask = reading(3.0, 2, T)
    alpha = 0.7
    stats = token_stats(logits, tokens, mask=mask, alpha=alpha)
    value = alpha * torch.logsumexp(logits.double() / alpha, -1)[:, 1:-1]  # V of the states before tokens 2 ... T - 1
    h = torch.arange(2, value.shape[1] + 1)
    later = (GAMMA ** (h - 2) * value[:, 1:]).sum(1)
    ours, logprob = (SIGNALS[name].score(stats).double() for name in ("discounted-reward", "discounted-logprob"))
    torch.testing.assert_close(ours, alpha * logprob + value[:, 0] - (1 - GAMMA) * later, rtol=1e-5, atol=1e-4)
    steps = torch.arange(T - 2)  # i counts the completion's tokens from 0, as in RMGAP's code
    weights = torch.maximum(torch.tensor(GAMMA, dtype=torch.float64) ** steps, torch.tensor(0.0))
    by_hand = (weights * log_pi(logits, tokens, alpha, torch.float64)[:, 2:]).sum(1)
    torch.testing.assert_close(logprob, by_hand, rtol=1e-6, atol=1e-5)


def test_the_two_discounted_sums_rank_two_answers_differently():
    """The reward prefers answers whose later states have a small V. The log-probability does not depend on V."""
    logits, tokens = torch.randn(2, 6, V), torch.randint(0, V, (2, 6))
    tokens[:, 0], logits[:, 0] = 0, logits[0, 0]  # the same prompt
    both = "discounted-reward", "discounted-logprob"

    def scores(logits):
        stats = token_stats(logits, tokens)
        return [SIGNALS[name].score(stats) for name in both]

    reward, logprob = scores(logits)
    better = int(logprob.argmax())
    logits[better, 1] += 1000  # raises V(s_2) of the likelier answer by 1000, and changes no probability
    new_reward, new_logprob = scores(logits)
    torch.testing.assert_close(new_logprob, logprob, rtol=0, atol=1e-3)
    assert float((reward - new_reward)[better]) == pytest.approx((1 - GAMMA) * 1000, abs=1e-2)
    assert new_logprob.argmax() == better != new_reward.argmax()
    sums = [SIGNALS[name].score(token_stats(logits, tokens)).argmax() for name in ("endogenous", "logprob")]
    assert sums[0] == sums[1]  # without a discount, the two rank alike


def test_another_discount_is_another_signal_and_a_wrong_one_is_refused():
    logits, tokens, mask = reading(2.0, 2, T)
    stats = token_stats(logits, tokens, mask=mask)
    logp = signals.logprob(stats)
    floored = dataclasses.replace(SIGNALS["discounted-logprob"], gamma=0.5, floor=0.2).score(stats)
    weights = torch.maximum(0.5 ** torch.arange(T - 2), torch.tensor(0.2))
    torch.testing.assert_close(floored, (logp[:, 2:] * weights).sum(1))
    for gamma in (0, 1.1, -0.5, math.nan):
        with pytest.raises(EndoRewardError, match=f"'discounted-logprob': gamma={gamma}: expected a number above 0"):
            dataclasses.replace(SIGNALS["discounted-logprob"], gamma=gamma)
    with pytest.raises(EndoRewardError, match="floor=-1: expected a number, 0 or more"):
        dataclasses.replace(SIGNALS["discounted-logprob"], floor=-1)


# --- infinities


def test_no_signal_with_needs_is_nan_where_tokens_are_ruled_out():
    logits, tokens = torch.randn(4, 5, V), torch.randint(0, V, (4, 5))
    for row, place in ((0, 2), (1, 1), (3, 3)):
        logits[row, place - 1, tokens[row, place]] = -torch.inf
    stats = token_stats(logits, tokens)
    other = torch.where(stats.mask, -1.0, 0.0)
    other[0, 2] = other[1, 3] = other[2, 2] = -torch.inf
    ratio, value = signals.privileged_log_ratio(stats, other), signals.prefix_value(stats, other)
    # row 0: both rule the token out; 1: one each; 2: only the other; 3: only pi
    assert ratio[0, 2] == ratio[1, 3] == ratio[2, 2] == -torch.inf and ratio[1, 1] == ratio[3, 3] == torch.inf
    assert value[0, 1].isfinite() and (value[0, 2:] == -torch.inf).all() and (value[1, 1:] == -torch.inf).all()
    assert value[2, 1].isfinite() and (value[2, 2:] == torch.inf).all() and (value[3, 3:] == -torch.inf).all()
    given = {"reference": other, "privileged": other, "answer_span": stats.mask & (torch.arange(5) > 1)}
    given |= {"reference_answer": stats, "direct_answer": stats}
    for name, signal in SIGNALS.items():
        tokens_of = signal.per_token(stats, *(given[need] for need in signal.needs))
        score = signal.score(stats, **given)
        assert not tokens_of.isnan().any() and not score.isnan().any(), name
    endless = {name: SIGNALS[name].score(stats, **given).tolist() for name in SIGNALS}
    assert endless["privileged-log-ratio"][:3] == [-math.inf] * 3 and endless["privileged-log-ratio"][3] == math.inf
    assert endless["answer-logprob"][1] != -math.inf and endless["answer-logprob"][3] == -math.inf
    assert endless["discounted-logprob"][0] == endless["discounted-reward"][0] == -math.inf
    assert endless["reference-gain"] == [0.0] * 4
    dead = token_stats(torch.full((1, 3, V), -torch.inf), torch.zeros(1, 3, dtype=torch.long))
    assert SIGNALS["reference-probability"].score(dead, reference_answer=dead).item() == 0
    assert SIGNALS["privileged-log-ratio"].score(dead, privileged=torch.full((1, 3), -1.0)).item() == math.inf


def test_a_row_without_a_scored_token_scores_zero():
    logits, tokens, mask = reading(2.0, 4, T)
    mask[1] = False
    stats = token_stats(logits, tokens, mask=mask)
    nothing = token_stats(logits, tokens, mask=torch.zeros_like(mask))
    given = dict.fromkeys(("reference", "privileged"), torch.where(mask, -1.0, 0.0))
    given |= {"answer_span": mask & (torch.arange(T) == 5), "reference_answer": nothing, "direct_answer": nothing}
    for name, signal in SIGNALS.items():
        assert signal.score(stats, **given)[1] == 0, name


# --- what is refused


def test_a_missing_or_wrong_input_is_refused_by_name():
    logits, tokens, mask = reading(2.0, 4, T)
    stats = token_stats(logits, tokens, mask=mask)
    for name, signal in SIGNALS.items():
        if signal.needs:
            with pytest.raises(EndoRewardError, match=f"signal '{name}' needs `{signal.needs[0]}`, "):
                signal.score(stats)
    answer, own = SIGNALS["answer-logprob"], SIGNALS["privileged-log-ratio"]
    with pytest.raises(ValueError, match="answer_span, row 0: the span is not in the completion: mark scored tokens"):
        answer.score(stats, answer_span=torch.ones_like(mask))
    for wrong in (mask.long(), mask[:, 1:], mask.tolist()):
        with pytest.raises(ValueError, match=r"answer_span is .*: expected the tokens of the final answer, bool"):
            answer.score(stats, answer_span=wrong)
    for wrong in (mask, stats.lse[:1], stats):
        with pytest.raises(ValueError, match=r"privileged is .*: expected the log-probabilities \(B, T\) behind"):
            own.score(stats, privileged=wrong)
    reference = SIGNALS["reference-logprob"]
    with pytest.raises(ValueError, match="reference_answer is Tensor: expected TokenStats of prompt, thought"):
        reference.score(stats, reference_answer=stats.lse)
    with pytest.raises(ValueError, match=r"reference_answer \(2, 9\): expected 3 rows"):
        reference.score(stats, reference_answer=token_stats(logits[:2], tokens[:2]))
    with pytest.raises(EndoRewardError, match="no input 'span' of signals: expected one of reference, answer_span"):
        answer.score(stats, span=mask)


def test_the_needs_of_a_signal_are_the_arguments_of_its_function():
    for name, signal in SIGNALS.items():
        wanted = [p.name for p in inspect.signature(signal.per_token).parameters.values() if p.default is p.empty]
        assert tuple(wanted) == ("stats", *signal.needs), name
        assert set(signal.needs) <= NEEDS.keys() and signal.needs_reference == ("reference" in signal.needs)


def test_gradients_reach_every_reading():
    (logits, tokens, mask), (after, *_), (direct, *_) = (reading(1.0, 2, T) for _ in range(3))
    leaves = [z.requires_grad_() for z in (logits, after, direct)]
    stats, second, third = (token_stats(z, tokens, mask=mask) for z in leaves)
    gain = dataclasses.replace(SIGNALS["reference-gain"], bounds=None)
    gain.score(stats, reference_answer=second, direct_answer=third).sum().backward()
    assert leaves[0].grad is None or not leaves[0].grad.any()
    assert leaves[1].grad.abs().max() > 1e-4 and leaves[2].grad.abs().max() > 1e-4
    plain = torch.zeros(B, T)
    for name, given in (("prefix-value", plain), ("privileged-log-ratio", plain), ("answer-probability", mask)):
        (grad,) = torch.autograd.grad(
            SIGNALS[name].score(token_stats(logits, tokens, mask=mask), **{SIGNALS[name].needs[0]: given}).sum(), logits
        )
        assert grad.isfinite().all() and grad.abs().max() > 1e-4, name
