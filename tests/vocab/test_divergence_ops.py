"""The divergence as operators and as functions: opcheck, torch.compile, autocast, bad input, bounded memory."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import endoreward_fast as er
from endoreward_fast.vocab.divergence import ops

FAST = ("fused", "chunked")
V, D = 70, 12


@pytest.fixture
def heads(device):
    return torch.randn(4, D, device=device), torch.randn(V, D, device=device), torch.randn(V, device=device)


@pytest.mark.parametrize(("impl", "beta"), [("fused", None), ("chunked", 0.3)])
def test_opcheck_logits(impl, beta, device):
    p, q = (torch.randn(1, 2, V, device=device, requires_grad=True) for _ in range(2))
    mask = torch.tensor([True, False], device=device)
    torch.library.opcheck(torch.ops.endoreward_fast.logits_divergence.default, (p, q, mask, beta, 0.7, impl))
    if beta is None:
        return
    stats = ops.logits_divergence(p.detach(), q.detach(), mask, beta, 0.7, impl)
    args = p.detach(), q.detach(), mask, stats, torch.ones(2, device=device), beta, 0.7, [True, False], impl
    torch.library.opcheck(torch.ops.endoreward_fast.logits_divergence_backward.default, args)


def test_opcheck_linear(heads):
    hidden, weight, bias = (x.requires_grad_() for x in heads)
    other = torch.randn(4, 5, device=hidden.device), torch.randn(V, 5, device=hidden.device)
    mask = torch.tensor([True, False, True, True], device=hidden.device)
    args = hidden, weight, bias, *other, None, mask, 0.5, 4.0, 1.0, None, 0.3, 0.7, "chunked"
    torch.library.opcheck(torch.ops.endoreward_fast.linear_divergence.default, args)
    stats = ops.linear_divergence(*(x.detach() if isinstance(x, torch.Tensor) else x for x in args))
    needs = [True, True, False, True, False, False]
    args = *args[:11], stats, torch.ones(4, device=hidden.device), *args[11:13], needs, "chunked"
    args = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
    torch.library.opcheck(torch.ops.endoreward_fast.linear_divergence_backward.default, args)


def test_one_graph_for_every_length_and_beta(heads):
    hidden, weight, bias = heads

    def loss(hidden, weight, kind, beta):
        value = er.linear_vocab_divergence(hidden, weight, hidden.tanh(), weight, bias=bias, kind=kind, beta=beta)
        stored = er.vocab_divergence(hidden @ weight.T, hidden.tanh() @ weight.T, kind=kind, beta=beta)
        return value.sum() + 2 * stored.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows, kind, beta in ((4, "jsd", 0.3), (3, "jsd", 0.4)):
        grads = []
        for function in (loss, compiled):
            h, w = hidden[:rows].clone().requires_grad_(), weight.clone().requires_grad_()
            value = function(h, w, kind, beta)
            grads.append((value, *torch.autograd.grad(value, (h, w))))
        for ours, eager in zip(*grads, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def test_activation_checkpointing(heads):
    """Checkpointing lets a backward unpack its saved tensors once."""
    hidden, weight, bias = heads
    grads = []
    for run in (lambda loss, *args: loss(*args), partial(checkpoint, use_reentrant=False)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        linear = run(lambda h, w: er.linear_vocab_divergence(h, w, hidden.tanh(), weight, bias=bias, kind="jsd"), h, w)
        stored = run(lambda h, w: er.vocab_divergence(h @ w.T, hidden.tanh() @ weight.T), h, w)
        stats = run(lambda h, w: er.linear_vocab_stats(h, w, named=[0, 1]).named_logprob, h, w)
        grads.append(torch.autograd.grad(linear.sum() + stored.sum() + stats.sum(), (h, w)))
    for once, again in zip(*grads, strict=True):
        torch.testing.assert_close(once, again)


def test_autocast_casts_as_in_a_linear_layer(heads):
    hidden, weight, _ = heads
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        auto = er.linear_vocab_divergence(hidden, weight, hidden + 1, weight)
    low = [x.bfloat16() for x in (hidden, weight, hidden + 1, weight)]
    assert auto.dtype == torch.float32 and torch.equal(auto, er.linear_vocab_divergence(*low))


def test_padding_behind_the_vocabulary(heads):
    hidden, weight, bias = heads
    padded, other_bias = torch.cat([weight, torch.full((3, D), 9.0, device=weight.device)]), torch.zeros(V + 3)
    weight = weight.clone().requires_grad_()
    found = er.linear_vocab_divergence(
        hidden, weight, hidden + 1, padded, bias=bias, teacher_bias=other_bias.to(weight.device), vocab_size=V - 2
    )
    right = er.vocab_divergence((hidden @ weight.T + bias)[:, : V - 2], ((hidden + 1) @ padded.T)[:, : V - 2])
    torch.testing.assert_close(found, right)
    (grad,) = torch.autograd.grad(found.sum(), weight)
    assert grad[: V - 2].any(1).all() and not grad[V - 2 :].any()


class Split(torch.Tensor):
    """What marks a DTensor."""

    full_tensor = None


LOGITS = torch.zeros(2, 5)
HIDDEN, WEIGHT = torch.zeros(2, 3), torch.zeros(5, 3)
BAD = {
    "kind": (lambda: er.vocab_divergence(LOGITS, LOGITS, kind="kl"), "kind='kl': expected 'forward-kl', 'reverse-kl'"),
    "beta at the end": (
        lambda: er.vocab_divergence(LOGITS, LOGITS, kind="jsd", beta=0),
        "beta=0: expected 0 < beta < 1; for the forward KL pass kind='forward-kl'",
    ),
    "beta near the end": (
        lambda: er.vocab_divergence(LOGITS, LOGITS, kind="jsd", beta=1 - 1e-9),
        "beta=0.999999999: expected 1e-06 to 1 - 1e-06, which float32 tells from 0 and 1",
    ),
    "beta as an array": (
        lambda: er.vocab_divergence(LOGITS, LOGITS, beta=np.ones(2)), "beta is a ndarray: expected a number"
    ),
    "beta of a schedule": (lambda: er.vocab_divergence(LOGITS, LOGITS, beta=LOGITS[0, 0]), "beta is a tensor"),
    "beta as text": (lambda: er.vocab_divergence(LOGITS, LOGITS, beta="0.5"), "beta is a str: expected a number"),
    "alpha": (lambda: er.vocab_divergence(LOGITS, LOGITS, alpha=0.0), "alpha=0.0: expected a finite temperature"),
    "two vocabularies": (
        lambda: er.vocab_divergence(LOGITS, LOGITS[:, :4]),
        "logits has 5 words and teacher_logits 4: expected one vocabulary; if only the padding differs, slice both",
    ),
    "two vocabularies of heads": (
        lambda: er.linear_vocab_divergence(HIDDEN, WEIGHT, HIDDEN, WEIGHT[:4]),
        "weight has 5 words and teacher_weight 4: expected one vocabulary; .* pass vocab_size",
    ),
    "vocab_size": (
        lambda: er.linear_vocab_divergence(HIDDEN, WEIGHT, HIDDEN, WEIGHT[:4], vocab_size=5),
        "vocab_size=5: expected 1 to 4",
    ),
    "two shapes": (
        lambda: er.vocab_divergence(LOGITS, LOGITS[:1]),
        r"teacher_logits is \(1, 5\) on cpu: expected the shape and the device of logits, \(2, 5\)",
    ),
    "two numbers of rows": (
        lambda: er.linear_vocab_divergence(HIDDEN, WEIGHT, HIDDEN[:1], WEIGHT),
        r"teacher_hidden is \(1, 3\) on cpu: expected the rows of hidden, \(2,\)",
    ),
    "the teacher's weight": (
        lambda: er.linear_vocab_divergence(HIDDEN, WEIGHT, HIDDEN, WEIGHT.T),
        r"teacher_weight is \(3, 5\).*expected \(V, 3\), D as in teacher_hidden",
    ),
    "the teacher's softcap": (
        lambda: er.linear_vocab_divergence(HIDDEN, WEIGHT, HIDDEN, WEIGHT, teacher_softcap=0.0),
        "teacher_softcap=0.0: expected a finite number > 0",
    ),
    "the teacher's bias": (
        lambda: er.linear_vocab_divergence(HIDDEN, WEIGHT, HIDDEN, WEIGHT, teacher_bias=HIDDEN[0]),
        r"teacher_bias is \(3,\).*expected \(5,\), one per row of teacher_weight",
    ),
    "the teacher's hidden states": (
        lambda: er.linear_vocab_divergence(HIDDEN, WEIGHT, [0.0], WEIGHT),
        r"torch.as_tensor\(teacher_hidden\) makes one",
    ),
    "split logits": (
        lambda: er.vocab_divergence(LOGITS, Split(LOGITS)), "teacher_logits is a DTensor: .* pass its full_tensor"
    ),
    "a split bias": (
        lambda: er.linear_vocab_divergence(HIDDEN, WEIGHT, HIDDEN, WEIGHT, bias=Split(LOGITS[0])), "bias is a DTensor"
    ),
    "mask": (lambda: er.vocab_divergence(LOGITS, LOGITS, mask=LOGITS > 0), r"mask is \(2, 5\).*expected \(2,\) bool"),
    "integer logits": (lambda: er.vocab_divergence(LOGITS, LOGITS.long()), "teacher_logits is .*floating-point"),
    "no tensor": (lambda: er.vocab_divergence(LOGITS, [0.0]), "teacher_logits is a list: expected a tensor"),
    "fused hidden states": (
        lambda: er.linear_vocab_divergence(HIDDEN, WEIGHT, HIDDEN, WEIGHT, impl="fused"),
        "impl='fused' cannot run here: no kernel computes the divergence from hidden states",
    ),
    "fused float64": (lambda: er.vocab_divergence(LOGITS, LOGITS.double(), impl="fused"), "not torch.float64"),
    "compiled": (lambda: er.vocab_divergence(LOGITS, LOGITS, impl="compiled"), "the divergence has no compiled C"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, says = BAD[name]
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("impl", FAST)
def test_forward_mode_is_refused_and_the_reference_has_it(impl, device):
    student, teacher = torch.randn(2, 3, V, device=device)
    with pytest.raises(ValueError, match="no forward-mode derivative"):
        torch.func.jvp(lambda s: er.vocab_divergence(s, teacher, impl=impl), (student,), (student,))
    _, tangent = torch.func.jvp(
        lambda s: er.vocab_divergence(s, teacher, impl="reference"), (student,), (torch.ones_like(student),)
    )
    torch.testing.assert_close(tangent, torch.zeros_like(tangent), atol=1e-6, rtol=0)


def test_meta_tensors_have_the_shape_of_a_result(heads):
    hidden, weight, _ = (x.to("meta") for x in heads)
    assert er.linear_vocab_divergence(
        hidden.unflatten(0, (2, 2)), weight, hidden.unflatten(0, (2, 2)), weight
    ).shape == (2, 2)
    assert er.vocab_divergence(weight, weight, kind="jsd").is_meta


def risen_mib(call) -> float:
    """Return by how many MiB the resident memory of this process rises at its peak during the call."""

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")
def test_extra_memory_is_bounded():
    """Each of the two logits would be 27 MiB. The reference, which holds several such tensors, fails this check."""
    rows, vocab = 1200, 6000
    leaves = [torch.randn(n, 8, requires_grad=True) for n in (rows, vocab)]
    teacher = torch.randn(rows, 4).bfloat16(), torch.randn(vocab, 4).bfloat16()

    def call(rows):
        value = er.linear_vocab_divergence(leaves[0][:rows], leaves[1], teacher[0][:rows], teacher[1], kind="jsd")
        return torch.autograd.grad(value.sum(), leaves)

    call(2)  # loads code
    assert 0 < risen_mib(lambda: call(rows)) < 24
    assert risen_mib(lambda: er.linear_vocab_divergence(*leaves, *teacher, impl="reference")) > 64
