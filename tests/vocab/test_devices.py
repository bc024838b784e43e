"""Tensors beyond 2^31 elements, on another device, on another stream, and in a CUDA graph."""

import pytest
import torch

import endoreward_fast as er

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and CUDA graphs need a GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="another device needs two GPUs")


def far_apart(rows, width, device):
    """Return (rows, width) bf16 whose last row starts beyond 2^31 elements. On the CPU only touched pages exist."""
    pitch = 2**31 // (rows - 1) + 64
    storage = torch.empty(pitch * (rows - 1) + width, dtype=torch.bfloat16, device=device)
    return storage.as_strided((rows, width), (pitch, 1)).copy_(torch.randn(rows, width, device=device))


@pytest.mark.parametrize("far", ["logits", "hidden", "weight"])
def test_rows_beyond_32_bit_offsets(far, device):
    width, rows = 64, 3
    view, near = far_apart(rows, width, device), torch.randn(40, width, device=device).bfloat16()
    targets = torch.randint(0, rows, (len(near) if far == "weight" else rows,), device=device)
    fn = er.vocab_stats if far == "logits" else er.linear_vocab_stats
    args = {"logits": (view,), "hidden": (view, near), "weight": (near, view)}[far]
    fused = fn(*args, targets, entropy=True, impl="fused")
    expected = fn(*(x.clone() for x in args), targets, entropy=True, impl="reference")
    for name in ("lse", "target_logit", "entropy"):
        torch.testing.assert_close(getattr(fused, name), getattr(expected, name), rtol=1e-5, atol=1e-4)


def test_gradients_of_rows_beyond_32_bit_offsets(device):
    view, targets = far_apart(3, 64, device), torch.tensor([0, 5, 63], device=device)
    gradients = []
    for z, impl in ((view.detach(), "fused"), (view.clone(), "reference")):
        out = er.vocab_stats(z.requires_grad_(), targets, entropy=True, impl=impl)
        gradients += torch.autograd.grad(out.lse.sum() + out.entropy.sum(), z)
    torch.testing.assert_close(*gradients)


def test_tma_is_used_only_for_tensors_it_can_read(device):
    """TMA needs 16-byte aligned base and row pitch, unit stride, and rows that do not overlap."""
    from endoreward_fast.kernels.linear_vocab_stats import tma_usable

    storage = torch.empty(1024, dtype=torch.bfloat16, device=device)

    def usable(start=0, pitch=64, step=1):
        return tma_usable(storage.as_strided((4, 32), (pitch, step), start))

    assert usable() and usable(start=8) and usable(pitch=40)
    assert not any((usable(start=1), usable(start=4), usable(pitch=60), usable(pitch=16), usable(pitch=128, step=2)))


@pytest.mark.device
@needs_gpu
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_a_side_stream_and_a_cuda_graph(path):
    hidden = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(5000, 256, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 5000, (64,), device="cuda")
    logits = hidden @ weight.T

    def run():
        if path == "logits":
            return er.vocab_stats(logits, targets, entropy=True)[:3]
        return er.linear_vocab_stats(hidden, weight, targets, entropy=True)[:3]

    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    for other in (aside, captured):
        assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))


@pytest.mark.device
@needs_gpu
@pytest.mark.parametrize("impl", ["fused", "chunked"])
def test_a_cuda_graph_of_masked_rewards_and_their_gradient(impl):
    """One graph serves every mask of its shape. The fused forward gives the bits of the same call without a graph."""
    hidden = torch.randn(2, 48, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    tokens, mask = torch.randint(0, 5000, (2, 48), device="cuda"), torch.rand(2, 48, device="cuda") < 0.5

    def run():
        out = er.linear_token_rewards(hidden, weight, tokens, mask=mask, entropy=True, impl=impl)
        return *out, *torch.autograd.grad(out.reward.sum() + out.entropy.sum(), (hidden, weight))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles, and warms up the library's matmul
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for share in (0.9, 0.1):
        mask.copy_(torch.rand(2, 48, device="cuda") < share)
        graph.replay()
        expected = run()
        torch.cuda.synchronize()
        for name, a, b in zip((*er.TokenRewards._fields, "dhidden", "dweight"), captured, expected, strict=True):
            if impl == "fused" and name in er.TokenRewards._fields:
                assert torch.equal(a, b), name
            else:
                torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.device
@needs_two
@pytest.mark.parametrize("impl", ["fused", "chunked"])
def test_tensors_on_a_device_that_is_not_the_current_one(impl):
    hidden, weight, targets = torch.randn(40, 64), torch.randn(500, 64), torch.arange(40)

    def run(device):
        h, w = (x.to(device).requires_grad_() for x in (hidden, weight))
        out = er.linear_vocab_stats(h, w, targets.to(device), entropy=True, impl=impl)
        return *out[:3], *torch.autograd.grad(out.lse.sum() + out.entropy.sum(), (h, w))

    with torch.cuda.device(0):
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(run("cuda:1"), run("cuda:0"), strict=True))
