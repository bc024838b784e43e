"""The custom operators: opcheck of schemas, fakes and autograd; torch.compile, autocast and lazy imports."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import endoreward_fast as er
from endoreward_fast.vocab import ops
from endoreward_fast.vocab.compiled import find_compiler

COMPILED = pytest.param(
    "compiled",
    marks=pytest.mark.skipif(
        torch.cuda.is_available() or find_compiler() is None,
        reason="impl='compiled' needs CPU tensors and a C++ compiler",
    ),
)
IMPLS = ("fused", "chunked", COMPILED)
B, T, V, D = 2, 6, 70, 24


@pytest.fixture
def case(device):
    hidden = torch.randn(B, T, D, device=device)
    weight = torch.randn(V, D, device=device)
    tokens = torch.randint(0, V, (B, T), device=device)
    mask = torch.rand(B, T, device=device) > 0.3
    return hidden, weight, tokens, mask


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rewards", [False, True])
def test_opcheck_logits(case, impl, rewards):
    hidden, weight, tokens, mask = case
    logits = (hidden @ weight.T).detach().requires_grad_()
    successor = _successors(mask) if rewards else None
    args = (logits, tokens.flatten(), mask.flatten(), successor, 0.7, True, not rewards, impl, None, None)
    torch.library.opcheck(torch.ops.endoreward_fast.logits_stats.default, args)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_linear(case, impl, masked):
    hidden, weight, tokens, mask = case
    hidden, weight = hidden.flatten(0, 1).requires_grad_(), weight.requires_grad_()
    bias = torch.randn(V, device=hidden.device, requires_grad=True)
    rows = mask.flatten() if masked else None
    args = (hidden, weight, bias, tokens.flatten(), rows, None, 0.5, 4.0, 0.7, True, True, impl, None, None)
    torch.library.opcheck(torch.ops.endoreward_fast.linear_stats.default, args)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_operators_have_right_fakes(case, impl):
    hidden, weight, tokens, _ = case
    flat, targets = hidden.flatten(0, 1), tokens.flatten()
    stats = ops.linear_stats(flat, weight, None, targets, None, None, 1.0, None, 1.0, True, True, impl, None, None)
    g = torch.randn(B * T, device=flat.device)
    needs = [True, True, False]
    args = (flat, weight, None, targets, None, stats, g, g, g, g, 1.0, None, 1.0, needs, impl)
    torch.library.opcheck(torch.ops.endoreward_fast.linear_stats_backward.default, args)
    args = (hidden @ weight.T, targets, None, stats, g, g, g, g, 1.0, impl)
    torch.library.opcheck(torch.ops.endoreward_fast.logits_stats_backward.default, args)


@pytest.mark.parametrize("impl", IMPLS)
def test_fullgraph_compilation_agrees_with_eager(case, impl):
    hidden, weight, tokens, mask = case

    def loss(hidden, weight):
        out = er.linear_token_rewards(hidden, weight, tokens, mask=mask, entropy=True, impl=impl)
        stats = er.vocab_stats(hidden @ weight.T, tokens, mask=mask, logit_mean=True, impl=impl)
        return sum(f.square().sum() for f in (*out, stats.lse, stats.logit_mean))

    grads = []
    for fn in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = fn(h, w)
        value.backward()
        grads.append((value, h.grad, w.grad))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_mode_is_refused_where_it_would_be_silently_zero(case, impl):
    hidden, weight, tokens, _ = case
    logits = hidden @ weight.T
    calls = {
        "logits": (lambda x, impl: er.vocab_stats(x, tokens, impl=impl).lse, logits),
        "linear": (lambda x, impl: er.linear_vocab_stats(x, weight, tokens, impl=impl).lse, hidden),
        "weight": (lambda x, impl: er.linear_token_rewards(hidden, x, tokens, impl=impl).reward, weight),
        "rewards": (lambda x, impl: er.token_rewards(x, tokens, impl=impl).reward, logits),
    }
    for call, x in calls.values():
        with pytest.raises(ValueError, match=f"impl='{impl}' has no forward-mode derivative.*impl='reference'"):
            torch.func.jvp(lambda x, call=call: call(x, impl), (x,), (x,))
    call, x = calls["logits"]
    _, tangent = torch.func.jvp(lambda x: call(x, "reference"), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.ones_like(tangent))


def test_a_schedule_of_alpha_softcap_and_floor_stays_one_graph(case):
    """dynamo makes a float symbolic when it changes for the first time."""
    hidden, weight, tokens, mask = case

    def score(alpha, softcap, floor):
        out = er.linear_token_rewards(hidden, weight, tokens, mask=mask, alpha=alpha, softcap=softcap)
        return er.sequence_score(out.reward, mask, gamma=0.9, floor=floor)

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    for step in range(1, 5):
        numbers = 0.5 * step, 3.0 * step, 0.01 * step
        torch.testing.assert_close(compiled(*numbers), score(*numbers))


@pytest.mark.parametrize("impl", IMPLS)
def test_many_lengths_compile_a_bounded_number_of_times(impl, device):
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def rewards(hidden, weight, tokens):
        return er.linear_token_rewards(hidden, weight, tokens, impl=impl).reward

    weight = torch.randn(V, D, device=device)
    for length in range(3, 23):
        tokens = torch.randint(0, V, (2, length), device=device)
        assert rewards(torch.randn(2, length, D, device=device), weight, tokens).shape == tokens.shape
    assert counter.frame_count <= 3, "once for the first length, once for all others"


@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
def test_autocast_casts_the_linear_path_like_a_linear_layer(case, impl):
    hidden, weight, tokens, mask = case
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        auto = er.linear_token_rewards(hidden, weight, tokens, mask=mask, impl=impl)
    by_hand = er.linear_token_rewards(hidden.bfloat16(), weight.bfloat16(), tokens, mask=mask, impl=impl)
    plain = er.linear_token_rewards(hidden, weight, tokens, mask=mask, impl=impl)
    assert auto.reward.dtype == torch.float32
    assert torch.equal(auto.reward, by_hand.reward)
    assert not torch.equal(auto.reward, plain.reward)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_backward_under_autocast_is_the_one_outside(case, impl, dtype):
    hidden, weight, tokens, mask = case
    leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    loss = er.linear_token_rewards(*leaves, tokens, mask=mask, impl=impl).reward.square().sum()
    outside = torch.autograd.grad(loss, leaves, retain_graph=True)
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        inside = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, inside, outside))


def test_meta_tensors_have_the_shapes_of_a_result(case):
    hidden, weight, tokens, mask = (x.to("meta") for x in case)
    found = er.linear_token_rewards(hidden, weight, tokens, mask=mask, entropy=True)
    assert all(x.is_meta and x.shape == (B, T) for x in found)
    assert er.linear_vocab_stats(hidden, weight, tokens, mask=mask).lse.shape == (B, T)


@pytest.mark.parametrize("impl", IMPLS)
def test_vmap_is_refused_by_torch(case, impl):
    """Neither the kernels nor the workspace know tensors that stand for a batch."""
    hidden, weight, tokens, _ = case
    h = hidden.requires_grad_()
    with pytest.raises(RuntimeError, match="Batching rule not implemented for endoreward_fast"):
        torch.func.vmap(lambda x: er.linear_vocab_stats(x, weight.detach(), tokens[0], impl=impl).lse)(h.detach())
    lse = er.linear_vocab_stats(h, weight, tokens, impl=impl).lse
    with pytest.raises(RuntimeError, match="Batching rule not implemented for endoreward_fast"):
        torch.autograd.grad(lse, h, torch.ones(3, *lse.shape, device=h.device), is_grads_batched=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_of_backward_is_refused(case, impl):
    hidden, weight, tokens, _ = case
    h = hidden.requires_grad_()
    (grad,) = torch.autograd.grad(er.linear_vocab_stats(h, weight, tokens, impl=impl).lse.sum(), h, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_importing_the_package_imports_neither_triton_nor_transformers_nor_trl():
    code = (
        "import sys, endoreward_fast as er, endoreward_fast.vocab.ops, endoreward_fast.vocab.fused\n"
        "er.token_rewards, er.EndoRewardModel\n"
        "sys.exit(' '.join(m for m in ('triton', 'transformers', 'trl') if m in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, endoreward_fast as er\n"
        "hidden, weight, tokens = torch.randn(1, 3, 4), torch.randn(9, 4), torch.zeros(1, 3, dtype=torch.long)\n"
        "assert er.linear_token_rewards(hidden, weight, tokens).reward.isfinite().all()\n"
        "try: er.linear_token_rewards(hidden, weight, tokens, impl='fused')\n"
        "except ValueError as error: sys.exit(0 if 'triton is not installed' in str(error) else 1)\n"
        "sys.exit(1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_kernels_folder_does_not_shadow_the_hub_package_of_that_name():
    import endoreward_fast.kernels.combine as ours

    found = sys.modules[ours.__name__.rpartition(".")[0]]
    assert found.__name__ == "endoreward_fast.kernels"
    assert getattr(found, "__file__", None) is None, "kernels/__init__.py would shadow Hugging Face's package"


def _successors(mask):
    row = torch.arange(mask.numel(), device=mask.device)
    follows = torch.cat([mask.flatten()[1:], mask.new_zeros(1)])
    return torch.where(mask.flatten() & follows, row + 1, -1)
