"""The custom operators `torch.ops.endoreward_fast.*`: schemas, fakes and autograd, for torch.compile and opcheck.

Each pass over the vocabulary is one operator, and so is its gradient. `impl` selects the backend "fused", "chunked" or
"compiled", which is imported on first execution. The reference needs no operator, because eager torch differentiates
it.

rows.py describes how rows are flattened. An output that was not requested is empty: an operator cannot return None.
"""

import contextlib

import torch
from torch import Tensor

from .choice import backend as _backend
from .reference import outside_vocabulary
from .rows import RowGrads, RowRewards, RowStats, stats_grads, successor_among

_op = torch.library.custom_op
# The linear operators read the rows of a mask back to the host, which a CUDA graph cannot capture.
NO_CUDA_GRAPH = (torch.Tag.cudagraph_unsafe,)
STATS = ("lse", "target_logit", "entropy", "logit_mean", "shift", "log_total")


def _on_device_of(x: Tensor):
    """Make the tensor's device the current one, because Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------ logits (B, T, V)


@_op("endoreward_fast::logits_stats", mutates_args=())
def logits_stats(
    logits: Tensor, targets: Tensor, mask: Tensor | None, successor: Tensor | None,
    alpha: float, entropy: bool, logit_mean: bool, impl: str,
) -> list[Tensor]:  # fmt: skip
    """Return the six fields of RowStats and, if `successor` is given, the three of RowRewards.

    logits is (B, T, V); targets, mask and successor are (B T,).
    """
    outside_vocabulary(targets, mask, logits.shape[-1])
    with _on_device_of(logits):
        stats, rewards = _backend(impl, logits).logits_forward(
            logits, targets, mask=mask, alpha=alpha, entropy=entropy, logit_mean=logit_mean, successor=successor
        )
    return outputs(stats, rewards)


@logits_stats.register_fake
def _(logits, targets, mask, successor, alpha, entropy, logit_mean, impl):
    return _fake_outputs(targets, entropy, logit_mean, successor is not None)


@_op("endoreward_fast::logits_stats_backward", mutates_args=())
def logits_stats_backward(
    logits: Tensor, targets: Tensor, mask: Tensor | None, stats: list[Tensor], g_lse: Tensor, g_target: Tensor,
    g_entropy: Tensor | None, g_mean: Tensor | None, alpha: float, impl: str,
) -> Tensor:  # fmt: skip
    grads = RowGrads(g_lse, g_target, g_entropy, g_mean)
    with _on_device_of(logits):
        return _backend(impl, logits).logits_backward(logits, targets, RowStats(*stats), grads, mask=mask, alpha=alpha)


@logits_stats_backward.register_fake
def _(logits, targets, mask, stats, g_lse, g_target, g_entropy, g_mean, alpha, impl):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _logits_setup(ctx, inputs, output):
    logits, targets, mask, successor, ctx.alpha, _, _, ctx.impl = inputs
    _save(ctx, (logits, targets, mask, successor), output)


def _logits_backward(ctx, grads):
    (logits, targets, mask, successor), stats = _saved(ctx, 4)
    upstream = row_grads(grads, targets, successor, stats, ctx.alpha)
    grad = logits_stats_backward(logits, targets, mask, list(stats), *upstream, ctx.alpha, ctx.impl)
    return grad, None, None, None, None, None, None, None


logits_stats.register_autograd(_logits_backward, setup_context=_logits_setup)


# ----------------------------------------------------------------------------------- hidden (N, D), weight (V, D)


@_op("endoreward_fast::linear_stats", mutates_args=(), tags=NO_CUDA_GRAPH)
def linear_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor | None,
    successor: Tensor | None, logit_scale: float, softcap: float | None, alpha: float, entropy: bool,
    logit_mean: bool, impl: str,
) -> list[Tensor]:  # fmt: skip
    """Do the same as `logits_stats` from hidden (N, D) and weight (V, D). Rows off the mask skip the matmul."""
    outside_vocabulary(targets, mask, weight.shape[0])
    head = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}
    want = {"alpha": alpha, "entropy": entropy, "logit_mean": logit_mean}
    backend = _backend(impl, hidden, weight)

    def forward(hidden, targets, successor):
        with _on_device_of(hidden):
            return backend.linear_forward(hidden, weight, targets, successor=successor, **head, **want)

    if mask is None:
        return outputs(*forward(hidden, targets, successor))
    rows = mask.nonzero().squeeze(1)
    stats, rewards = forward(hidden[rows], targets[rows], successor_among(successor, mask, rows))
    return outputs(_spread(stats, rows, len(targets)), rewards and _spread(rewards, rows, len(targets)))


@linear_stats.register_fake
def _(hidden, weight, bias, targets, mask, successor, logit_scale, softcap, alpha, entropy, logit_mean, impl):
    return _fake_outputs(targets, entropy, logit_mean, successor is not None)


@_op("endoreward_fast::linear_stats_backward", mutates_args=(), tags=NO_CUDA_GRAPH)
def linear_stats_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor | None, stats: list[Tensor],
    g_lse: Tensor, g_target: Tensor, g_entropy: Tensor | None, g_mean: Tensor | None,
    logit_scale: float, softcap: float | None, alpha: float, needs: list[bool], impl: str,
) -> list[Tensor]:  # fmt: skip
    """Return (dhidden, dweight, dbias) in the inputs' dtypes; empty where `needs` is False."""
    grads = RowGrads(g_lse, g_target, g_entropy, g_mean)
    rows = None if mask is None else mask.nonzero().squeeze(1)
    h = hidden
    if rows is not None:
        h, targets = hidden[rows], targets[rows]
        stats = [field[rows] if field.numel() else field for field in stats]
        grads = RowGrads(*(None if g is None else g[rows] for g in grads))
    with _on_device_of(h):
        dhidden, dweight, dbias = _backend(impl, h, weight).linear_backward(
            h, weight, targets, RowStats(*stats), grads, bias=bias, logit_scale=logit_scale, softcap=softcap,
            alpha=alpha, needs=tuple(needs),
        )  # fmt: skip
    if rows is not None and dhidden is not None:
        dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format).index_copy_(0, rows, dhidden)
    return [hidden.new_empty(0) if g is None else g for g in (dhidden, dweight, dbias)]


@linear_stats_backward.register_fake
def _(
    hidden, weight, bias, targets, mask, stats, g_lse, g_target, g_entropy, g_mean, logit_scale, softcap, alpha,
    needs, impl,
):  # fmt: skip
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else hidden.new_empty(0)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    ]


def _linear_setup(ctx, inputs, output):
    hidden, weight, bias, targets, mask, successor, ctx.logit_scale, ctx.softcap, ctx.alpha, _, _, ctx.impl = inputs
    _save(ctx, (hidden, weight, bias, targets, mask, successor), output)


def _linear_backward(ctx, grads):
    (hidden, weight, bias, targets, mask, successor), stats = _saved(ctx, 6)
    upstream = row_grads(grads, targets, successor, stats, ctx.alpha)
    needs = list(ctx.needs_input_grad[:3])
    out = linear_stats_backward(
        hidden, weight, bias, targets, mask, list(stats), *upstream,
        ctx.logit_scale, ctx.softcap, ctx.alpha, needs, ctx.impl,
    )  # fmt: skip
    return *(g if need else None for g, need in zip(out, needs, strict=True)), *(None,) * 9


linear_stats.register_autograd(_linear_backward, setup_context=_linear_setup)


# ---------------------------------------------------------------------------------------------------- shared parts


def outputs(stats: RowStats, rewards: RowRewards | None) -> list[Tensor]:
    empty = stats.lse.new_empty(0)
    return [empty.clone() if f is None else f for f in (*stats, *(rewards or ()))]


def _fake_outputs(targets: Tensor, entropy: bool, logit_mean: bool, rewards: bool) -> list[Tensor]:
    wanted = [True, True, entropy, logit_mean, True, True] + [True] * 3 * rewards
    return [targets.new_empty(targets.shape[0] if want else 0, dtype=torch.float32) for want in wanted]


def _spread(fields, rows: Tensor, count: int):
    """Expand a RowStats or RowRewards of the given rows to all `count` rows, with 0 in the other rows."""
    spread = (f if f is None else f.new_zeros(count).index_copy_(0, rows, f) for f in fields)
    return type(fields)(*spread)


def _save(ctx, inputs: tuple, output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[: len(STATS)])


def _saved(ctx, count: int) -> tuple[tuple, RowStats]:
    tensors = ctx.saved_tensors
    return tensors[:count], RowStats(*tensors[count:])


def row_grads(
    grads: list[Tensor | None], targets: Tensor, successor: Tensor | None, stats: RowStats, alpha: float
) -> RowGrads:
    """Turn upstream gradients of an operator's outputs into gradients of the row statistics."""

    def or_zero(g):
        return torch.zeros_like(stats.lse) if g is None else g

    g_lse, g_target, g_entropy, g_mean = grads[:4]
    if successor is None:
        return RowGrads(or_zero(g_lse), or_zero(g_target), g_entropy, g_mean)
    g_rewards = RowRewards(*(or_zero(g) for g in grads[len(STATS) :]))
    return stats_grads(targets, successor, stats.log_total, alpha, g_rewards, g_entropy)
