"""Equal numbers give equal bits in compiled code: in every dtype, alone and in a batch, with and without a mask."""

import pytest
import torch

import endoreward_fast as er
from endoreward_fast.kernels.config import LogitsConfig
from endoreward_fast.kernels.vocab_stats import logits_partials

FULL = {"entropy": True, "logit_mean": True}


@pytest.mark.parametrize("arch", [80, 90])
def test_logits_of_every_dtype_have_the_same_partials(package, arch):
    package.on(arch)
    logits = torch.randn(1, 2, 10000).half().bfloat16()  # no multiple of the block, and rows begin 16 bytes apart
    targets = torch.tensor([9999, 17])
    found = [
        logits_partials(logits.to(dtype), targets, alpha=0.7, entropy=True, logit_mean=True, config=LogitsConfig())
        for dtype in (torch.bfloat16, torch.float32)
    ]
    for name, low, full in zip(found[0]._fields[:5], *(partials[:5] for partials in found), strict=True):
        assert torch.equal(low, full), name


def test_a_row_alone_is_the_row_in_a_batch(package):
    package.on(90)
    for vocab, pitch in ((256, 256), (251, 251), (256, 259)):
        logits, targets = torch.randn(1, 5, pitch).bfloat16()[..., :vocab], torch.randint(0, vocab, (1, 5))
        batch = er.vocab_stats(logits, targets, **FULL, impl="fused")
        for row in range(5):
            alone = er.vocab_stats(logits[0, row : row + 1], targets[0, row : row + 1], **FULL, impl="fused")
            assert all(torch.equal(a[0, row], b[0]) for a, b in zip(batch[:4], alone[:4], strict=True))


def test_a_row_that_a_mask_keeps_is_the_row_without_one(package):
    package.on(90)
    hidden, weight = torch.randn(40, 64).bfloat16(), torch.randn(295, 64).bfloat16()
    targets, mask = torch.randint(0, 295, (40,)), torch.rand(40) < 0.4
    whole = er.linear_vocab_stats(hidden, weight, targets, **FULL, impl="fused")
    kept = er.linear_vocab_stats(hidden, weight, targets, **FULL, mask=mask, impl="fused")
    for a, b in zip(whole[:4], kept[:4], strict=True):
        assert torch.equal(torch.where(mask, a, 0.0), b)
