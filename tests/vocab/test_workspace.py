"""The workspace path: a matmul, then the row kernels. On a GPU impl="chunked" uses it; here it is called directly."""

import pytest
import torch

from endoreward_fast.vocab import chunked, reference, workspace
from endoreward_fast.vocab.chunked_tiles import Buffer
from endoreward_fast.vocab.rows import RowGrads, RowStats

FIELDS = ("lse", "target_logit", "entropy", "logit_mean")
HEADS = {
    "plain": {},
    "everything": {"bias": True, "logit_scale": 0.5, "softcap": 4.0, "alpha": 0.7},
    "negative scale": {"logit_scale": -1.5},
}
F64 = torch.float64


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(workspace, "PIECE", 128)
    if request.param == "many tiles":
        for name, value in {
            "FORWARD_ROWS": 7, "FORWARD_TILE": 7 * 256, "BACKWARD_ROWS": 6, "BACKWARD_TILE": 300, "GRADIENT": 6 * 100,
            "ACCUMULATOR": 8 * 24,
        }.items():  # fmt: skip
            monkeypatch.setattr(workspace, name, value)


def _case(head, dtype, device):
    # Multiples of 1/8 have exact float32 products and sums. Otherwise the rounding of the library's matmul would count
    # as an error of the gradient where one token has all the probability. It depends on the chip and the tile's shape.
    hidden, weight = (torch.randn(n, 24, device=device).mul(8).round().div(8) for n in (20, 333))
    targets = torch.randint(0, 333, (20,), device=device)
    targets[::6] = -100
    head = {"bias": None, "logit_scale": 1.0, "softcap": None, "alpha": 1.0} | head
    if head["bias"]:
        head["bias"] = torch.randn(333, device=device).to(dtype)
    return hidden.to(dtype), weight.to(dtype), targets, head


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_and_gradients(head, dtype, tiles, device, assert_within_budget):
    hidden, weight, targets, head = _case(HEADS[head], dtype, device)
    upstream = [torch.randn(20, device=device) for _ in FIELDS]

    def everything(dtype):
        leaves = [None if x is None else x.to(dtype).requires_grad_() for x in (hidden, weight, head["bias"])]
        rest = {k: v for k, v in head.items() if k != "bias"}
        want = {"entropy": True, "logit_mean": True, "dtype": dtype}
        out = reference.linear_vocab_stats(*leaves[:2], targets, bias=leaves[2], **rest, **want)
        total = sum((f * g.to(dtype)).sum() for f, g in zip(out[:4], upstream, strict=True))
        return out, torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None])

    stats, rewards = workspace.linear_forward(hidden, weight, targets, entropy=True, logit_mean=True, **head)
    assert rewards is None
    (eager, eager_gradients), (oracle, oracle_gradients) = everything(torch.float32), everything(F64)
    for name in FIELDS:
        assert_within_budget(getattr(stats, name), getattr(eager, name), getattr(oracle, name), scale=10.0, name=name)
    needs = (True, True, head["bias"] is not None)
    gradients = workspace.linear_backward(hidden, weight, targets, stats, RowGrads(*upstream), needs=needs, **head)
    gradients = [g for g in gradients if g is not None]
    for ours, eager, oracle in zip(gradients, eager_gradients, oracle_gradients, strict=True):
        assert ours.dtype == dtype
        if dtype == torch.float32:
            assert_within_budget(ours, eager, oracle, scale=10.0)
        else:  # dy has this dtype, and its roundings add up: in units of the largest gradient
            unit = torch.finfo(dtype).eps * oracle.abs().max()
            assert (ours.double() - oracle).abs().max() <= 2 * unit


def test_rewards_and_hard_rows_match_the_chunked_path(tiles, device):
    hidden, weight, targets, head = _case({"bias": True}, torch.float32, device)
    head["bias"][50:200] = -torch.inf
    targets[targets != -100] = targets[targets != -100] % 50
    successor = torch.arange(1, 21, device=device)
    successor[[4, 19]] = -1
    want = {"entropy": True, "logit_mean": False, "successor": successor}
    ours, ours_rewards = workspace.linear_forward(hidden, weight, targets, **want, **head)
    theirs, their_rewards = chunked.linear_forward(hidden, weight, targets, **want, **head)
    for a, b in zip((*ours[:3], *ours_rewards), (*theirs[:3], *their_rewards), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    upstream = RowGrads(torch.ones(20, device=device), torch.ones(20, device=device), None, None)
    gradients = workspace.linear_backward(hidden, weight, targets, ours, upstream, needs=(True, True, True), **head)
    expected = chunked.linear_backward(hidden, weight, targets, theirs, upstream, needs=(True, True, True), **head)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert gradients[2][50:200].eq(0).all()


def test_float32_hidden_with_a_bf16_weight(tiles, device):
    hidden, weight, targets, head = _case({}, torch.float32, device)
    weight = weight.bfloat16()
    stats, _ = workspace.linear_forward(hidden, weight, targets, entropy=False, logit_mean=False, **head)
    exact, _ = workspace.linear_forward(hidden, weight.float(), targets, entropy=False, logit_mean=False, **head)
    assert torch.equal(stats.lse, exact.lse)
    upstream = RowGrads(torch.ones(20, device=device), torch.zeros(20, device=device), None, None)
    dhidden, dweight, _ = workspace.linear_backward(
        hidden, weight, targets, stats, upstream, needs=(True, True, False), **head
    )
    assert dhidden.dtype == torch.float32 and dweight.dtype == torch.bfloat16


def test_one_row_and_no_rows(device):
    hidden, weight, targets, head = _case({}, torch.float32, device)
    want = {"entropy": False, "logit_mean": False}
    whole, _ = workspace.linear_forward(hidden, weight, targets, **want, **head)
    one, _ = workspace.linear_forward(hidden[:1], weight, targets[:1], **want, **head)
    torch.testing.assert_close(one.lse, whole.lse[:1])
    none, _ = workspace.linear_forward(hidden[:0], weight, targets[:0], **want, **head)
    assert none.lse.shape == (0,)
    upstream = RowGrads(none.lse, none.lse, None, None)
    dhidden, dweight, _ = workspace.linear_backward(
        hidden[:0], weight, targets[:0], none, upstream, needs=(True, True, False), **head
    )
    assert dhidden.shape == (0, 24) and dweight.eq(0).all()


@pytest.mark.parametrize(("rows", "dim"), [(1000, 64), (9001, 3584)])
def test_rows_of_gradient_tiles_begin_at_multiples_of_16_bytes(rows, dim):
    """Otherwise the kernel loads and stores one number at a time, and the matmul has no aligned operand."""
    like = torch.empty((), device="meta", dtype=torch.bfloat16)
    hidden, weight = like.new_empty(rows, dim), like.new_empty(151936, dim)
    row = like.new_empty(rows, dtype=torch.float32)
    source = workspace._KernelGradients(
        hidden, weight, None, 1.0, None, row.long(), RowStats(row, row, None, None, row, row),
        RowGrads(row, row, None, None), 1.0,
    )  # fmt: skip
    assert 0 < source.tiles.vocab < 151936 and source.tiles.vocab % 8 == 0


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures GPU memory")
def test_extra_device_memory_is_under_256_mib(device):
    hidden = torch.randn(16384, 1024, device=device, dtype=torch.bfloat16)
    weight = torch.randn(32000, 1024, device=device, dtype=torch.bfloat16)
    targets = torch.randint(0, 32000, (16384,), device=device)
    head = {"bias": None, "logit_scale": 1.0, "softcap": None, "alpha": 1.0}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stats, _ = workspace.linear_forward(hidden, weight, targets, entropy=True, logit_mean=True, **head)
    assert torch.cuda.max_memory_allocated() - before < 256 * 2**20
    upstream = RowGrads(stats.lse, stats.lse, None, None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = workspace.linear_backward(hidden, weight, targets, stats, upstream, needs=(True, True, False), **head)
    kept = sum(g.numel() * g.element_size() for g in out[:2])
    assert torch.cuda.max_memory_allocated() - before - kept < 256 * 2**20


def test_another_size_of_the_workspace_gives_the_same_statistics(device, monkeypatch):
    """As `endoreward tune` may choose it."""
    monkeypatch.setattr(workspace, "PIECE", 128)
    hidden, weight, targets, head = _case(HEADS["plain"], torch.float32, device)
    usual, _ = workspace.linear_forward(hidden, weight, targets, entropy=True, logit_mean=True, **head)
    sizes = []
    monkeypatch.setattr(workspace, "Buffer", lambda size, device: sizes.append(size) or Buffer(size, device))
    small, _ = workspace.linear_forward(hidden, weight, targets, entropy=True, logit_mean=True, tile=20 * 128, **head)
    assert sizes == [20 * 128]
    for name in FIELDS:
        torch.testing.assert_close(getattr(small, name), getattr(usual, name), rtol=0, atol=0)
