"""The mean of logits of which some are their dtype's lowest number: the sum overflows, the mean does not."""

import math

import pytest
import torch

import endoreward_fast as er
from endoreward_fast.signals import SIGNALS, token_stats
from endoreward_fast.vocab.compiled import find_compiler
from endoreward_fast.vocab.reference import vocab_stats as oracle

IMPLS = ["reference", "chunked", "fused"]
V = 9001  # two splits of the kernel, several chunks and blocks, a ragged end
LOW = {torch.bfloat16: -3.3895313892515355e38, torch.float16: -65504.0, torch.float32: -3.4028234663852886e38}


@pytest.fixture(params=[*IMPLS, "compiled"])
def impl(request, device):
    if request.param == "compiled" and (device.type != "cpu" or find_compiler() is None):
        pytest.skip("impl='compiled' is for the CPU, with a C++ compiler")
    return request.param


def check(ours, logits, budget, alpha=1.0):
    none = torch.full(logits.shape[:-1], -100, device=logits.device)
    exact = oracle(logits, none, alpha=alpha, entropy=True, logit_mean=True, dtype=torch.float64)
    scale = logits.float().abs().nan_to_num(posinf=0.0).amax(-1).clamp(max=3e38)
    for name in ("lse", "entropy"):
        budget(getattr(ours, name), getattr(exact, name).float(), getattr(exact, name), scale=32.0, name=name)
    mean = exact.logit_mean
    finite = mean.isfinite()
    error = (ours.logit_mean.double() - mean).abs()
    assert torch.equal(ours.logit_mean[~finite].double(), mean[~finite])
    assert (error <= 16 * torch.finfo(torch.float32).eps * torch.maximum(mean.abs(), scale.double()))[finite].all()
    assert ours.logit_mean[finite].isfinite().all()


@pytest.mark.parametrize("dtype", LOW)
def test_logits_at_the_dtypes_lowest_number_have_a_finite_mean(impl, dtype, device, assert_within_budget):
    logits = torch.randn(6, V, device=device).to(dtype)
    logits[0, : 2 * V // 3] = LOW[dtype]
    logits[1, ::2] = LOW[dtype]
    logits[2, 1:] = LOW[dtype]
    logits[3, -1] = LOW[dtype]
    logits[4, ::3] = -LOW[dtype]
    logits[5, : V // 2], logits[5, V // 2 :] = LOW[dtype], -LOW[dtype]
    ours = er.vocab_stats(logits, entropy=True, logit_mean=True, impl=impl)
    check(ours, logits, assert_within_budget)


def test_logits_of_minus_infinity_have_a_mean_of_minus_infinity(impl, device, assert_within_budget):
    logits = torch.randn(3, V, device=device)
    logits[0, 5] = -math.inf
    logits[1, ::2], logits[1, 1::4] = -math.inf, LOW[torch.float32]
    ours = er.vocab_stats(logits, entropy=True, logit_mean=True, impl=impl)
    assert ours.logit_mean[:2].tolist() == [-math.inf] * 2
    check(ours, logits, assert_within_budget)


def test_from_hidden_states(impl, device):
    hidden, weight = torch.randn(4, 16, device=device), torch.randn(V, 16, device=device)
    bias = torch.zeros(V, device=device)
    bias[::2] = LOW[torch.float32]
    ours = er.linear_vocab_stats(hidden, weight, bias=bias, logit_mean=True, impl=impl).logit_mean
    wanted = (hidden.double() @ weight.double().T + bias.double()).mean(-1)
    assert ((ours - wanted).abs() <= 1e-6 * wanted.abs()).all() and ours.isfinite().all()


def test_the_mean_of_ordinary_logits_loses_no_precision(impl, device, assert_within_budget):
    for size in (1e-20, 1e-3, 1.0, 1e4):
        logits = torch.randn(3, V, device=device) * size
        ours = er.vocab_stats(logits, logit_mean=True, impl=impl).logit_mean
        assert_within_budget(ours, logits.mean(-1), logits.double().mean(-1), scale=size, name=str(size))
    leaf = torch.randn(2, V, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(er.vocab_stats(leaf, logit_mean=True, impl=impl).logit_mean.sum(), leaf)
    torch.testing.assert_close(grad, torch.full_like(grad, 1 / V))


@pytest.mark.parametrize("low", [*LOW.values(), -math.inf], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_no_signal_is_nan_and_the_centred_reward_skips_such_a_mean(impl, low, alpha, device):
    tokens, logits = torch.randint(0, 50, (2, 5), device=device), torch.randn(2, 5, 300, device=device)
    logits[0, :, 100:], logits[1, ::2, 100:] = low, low
    stats = token_stats(logits, tokens, alpha=alpha, impl=impl)
    found = {name: signal.per_token(stats) for name, signal in SIGNALS.items() if not signal.needs}
    assert not any(tokens.isnan().any() for tokens in found.values())
    assert all(found[name].isfinite().all() for name in found if name != "self-certainty")
    if low < -1e30:
        torch.testing.assert_close(found["centred"][0], found["endogenous"][0])
    certain = found["self-certainty"][0, 1:]
    if low == -math.inf:
        assert (certain == math.inf).all()
    elif alpha == 1.0:
        torch.testing.assert_close(certain, torch.full_like(certain, -low * 2 / 3), rtol=1e-3, atol=0.0)
    else:
        assert (certain > 1e4).all()
