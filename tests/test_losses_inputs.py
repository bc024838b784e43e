"""The losses on unusual and on wrong inputs: masks, empty rows, truncated rows, infinities and mistakes."""

import doctest
from itertools import product

import pytest
import torch

from endoreward_fast import TokenRewards, losses, token_rewards
from endoreward_fast.losses import reval_loss, tbrm_loss
from loss_cases import BETA, LOSSES, both, case, exact


def fields(*rows, value=None):
    """Return TokenRewards with these log-probabilities."""
    logprob = torch.tensor(rows)
    value = torch.zeros_like(logprob) if value is None else torch.tensor(value)
    return TokenRewards(logprob + value, logprob, value, None)


def test_position_0_has_no_state_whatever_the_mask_says():
    heads, tokens, mask, _, reward = case()
    z, z_ref = both(heads, torch.float32)
    mask[1, 0] = True  # row 1 is now scored from its first token
    policy, fixed = (token_rewards(x, tokens, mask=mask) for x in (z, z_ref))
    without = mask.clone()
    without[:, 0] = False
    for loss in LOSSES.values():
        one, other = (loss(policy, fixed, m, reward, beta=BETA) for m in (mask, without.long()))
        assert torch.equal(one.residual, other.residual) and one.value[1] != 0


def test_rows_without_a_scored_token_do_not_count():
    policy, fixed = fields([0.0, -1.0, -2.0], [0.0, 0.0, 0.0]), fields([0.0, -2.0, -2.0], [0.0, 0.0, 0.0])
    mask = torch.tensor([[False, True, True], [False, False, False]])
    out = reval_loss(policy, fixed, mask, torch.tensor([1, 7]), beta=2.0)
    assert out.residual.tolist() == [0.5, 0.0] and out.target.tolist() == [0.5, 0.0] and out.loss == 0.25
    nothing = policy._replace(logprob=policy.logprob.requires_grad_())
    empty = reval_loss(nothing, fixed, torch.zeros_like(mask), torch.tensor([1.0, 7.0]), beta=2.0)
    assert empty.loss == 0 and not torch.autograd.grad(empty.loss, nothing.logprob)[0].any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("level", ["trajectory", "token"])
def test_what_lies_off_the_mask_changes_nothing(name, level):
    heads, tokens, mask, _, reward = case()
    z, z_ref = both(heads, torch.float32)
    policy, fixed = (token_rewards(x.detach(), tokens, mask=mask) for x in (z, z_ref))
    spoilt = [TokenRewards(*(f if f is None else f.masked_fill(~mask, torch.nan) for f in m)) for m in (policy, fixed)]
    options = {"beta": BETA, "level": level, "bootstrap": True}
    odd_rows = reward.masked_fill(~mask.any(1), torch.nan)
    tokens_too = torch.randn(mask.shape)
    for given, odd in ((reward, odd_rows), (tokens_too, tokens_too.masked_fill(~mask, torch.nan))):
        one, other = (LOSSES[name](*m, mask, r, **options) for m, r in (((policy, fixed), given), (spoilt, odd)))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_terminal_tokens_of_the_pass_matter_only_for_bootstrapping():
    heads, tokens, mask, terminal, reward = case()
    z, z_ref = (x.detach() for x in both(heads, torch.float32))

    def residual(ends, bootstrap):
        policy, fixed = (token_rewards(x, tokens, mask=mask, terminal=ends) for x in (z, z_ref))
        return reval_loss(policy, fixed, mask, reward, beta=BETA, bootstrap=bootstrap).residual

    assert torch.equal(residual(terminal, False), residual(None, False))
    torch.testing.assert_close(residual(None, True), residual(None, False), rtol=1e-5, atol=1e-4)
    apart = (residual(terminal, True) - residual(None, False)).abs() > 1e-2
    assert apart.tolist() == [False, True, True, False, False]


def test_impossible_tokens():
    inf = torch.inf
    mask = torch.tensor([[False, True, True]] * 4)
    policy = fields([0.0, -1.0, -inf], [0.0, -1.0, -1.0], [0.0, -1.0, -inf], [0.0, -1.0, -1.0])
    fixed = fields([0.0, -2.0, -2.0], [0.0, -2.0, -inf], [0.0, -2.0, -inf], [0.0, -2.0, -2.0])
    for loss, bootstrap in product(LOSSES.values(), (False, True)):
        out = loss(policy, fixed, mask, torch.zeros(4), beta=1.0, bootstrap=bootstrap)
        assert out.residual.tolist() == [-inf, inf, 1.0, 2.0] and out.loss == inf
    gone = fields([0.0, -inf, -1.0], value=[[0.0, -inf, 0.0]])  # a state that allows no token, in both models
    assert reval_loss(gone, gone, mask[:1], torch.zeros(1), beta=1.0).residual.tolist() == [0.0]
    torn = fields([0.0, -1.0, -inf]), fields([0.0, -inf, -1.0])  # -inf and +inf in one row
    assert reval_loss(*torn, mask[:1], torch.zeros(1), beta=1.0).residual.isnan().tolist() == [True]
    far = reval_loss(policy, fixed, mask, torch.zeros(4), beta=1.0, gamma=1e-50)  # the discount underflows
    assert far.residual.tolist() == [1.0] * 4


def test_bfloat16_fields_are_summed_in_float32():
    policy, fixed = fields([0.0] + [-0.5] * 999), fields([0.0] + [-0.25] * 999)
    mask = torch.arange(1000)[None] > 0
    low = [TokenRewards(*(None if f is None else f.bfloat16() for f in m)) for m in (policy, fixed)]
    out = reval_loss(*low, mask, torch.tensor([1.0]), beta=0.5)
    assert out.residual.dtype == torch.float32 and out.residual.item() == -251.75


def test_a_compiled_loss_is_one_graph():
    heads, tokens, mask, terminal, reward = case()
    policy, fixed = (exact(z, tokens, mask, terminal) for z in both(heads, torch.float64))
    options = {"beta": BETA, "gamma": 0.9, "level": "token", "bootstrap": True}
    compiled = torch.compile(reval_loss, fullgraph=True, backend="eager")
    assert torch.equal(
        compiled(policy, fixed, mask, reward, **options).loss, reval_loss(policy, fixed, mask, reward, **options).loss
    )


def test_gradients_of_each_row_under_vmap():
    heads, tokens, mask, terminal, reward = case()
    policy, fixed = (exact(z.detach(), tokens, mask, terminal) for z in both(heads, torch.float64))

    def loss(logprob, value, row_mask, row_reward, *reference):
        one = TokenRewards(value, logprob, value, None)
        fields = (x[None] for x in reference)
        ref = TokenRewards(None, *fields, None)
        model = TokenRewards(*(None if x is None else x[None] for x in one))
        return reval_loss(model, ref, row_mask[None], row_reward[None], beta=BETA, gamma=0.9).loss

    rows = policy.logprob, policy.value, mask.long(), reward, fixed.logprob, fixed.value
    found = torch.func.vmap(torch.func.grad(loss))(*rows)
    for b, gradient in enumerate(found):
        torch.testing.assert_close(gradient, torch.func.grad(loss)(*(x[b] for x in rows)))
    assert found[0].any() and not found[4].any()


def test_the_examples_of_the_docstrings_run():
    found = doctest.testmod(losses)
    assert found.attempted == 8 and not found.failed


# --- mistakes

GOOD = fields([0.0, -1.0, -2.0], [0.0, -1.0, -2.0])
ON = torch.tensor([[False, True, True]] * 2)
WRONG = {
    "reference without V": ({"reference": GOOD._replace(value=None)}, "reference without V: give TokenRewards"),
    "log-probabilities for ReVal": ({"reference": GOOD.logprob}, "reference is a Tensor: expected TokenRewards"),
    "policy": ({"policy": GOOD.logprob}, "policy is a Tensor: expected TokenRewards"),
    "policy without V": ({"policy": GOOD._replace(value=None)}, "got no policy.value"),
    "list": ({"policy": GOOD._replace(value=[1.0])}, "policy.value is a list: expected a tensor"),
    "no rewards": ({"policy": GOOD._replace(reward=None), "bootstrap": True}, "got no policy.reward"),
    "shapes": (
        {"reference": fields([0.0, -1.0])},
        r"reference.logprob is \(1, 2\) torch.float32 on cpu: expected floating point \(2, 3\) on cpu, like policy",
    ),
    "one dimension": ({"policy": TokenRewards(*(GOOD.value[0],) * 3, None)}, r"policy.logprob \(3,\): expected \(B, T"),
    "mask": ({"mask": ON[:1]}, r"mask is \(1, 3\) torch.bool on cpu: expected \(2, 3\) bool"),
    "no mask": ({"mask": None}, "mask is None: expected a tensor"),
    "no reward": ({"reward": None}, "reward is None: expected a tensor"),
    "rewards": ({"reward": torch.zeros(3)}, r"reward is \(3,\) torch.float32: expected numbers \(2,\), one for each"),
    "no tensor": ({"reward": [0.0, 1.0]}, r"reward is a list: expected a tensor; torch.as_tensor\(reward\) makes one"),
    "nan": ({"reward": torch.tensor([0.0, torch.nan])}, "reward holds nan in row 1: expected finite numbers"),
    "nan of a token": (
        {"reward": torch.tensor([[torch.nan, 0.0, 0.0], [0.0, 0.0, torch.nan]])},
        r"reward holds nan in row 1: expected finite numbers. Leave a row without a reward out of the mask",
    ),
    "beta 0": ({"beta": 0.0}, "beta=0.0: expected a finite number > 0"),
    "beta inf": ({"beta": float("inf")}, "beta=inf: expected a finite number > 0"),
    "beta tensor": ({"beta": torch.tensor(1.0)}, "beta is a Tensor: expected a number"),
    "beta None": ({"beta": None}, "beta is a NoneType: expected a number"),
    "alpha": ({"alpha": -1.0}, "alpha=-1.0: expected a finite temperature > 0"),
    "alpha None": ({"alpha": None}, "alpha is None: expected a finite temperature > 0"),
    "alphas": ({"alpha": torch.ones(2)}, r"alpha is a tensor, and it is \(2,\) .* or \(2, 3\) float32"),
    "alpha on the mask": (
        {"alpha": torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])},
        "alpha holds 0.0 on the mask: expected finite temperatures > 0",
    ),
    "gamma 0": ({"gamma": 0.0}, r"gamma=0.0: expected a discount in \(0, 1\]"),
    "gamma nan": ({"gamma": float("nan")}, r"gamma=nan: expected a discount in \(0, 1\]"),
    "gamma 2": ({"gamma": 2}, r"gamma=2: expected a discount in \(0, 1\]"),
    "level": ({"level": "step"}, "level='step': expected 'trajectory' or 'token'"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_refused_in_one_line(mistake):
    change, message = WRONG[mistake]
    call = {"policy": GOOD, "reference": GOOD, "mask": ON, "reward": torch.zeros(2), "beta": 1.0} | change
    with pytest.raises(ValueError, match=message) as caught:
        reval_loss(**call)
    assert "\n" not in str(caught.value)


def test_tbrm_needs_only_the_log_probabilities_of_the_reference():
    policy = fields([0.0, -1.0, -2.0], value=[[0.0, 3.0, 5.0]])
    call = ON[:1], torch.tensor([1.0])
    by_tensor, by_fields = (
        tbrm_loss(policy, ref, *call, beta=0.5).residual.item()
        for ref in (GOOD.logprob[:1], TokenRewards(None, GOOD.logprob[:1], None, None))
    )
    assert by_tensor == by_fields == 1.0
    with pytest.raises(ValueError, match="reference is a dict: expected TokenRewards"):
        tbrm_loss(policy, {}, *call, beta=0.5)
