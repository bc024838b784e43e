"""The oracle against numbers worked out by hand, torch's own functions, and the identities of the theory."""

import math

import pytest
import torch

from endoreward_fast.vocab import reference

F64 = {"dtype": torch.float64}


def test_rewards_of_two_tokens_by_hand():
    # Two actions. Logits after the prompt: (ln 3, 0); after token 0: (0, ln 2), where the episode ends at token 1.
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, math.log(2)], [9.0, 9.0]]], dtype=torch.float64)
    tokens = torch.tensor([[1, 0, 1]])  # the first is the prompt
    out = reference.token_rewards(logits, tokens, entropy=True, **F64)
    # V = ln 4, then ln 3; r_1 = ln 3 - V(s_2) = ln 3 - ln 3 = 0; r_2 = ln 2 - 0
    torch.testing.assert_close(out.reward, torch.tensor([[0.0, 0.0, math.log(2)]], **F64))
    torch.testing.assert_close(out.logprob, torch.tensor([[0.0, math.log(3 / 4), math.log(2 / 3)]], **F64))
    torch.testing.assert_close(out.value, torch.tensor([[0.0, math.log(4), math.log(3)]], **F64))
    entropies = [0.0] + [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (3 / 4, 2 / 3)]
    torch.testing.assert_close(out.entropy, torch.tensor([entropies], **F64))


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
def test_statistics_match_torch(alpha):
    logits, targets = torch.randn(5, 40, **F64) * 3, torch.randint(0, 40, (5,))
    out = reference.vocab_stats(logits, targets, alpha=alpha, entropy=True, logit_mean=True, **F64)
    torch.testing.assert_close(out.lse, torch.logsumexp(logits / alpha, -1))
    torch.testing.assert_close(out.entropy, torch.distributions.Categorical(logits=logits / alpha).entropy())
    torch.testing.assert_close(out.target_logit, logits[torch.arange(5), targets])
    torch.testing.assert_close(out.logit_mean, logits.mean(-1))


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_undiscounted_sum_is_the_sequence_logprob_plus_the_first_value(alpha):
    logits, tokens = torch.randn(3, 8, 20, **F64), torch.randint(0, 20, (3, 8))
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[:, 3:] = True
    out = reference.token_rewards(logits, tokens, mask=mask, alpha=alpha, **F64)
    first_value = alpha * torch.logsumexp(logits[:, 2] / alpha, -1)
    torch.testing.assert_close(out.reward.sum(1), alpha * out.logprob.sum(1) + first_value)


def test_a_constant_on_one_states_logits_moves_two_rewards_and_no_probability():
    logits, tokens = torch.randn(1, 5, 9, **F64), torch.randint(0, 9, (1, 5))
    shifted = logits.clone()
    shifted[0, 2] += 7.0
    a, b = (reference.token_rewards(x, tokens, **F64) for x in (logits, shifted))
    torch.testing.assert_close(a.logprob, b.logprob)
    expected = torch.zeros(1, 5, **F64)
    expected[0, 2], expected[0, 3] = -7.0, 7.0  # the token that led into the state, and the token chosen in it
    torch.testing.assert_close(b.reward - a.reward, expected)


def test_terminal_tokens_lead_nowhere_and_truncated_ones_are_bootstrapped():
    logits, tokens = torch.randn(1, 4, 6, **F64), torch.randint(0, 6, (1, 4))
    ended = reference.token_rewards(logits, tokens, **F64)
    cut = reference.token_rewards(logits, tokens, terminal=torch.zeros(1, 4, dtype=torch.bool), **F64)
    difference = torch.zeros(1, 4, **F64)
    difference[0, 3] = torch.logsumexp(logits[0, 3], -1)
    torch.testing.assert_close(ended.reward - cut.reward, difference)


def test_a_mask_with_a_gap_has_two_episodes():
    logits, tokens = torch.randn(1, 6, 6, **F64), torch.randint(0, 6, (1, 6))
    mask = torch.tensor([[False, True, True, False, True, True]])
    _, ends, needed = reference.scored_terminal_needed(tokens, mask, None, None)
    assert ends.tolist() == [[False, False, True, False, False, True]]
    assert needed.tolist() == [[True, True, False, True, True, False]]
    whole = reference.token_rewards(logits, tokens, mask=mask, **F64)
    alone = reference.token_rewards(logits[:, 3:], tokens[:, 3:], **F64)
    torch.testing.assert_close(whole.reward[:, 4:], alone.reward[:, 1:])


def test_packed_rows_are_separate_sequences():
    lengths = [3, 1, 4]
    logits, tokens = torch.randn(1, 8, 7, **F64), torch.randint(0, 7, (1, 8))
    offsets = torch.tensor([0, 3, 4, 8])
    packed = reference.token_rewards(logits, tokens, cu_seqlens=offsets, entropy=True, **F64)
    apart = [
        reference.token_rewards(z, t, entropy=True, **F64)
        for z, t in zip(logits.split(lengths, 1), tokens.split(lengths, 1), strict=True)
    ]
    for name in packed._fields:
        torch.testing.assert_close(getattr(packed, name), torch.cat([getattr(o, name) for o in apart], 1))


def test_position_zero_has_no_reward_whatever_the_mask_says():
    logits, tokens = torch.randn(2, 3, 5, **F64), torch.randint(0, 5, (2, 3))
    out = reference.token_rewards(logits, tokens, mask=torch.ones(2, 3, dtype=torch.bool), **F64)
    assert out.reward[:, 0].tolist() == [0.0, 0.0]


def test_gradients_by_finite_differences():
    logits = torch.randn(2, 4, 6, **F64, requires_grad=True)
    tokens, mask = torch.randint(0, 6, (2, 4)), torch.rand(2, 4) > 0.3

    def fields(z):
        out = reference.token_rewards(z, tokens, mask=mask, alpha=0.6, entropy=True, **F64)
        stats = reference.vocab_stats(z, tokens, alpha=0.6, entropy=True, logit_mean=True, **F64)
        return (*out, *stats[:4])

    assert torch.autograd.gradcheck(fields, logits)


def test_the_head_applies_bias_scale_and_softcap_in_that_order():
    hidden, weight, bias = torch.randn(3, 4, **F64), torch.randn(6, 4, **F64), torch.randn(6, **F64)
    z = reference.final_logits(hidden, weight, bias=bias, logit_scale=0.5, softcap=2.0, **F64)
    torch.testing.assert_close(z, 2.0 * torch.tanh(0.5 * (torch.nn.functional.linear(hidden, weight, bias)) / 2.0))
