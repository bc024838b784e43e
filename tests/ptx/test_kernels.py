"""Every kernel of the package, compiled to PTX and emulated, against the float64 reference."""

import pytest
import torch

import endoreward_fast as er
from endoreward_fast.vocab import reference

F64 = torch.float64
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ARCHS = (80, 90)
FULL = {"entropy": True, "logit_mean": True}
HEAD = {"logit_scale": 0.75, "softcap": 6.0}


@pytest.fixture(params=ARCHS, ids="sm_{}".format)
def arch(request) -> int:
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(params=["plain", "full"])
def full(request) -> bool:
    return request.param == "full"


def check(budget, ours, eager, oracle, scale):
    for name in ours._fields:
        if getattr(oracle, name) is not None:
            budget(getattr(ours, name), getattr(eager, name), getattr(oracle, name), scale=scale, name=name)


def check_gradients(budget, function, inputs, upstream, dtype):
    """Compare the gradients with those of the oracle. 16-bit ones may differ by a rounding of the largest."""

    def gradients(name, dtype):
        xs = [x.to(dtype).requires_grad_() for x in inputs]
        fields = [f for f in function[name](*xs) if f is not None]
        return torch.autograd.grad(sum((f * g).sum() for f, g in zip(fields, upstream, strict=False)), xs)

    ours, eager, oracle = gradients("fused", dtype), gradients("eager", torch.float32), gradients("oracle", F64)
    for a, b, c in zip(ours, eager, oracle, strict=True):
        assert a.dtype == dtype
        if dtype == torch.float32:
            budget(a, b, c, scale=4.0)
        else:
            assert (a.double() - c).abs().max() <= 2 * torch.finfo(dtype).eps * c.abs().max()


def functions(name, arguments, want):
    """Return the same public function in three ways: fused, eager, and as the oracle."""
    ours, theirs = getattr(er, name), getattr(reference, name)
    return {
        "fused": lambda *xs: ours(*xs, *arguments, **want, impl="fused"),
        "eager": lambda *xs: theirs(*xs, *arguments, **want),
        "oracle": lambda *xs: theirs(*xs, *arguments, **want, dtype=F64),
    }


def test_statistics_of_logits_and_their_gradient(package, arch, dtype, full, assert_within_budget):
    package.on(arch)
    logits = (4 * torch.randn(2, 5, 300)).to(dtype)[:, :, :295]  # three pieces, the last of them ragged
    targets = torch.randint(0, 295, (2, 5))
    targets[0, 1] = -100
    want = {"alpha": 0.7, **(FULL if full else {})}
    if full:
        want["mask"] = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]], dtype=torch.bool)
    f = functions("vocab_stats", (targets,), want)
    check(assert_within_budget, f["fused"](logits), f["eager"](logits), f["oracle"](logits), 16.0)
    upstream = torch.randn(4, 2, 5)
    check_gradients(assert_within_budget, f, [logits], upstream, dtype)


def test_temperatures_and_named_tokens(package, assert_within_budget):
    package.on(90)
    logits, targets, mask = 4 * torch.randn(2, 3, 295), torch.randint(0, 295, (2, 3)), torch.arange(6).view(2, 3) != 1
    want = {"alpha": 0.5 + torch.rand(2, 3), "mask": mask, "entropy": True, "named": torch.tensor([294, 0, 294])}
    f = functions("vocab_stats", (targets,), want)
    check(assert_within_budget, f["fused"](logits), f["eager"](logits), f["oracle"](logits), 16.0)
    upstream = [*torch.randn(3, 2, 3), torch.randn(2, 3, 3)]
    check_gradients(assert_within_budget, f, [logits], upstream, torch.float32)
    hidden, weight = torch.randn(2, 3, 64).bfloat16(), torch.randn(295, 64).bfloat16()
    f = functions("linear_vocab_stats", (weight, targets), want)
    oracle = reference.linear_vocab_stats(hidden.double(), weight.double(), targets, **want, dtype=F64)
    check(assert_within_budget, f["fused"](hidden), f["eager"](hidden), oracle, 64.0)


def test_rewards_of_logits(package, arch, full, assert_within_budget):
    package.on(arch)
    logits, tokens = 4 * torch.randn(2, 6, 295), torch.randint(0, 295, (2, 6))
    want = {"alpha": 1.3, "entropy": full}
    if full:
        want["mask"] = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    f = functions("token_rewards", (tokens,), want)
    check(assert_within_budget, f["fused"](logits), f["eager"](logits), f["oracle"](logits), 16.0)


def linear_case(dtype, dim, full):
    """Return (inputs, targets, keywords): two tiles of tokens, and some of the vocabulary, the last of them ragged.

    Multiples of 1/8 have exact products and sums in float32.
    """
    rows, vocab = (20, 70) if dtype == torch.float32 else (70, 200)
    hidden, weight = (torch.randn(n, dim).mul(2).round().div(8).to(dtype) for n in (rows, vocab))
    targets = torch.randint(0, vocab, (rows,))
    targets[::9] = -100
    want = {"alpha": 0.7}
    if full:
        mask = torch.ones(rows, dtype=torch.bool)
        mask[3::7] = False
        want |= {**FULL, **HEAD, "bias": torch.randn(vocab).to(dtype), "mask": mask}
    return hidden, weight, targets, want


@pytest.mark.parametrize("dim", [144, 70], ids=["aligned", "unaligned"])
def test_statistics_of_hidden_states(package, arch, dtype, full, dim, assert_within_budget):
    """Of 16-bit rows of 144 numbers sm_80 loads by cp.async, and sm_90 by bulk copies. Rows of 70 are not aligned."""
    driver = package.on(arch)
    hidden, weight, targets, want = linear_case(dtype, dim, full)
    f = functions("linear_vocab_stats", (targets,), want)
    ours = f["fused"](hidden, weight)
    oracle_want = want | ({"bias": want["bias"].double()} if full else {})
    oracle = reference.linear_vocab_stats(hidden.double(), weight.double(), targets, **oracle_want, dtype=F64)
    check(assert_within_budget, ours, f["eager"](hidden, weight), oracle, 16.0)
    (linear,) = (program for program in driver.launches if program.name == "linear_partials_kernel")
    assert {words for words in PIPELINES if any(is_one(i, words) for i in linear.instructions)} == pipeline(
        arch, dtype, dim
    )


PIPELINES = ("mma", "wgmma", "cp.async", "cp.async.bulk")


def is_one(instruction, words: str) -> bool:
    name, *modifiers = words.split(".")
    bulk = "bulk" in instruction.modifiers
    return instruction.name == name and (not modifiers or bulk == ("bulk" in modifiers))


def pipeline(arch, dtype, dim) -> set[str]:
    """Return the instructions that a linear kernel should load and multiply with."""
    if dtype == torch.float32:
        return {"cp.async"}
    copies = {80: "cp.async", 90: "cp.async.bulk"}[arch]
    return {{80: "mma", 90: "wgmma"}[arch], *([copies] if dim % 16 == 0 else [])}
