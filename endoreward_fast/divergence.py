"""Divergence of two next-token distributions, per token: the loss of distillation, from logits or from hidden states.

The student is pi = softmax(z / alpha) and the teacher tau = softmax(z_teacher / alpha), over the same vocabulary:

    forward-kl   KL(tau || pi)  = sum_a tau_a (log tau_a - log pi_a)              covers what the teacher does
    reverse-kl   KL(pi || tau)  = sum_a pi_a (log pi_a - log tau_a)               seeks what the teacher prefers
    jsd          beta KL(tau || m) + (1 - beta) KL(pi || m),   m = beta tau + (1 - beta) pi

All are in nats. None is multiplied by alpha^2, as in TRL, Liger and verl; Hinton's loss and NeMo's are. beta weights
the teacher, as in GKD (Agarwal et al., arXiv 2306.13649) and in TRL, Liger and verl. vocab/divergence/reference.py has
the formulas of the limits.

impl  "fused"      Triton kernels; from stored logits only, on a CUDA or ROCm device
      "chunked"    torch code with a bounded workspace, on any device
      "reference"  eager torch that materialises everything, on any device; the oracle of the tests
      "auto"       from stored logits "fused" where the kernels can run, else "chunked"; from hidden states "chunked"
A named impl that cannot run raises ValueError. It never falls back to another one.
"""

import math
from numbers import Integral
from typing import Any, Literal

from torch import Tensor

from .vocab.checks import as_bool, check_linear, check_logits, check_numbers, check_reverse_mode
from .vocab.divergence import reference
from .vocab.divergence.fused import obstacle
from .vocab.divergence.rows import Head
from .vocab.prepare import as_3d, autocast, flat

Kind = Literal["forward-kl", "reverse-kl", "jsd"]
DivergenceImpl = Literal["auto", "fused", "chunked", "reference"]
KINDS = ("forward-kl", "reverse-kl", "jsd")
LEAST_SHARE = 1e-6
"""least weight of either distribution in "jsd". Below 3e-8, 1 - beta is 1 in float32, and the JSD would be inf"""


def vocab_divergence(
    logits: Tensor, teacher_logits: Tensor, *, kind: Kind = "forward-kl", beta: float = 0.5,
    mask: Tensor | None = None, alpha: float = 1.0, impl: DivergenceImpl = "auto",
) -> Tensor:  # fmt: skip
    """Compute the divergence between a student's and a teacher's next-token distributions, from logits.

    The formulas are at the top of this file. The two may have different dtypes; arithmetic is float32.

    logits          (..., V) of the student: bf16, fp16, fp32 or fp64, any strides
    teacher_logits  (..., V) of the teacher, of the same shape. Detach them, or compute them under no_grad, to train the
                    student alone; the teacher's gradient then costs nothing
    kind            "forward-kl", "reverse-kl" or "jsd"
    beta            weight of the teacher in "jsd", 1e-6 to 1 - 1e-6; the other kinds ignore it. TRL and Liger return
                    the forward KL for beta = 0 and the reverse KL for beta = 1: name those by `kind`
    mask            (...) rows to compute, as bool or as integers 0 and 1; the others cost nothing and come back 0
    alpha           softmax temperature of both, > 0
    impl            implementation, see the top of this file

        >>> import torch
        >>> student, teacher = torch.tensor([0.0, 0.0]), torch.tensor([0.0, float("-inf")])
        >>> vocab_divergence(student, teacher), vocab_divergence(student, teacher, kind="reverse-kl")
        (tensor(0.6931), tensor(inf))

    Returns float32 (...), nats, at least 0, and exactly 0 for equal rows. KL is inf, without a gradient, where one
    distribution excludes (logit -inf) a word that the expectation is taken over; JSD is finite.
    Raises ValueError for a wrong shape, dtype or device, and for two vocabularies.
    """
    _check_options(kind, beta, alpha)
    for name, x in (("logits", logits), ("teacher_logits", teacher_logits)):
        check_logits(x, name)
        _refuse_dtensor(name, x)
    _check_one_vocabulary(logits.shape[-1], teacher_logits.shape[-1], "logits", "slice both to the words they share")
    if teacher_logits.shape != logits.shape or teacher_logits.device != logits.device:
        raise ValueError(
            f"teacher_logits is {tuple(teacher_logits.shape)} on {teacher_logits.device}: expected the shape and the "
            f"device of logits, {tuple(logits.shape)} on {logits.device}"
        )
    mask = None if mask is None else as_bool("mask", mask, logits.shape[:-1], logits.device)
    p, q, weight = _roles(logits, teacher_logits, kind, beta)
    chosen = _choose(impl, p, q)
    if chosen == "reference":
        return reference.divergence(p, q, mask=mask, beta=weight, alpha=alpha)
    check_reverse_mode(chosen, p, q)
    from .vocab.divergence.ops import logits_divergence

    out = logits_divergence(as_3d(p), as_3d(q), flat(mask), weight, float(alpha), chosen)
    return out[0].view(logits.shape[:-1])


def linear_vocab_divergence(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *, bias: Tensor | None = None,
    logit_scale: float = 1.0, softcap: float | None = None, teacher_bias: Tensor | None = None,
    teacher_logit_scale: float = 1.0, teacher_softcap: float | None = None, kind: Kind = "forward-kl",
    beta: float = 0.5, mask: Tensor | None = None, alpha: float = 1.0, impl: DivergenceImpl = "auto",
    vocab_size: int | None = None,
) -> Tensor:  # fmt: skip
    """Compute `vocab_divergence` from the hidden states and the head of each model, without writing the logits.

        z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)

    hidden          (..., D) of the student
    weight          (V, D), of the dtype of hidden; bf16 or fp16 too if hidden is float32
    teacher_hidden  (..., D') of the teacher, whose D' and dtype may differ
    teacher_weight  (V, D'). The same tensor as weight for self-distillation from another context: it then gets the sum
                    of both gradients, or with `teacher_weight=weight.detach()` that of the student alone
    bias, teacher_bias                (V,) or None
    logit_scale, teacher_logit_scale  factor of the logits
    softcap, teacher_softcap          None: no cap
    vocab_size      number of words that both know; the rows of the weights behind them are padding and are left out

    kind, beta, mask, alpha and impl are as in `vocab_divergence`. Rows off the mask skip the matmuls. The extra memory
    is bounded for any number of rows: 64 MiB on the CPU, 256 MiB on a GPU. The forward multiplies each head once, for
    "jsd" twice; the backward multiplies both heads once more for each model that needs a gradient. Under autocast,
    hidden states, weights and biases are cast first, as in a linear layer.
    Returns and raises as `vocab_divergence`.
    """
    _check_options(kind, beta, alpha)
    student = _head("", hidden, weight, bias, logit_scale, softcap)
    teacher = _head("teacher_", teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
    if vocab_size is None:
        sizes = weight.shape[0], teacher_weight.shape[0]
        _check_one_vocabulary(*sizes, "weight", "pass vocab_size, the number of words that both know")
    else:
        student, teacher = _cut(vocab_size, student, teacher)
    rows = hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != rows or teacher_hidden.device != hidden.device:
        raise ValueError(
            f"teacher_hidden is {tuple(teacher_hidden.shape)} on {teacher_hidden.device}: expected the rows of hidden, "
            f"{tuple(rows)}, on {hidden.device}"
        )
    mask = None if mask is None else as_bool("mask", mask, rows, hidden.device)
    p, q, share = _roles(student, teacher, kind, beta)
    chosen = _choose(impl, None, None)
    if chosen == "reference":
        return reference.linear_divergence(p, q, mask=mask, beta=share, alpha=alpha)
    check_reverse_mode(chosen, *p[:3], *q[:3])
    from .vocab.divergence.ops import linear_divergence

    out = linear_divergence(
        _rows(p[0]), *p[1:3], _rows(q[0]), *q[1:3], flat(mask), *p[3:], *q[3:], share, float(alpha), chosen
    )
    return out[0].view(rows)


def _roles(student: Any, teacher: Any, kind: Kind, beta: float) -> tuple[Any, Any, float | None]:
    """Return (p, q, beta) of the operators: KL(p || q) with beta None, else p has the weight beta."""
    if kind == "reverse-kl":
        return student, teacher, None
    return teacher, student, float(beta) if kind == "jsd" else None


def _choose(impl: str, p: Tensor | None, q: Tensor | None) -> str:
    """Return the implementation, for stored logits p and q, or for hidden states if they are None."""
    if impl not in ("auto", "fused", "chunked", "reference"):
        also = "; the divergence has no compiled C++ code" if impl == "compiled" else ""
        raise ValueError(f"impl={impl!r}: expected 'auto', 'fused', 'chunked' or 'reference'{also}")
    if impl in ("chunked", "reference"):
        return impl
    if p is None or q is None:
        found: str | None = "no kernel computes the divergence from hidden states"
    else:
        found = obstacle(p, q)
        if impl == "auto" and p.device.type != "cuda":
            return "chunked"
    if found is None:
        return "fused"
    if impl == "fused":
        raise ValueError(f"impl='fused' cannot run here: {found}; impl='auto' would choose 'chunked'")
    return "chunked"


def _head(
    prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Head:
    """Check a head and return it, its tensors cast as autocast would cast those of a linear layer."""
    check_linear(hidden, weight, bias, scale, softcap, of=prefix)
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        _refuse_dtensor(prefix + name, x)
    return Head(*autocast(hidden, weight, bias), float(scale), None if softcap is None else float(softcap))


def _refuse_dtensor(name: str, x: Tensor | None) -> None:
    if hasattr(x, "full_tensor"):
        raise ValueError(f"{name} is a DTensor: the divergence reads whole tensors only; pass its full_tensor()")


def _cut(vocab_size: int, *heads: Head) -> list[Head]:
    """Return the heads without the padding behind the vocabulary."""
    most = min(head.weight.shape[0] for head in heads)
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, Integral) or not 1 <= vocab_size <= most:
        raise ValueError(f"vocab_size={vocab_size!r}: expected 1 to {most}, the rows of the smaller weight")
    return [
        head._replace(weight=head.weight[:vocab_size], bias=None if head.bias is None else head.bias[:vocab_size])
        for head in heads
    ]


def _check_options(kind: str, beta: float, alpha: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected {', '.join(map(repr, KINDS[:-1]))} or {KINDS[-1]!r}")
    for name, x in (("alpha", alpha), ("beta", beta)):
        if isinstance(x, Tensor) or x is None:
            raise ValueError(f"{name} is {'a tensor' if isinstance(x, Tensor) else None}: expected a number")
    check_numbers(alpha=alpha, beta=beta)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha}: expected a finite temperature > 0")
    if kind == "jsd" and not 0 < beta < 1:
        at_the_ends = "; for the forward KL pass kind='forward-kl', for the reverse KL kind='reverse-kl'"
        raise ValueError(f"beta={beta}: expected 0 < beta < 1{at_the_ends if beta in (0, 1) else ''}")
    if kind == "jsd" and not LEAST_SHARE <= beta <= 1 - LEAST_SHARE:
        raise ValueError(f"beta={beta}: expected {LEAST_SHARE} to 1 - {LEAST_SHARE}, which float32 tells from 0 and 1")


def _check_one_vocabulary(vocab: int, teacher_vocab: int, name: str, advice: str) -> None:
    if vocab != teacher_vocab:
        raise ValueError(
            f"{name} has {vocab} words and teacher_{name} {teacher_vocab}: expected one vocabulary; if only "
            f"the padding differs, {advice}"
        )


def _rows(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


__all__ = ["DivergenceImpl", "Kind", "linear_vocab_divergence", "vocab_divergence"]
