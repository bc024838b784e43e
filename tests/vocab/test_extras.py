"""A temperature for each token, and the log-probabilities of named tokens: every implementation that has them.

The draws are those of test_properties.py, with temperatures and names added.
"""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import endoreward_fast as er
from endoreward_fast.vocab import chunked, fused, ops, reference
from endoreward_fast.vocab.rows import RowStats
from endoreward_fast.vocab.shard_layout import VocabShard
from property_cases import (
    DEVICE,
    EPS32,
    F64,
    call,
    drawn,
    exact_logits,
    final_logits,
    flat,
    linear_cases,
    logit_cases,
    offsets_of,
    rewards_by_definition,
    scale_of,
)

pytestmark = pytest.mark.device

FAST = ("fused", "chunked")
CASES = {"logits": logit_cases(), "linear": linear_cases()}


def warmed(case):
    """Return the case with a temperature for each token, NaN off the mask, and the smallest of them."""
    spread = torch.linspace(-1.0, 1.0, case.tokens.numel(), device=DEVICE).view_as(case.tokens).flip(0)
    alpha = (case.alpha * spread.exp()).float()
    smallest = alpha.min().item() if alpha.numel() else case.alpha
    if case.mask is not None:
        alpha = torch.where(case.mask, alpha, torch.nan)
    return case._replace(alpha=alpha, spread=case.spread * case.alpha / smallest), smallest


def names(case):
    """Return ids at both ends of the vocabulary, and one of them twice."""
    vocab = final_logits(case).shape[-1]
    return torch.tensor([vocab - 1, 0, vocab - 1], device=DEVICE)


def wanted(case, kind):
    return {"named": names(case)} if kind == "stats" else {}


def magnitude(case, smallest, field):
    if field == "named_logprob":
        return max(1.0, case.spread)
    return scale_of(case._replace(alpha=smallest), field)


@pytest.mark.parametrize("kind", ["stats", "rewards"])
@pytest.mark.parametrize("path", CASES)
@pytest.mark.parametrize("impl", FAST)
def test_temperatures_and_names_within_the_budget(impl, path, kind, assert_within_budget):
    @drawn(5)
    @given(CASES[path])
    def check(case):
        case, smallest = warmed(case)
        extra = wanted(case, kind)
        with exact_logits():
            ours = call(er, case, kind, impl=impl, **extra)
        eager = call(reference, case, kind, **extra)
        oracle = call(reference, case, kind, case.leaves(F64), dtype=F64, **extra)
        for name, field in ours._asdict().items():
            scale = magnitude(case, smallest, name)
            assert_within_budget(field, getattr(eager, name), getattr(oracle, name), scale=scale, name=name)
        last = ours.named_logprob if kind == "stats" else ours.logprob
        assert (last <= 0).all() and last.dtype == torch.float32

    check()


def gradients(module, case, kind, leaf_dtype=None, **extra):
    leaves = {k: x.detach().requires_grad_() for k, x in case.leaves(leaf_dtype).items()}
    out = call(module, case, kind, leaves, **wanted(case, kind), **extra)
    upstream = [g.to(field.dtype) for g, field in zip(case.upstream, out, strict=False)]
    if kind == "stats":
        upstream.append(torch.stack([case.upstream[0], case.upstream[1], case.upstream[2]], -1).to(out[4].dtype))
    return torch.autograd.grad(list(out), list(leaves.values()), upstream)


@pytest.mark.parametrize("kind", ["stats", "rewards"])
@pytest.mark.parametrize("path", CASES)
@pytest.mark.parametrize("impl", FAST)
def test_gradients_of_temperatures_and_names_within_the_budget(impl, path, kind, assert_within_budget):
    @drawn(4)
    @given(CASES[path])
    def check(case):
        case, smallest = warmed(case)
        with exact_logits():
            ours = gradients(er, case, kind, impl=impl)
        eager, oracle = gradients(reference, case, kind), gradients(reference, case, kind, leaf_dtype=F64, dtype=F64)
        others = {"hidden": "weight", "weight": "hidden"}
        for name, a, b, c in zip(case.tensors, ours, eager, oracle, strict=True):
            factor = case.tensors[others[name]].abs().max().item() if name in others else 1.0
            summands = 4 * (1 + case.spread) / min(1.0, smallest) * max(1.0, factor)
            rounding = torch.finfo(a.dtype).eps / (16 * EPS32) * c.abs().max().item()
            assert_within_budget(a, b, c, scale=max(summands, rounding), name=f"d{name}")

    check()


def test_the_oracle_of_temperatures_is_the_definition():
    @drawn(20)
    @given(logit_cases(dtypes=[torch.float32]))
    def check(case):
        case, smallest = warmed(case)
        count = case.tokens.numel()
        z = case.tensors["logits"].double().flatten(0, 1).tolist()
        terminal = None if case.terminal is None else flat(case.terminal, False, count)
        expected = rewards_by_definition(
            z, flat(case.tokens, 0, count), flat(case.mask, True, count), terminal, offsets_of(case),
            case.alpha.double().flatten().tolist(),
        )  # fmt: skip
        oracle = call(reference, case, "rewards", case.leaves(F64), dtype=F64)
        scale = magnitude(case, smallest, "reward")
        for name, field, column in zip(oracle._fields, oracle, zip(*expected, strict=True), strict=True):
            column = torch.tensor(column, dtype=F64, device=DEVICE)
            torch.testing.assert_close(
                field.flatten(), column, rtol=1e-12, atol=1e-13 * scale, msg=lambda m, n=name: n + m
            )

    check()


# -------------------------------------------------------------------------------------------------- temperatures


@pytest.mark.parametrize("impl", [*FAST, "reference"])
def test_the_alpha_of_a_token_is_that_of_the_state_before_it(impl, device):
    """By hand: logits (0, ln 3) in each state, so V = alpha ln(1 + 3^(1 / alpha))."""
    logits = torch.tensor([0.0, math.log(3.0)], device=device).expand(1, 4, 2)
    tokens = torch.tensor([[0, 1, 1, 0]], device=device)
    alpha = torch.tensor([[9.0, 1.0, 0.5, 2.0]], device=device)

    def value(a):
        return a * math.log(1 + 3 ** (1 / a))

    chosen = [math.log(3.0), math.log(3.0), 0.0]
    ends = er.token_rewards(logits, tokens, alpha=alpha, impl=impl)
    expected = [chosen[0] - value(0.5), chosen[1] - value(2.0), chosen[2]]
    torch.testing.assert_close(ends.reward[0, 1:], torch.tensor(expected, device=device))
    expected = [(chosen[t] - value(a)) / a for t, a in enumerate((1.0, 0.5, 2.0))]
    torch.testing.assert_close(ends.logprob[0, 1:], torch.tensor(expected, device=device))
    # A bootstrapped end has the alpha of the token that led to it.
    on = er.token_rewards(logits, tokens, terminal=torch.zeros_like(tokens) > 0, alpha=alpha, impl=impl)
    assert on.reward[0, 3].item() == pytest.approx(chosen[2] - value(2.0), rel=1e-6)


@pytest.mark.parametrize("impl", FAST)
def test_rewards_under_many_temperatures_sum_to_logprobs_and_the_first_value(impl, device):
    hidden, weight = torch.randn(2, 6, 16, device=device), torch.randn(90, 16, device=device)
    tokens = torch.randint(0, 90, (2, 6), device=device)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]], device=device).bool()
    alpha = 0.3 + torch.rand(2, 6, device=device)
    out = er.linear_token_rewards(hidden, weight, tokens, mask=mask, alpha=alpha, impl=impl)
    first = torch.stack([out.value[0, 2], out.value[1, 1]])
    torch.testing.assert_close(out.reward.sum(1), (alpha * out.logprob).sum(1) + first, rtol=1e-4, atol=1e-3)
    oracle = reference.linear_token_rewards(hidden.double(), weight.double(), tokens, mask=mask, alpha=alpha, dtype=F64)
    torch.testing.assert_close(out.logprob.double(), oracle.logprob, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", FAST)
def test_the_gradient_of_the_next_value_has_its_own_temperature(impl, device):
    logits, tokens = torch.randn(1, 5, 30, device=device), torch.randint(0, 30, (1, 5), device=device)
    alpha = torch.tensor([[1.0, 0.2, 3.0, 0.4, 2.0]], device=device)
    on = torch.zeros_like(tokens) > 0
    found = []
    for module, leaf, extra in ((er, logits, {"impl": impl}), (reference, logits.double(), {"dtype": F64})):
        leaf = leaf.detach().requires_grad_()
        out = module.token_rewards(leaf, tokens, terminal=on, alpha=alpha, **extra)
        found += torch.autograd.grad(out.reward.square().sum(), leaf)
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", FAST)
def test_one_temperature_for_all_rows_is_the_number(impl, device):
    logits, targets = torch.randn(2, 5, 300, device=device), torch.randint(0, 300, (2, 5), device=device)
    number, tensor = (
        er.vocab_stats(logits, targets, alpha=alpha, entropy=True, named=[0, 299], impl=impl)
        for alpha in (0.6, torch.full((2, 5), 0.6, device=device))
    )
    for a, b in zip(number, tensor, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5) if a is not None else None


# ---------------------------------------------------------------------------------------------------- named tokens


@pytest.mark.parametrize("impl", [*FAST, "reference"])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_named_logprobs_are_those_of_the_softmax(impl, offset, device):
    """An offset of 1e6 rounds lse to 0.06; the log-probabilities keep their digits."""
    logits = (torch.randn(4, 200, device=device) * 4).round() + offset
    logits[2, 7], logits[3] = -torch.inf, -torch.inf
    named = [7, 199, 7]
    found = er.vocab_stats(logits, named=named, impl=impl).named_logprob
    expected = torch.log_softmax(logits.double(), -1)[:, named]
    expected[3] = -torch.inf
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert (found <= 0).all() and torch.equal(found[:, 0], found[:, 2])


@pytest.mark.parametrize("impl", FAST)
def test_names_may_be_integers_of_numpy(impl, device):
    logits = torch.randn(3, 9, device=device)
    found = er.vocab_stats(logits, named=[*np.arange(3), np.int64(8)], impl=impl).named_logprob
    assert torch.equal(found, er.vocab_stats(logits, named=[0, 1, 2, 8], impl=impl).named_logprob)


@pytest.mark.parametrize("impl", FAST)
def test_a_target_that_is_named_has_the_logprob_of_its_reward(impl, device):
    hidden, weight = torch.randn(1, 9, 20, device=device), torch.randn(130, 20, device=device)
    tokens = torch.arange(100, 109, device=device)[None]
    named = er.linear_vocab_stats(hidden, weight, named=tokens[0], softcap=3.0, impl=impl).named_logprob
    logprob = er.linear_token_rewards(hidden, weight, tokens, softcap=3.0, impl=impl).logprob
    assert torch.equal(named[0, :-1].diagonal(1), logprob[0, 1:])


def test_the_number_of_names_is_no_constant_of_a_trace():
    """torch.export refuses a dynamic K that became an int, as by len()."""
    mode, names = FakeTensorMode(shape_env=ShapeEnv()), torch.ones(3, dtype=torch.long, device="meta")
    logits, named = (mode.from_tensor(x) for x in (torch.randn(4, 9, device="meta"), names))
    with mode:
        assert isinstance(er.vocab_stats(logits, named=named, impl="chunked").named_logprob.shape[-1], torch.SymInt)


@pytest.mark.parametrize("impl", FAST)
def test_the_gradient_of_a_token_named_twice(impl, device):
    logits, named = torch.randn(2, 50, device=device, requires_grad=True), [7, 49, 7]
    upstream = torch.randn(2, 3, device=device)
    (found,) = torch.autograd.grad(er.vocab_stats(logits, named=named, impl=impl).named_logprob, logits, upstream)
    (expected,) = torch.autograd.grad(torch.log_softmax(logits, -1)[:, named], logits, upstream)
    torch.testing.assert_close(found, expected)


def test_names_outside_the_vocabulary(device):
    logits = torch.randn(3, 40)
    for named in ([1, 40], [-1], torch.tensor([40])):
        for impl in ("chunked", "reference"):
            with pytest.raises(IndexError, match=r"named\[\d\] is (40|-1), which is outside the vocabulary \[0, 40\)"):
                er.vocab_stats(logits, named=named, impl=impl)
    if device.type == "cpu":
        with pytest.raises(IndexError, match=r"named\[0\] is 40"):
            ops.logits_stats(
                logits[None], torch.zeros(3).long(), None, None, 1.0, False, False, "chunked", None, torch.tensor([40])
            )  # what torch.compile calls, without the check of vocab_stats
    # On a GPU nothing is read back: a column outside comes out NaN, and the others right.
    named, targets = torch.tensor([40, 3, -1, 2**40], device=device), torch.full((3,), -100, device=device)
    for backend in (chunked, fused):
        found = backend.logits_forward(
            logits[None].to(device), targets, mask=None, alpha=1.0, entropy=False, logit_mean=False, named=named
        )[0].named
        assert found[:, [0, 2, 3]].isnan().all()
        torch.testing.assert_close(found[:, 1].cpu(), logits.log_softmax(-1)[:, 3])


REFUSALS = {
    "shape": ({"alpha": torch.ones(3)}, r"alpha is a tensor, and it is \(3,\).*expected a number, or \(2, 4\) float32"),
    "dtype": ({"alpha": torch.ones(2, 4).double()}, "alpha is a tensor.*float64"),
    "gradient": ({"alpha": torch.ones(2, 4, requires_grad=True)}, "alpha requires a gradient.*detach"),
    "zero": ({"alpha": torch.zeros(2, 4)}, "alpha holds 0.0: expected finite temperatures > 0"),
    "nan": ({"alpha": torch.full((2, 4), torch.nan)}, "alpha holds nan"),
    "on the mask": ({"alpha": -torch.ones(2, 4), "mask": torch.ones(2, 4) > 0}, "alpha holds -1.0 on the mask"),
    "compiled": ({"alpha": torch.ones(2, 4), "impl": "compiled"}, "impl='compiled' takes one alpha.*'chunked'"),
    "compiled names": ({"named": [1], "impl": "compiled"}, "impl='compiled' takes one alpha.*'chunked'"),
    "text": ({"named": "Yes"}, "named is a str: expected token ids"),
    "words": ({"named": ["Yes"]}, r"named is \['Yes'\]: expected at least one token id"),
    "none": ({"named": []}, "named is .*expected at least one token id"),
    "float ids": ({"named": torch.ones(2)}, r"named is \(2,\) torch.float32.*expected \(K,\) int64"),
    "number": ({"named": 3}, "named is a int: expected token ids"),
    "bools": ({"named": [True]}, r"named is \[True\]: expected at least one token id"),
    "no data": ({"named": torch.ones(2, dtype=torch.long, device="meta")}, "named is .* on meta: expected token ids"),
    "array": ({"alpha": np.ones((2, 4))}, "alpha is a ndarray: expected a number"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_wrong_temperatures_and_names_are_refused(name):
    arguments, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        er.vocab_stats(torch.randn(2, 4, 9), torch.zeros(2, 4).long(), **arguments)


@pytest.mark.parametrize("impl", [*FAST, "reference"])
def test_the_alpha_of_tokens_that_are_not_scored_is_not_read(impl, device):
    """The first token of a sequence and a token of -100 are never scored, with the default mask or with any other."""
    logits, tokens = torch.randn(2, 6, 9, device=device), torch.randint(9, (2, 6), device=device)
    offsets, alpha = torch.tensor([0, 2, 12], device=device), torch.rand(2, 6, device=device) + 0.5
    tokens[1, 3] = -100
    unscored = tokens == -100
    unscored.view(-1)[:3:2] = True
    for wrong in (torch.nan, 0.0, torch.inf):
        for mask in (None, torch.ones_like(unscored)):
            odd = torch.where(unscored, wrong, alpha)
            right, found = (
                er.token_rewards(logits, tokens, mask=mask, cu_seqlens=offsets, alpha=a, impl=impl)
                for a in (alpha, odd)
            )
            assert all(map(torch.equal, right[:3], found[:3]))
    if device.type == "cpu":
        with pytest.raises(ValueError, match="alpha holds inf"):
            er.token_rewards(logits, tokens, cu_seqlens=offsets, alpha=alpha / torch.zeros_like(alpha), impl=impl)


def test_what_reads_one_alpha_refuses_many():
    from endoreward_fast.signals import token_stats

    logits, tokens, alpha = torch.randn(2, 4, 9), torch.zeros(2, 4).long(), torch.ones(2, 4)
    with pytest.raises(ValueError, match="alpha is a tensor: expected a number"):
        token_stats(logits, tokens, alpha=alpha)


def test_a_sharded_head_takes_one_alpha_and_no_names():
    hidden, weight, tokens = torch.randn(2, 4, 9), torch.randn(5, 9), torch.zeros(2, 4).long()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for given, said in (({"alpha": torch.ones(2, 4)}, "no alpha as a tensor"), ({"named": [1]}, "no named tokens")):
            with pytest.raises(ValueError, match=f"a sharded head takes {said}"):
                er.linear_vocab_stats(hidden, weight, tokens, shard=VocabShard(None, 0), **given)
        assert er.linear_vocab_stats(hidden, weight, tokens, shard=VocabShard(None, 0)).named_logprob is None
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------- torch's own machinery


@pytest.fixture
def case(device):
    tokens = torch.randint(0, 40, (1, 5), device=device)
    alpha, mask = 0.5 + torch.rand(1, 5, device=device), torch.arange(5, device=device)[None] != 2
    return torch.randn(1, 5, 12, device=device), torch.randn(40, 12, device=device), tokens, mask, alpha


@pytest.mark.parametrize("impl", FAST)
def test_the_operators_pass_opcheck(case, impl):
    hidden, weight, tokens, mask, alpha = case
    rows, named = (tokens.flatten(), mask.flatten()), torch.tensor([3, 39, 3], device=hidden.device)
    logits = (hidden @ weight.T).requires_grad_()
    args = (logits, *rows, None, 1.0, True, True, impl, alpha.flatten(), named)
    torch.library.opcheck(torch.ops.endoreward_fast.logits_stats.default, args)
    flat_hidden = hidden.flatten(0, 1).requires_grad_()
    args = (flat_hidden, weight.requires_grad_(), None, *rows, None, 0.5, 4.0, 1.0, True, True, impl, alpha.flatten())
    torch.library.opcheck(torch.ops.endoreward_fast.linear_stats.default, (*args, named))


@pytest.mark.parametrize("impl", FAST)
def test_temperatures_and_names_under_fullgraph_compilation(case, impl):
    hidden, weight, tokens, mask, alpha = case

    def loss(hidden, alpha):
        out = er.linear_token_rewards(hidden, weight, tokens, mask=mask, alpha=alpha, impl=impl)
        named = er.vocab_stats(hidden @ weight.T, mask=mask, alpha=alpha, named=[3, 39], impl=impl).named_logprob
        return out.reward.square().sum() + named.square().sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = hidden.clone().requires_grad_()
        value = function(leaf, alpha)
        found.append((value, *torch.autograd.grad(value, leaf)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-4)


def test_shapes_without_data_and_without_rows(case):
    hidden, weight, _, mask, alpha = case
    meta = [x.to("meta") for x in case]
    found = er.linear_vocab_stats(meta[0], meta[1], meta[2], mask=meta[3], alpha=meta[4], named=[1, 2])
    assert found.lse.is_meta and found.named_logprob.shape == (1, 5, 2)
    for impl in (*FAST, "reference"):
        none = er.linear_vocab_stats(hidden[:0], weight, alpha=alpha[:0], named=[1, 2], impl=impl)
        assert none.named_logprob.shape == (0, 5, 2)
        off = er.linear_vocab_stats(hidden, weight, mask=mask & False, alpha=alpha * 0, named=[1, 2], impl=impl)
        assert off.named_logprob.shape == (1, 5, 2) and not off.named_logprob.any()
        one = er.vocab_stats(hidden[0, 0] @ weight.T, alpha=alpha[0, 0], named=[1], impl=impl)
        assert one.named_logprob.shape == (1,)


def test_statistics_of_rows_are_built_as_before():
    assert er.VocabStats(1, 2, None, None).named_logprob is None
    assert RowStats(*range(6)).named is None
