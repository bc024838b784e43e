"""The Gluon forward for Hopper, whole: 128 tokens x 256 entries a tile, a producer warp and two consumer warpgroups."""

import pytest
import torch

from endoreward_fast.vocab import reference
from endoreward_fast.vocab.rows import RowStats

BF16, FP16, F64 = torch.bfloat16, torch.float16, torch.float64
FULL = {"entropy": True, "logit_mean": True}
HEAD = {"logit_scale": 0.75, "softcap": 6.0}


def inputs(rows, vocab, dim, dtype):
    """Multiples of 1/8 have exact products and sums in float32. Targets: none, each end of the vocabulary, random."""
    hidden, weight = (torch.randn(n, dim).mul(2).round().div(8).to(dtype) for n in (rows, vocab))
    targets = torch.randint(0, vocab, (rows,))
    targets[::9] = -100
    targets[1:3] = torch.tensor([0, vocab - 1])
    return hidden, weight, targets


def forward(hidden, weight, targets, *, alpha=0.7, entropy=False, logit_mean=False, bias=None, logit_scale=1.0,
            softcap=None, programs=2, **config):  # fmt: skip
    from endoreward_fast.kernels.combine import combine
    from endoreward_fast.kernels.hopper_vocab_stats import HopperConfig, hopper_partials
    from endoreward_fast.kernels.primitives import Head

    partials = hopper_partials(
        hidden, weight, targets, alpha=alpha, entropy=entropy, logit_mean=logit_mean,
        config=HopperConfig(**config), head=Head(bias, logit_scale, softcap), programs=programs,
    )  # fmt: skip
    stats, _ = combine(partials, targets, vocab=weight.shape[0], alpha=alpha)
    return RowStats(*stats)


def check(budget, ours, hidden, weight, targets, **want):
    eager = reference.linear_vocab_stats(hidden, weight, targets, alpha=0.7, **want)
    exact = want | ({"bias": want["bias"].double()} if "bias" in want else {})
    oracle = reference.linear_vocab_stats(hidden.double(), weight.double(), targets, alpha=0.7, **exact, dtype=F64)
    for name in oracle._fields:
        if getattr(oracle, name) is not None:
            budget(getattr(ours, name), getattr(eager, name), getattr(oracle, name), scale=16.0, name=name)


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_statistics(package, dtype, full, assert_within_budget):
    """Two tiles of tokens, two splits of 256 and a ragged third, five steps in the width with a ragged last."""
    package.on(90)
    hidden, weight, targets = inputs(140, 600, 264, dtype)
    want = {**FULL, **HEAD, "bias": torch.randn(600).to(dtype)} if full else {}
    ours = forward(hidden, weight, targets, split=256, **want)
    check(assert_within_budget, ours, hidden, weight, targets, **want)


@pytest.mark.parametrize("config", [{}, {"lead": 1}, {"block_d": 32, "num_stages": 9, "lead": 4}], ids=str)
def test_warps_in_every_order_give_the_same_bits(package, config):
    """One program takes all the work, and the ring is used again and again."""
    hidden, weight, targets = inputs(140, 300, 136, BF16)
    results = []
    for order in ("lockstep", "up", "down", 1, 2):
        package.on(90, order)
        stats = forward(hidden, weight, targets, **FULL, **HEAD, programs=1, split=256, **config)
        results.append(torch.stack([field for field in stats if field is not None]))
    assert results[0].isfinite().all()
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_row_has_the_same_bits_alone_and_in_any_batch(package):
    package.on(90)
    hidden, weight, targets = inputs(140, 300, 72, BF16)
    together = forward(hidden, weight, targets, entropy=True, split=256)
    for rows in ([139], [5, 7], list(range(60, 130))):
        alone = forward(hidden[rows], weight, targets[rows], entropy=True, split=256, programs=1)
        for field, other in zip(together, alone, strict=True):
            assert field is None or torch.equal(field[rows], other)


@pytest.mark.parametrize("dim", [8, 70], ids=["one short step", "a hidden that TMA cannot read"])
def test_other_widths(package, dim, assert_within_budget):
    package.on(90)
    hidden, weight, targets = inputs(3, 257, dim, BF16)
    weight = torch.cat([weight, weight.new_full((257, 2), float("nan"))], 1)[:, :dim] if dim == 70 else weight
    check(assert_within_budget, forward(hidden, weight, targets.int()), hidden, weight, targets)
