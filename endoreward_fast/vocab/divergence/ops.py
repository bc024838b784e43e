"""The custom operators of the divergence: schemas, fakes and autograd (see ops.py).

`impl` is "fused" or "chunked", and `beta` None stands for KL(p || q). Each operator returns the fields of
rows.Stats; only the first, the divergence, is differentiable.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from ..ops import _op, _own_surroundings
from .rows import Head, Stats

FORWARD = {"fused": "fused", "chunked": "chunked"}
BACKWARD = {"fused": "fused", "chunked": "backward"}


def _module(names: dict[str, str], impl: str) -> ModuleType:
    return import_module(f".{names[impl]}", __package__)


def _fake_stats(like: Tensor, rows: int | torch.SymInt) -> list[Tensor]:
    return [like.new_empty(rows, dtype=torch.float32) for _ in Stats._fields]


def _given(like: Tensor, grads: list[Tensor | None] | tuple[Tensor | None, ...]) -> list[Tensor]:
    """Return the gradients, empty tensors in place of None: an operator cannot return None."""
    return [like.new_empty(0) if g is None else g for g in grads]


def _fake_grads(like: Tensor, inputs: tuple[Tensor | None, ...], needs: list[bool]) -> list[Tensor]:
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else like.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    ]


def _save(ctx, inputs: tuple[Tensor | None, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, *output)


# ------------------------------------------------------------------------------------------------ logits (B, T, V)


@_op("endoreward_fast::logits_divergence")
def logits_divergence(
    p: Tensor, q: Tensor, mask: Tensor | None, beta: float | None, alpha: float, impl: str
) -> list[Tensor]:
    """Return the fields of Stats for logits p and q (B, T, V) and mask (B T,)."""
    with _own_surroundings(p):
        return list(_module(FORWARD, impl).logits_forward(p, q, mask=mask, beta=beta, alpha=alpha))


@logits_divergence.register_fake
def _(p, q, mask, beta, alpha, impl):
    return _fake_stats(p, p.shape[0] * p.shape[1])


@_op("endoreward_fast::logits_divergence_backward")
def logits_divergence_backward(
    p: Tensor, q: Tensor, mask: Tensor | None, stats: list[Tensor], g: Tensor, beta: float | None, alpha: float,
    needs: list[bool], impl: str,
) -> list[Tensor]:  # fmt: skip
    """Return (dp, dq) in the logits' dtypes; empty where `needs` is False."""
    with _own_surroundings(p):
        return _given(
            p,
            _module(BACKWARD, impl).logits_backward(
                p, q, Stats(*stats), g, mask=mask, beta=beta, alpha=alpha, needs=tuple(needs)
            ),
        )


@logits_divergence_backward.register_fake
def _(p, q, mask, stats, g, beta, alpha, needs, impl):
    return _fake_grads(p, (p, q), needs)


def _logits_setup(ctx, inputs, output):
    p, q, mask, ctx.beta, ctx.alpha, ctx.impl = inputs
    _save(ctx, (p, q, mask), output)


def _logits_backward(ctx, grads):
    p, q, mask, *stats = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    if grads[0] is None:
        return (None,) * 6
    out = logits_divergence_backward(p, q, mask, stats, grads[0], ctx.beta, ctx.alpha, needs, ctx.impl)
    return *(g if need else None for g, need in zip(out, needs, strict=True)), *(None,) * 4


logits_divergence.register_autograd(_logits_backward, setup_context=_logits_setup)


# ------------------------------------------------------------------------------ two heads, hidden (N, D), weight (V, D)


@_op("endoreward_fast::linear_divergence")
def linear_divergence(
    p_hidden: Tensor, p_weight: Tensor, p_bias: Tensor | None, q_hidden: Tensor, q_weight: Tensor,
    q_bias: Tensor | None, mask: Tensor | None, p_scale: float, p_softcap: float | None, q_scale: float,
    q_softcap: float | None, beta: float | None, alpha: float, impl: str,
) -> list[Tensor]:  # fmt: skip
    """Do the same as `logits_divergence` from hidden states and weights. Rows off the mask skip the matmuls."""
    p = Head(p_hidden, p_weight, p_bias, p_scale, p_softcap)
    q = Head(q_hidden, q_weight, q_bias, q_scale, q_softcap)
    with _own_surroundings(p_hidden):
        return list(_module(FORWARD, impl).linear_forward(p, q, mask=mask, beta=beta, alpha=alpha))


@linear_divergence.register_fake
def _(
    p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias, mask, p_scale, p_softcap, q_scale, q_softcap, beta, alpha,
    impl,
):  # fmt: skip
    return _fake_stats(p_hidden, p_hidden.shape[0])


@_op("endoreward_fast::linear_divergence_backward")
def linear_divergence_backward(
    p_hidden: Tensor, p_weight: Tensor, p_bias: Tensor | None, q_hidden: Tensor, q_weight: Tensor,
    q_bias: Tensor | None, mask: Tensor | None, p_scale: float, p_softcap: float | None, q_scale: float,
    q_softcap: float | None, stats: list[Tensor], g: Tensor, beta: float | None, alpha: float, needs: list[bool],
    impl: str,
) -> list[Tensor]:  # fmt: skip
    """Return (dhidden, dweight, dbias) of p, then of q, in the inputs' dtypes; empty where `needs` is False."""
    p = Head(p_hidden, p_weight, p_bias, p_scale, p_softcap)
    q = Head(q_hidden, q_weight, q_bias, q_scale, q_softcap)
    with _own_surroundings(p_hidden):
        found = _module(BACKWARD, impl).linear_backward(
            p, q, Stats(*stats), g, mask=mask, beta=beta, alpha=alpha, needs=(tuple(needs[:3]), tuple(needs[3:]))
        )
    return _given(p_hidden, found)


@linear_divergence_backward.register_fake
def _(
    p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias, mask, p_scale, p_softcap, q_scale, q_softcap, stats, g,
    beta, alpha, needs, impl,
):  # fmt: skip
    return _fake_grads(p_hidden, (p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias), needs)


def _linear_setup(ctx, inputs, output):
    ctx.numbers, (ctx.beta, ctx.alpha, ctx.impl) = inputs[7:11], inputs[11:]
    _save(ctx, inputs[:7], output)


def _linear_backward(ctx, grads):
    saved = ctx.saved_tensors  # once: activation checkpointing refuses to unpack a tensor again
    tensors, stats = saved[:7], list(saved[7:])
    needs = list(ctx.needs_input_grad[:6])
    if grads[0] is None:
        return (None,) * 14
    out = linear_divergence_backward(
        *tensors, *ctx.numbers, stats, grads[0], ctx.beta, ctx.alpha, needs, ctx.impl
    )  # fmt: skip
    return *(g if need else None for g, need in zip(out, needs, strict=True)), *(None,) * 8


linear_divergence.register_autograd(_linear_backward, setup_context=_linear_setup)
