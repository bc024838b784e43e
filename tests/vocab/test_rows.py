"""Which rows are computed: the plan from tokens to rows and the rows that a mask keeps. Nothing is read back."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import endoreward_fast as er
from endoreward_fast.vocab import ops, workspace
from endoreward_fast.vocab.plan import plan_rows

READS_BACK = {"aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::index.Tensor"}


class NothingReadBack(TorchDispatchMode):
    """Fails on an operator that would wait for the device. Passes through the package's own operators."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "endoreward_fast":
            with self:  # a mode is off while it handles an operator
                return torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        assert func._schema.name not in READS_BACK, func
        return func(*args, **(kwargs or {}))


def _flags(shape, device, share=0.6):
    return torch.rand(shape, device=device) < share


@pytest.mark.parametrize("seed", range(12))
def test_the_kernels_plan_is_the_one_of_torch(seed, device):
    torch.manual_seed(seed)
    rows, length = [(1, 1), (1, 9), (3, 7), (4, 400)][seed % 4]
    tokens = torch.randint(0, 50, (rows, length), device=device)
    tokens[_flags(tokens.shape, device, 0.1)] = -100
    mask = _flags(tokens.shape, device) if seed % 3 else None
    terminal = _flags(tokens.shape, device, 0.2) if seed % 2 else None
    cu_seqlens = None
    if seed >= 4:  # sequences of any length, some of them empty
        cuts = torch.randint(0, tokens.numel() + 1, (seed,), device=device).sort().values
        ends = torch.tensor([0], device=device), torch.tensor([tokens.numel()], device=device)
        cu_seqlens = torch.cat([ends[0], cuts, ends[1]]).to([torch.int32, torch.int64][seed % 2])
    ours = plan_rows(tokens, mask, terminal, cu_seqlens, kernels=True)
    for name, found, wanted in zip(ours._fields, ours, plan_rows(tokens, mask, terminal, cu_seqlens), strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), name


@pytest.mark.parametrize("n", [1, 5, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_rows_that_a_mask_keeps(n, share, device):
    from endoreward_fast.kernels.rows import gather, keep

    mask = _flags(n, device, share)
    kept, index = keep(mask), mask.nonzero().squeeze(1)
    count = len(index)
    assert kept.count.item() == count
    assert torch.equal(kept.rows[:count].long(), index)
    assert torch.equal(kept.place[index].long(), torch.arange(count, device=device))
    if n < 1000:
        x = torch.randn(40, n, device=device).T  # columns are not neighbours
        assert torch.equal(gather(x, kept, torch.empty(n, 64, device=device)[:, :40])[:count], x[index])


@pytest.fixture
def masked(device):
    hidden, weight = torch.randn(2, 12, 24, device=device), torch.randn(70, 24, device=device)
    tokens, mask = torch.randint(0, 70, (2, 12), device=device), _flags((2, 12), device)
    mask[0] = False
    return hidden, weight, tokens, mask


def _graph_may_hold(monkeypatch):
    """Take the way of a CUDA graph: no target is checked, as on a GPU, and the stream seems to be captured."""
    monkeypatch.setattr(ops, "_refuse_outside", lambda *_: None)
    monkeypatch.setattr(workspace, "_capturing", lambda device: True)


@pytest.mark.parametrize("call", ["stats", "rewards"])
def test_a_masked_call_reads_nothing_back(call, masked, monkeypatch):
    hidden, weight, tokens, mask = masked
    _graph_may_hold(monkeypatch)
    fn = er.linear_vocab_stats if call == "stats" else er.linear_token_rewards
    with torch.no_grad(), NothingReadBack():
        found = fn(hidden, weight, tokens, mask=mask, entropy=True, impl="fused")
    wanted = fn(hidden, weight, tokens, mask=mask, entropy=True, impl="reference")
    for name in ("lse", "entropy") if call == "stats" else found._fields:
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))


def test_a_captured_gradient_reads_nothing_back_and_is_the_same(masked, monkeypatch):
    hidden, weight, tokens, mask = masked
    hidden[0] = torch.nan  # off the mask
    bias = torch.zeros(70, device=hidden.device)
    bias[0] = 100.0  # its exponential overflows without a shift

    def gradients():
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = er.linear_token_rewards(*leaves, tokens, mask=mask, bias=bias, entropy=True, impl="fused")
        return torch.autograd.grad(out.reward.sum() + out.logprob.square().sum() + out.entropy.sum(), leaves)

    plain = gradients()
    _graph_may_hold(monkeypatch)
    with NothingReadBack():
        captured = gradients()
    for a, b in zip(plain, captured, strict=True):
        torch.testing.assert_close(a, b)
        assert b.isfinite().all()


def test_a_captured_chunked_forward_is_the_same(masked, monkeypatch):
    hidden, weight, tokens, mask = masked
    plan = plan_rows(tokens, mask, None, None)
    head = {"bias": None, "logit_scale": 1.0, "softcap": None, "alpha": 1.0, "entropy": True, "logit_mean": True}

    def forward():
        args = hidden.flatten(0, 1), weight, plan.targets
        return workspace.linear_forward(*args, mask=plan.needed, successor=plan.successor, **head)

    plain = forward()
    _graph_may_hold(monkeypatch)
    with NothingReadBack():
        captured = forward()
    for a, b in zip(plain[0] + plain[1], captured[0] + captured[1], strict=True):
        torch.testing.assert_close(a, b)
