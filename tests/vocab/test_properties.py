"""Every implementation against the fp64 oracle under the error budget, on inputs that hypothesis draws.

The oracle itself is compared with the definitions, written again in Python floats. Shapes, memory layouts, dtypes,
temperatures, heads, masks, packings and rows of -inf are all drawn (property_cases.py). The examples are the same in
every run; HYPOTHESIS_PROFILE=long draws 1000 new ones per test. test_mutations.py lists the broken copies on which each
test fails.
"""

import pytest
import torch
from hypothesis import given

import endoreward_fast as er
from endoreward_fast.vocab import reference
from endoreward_fast.vocab.compiled import find_compiler
from property_cases import (
    EPS32,
    F64,
    call,
    drawn,
    exact_logits,
    final_logits,
    flat,
    linear_cases,
    logit_cases,
    logits_by_definition,
    offsets_of,
    rewards_by_definition,
    scale_of,
    stats_by_definition,
)

pytestmark = pytest.mark.device  # drawn on the device by property_cases.py

COMPILED = pytest.param(
    "compiled",
    marks=pytest.mark.skipif(
        torch.cuda.is_available() or find_compiler() is None,
        reason="impl='compiled' needs CPU tensors and a C++ compiler",
    ),
)
FAST = ("fused", "chunked", COMPILED)
CASES = {"logits": logit_cases(), "linear": linear_cases()}


def bits(x):
    """Return a tensor that torch.equal can compare although some numbers are NaN."""
    return x.detach().clone().nan_to_num(nan=7.25)


@pytest.mark.parametrize("kind", ["stats", "rewards"])
@pytest.mark.parametrize("path", CASES)
@pytest.mark.parametrize("impl", FAST)
def test_within_the_budget(impl, path, kind, assert_within_budget):
    @drawn(20)
    @given(CASES[path])
    def check(case):
        before = [bits(x) for x in (*case.tensors.values(), case.tokens)]
        with exact_logits():
            ours = call(er, case, kind, impl=impl)
        eager = call(reference, case, kind)
        oracle = call(reference, case, kind, case.leaves(F64), dtype=F64)
        for name, field in zip(ours._fields[:4], ours[:4], strict=True):
            assert field.dtype == torch.float32 and field.shape == case.tokens.shape
            scale = scale_of(case, name)
            assert_within_budget(field, getattr(eager, name), getattr(oracle, name), scale=scale, name=name)
        vocab = final_logits(case).shape[-1]
        assert (ours.entropy >= 0).all()
        assert (ours.entropy <= torch.log(torch.tensor(float(vocab)))).all()
        assert kind == "stats" or (ours.logprob <= 0).all()
        after = [bits(x) for x in (*case.tensors.values(), case.tokens)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was written to"

    check()


@pytest.mark.parametrize("impl", [*FAST, "reference"])
def test_low_precision_logits_equal_the_same_numbers_in_float32(impl):
    @drawn(20)
    @given(logit_cases(dtypes=[torch.bfloat16, torch.float16]))
    def check(case):
        low, high = (call(er, case, "rewards", leaves, impl=impl) for leaves in (None, case.leaves(torch.float32)))
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(low, high, strict=True))

    check()


def gradients(module, case, kind, leaf_dtype=None, **extra):
    """Return the gradients of every input, with a different upstream gradient for every row and field."""
    leaves = {k: x.detach().requires_grad_() for k, x in case.leaves(leaf_dtype).items()}
    out = call(module, case, kind, leaves, **extra)[:4]
    upstream = [g.to(field.dtype) for g, field in zip(case.upstream, out, strict=True)]
    return torch.autograd.grad(list(out), list(leaves.values()), upstream, allow_unused=True)


@pytest.mark.parametrize("kind", ["stats", "rewards"])
@pytest.mark.parametrize("path", CASES)
@pytest.mark.parametrize("impl", FAST)
def test_gradients_within_the_budget(impl, path, kind, assert_within_budget):
    @drawn(14)
    @given(CASES[path])
    def check(case):
        with exact_logits():
            ours = gradients(er, case, kind, impl=impl)
        eager, oracle = gradients(reference, case, kind), gradients(reference, case, kind, leaf_dtype=F64, dtype=F64)
        others = {"hidden": "weight", "weight": "hidden"}  # what a gradient of the logits is multiplied by
        for name, a, b, c in zip(case.tensors, ours, eager, oracle, strict=True):
            assert a.isfinite().all() and a.dtype == case.tensors[name].dtype
            factor = case.tensors[others[name]].abs().max().item() if name in others else 1.0
            summands = 4 * (1 + case.spread) / min(1.0, case.alpha) * max(1.0, factor)
            rounding = torch.finfo(a.dtype).eps / (16 * EPS32) * c.abs().max().item()
            assert_within_budget(a, b, c, scale=max(summands, rounding), name=f"d{name}")

    check()


# ------------------------------------------------------------------------------------------------ the oracle itself


@pytest.mark.parametrize("path", CASES)
def test_the_oracle_is_the_definition(path):
    dtypes = [torch.float32]

    @drawn(60)
    @given(logit_cases(dtypes=dtypes) if path == "logits" else linear_cases(dtypes=dtypes))
    def check(case):
        count = case.tokens.numel()
        if path == "logits":
            z = case.tensors["logits"].double().flatten(0, 1).tolist()
        else:
            leaves = {k: x.double() for k, x in case.tensors.items()}
            bias = leaves["bias"].tolist() if "bias" in leaves else None
            z = logits_by_definition(
                leaves["hidden"].flatten(0, 1).tolist(), leaves["weight"].tolist(), bias, **case.head
            )
        tokens, mask = flat(case.tokens, 0, count), flat(case.mask, True, count)

        stats = [
            stats_by_definition(*row, case.alpha) if m else (0.0,) * 4 for *row, m in zip(z, tokens, mask, strict=True)
        ]
        oracle = call(reference, case, "stats", case.leaves(F64), dtype=F64)
        _assert_same(oracle, stats, case)

        terminal = None if case.terminal is None else flat(case.terminal, False, count)
        rewards = rewards_by_definition(z, tokens, mask, terminal, offsets_of(case), case.alpha)
        oracle = call(reference, case, "rewards", case.leaves(F64), dtype=F64)
        _assert_same(oracle, rewards, case)

    check()


def _assert_same(fields, by_token, case):
    scale = max(1.0, case.scale, case.scale / case.alpha)
    expected = torch.tensor(by_token, dtype=F64, device=case.tokens.device).T
    for name, field, column in zip(fields._fields[:4], fields[:4], expected, strict=True):
        torch.testing.assert_close(field.flatten(), column, rtol=1e-12, atol=1e-13 * scale, msg=lambda m, n=name: n + m)
