"""Warps in every order give the same bits; and the tile that the package ships for sm_90, whole."""

import pytest
import torch

import endoreward_fast as er
from endoreward_fast.vocab import reference

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
ORDERS = ("up", "down", 1)


def logits():
    z, tokens = torch.randn(2, 6, 295), torch.randint(0, 295, (2, 6))
    return er.token_rewards(z, tokens, alpha=0.7, entropy=True, impl="fused")


def gradient():
    z = torch.randn(2, 4, 295).requires_grad_()
    out = er.vocab_stats(z, torch.randint(0, 295, (2, 4)), entropy=True, logit_mean=True, impl="fused")
    return torch.autograd.grad(sum(field.sum() for field in out[:4]), z)


def linear(dim, dtype):
    def run():
        rows, vocab = (20, 70) if dtype == F32 else (70, 100)
        hidden, weight, bias = torch.randn(rows, dim), torch.randn(vocab, dim), torch.randn(vocab)
        head = {"bias": bias.to(dtype), "softcap": 6.0}
        targets = torch.arange(rows)
        want = {"entropy": True, "logit_mean": True}
        return er.linear_vocab_stats(hidden.to(dtype), weight.to(dtype), targets, **head, **want, impl="fused")

    return run


CASES = {
    "logits, sm_80": (80, logits), "logits, sm_90": (90, logits), "gradient, sm_80": (80, gradient),
    "linear, sm_80": (80, linear(144, BF16)), "linear, sm_90": (90, linear(70, BF16)),
    "linear, sm_90, bulk copies": (90, linear(264, BF16)), "linear, fp32": (80, linear(24, F32)),
}  # fmt: skip


@pytest.mark.parametrize("orders", [ORDERS, pytest.param(range(2, 12), marks=pytest.mark.ptx)], ids=["some", "many"])
@pytest.mark.parametrize("case", CASES)
def test_warps_in_every_order_give_the_same_bits(case, orders, package):
    arch, run = CASES[case]

    def bits(order):
        torch.manual_seed(0)
        package.on(arch, order)
        return torch.cat([field.flatten() for field in run() if field is not None])

    expected = bits("lockstep")
    assert expected.isfinite().all()
    for order in orders:
        assert torch.equal(bits(order), expected), order


@pytest.mark.parametrize("order", ["lockstep", pytest.param("down", marks=pytest.mark.ptx)])
def test_the_shipped_tile_of_sm_90(order, package, assert_within_budget):
    """128 x 256 x 64 with 8 warps and 4 stages: two tiles of tokens, two of the vocabulary, five steps in the width."""
    driver = package.on(90, order, shipped=True)
    hidden, weight = (torch.randn(n, 264).mul(2).round().div(8).to(BF16) for n in (140, 300))
    targets = torch.randint(0, 300, (140,))
    ours = er.linear_vocab_stats(hidden, weight, targets, entropy=True, impl="fused")
    eager = reference.linear_vocab_stats(hidden, weight, targets, entropy=True)
    oracle = reference.linear_vocab_stats(hidden.double(), weight.double(), targets, entropy=True, dtype=F64)
    for name in ("lse", "target_logit", "entropy"):
        assert_within_budget(getattr(ours, name), getattr(eager, name), getattr(oracle, name), scale=16.0, name=name)
    words = {word for program in driver.launches for i in program.instructions for word in (i.name, *i.modifiers)}
    assert {"wgmma", "m64n256k16", "bulk"} <= words
