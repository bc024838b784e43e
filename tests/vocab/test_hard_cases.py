"""Cases that fused vocabulary kernels are known to get wrong, one named test each."""

import math
from dataclasses import replace

import pytest
import torch

import endoreward_fast as er
from endoreward_fast.vocab import chunked_tiles, reference, workspace
from endoreward_fast.vocab.compiled import find_compiler

COMPILED = pytest.param(
    "compiled",
    marks=pytest.mark.skipif(
        torch.cuda.is_available() or find_compiler() is None,
        reason="impl='compiled' needs CPU tensors and a C++ compiler",
    ),
)
FAST = ("fused", "chunked", COMPILED)
IMPLS = (*FAST, "reference")
F64 = torch.float64
ODD_VOCABS = (50257, 32001, 151669, 129920)


def _stats(logits, targets, impl, alpha=1.0):
    return er.vocab_stats(logits, targets, alpha=alpha, entropy=True, logit_mean=True, impl=impl)


def _check(ours, logits, targets, budget, alpha=1.0, scale=1.0):
    want = {"alpha": alpha, "entropy": True, "logit_mean": True}
    eager = reference.vocab_stats(logits, targets, **want)
    oracle = reference.vocab_stats(logits, targets, dtype=F64, **want)
    for name in ours._fields[:4]:
        budget(getattr(ours, name), getattr(eager, name), getattr(oracle, name), scale=scale, name=name)


@pytest.mark.parametrize("vocab", ODD_VOCABS)
@pytest.mark.parametrize("kind", ["peaked", "all negative"])
@pytest.mark.parametrize("impl", IMPLS)
def test_odd_vocabularies(vocab, kind, impl, device, assert_within_budget):
    """A kernel that counts columns past the vocabulary as exp(0) fails where every real logit is far below 0."""
    logits = torch.randn(2, vocab, device=device)
    logits = logits - 60 if kind == "all negative" else logits.index_fill(1, torch.tensor([7], device=device), 80.0)
    targets = torch.tensor([vocab - 1, 7], device=device)
    _check(_stats(logits, targets, impl), logits, targets, assert_within_budget, scale=80.0)


@pytest.mark.parametrize("vocab", [129, 333])
@pytest.mark.parametrize("softcap", [1.0, 30.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_softcap_with_a_ragged_vocabulary(vocab, softcap, impl, device, assert_within_budget):
    """In a column outside the vocabulary, tanh turns -inf into -softcap and keeps 0. Neither may be counted."""
    hidden, weight = torch.randn(5, 16, device=device), torch.randn(vocab, 16, device=device) * 4
    targets = torch.randint(0, vocab, (5,), device=device)
    ours = er.linear_vocab_stats(hidden, weight, targets, softcap=softcap, entropy=True, impl=impl)
    eager = reference.linear_vocab_stats(hidden, weight, targets, softcap=softcap, entropy=True)
    oracle = reference.linear_vocab_stats(
        hidden.double(), weight.double(), targets, softcap=softcap, entropy=True, dtype=F64
    )
    for name in ("lse", "target_logit", "entropy"):
        assert_within_budget(getattr(ours, name), getattr(eager, name), getattr(oracle, name), name=name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [30.0, 1e3, 1e6])
def test_a_softcap_far_above_the_logits_costs_no_digits(softcap, impl, device, assert_within_budget):
    """2 sigmoid(2 x) - 1 loses all digits of tanh(x) at x = 1e-7. Under a cap of 1e6 a logit is off by 0.08."""
    hidden, weight = torch.randn(64, 32, device=device), torch.randn(70, 32, device=device) / 2
    targets = torch.arange(64, device=device)
    args, want = (hidden, weight, targets), {"softcap": softcap}
    ours, eager = er.linear_vocab_stats(*args, impl=impl, **want), reference.linear_vocab_stats(*args, **want)
    oracle = reference.linear_vocab_stats(hidden.double(), weight.double(), targets, dtype=F64, **want)
    assert_within_budget(ours.target_logit, eager.target_logit, oracle.target_logit, scale=4.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab", [1, 5, 4999, 151669])
def test_entropy_of_equal_logits_is_at_most_ln_v(vocab, impl, device):
    out = er.vocab_stats(
        torch.zeros(1, vocab, device=device), torch.zeros(1, dtype=torch.long, device=device), entropy=True, impl=impl
    )
    assert 0 <= out.entropy.item() <= torch.tensor(math.log(vocab)).item()


@pytest.mark.parametrize("impl", IMPLS)
def test_one_token_that_stands_out_among_equal_ones(impl, device, assert_within_budget):
    """Each addition of an equal number to the large one rounds the same way, so a plain sum drifts along the row."""
    logits = torch.zeros(4, 50257, device=device)
    logits[:, 0] = torch.tensor([2.0, 9.0, 12.0, 13.0])
    targets = torch.tensor([0, 1, 0, -100], device=device)
    ours = _stats(logits, targets, impl)
    _check(ours, logits, targets, assert_within_budget)

    def gradient(call, dtype):
        z = logits.detach().clone().to(dtype).requires_grad_()
        out = call(z)
        (out.lse.sum() + 2 * out.entropy.sum() - out.target_logit.sum()).backward()
        return z.grad

    assert_within_budget(
        gradient(lambda z: _stats(z, targets, impl), torch.float32),
        gradient(lambda z: reference.vocab_stats(z, targets, entropy=True), torch.float32),
        gradient(lambda z: reference.vocab_stats(z, targets, entropy=True, dtype=F64), F64),
    )


@pytest.mark.parametrize("offset", [-2e4, 1e4, 1e6])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_common_offset_leaves_probabilities_alone(offset, impl, device, assert_within_budget):
    logits = torch.randn(4, 777, device=device) + offset
    targets = torch.randint(0, 777, (4,), device=device)
    ours = _stats(logits, targets, impl)
    _check(ours, logits, targets, assert_within_budget, scale=abs(offset))
    # The entropy does not contain the offset and must be as accurate as without it.
    near = reference.vocab_stats(logits.double() - offset, targets, entropy=True, dtype=F64)
    assert (ours.entropy - near.entropy).abs().max() < 1e-5


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_under_a_common_offset(offset, impl, device, assert_within_budget):
    """exp(z - lse) with a rounded lse is off by 6% at an offset of 1e6."""
    logits = torch.randn(4, 777, device=device) + offset
    targets = torch.randint(0, 777, (4,), device=device)

    def gradient(call, dtype):
        z = logits.detach().clone().to(dtype).requires_grad_()
        out = call(z)
        (out.lse.sum() + 2 * out.entropy.sum() - out.target_logit.sum()).backward()
        return z.grad

    ours = gradient(lambda z: _stats(z, targets, impl), torch.float32)
    eager = gradient(lambda z: reference.vocab_stats(z, targets, entropy=True), torch.float32)
    oracle = gradient(lambda z: reference.vocab_stats(z, targets, entropy=True, dtype=F64), F64)
    assert_within_budget(ours, eager, oracle)


@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize("impl", IMPLS)
def test_logprobs_of_rewards_under_a_common_offset(offset, impl, device):
    logits = torch.randn(2, 6, 200, device=device) + offset
    tokens = torch.randint(0, 200, (2, 6), device=device)
    ours = er.token_rewards(logits, tokens, impl=impl)
    oracle = reference.token_rewards(logits, tokens, dtype=F64)
    room = 1e-5 if impl != "reference" else 1e-5 + offset * 2e-7  # eager torch subtracts a rounded lse
    assert (ours.logprob - oracle.logprob).abs().max() < room


@pytest.mark.parametrize("impl", IMPLS)
def test_a_whole_tile_of_minus_infinity_and_single_ones(impl, device, assert_within_budget):
    logits = torch.randn(3, 20000, device=device)
    logits[0, :8192] = -torch.inf  # the first tile, before any finite number has been seen
    logits[1, 5:19990] = -torch.inf
    logits[2, 1] = -torch.inf
    targets = torch.tensor([9000, 2, 1], device=device)
    ours = _stats(logits, targets, impl)
    _check(ours, logits, targets, assert_within_budget)
    assert ours.entropy.isfinite().all() and ours.target_logit[2] == -torch.inf
    z = logits.clone().requires_grad_()
    out = _stats(z, torch.full_like(targets, -100), impl)
    (out.lse.sum() + out.entropy.sum()).backward()
    assert z.grad.isfinite().all() and z.grad[logits == -torch.inf].eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_is_all_minus_infinity_has_one_defined_answer(impl, device):
    logits = torch.randn(1, 4, 300, device=device)
    logits[0, 1] = -torch.inf
    tokens = torch.randint(0, 300, (1, 4), device=device)
    stats = er.vocab_stats(logits, tokens, entropy=True, impl=impl)
    assert stats.lse[0, 1] == -torch.inf and stats.entropy[0, 1] == 0
    assert stats.lse[0, [0, 2, 3]].isfinite().all()
    z = logits.clone().requires_grad_()
    out = er.token_rewards(z, tokens, entropy=True, impl=impl)
    # Token 1 leads to the dead state and counts as terminal. Token 2 is chosen in the dead state.
    torch.testing.assert_close(out.reward[0, 1], logits[0, 0, tokens[0, 1]])
    assert out.reward[0, 2] == -torch.inf and out.logprob[0, 2] == -torch.inf and out.entropy[0, 2] == 0
    assert not any(f.isnan().any() for f in out)
    (out.reward[0, [1, 3]].sum() + out.entropy.sum()).backward()
    assert z.grad.isfinite().all() and z.grad[0, 1].eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_logits_are_not_swallowed(impl, device):
    """max() drops a NaN; the sum must keep it."""
    logits = torch.randn(3, 500, device=device)
    logits[1, 400] = torch.nan
    out = er.vocab_stats(logits, torch.zeros(3, dtype=torch.long, device=device), entropy=True, impl=impl)
    assert out.lse.isnan().tolist() == [False, True, False] == out.entropy.isnan().tolist()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("peak", [0.0, 20.0, 500.0])
def test_bounds_hold_always(impl, peak, device):
    """logprob <= 0 and 0 <= entropy <= ln V. Uniform rows and certain tokens reach the bounds."""
    vocab = 1000
    logits = torch.full((1, 9, vocab), 3.7, device=device)
    logits[..., 5] += peak
    tokens = torch.full((1, 9), 5, device=device)
    for alpha in (0.3, 1.0, 3.0):
        out = er.token_rewards(logits, tokens, alpha=alpha, entropy=True, impl=impl)
        assert (out.logprob <= 0).all()
        assert (out.entropy >= 0).all() and (out.entropy <= torch.tensor(math.log(vocab)).to(device)).all()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("layout", ["transposed", "padded rows", "every other", "slice of time", "unaligned"])
def test_strides_are_honoured_and_inputs_left_alone(impl, layout, device):
    b, t, v = 3, 6, 150
    logits = torch.randn(b, t, v, device=device)
    view = {
        "transposed": lambda: logits.transpose(1, 2).contiguous().transpose(1, 2),
        "padded rows": lambda: torch.nn.functional.pad(logits, (0, 11))[..., :v],
        "every other": lambda: logits.repeat_interleave(2, -1)[..., ::2],
        "slice of time": lambda: torch.nn.functional.pad(logits, (0, 0, 0, 2))[:, :t],
        "unaligned": lambda: torch.cat([logits.new_zeros(1), logits.flatten()])[1:].view(b, t, v),
    }[layout]()
    assert torch.equal(view, logits)
    tokens = torch.randint(0, v, (b, t), device=device)
    before = view.clone()
    plain, strided = logits.clone().requires_grad_(), view.detach().requires_grad_()
    results = []
    for z in (plain, strided):
        out = er.vocab_stats(z, tokens, entropy=True, impl=impl)
        out.lse.sum().backward()
        results.append([*out[:3], z.grad])
    for a, c in zip(*results, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-6)
    # The gradient of a sum has stride 0. A kernel that reads it as dense is wrong in both layouts.
    torch.testing.assert_close(strided.grad, torch.softmax(logits, -1), rtol=1e-5, atol=1e-6)
    assert torch.equal(view, before)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dim", [70, 123, 300])
def test_any_width_and_strided_weights(impl, dim, device, assert_within_budget):
    wide = torch.randn(90, dim + 5, device=device)
    weight, hidden = wide[:, 3 : dim + 3], torch.randn(dim, 11, device=device).T
    targets = torch.randint(0, 90, (11,), device=device)
    ours = er.linear_vocab_stats(hidden, weight, targets, entropy=True, impl=impl)
    eager = reference.linear_vocab_stats(hidden, weight, targets, entropy=True)
    oracle = reference.linear_vocab_stats(hidden.double(), weight.double(), targets, entropy=True, dtype=F64)
    for name in ("lse", "target_logit", "entropy"):
        assert_within_budget(getattr(ours, name), getattr(eager, name), getattr(oracle, name), scale=30.0, name=name)


@pytest.mark.parametrize("path", ["logits", "linear"])
def test_a_row_alone_is_bitwise_the_same_row_in_a_batch_and_from_run_to_run(path, device):
    hidden, weight = torch.randn(37, 48, device=device), torch.randn(500, 48, device=device)
    targets = torch.randint(0, 500, (37,), device=device)

    def run(rows):
        args = (hidden[rows], weight) if path == "linear" else ((hidden @ weight.T)[rows],)
        fn = er.linear_vocab_stats if path == "linear" else er.vocab_stats
        return fn(*args, targets[rows], entropy=True, logit_mean=True, impl="fused")[:4]

    everything = run(slice(None))
    for rows in (slice(None), slice(5, 6), slice(30, 37)):
        for a, b in zip(run(rows), everything, strict=True):
            assert torch.equal(a, b[rows])


@pytest.mark.parametrize("impl", FAST)
def test_a_bias_is_counted_once_whatever_the_vocabulary_is_split_into(impl, device):
    """With a weight of zeros, the logits are the bias."""
    bias = torch.randn(3000, device=device)
    targets = torch.randint(0, 3000, (4,), device=device)
    hidden, weight = torch.randn(4, 16, device=device), torch.zeros(3000, 16, device=device)
    out = er.linear_vocab_stats(hidden, weight, targets, bias=bias, impl=impl)
    torch.testing.assert_close(out.target_logit, bias[targets])
    torch.testing.assert_close(out.lse, torch.logsumexp(bias, 0).expand(4))


@pytest.mark.parametrize("impl", FAST)
def test_weight_gradient_in_bf16_accumulates_in_fp32(impl, device, monkeypatch):
    """17 tiles of 16 rows. The first row adds 256, where bf16 has steps of 2; each later tile adds 0.25."""
    monkeypatch.setattr(chunked_tiles, "CPU_LIMITS", replace(chunked_tiles.CPU_LIMITS, rows=16))
    monkeypatch.setattr(workspace, "BACKWARD_ROWS", 16)
    rows, vocab, dim = 17 * 16, 64, 16
    hidden = torch.ones(rows, dim, device=device, dtype=torch.bfloat16)
    hidden[0] = 2.0**14
    weight = torch.zeros(vocab, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.long, device=device)
    out = er.linear_vocab_stats(hidden, weight, targets, impl=impl)
    out.lse.sum().backward()
    expected = torch.full_like(weight, 256 + (rows - 1) / vocab, dtype=torch.float32)
    torch.testing.assert_close(weight.grad.float(), expected, rtol=1 / 256, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_backward_twice_gives_the_same_gradient(path, impl, device):
    hidden, weight = torch.randn(2, 5, 16, device=device), torch.randn(90, 16, device=device)
    tokens = torch.randint(0, 90, (2, 5), device=device)
    leaves = [x.requires_grad_() for x in ((hidden, weight) if path == "linear" else (hidden @ weight.T,))]
    fn = er.linear_token_rewards if path == "linear" else er.token_rewards
    out = fn(*leaves, tokens, entropy=True, impl=impl)
    loss = out.reward.sum() + out.entropy.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_a_persistent_grid_gives_the_same_bits(programs, device):
    from endoreward_fast.kernels.config import INTERPRETER_CONFIG
    from endoreward_fast.kernels.linear_vocab_stats import linear_partials
    from endoreward_fast.vocab.fused import interpreted

    hidden, weight = torch.randn(40, 24, device=device), torch.randn(300, 24, device=device)
    targets = torch.randint(0, 300, (40,), device=device)
    want = {"alpha": 1.0, "entropy": True, "logit_mean": True, "config": INTERPRETER_CONFIG, "split": 64}
    plain, persistent = (
        linear_partials(hidden, weight, targets, **want, interpreted=interpreted(), programs=n)
        for n in (None, programs)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain[:5], persistent[:5], strict=True))
