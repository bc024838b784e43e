"""The Gluon forward for Hopper, whole: tiles of 128 tokens x 256 entries, a producer and two consumer warpgroups."""

from dataclasses import replace

import pytest
import torch

from emulator.faults import Deadlock, EarlyAccess, Race, Unwritten
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
            softcap=None, programs=2, config=None, **fields):  # fmt: skip
    from endoreward_fast.kernels.combine import combine
    from endoreward_fast.kernels.hopper_vocab_stats import HopperConfig, hopper_partials
    from endoreward_fast.kernels.primitives import Head

    partials = hopper_partials(
        hidden, weight, targets, alpha=alpha, entropy=entropy, logit_mean=logit_mean,
        config=config or HopperConfig(**fields), head=Head(bias, logit_scale, softcap), programs=programs,
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


CASES = {"plain fp16": (FP16, False), "full bf16": (BF16, True), "plain": (BF16, False), "full fp16": (FP16, True)}
LONG = {"block_d": 32, "num_stages": 9, "lead": 5}
LEADS = {"lead 1": {"lead": 1}, "no lead": {}, "lead 3": {"lead": 3}, "9 stages": LONG}


def first_of(names, kept):
    """Return the names as parameters; those after the first `kept` run with `-m ptx`."""
    return [pytest.param(name, marks=pytest.mark.ptx if i >= kept else ()) for i, name in enumerate(names)]


@pytest.mark.parametrize("case", first_of(CASES, 2))
def test_statistics(package, case, assert_within_budget):
    """Two tiles of tokens, two splits of 256 and a ragged third, five steps in the width with a ragged last."""
    package.on(90)
    dtype, full = CASES[case]
    hidden, weight, targets = inputs(140, 600, 264, dtype)
    want = {**FULL, **HEAD, "bias": torch.randn(600).to(dtype)} if full else {}
    ours = forward(hidden, weight, targets, split=256, **want)
    check(assert_within_budget, ours, hidden, weight, targets, **want)


@pytest.mark.parametrize("dim", [8, 70], ids=["one short step", "pitches that are padded"])
def test_other_widths(package, dim, assert_within_budget):
    """The weight's rows lie 72 entries apart, with NaN in between. hidden has a pitch that TMA cannot read."""
    package.on(90)
    hidden, weight, targets = inputs(3, 257, dim, FP16)
    padded = weight.new_full((257, 72), float("nan"))
    padded[:, :dim] = weight
    ours = forward(hidden, padded[:, :dim], targets, split=256)
    check(assert_within_budget, ours, hidden, weight, targets)


def test_rows_that_a_mask_keeps(package):
    """The backend gathers them, and their bits are those without a mask."""
    from endoreward_fast.kernels.hopper_vocab_stats import HopperConfig
    from endoreward_fast.vocab import fused

    package.on(90)
    hidden, weight, targets = inputs(150, 300, 72, BF16)
    want = {"bias": None, "logit_scale": 1.0, "softcap": None, "alpha": 0.7, **FULL, "config": HopperConfig()}
    mask = torch.rand(150) < 0.6
    whole, _ = fused.linear_forward(hidden, weight, targets, **want)
    kept, _ = fused.linear_forward(hidden, weight, targets, mask=mask, **want)
    for a, b in zip(whole[:6], kept[:6], strict=True):
        assert torch.equal(torch.where(mask, a, 0.0), b)


@pytest.mark.parametrize("case", first_of(LEADS, 1))
def test_warps_in_every_order_give_the_same_bits(package, case):
    """One program takes both pieces of work, and goes around the ring more than once."""
    hidden, weight, targets = inputs(70, 300, 168, BF16)
    results = []
    for order in ("up", "down", 1):  # consumers first, producer first, in turns
        package.on(90, order)
        stats = forward(hidden, weight, targets.int(), **FULL, **HEAD, programs=1, split=256, **LEADS[case])
        results.append(torch.stack([field for field in stats if field is not None]))
    assert results[0].isfinite().all()
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_row_has_the_same_bits_alone_and_in_any_batch(package):
    package.on(90)
    hidden, weight, targets = inputs(140, 300, 72, BF16)
    want = {**FULL, **HEAD, "split": 256, "lead": 1}
    together = forward(hidden, weight, targets.int(), **want)
    for rows in ([139], list(range(60, 130))):
        alone = forward(hidden[rows], weight, targets[rows].int(), **want)
        for field, other in zip(together[:6], alone[:6], strict=True):
            assert torch.equal(field[rows], other)


MISTAKES = {
    # mistake: in the PTX, what it becomes, the faults
    "a stage is given back while a matmul reads it": (
        "wgmma.wait_group.sync.aligned 1", "wgmma.wait_group.sync.aligned 2", (EarlyAccess, Race),
    ),
    "the tile of hidden alone is waited for": ("49152;", "16384;", (EarlyAccess, Unwritten)),
    "a byte too many is waited for": ("49152;", "49153;", Deadlock),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(package, mistake):
    correct, wrong, fault = MISTAKES[mistake]

    def rewrite(ptx):
        return ptx.replace(correct, wrong) if "hopper_partials_kernel" in ptx else ptx

    package.on(90, "down", rewrite=rewrite)
    with pytest.raises(fault):
        forward(*inputs(3, 257, 264, FP16), split=256, programs=1)


@pytest.mark.ptx
def test_a_lead_as_long_as_the_ring_waits_for_ever(package):
    """HopperConfig refuses it: the stage that consumer 0 needs next is one that consumer 1 has not read."""
    from endoreward_fast.kernels import hopper_vocab_stats

    config = hopper_vocab_stats.HopperConfig(split=256)
    with pytest.raises(ValueError, match="lead is 4"):
        replace(config, lead=4)
    object.__setattr__(config, "lead", 4)
    package.on(90)
    with pytest.raises(Deadlock, match="mbarrier"):
        forward(*inputs(70, 300, 264, BF16), config=config)
