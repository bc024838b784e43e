"""Properties, over shapes, strides, dtypes and heads that nobody chose: against the fp64 oracle, and between calls.

The examples are the same on every run; HYPOTHESIS_PROFILE=long draws 10 times as many, at random.
"""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import endoreward_fast as er
from endoreward_fast import reference

settings.register_profile("repeatable", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=250, deadline=None)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

IMPLS = ("fused", "chunked")
FIELDS = ("lse", "target_logit", "entropy", "logit_mean")
F64 = torch.float64
LAYOUTS = ("contiguous", "transposed", "sliced", "padded", "unaligned", "expanded")
alphas = st.sampled_from([0.1, 0.7, 1.0, 3.0, 20.0])
vocabs = st.integers(1, 300)
seeds = st.integers(0, 2**31)


def laid_out(x, layout):
    """x, as it may lie in memory: the same numbers, another stride or base."""
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":  # every second column of a wider tensor
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "padded":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
        wide[..., :-3] = x
        return wide[..., :-3]
    if layout == "unaligned":
        flat = x.new_empty(x.numel() + 1)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    if layout == "expanded" and x.ndim == 3:  # one sequence, read B times
        return x[:1].expand(x.shape)
    return x.contiguous()


@st.composite
def logit_cases(draw):
    torch.manual_seed(draw(seeds))
    batch, length, vocab = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(vocabs)
    z = torch.randn(batch, length, vocab) * draw(st.sampled_from([0.1, 3.0, 30.0]))
    z += draw(st.sampled_from([0.0, -1e4, 1e6]))
    ruled_out = draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
    z[torch.rand_like(z) < ruled_out] = -torch.inf
    tokens = torch.randint(0, vocab, (batch, length))
    tokens[torch.rand(batch, length) < 0.2] = -100
    mask = torch.rand(batch, length) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    if dtype == torch.float16:  # which ends at 65504
        z = torch.where(z > 6e4, z - 1e6, z)
    z = laid_out(z.to(dtype), draw(st.sampled_from(LAYOUTS)))
    return z, tokens, mask


@st.composite
def linear_cases(draw):
    torch.manual_seed(draw(seeds))
    rows, dim, vocab = draw(st.integers(0, 40)), draw(st.integers(1, 70)), draw(vocabs)
    hidden = laid_out(torch.randn(rows, dim), draw(st.sampled_from(LAYOUTS[:-1])))
    weight = laid_out(torch.randn(vocab, dim), draw(st.sampled_from(LAYOUTS[:-1])))
    targets = torch.randint(0, vocab, (rows,))
    targets[::4] = -100
    head = {
        "alpha": draw(alphas),
        "bias": draw(st.sampled_from([None, torch.randn(vocab)])),
        "logit_scale": draw(st.sampled_from([1.0, 0.3, -2.0])),
        "softcap": draw(st.sampled_from([None, 1.0, 30.0])),
        "mask": draw(st.sampled_from([None, torch.rand(rows) < 0.5])),
    }
    return hidden, weight, targets, head


def on(device, *values):
    return [x.to(device) if isinstance(x, torch.Tensor) and x.device != device else x for x in values]


def in_double(head):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in head.items()}


@pytest.mark.parametrize("impl", IMPLS)
@settings(PROFILE)
@given(case=logit_cases(), alpha=alphas)
def test_statistics_of_any_logits(impl, case, alpha, device, assert_within_budget):
    z, tokens, mask = on(device, *case)
    want = {"mask": mask, "alpha": alpha, "entropy": True, "logit_mean": True}
    ours = er.vocab_stats(z, tokens, impl=impl, **want)
    eager = reference.vocab_stats(z, tokens, **want)
    oracle = reference.vocab_stats(z, tokens, dtype=F64, **want)
    largest = z.float().masked_fill(z == -torch.inf, 0.0).abs().amax().item()
    for name in ours._fields:
        scale = max(1.0, math.log(z.shape[-1])) if name == "entropy" else max(1.0, largest) / min(alpha, 1.0)
        assert_within_budget(getattr(ours, name), getattr(eager, name), getattr(oracle, name), scale=scale, name=name)
    assert (ours.entropy >= 0).all() and (ours.entropy <= math.log(z.shape[-1]) + 1e-6).all()


@pytest.mark.parametrize("impl", IMPLS)
@settings(PROFILE)
@given(case=linear_cases())
def test_statistics_of_any_head(impl, case, device, assert_within_budget):
    hidden, weight, targets, head = case
    hidden, weight, targets = on(device, hidden, weight, targets)
    head = dict(zip(head, on(device, *head.values()), strict=True)) | {"entropy": True, "logit_mean": True}
    ours = er.linear_vocab_stats(hidden, weight, targets, impl=impl, **head)
    eager = reference.linear_vocab_stats(hidden, weight, targets, **head)
    oracle = reference.linear_vocab_stats(hidden.double(), weight.double(), targets, dtype=F64, **in_double(head))
    for name in ours._fields:
        scale = 60.0 / min(head["alpha"], 1.0)  # |z| < 60, and a row's statistics are sums of it
        assert_within_budget(getattr(ours, name), getattr(eager, name), getattr(oracle, name), scale=scale, name=name)


@pytest.mark.parametrize("impl", IMPLS)
@settings(PROFILE)
@given(case=linear_cases(), fields=st.sets(st.sampled_from(FIELDS), min_size=1))
def test_gradients_of_any_head_in_a_random_direction(impl, case, fields, device):
    hidden, weight, targets, head = case
    hidden, weight, targets = on(device, hidden, weight, targets)
    head = dict(zip(head, on(device, *head.values()), strict=True)) | {"entropy": True, "logit_mean": True}
    upstream = {name: torch.randn(len(hidden), device=device) for name in sorted(fields)}

    def gradients(module, precision, **how):
        bias = None if head["bias"] is None else head["bias"].to(precision).detach().requires_grad_()
        h, w = (x.to(precision).detach().requires_grad_() for x in (hidden, weight))
        out = module.linear_vocab_stats(h, w, targets, **head | {"bias": bias}, **how)
        total = sum((getattr(out, n) * g.to(precision)).sum() for n, g in upstream.items())
        return torch.autograd.grad(total, [h, w] if bias is None else [h, w, bias], allow_unused=True)

    oracle = gradients(reference, F64, dtype=F64)
    eager = gradients(reference, torch.float32)
    for ours, eager_gradient, exact in zip(gradients(er, torch.float32, impl=impl), eager, oracle, strict=True):
        if exact is None or not exact.numel():
            continue
        error, eager_error = ((g.double() - exact).abs().max() for g in (ours, eager_gradient))
        # Recomputed in other tiles, z differs in its last bits (|z| < 60: 4e-6), which p = exp(z / alpha) magnifies.
        largest = exact.abs().max().clamp(min=1.0)
        assert error <= 4 * eager_error + 1e-4 * largest / min(head["alpha"], 1.0)


@pytest.mark.parametrize("impl", IMPLS)
@settings(PROFILE)
@given(case=logit_cases(), alpha=alphas)
def test_the_summed_reward_is_the_summed_logprob_and_the_first_value(impl, case, alpha, device):
    z, tokens, mask = on(device, *case)
    z = torch.where(z.isfinite(), z, -5.0).float() - z.float().nan_to_num(0, 0, 0).mean().round()
    out = er.token_rewards(z, tokens, mask=mask, alpha=alpha, impl=impl)
    scored = (mask & (tokens != -100)).cpu()
    scored[:, 0] = False
    for row in range(len(z)):
        for start in range(1, z.shape[1]):
            if not scored[row, start] or scored[row, start - 1]:
                continue
            stop = start
            while stop < z.shape[1] and scored[row, stop]:
                stop += 1
            run = slice(start, stop)
            expected = alpha * out.logprob[row, run].sum() + out.value[row, start]
            size = out.reward[row, run].abs().sum() + out.value[row, run].abs().sum() + 1
            assert abs(out.reward[row, run].sum() - expected) <= 1e-5 * size


@pytest.mark.parametrize("impl", IMPLS)
@settings(PROFILE)
@given(case=logit_cases(), alpha=alphas, factor=st.sampled_from([0.5, 2.0, 4.0]))
def test_what_must_not_matter_does_not(impl, case, alpha, factor, device):
    z, tokens, _ = on(device, *case)
    want = {"entropy": True, "impl": impl}
    out = er.vocab_stats(z, tokens, alpha=alpha, **want)
    scaled = er.vocab_stats(z.float() * factor, tokens, alpha=alpha * factor, **want)  # powers of two: exact
    torch.testing.assert_close(scaled.lse, out.lse, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(scaled.entropy, out.entropy, rtol=1e-5, atol=1e-5)
    order = torch.randperm(z.shape[-1], device=device)
    place = torch.argsort(order)
    moved = er.vocab_stats(
        z[..., order], torch.where(tokens >= 0, place[tokens.clamp(min=0)], -100), alpha=alpha, **want
    )
    assert torch.equal(moved.target_logit, out.target_logit)
    torch.testing.assert_close(moved.lse, out.lse, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(moved.entropy, out.entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["logits", "linear"])
@settings(PROFILE)
@given(seed=seeds, lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_packed_sequences_are_the_sequences_bit_for_bit(path, seed, lengths, device):
    total = sum(lengths)
    if not total:
        return
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, total, 16, generator=generator).to(device)
    weight = torch.randn(90, 16, generator=generator).to(device)
    tokens = torch.randint(0, 90, (1, total), generator=generator).to(device)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
    logits = torch.stack([weight @ h for h in hidden[0]])[None]  # made row by row: the same bits in any batch

    def rewards(where, **how):
        if path == "logits":
            return er.token_rewards(logits[:, where], tokens[:, where], entropy=True, impl="fused", **how)
        return er.linear_token_rewards(hidden[:, where], weight, tokens[:, where], entropy=True, impl="fused", **how)

    packed = rewards(slice(None), cu_seqlens=offsets)
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        if stop > start:
            alone = rewards(slice(start, stop))
            assert all(torch.equal(a[:, start:stop], b) for a, b in zip(packed, alone, strict=True))


@settings(PROFILE)
@given(case=logit_cases(), alpha=alphas, bootstrap=st.booleans())
def test_the_oracle_is_the_definition_written_out(case, alpha, bootstrap):
    """Nothing but arithmetic: one token after the other, in Python floats."""
    z, tokens, mask = case
    z = z.double().nan_to_num(0.0, 0.0, -3.0)
    ends = torch.zeros_like(mask) if bootstrap else None
    out = reference.token_rewards(z, tokens, mask=mask, terminal=ends, alpha=alpha, entropy=True, dtype=F64)
    scored = [
        [t > 0 and bool(mask[b, t]) and int(tokens[b, t]) != -100 for t in range(z.shape[1])] for b in range(len(z))
    ]

    def value(b, t):
        top = max(z[b, t].tolist())
        return top + alpha * math.log(sum(math.exp((x - top) / alpha) for x in z[b, t].tolist()))

    for b in range(len(z)):
        for t in range(z.shape[1]):
            if not scored[b][t]:
                assert all(field[b, t] == 0 for field in out)
                continue
            last = not (t + 1 < z.shape[1] and scored[b][t + 1])
            after = 0.0 if last and not bootstrap else value(b, t)
            q, v = z[b, t - 1, tokens[b, t]].item(), value(b, t - 1)
            p = [math.exp((x - v) / alpha) for x in z[b, t - 1].tolist()]
            entropy = -sum(x * math.log(x) for x in p if x > 0)
            expected = (q - after, (q - v) / alpha, v, entropy)
            for field, exact in zip(out, expected, strict=True):
                assert math.isclose(field[b, t].item(), exact, rel_tol=1e-9, abs_tol=1e-6 / min(alpha, 1.0))
