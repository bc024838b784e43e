"""TRL's own losses agree with `vocab_divergence`: names, roles, beta and temperature."""

import pytest
import torch

import endoreward_fast as er

pytest.importorskip("trl", reason="TRL asks for Python 3.11")
chunked = pytest.importorskip("trl.kernels.chunked_divergence", reason="this TRL has no chunked divergence")

# TRL's beta, and what it is called here
CASES = {
    "forward-kl": (0.0, "forward-kl"),
    "reverse-kl": (1.0, "reverse-kl"),
    "jsd": (0.5, "jsd"),
    "jsd 0.1": (0.1, "jsd"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_gkd(name):
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    beta, kind = CASES[name]
    student, teacher = torch.randn(2, 2, 3, 60, dtype=torch.float64) * 2
    labels = torch.tensor([[1, -100, 2], [3, 4, 5]])
    leaf = student.clone().requires_grad_()
    theirs = GKDTrainer.generalized_jsd_loss(leaf, teacher, labels, beta=beta, temperature=0.7, reduction="sum")
    (right,) = torch.autograd.grad(theirs, leaf)
    mine = student.clone().requires_grad_()
    how = {"kind": kind, "alpha": 0.7, "mask": labels != -100} | ({"beta": beta} if kind == "jsd" else {})
    ours = er.vocab_divergence(mine, teacher, **how).sum()
    (grad,) = torch.autograd.grad(ours, mine)
    torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_chunked_divergence(name):
    beta, kind = CASES[name]
    inputs = [torch.randn(*shape) for shape in ((6, 8), (90, 8), (90,), (6, 5), (90, 5), (90,))]
    student = [x.clone().requires_grad_() for x in inputs[:3]]
    theirs, _ = chunked.ChunkedDivergenceFunction.apply(*student, *inputs[3:], beta, 0.7, 0.9, 20.0, 1.1, None)
    g = torch.randn(6)
    right = torch.autograd.grad(theirs, student, g)
    mine = [x.clone().requires_grad_() for x in inputs[:3]]
    ours = er.linear_vocab_divergence(
        mine[0], mine[1], inputs[3], inputs[4], bias=mine[2], teacher_bias=inputs[5], logit_scale=0.9, softcap=20.0,
        teacher_logit_scale=1.1, kind=kind, alpha=0.7, **({"beta": beta} if kind == "jsd" else {}),
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, mine, g), right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
