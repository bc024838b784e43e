"""The custom operators `torch.ops.endoreward_fast.*`: schemas, fakes and autograd, for torch.compile and opcheck.

Each pass over the vocabulary is one operator, and so is its gradient. `impl` selects the backend "fused", "chunked" or
"compiled", which is imported on first execution. The reference needs no operator, because eager torch differentiates
it.

rows.py describes how rows are flattened. An output that was not requested is empty: an operator cannot return None.
"""

import contextlib
import functools

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transforming
from torch._C._functorch import is_legacy_batchedtensor  # of torch.autograd.grad(is_grads_batched=True)
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .checks import check_named_inside
from .choice import backend as _backend
from .reference import outside_vocabulary
from .rows import RowGrads, RowRewards, RowStats, at_rows, named_grads, stats_grads

STATS = ("lse", "target_logit", "entropy", "logit_mean", "shift", "log_total")
PLAIN = (Tensor, torch.nn.Parameter)


def _op(name: str):
    """Register a function as the operator `name`, and let plain calls of it pass by torch's dispatcher.

    Dispatch takes 40 us of host time. Autograd, torch.compile, dispatch modes, functorch, meta tensors and tensor
    subclasses need it.
    """

    def register(function):
        operator = torch.library.custom_op(name, mutates_args=())(function)

        @functools.wraps(function)
        def call(*args):
            plain = not (torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or transforming())
            for x in args:
                if x is not None and isinstance(x, Tensor):  # isinstance takes 0.2 us
                    plain = plain and _holds_data(x) and not (x.requires_grad and torch.is_grad_enabled())
            return function(*args) if plain else operator(*args)

        call.register_fake, call.register_autograd = operator.register_fake, operator.register_autograd
        return call

    return register


def _holds_data(x: Tensor) -> bool:
    return type(x) in PLAIN and not (x.is_meta or is_legacy_batchedtensor(x))


@contextlib.contextmanager
def _own_surroundings(x: Tensor):
    """Make the tensor's device the current one, because Triton launches on it. Switch autocast off.

    A backend has its own dtypes. Under autocast torch would round the operands of its float32 products.
    """
    device = x.device
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


@_op("endoreward_fast::plan_rows")
def plan(tokens: Tensor, mask: Tensor | None, terminal: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Return the fields of RowPlan for tokens (B, T), by a kernel."""
    from ..kernels.rows import plan as launch

    with _own_surroundings(tokens):
        return list(launch(tokens, mask, terminal, cu_seqlens))


@plan.register_fake
def _(tokens, mask, terminal, cu_seqlens):
    return [tokens.new_empty(tokens.numel(), dtype=dtype) for dtype in (torch.int64, torch.int64, torch.bool)]


# ------------------------------------------------------------------------------------------------ logits (B, T, V)


@_op("endoreward_fast::logits_stats")
def logits_stats(
    logits: Tensor, targets: Tensor, mask: Tensor | None, successor: Tensor | None,
    alpha: float, entropy: bool, logit_mean: bool, impl: str, alphas: Tensor | None, named: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Return six fields of RowStats; if `successor` is given, the four of RowRewards at tokens; last `named`, if given.

    logits is (B, T, V); targets, mask, successor and alphas, the temperatures that replace alpha, are (B T,). named is
    (K,).
    """
    _refuse_outside(targets, mask, logits.shape[-1], named)
    with _own_surroundings(logits):
        stats, rewards = _backend(impl, logits).logits_forward(
            logits, targets, mask=mask, alpha=alpha if alphas is None else alphas, entropy=entropy,
            logit_mean=logit_mean, successor=successor, named=named,
        )  # fmt: skip
    return outputs(stats, rewards)


@logits_stats.register_fake
def _(logits, targets, mask, successor, alpha, entropy, logit_mean, impl, alphas, named):
    return _fake_outputs(targets, entropy, logit_mean, successor is not None, named)


@_op("endoreward_fast::logits_stats_backward")
def logits_stats_backward(
    logits: Tensor, targets: Tensor, mask: Tensor | None, stats: list[Tensor], g_lse: Tensor, g_target: Tensor,
    g_entropy: Tensor | None, g_mean: Tensor | None, alpha: float, impl: str, alphas: Tensor | None = None,
    named: Tensor | None = None, g_named: Tensor | None = None,
) -> Tensor:  # fmt: skip
    grads = RowGrads(g_lse, g_target, g_entropy, g_mean, g_named)
    with _own_surroundings(logits):
        return _backend(impl, logits).logits_backward(
            logits, targets, RowStats(*stats), grads, mask=mask, alpha=alpha if alphas is None else alphas,
            named=None if g_named is None else named,
        )  # fmt: skip


@logits_stats_backward.register_fake
def _(
    logits, targets, mask, stats, g_lse, g_target, g_entropy, g_mean, alpha, impl, alphas=None, named=None,
    g_named=None,
):  # fmt: skip
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _logits_setup(ctx, inputs, output):
    logits, targets, mask, successor, ctx.alpha, _, _, ctx.impl, alphas, named = inputs
    _save(ctx, (logits, targets, mask, successor, alphas, named), output)


def _logits_backward(ctx, grads):
    (logits, targets, mask, successor, alphas, named), stats = _saved(ctx, 6)
    upstream = _row_grads(grads, targets, successor, stats, ctx.alpha if alphas is None else alphas, named)
    grad = logits_stats_backward(
        logits, targets, mask, _six(stats), *upstream[:4], ctx.alpha, ctx.impl, alphas, named, upstream.named
    )
    return grad, *(None,) * 9


logits_stats.register_autograd(_logits_backward, setup_context=_logits_setup)


# ----------------------------------------------------------------------------------- hidden (N, D), weight (V, D)


@_op("endoreward_fast::linear_stats")
def linear_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor | None,
    successor: Tensor | None, logit_scale: float, softcap: float | None, alpha: float, entropy: bool,
    logit_mean: bool, impl: str, alphas: Tensor | None, named: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Do the same as `logits_stats` from hidden (N, D) and weight (V, D). Rows off the mask skip the matmul."""
    _refuse_outside(targets, mask, weight.shape[0], named)
    extras = alphas is not None or named is not None
    with _own_surroundings(hidden):
        stats, rewards = _backend(impl, hidden, weight, extras=extras).linear_forward(
            hidden, weight, targets, mask=mask, bias=bias, logit_scale=logit_scale, softcap=softcap,
            alpha=alpha if alphas is None else alphas, entropy=entropy, logit_mean=logit_mean, successor=successor,
            named=named,
        )  # fmt: skip
    return outputs(stats, rewards)


@linear_stats.register_fake
def _(
    hidden, weight, bias, targets, mask, successor, logit_scale, softcap, alpha, entropy, logit_mean, impl,
    alphas, named,
):  # fmt: skip
    return _fake_outputs(targets, entropy, logit_mean, successor is not None, named)


@_op("endoreward_fast::linear_stats_backward")
def linear_stats_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor | None, stats: list[Tensor],
    g_lse: Tensor, g_target: Tensor, g_entropy: Tensor | None, g_mean: Tensor | None,
    logit_scale: float, softcap: float | None, alpha: float, needs: list[bool], impl: str,
    alphas: Tensor | None = None, named: Tensor | None = None, g_named: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Return (dhidden, dweight, dbias) in the inputs' dtypes; empty where `needs` is False."""
    grads = RowGrads(g_lse, g_target, g_entropy, g_mean, g_named)
    extras = alphas is not None or named is not None
    with _own_surroundings(hidden):
        found = _backend(impl, hidden, weight, extras=extras).linear_backward(
            hidden, weight, targets, RowStats(*stats), grads, mask=mask, bias=bias, logit_scale=logit_scale,
            softcap=softcap, alpha=alpha if alphas is None else alphas, needs=tuple(needs),
            named=None if g_named is None else named,
        )  # fmt: skip
    return [hidden.new_empty(0) if g is None else g for g in found]


@linear_stats_backward.register_fake
def _(
    hidden, weight, bias, targets, mask, stats, g_lse, g_target, g_entropy, g_mean, logit_scale, softcap, alpha,
    needs, impl, alphas=None, named=None, g_named=None,
):  # fmt: skip
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else hidden.new_empty(0)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    ]


def _linear_setup(ctx, inputs, output):
    *tensors, ctx.logit_scale, ctx.softcap, ctx.alpha, _, _, ctx.impl, alphas, named = inputs
    _save(ctx, (*tensors, alphas, named), output)


def _linear_backward(ctx, grads):
    (hidden, weight, bias, targets, mask, successor, alphas, named), stats = _saved(ctx, 8)
    upstream = _row_grads(grads, targets, successor, stats, ctx.alpha if alphas is None else alphas, named)
    needs = list(ctx.needs_input_grad[:3])
    out = linear_stats_backward(
        hidden, weight, bias, targets, mask, _six(stats), *upstream[:4],
        ctx.logit_scale, ctx.softcap, ctx.alpha, needs, ctx.impl, alphas, named, upstream.named,
    )  # fmt: skip
    return *(g if need else None for g, need in zip(out, needs, strict=True)), *(None,) * 11


linear_stats.register_autograd(_linear_backward, setup_context=_linear_setup)


# ---------------------------------------------------------------------------------------------------- shared parts


def outputs(stats: RowStats, rewards: RowRewards | None) -> list[Tensor]:
    empty = stats.lse.new_empty(0)
    found = [empty.clone() if f is None else f for f in (*_six(stats), *(rewards or ()))]
    return found if stats.named is None else [*found, stats.named]


def _six(stats: RowStats) -> list[Tensor | None]:
    """Return the fields of RowStats that every call computes or leaves empty."""
    return list(stats[: len(STATS)])


def _fake_outputs(
    targets: Tensor, entropy: bool, logit_mean: bool, rewards: bool, named: Tensor | None
) -> list[Tensor]:  # fmt: skip
    wanted = [True, True, entropy, logit_mean, True, True] + [True, True, True, entropy] * rewards
    found = [targets.new_empty(targets.shape[0] if want else 0, dtype=torch.float32) for want in wanted]
    if named is not None:
        found.append(targets.new_empty(targets.shape[0], named.shape[0], dtype=torch.float32))
    return found


def _refuse_outside(targets: Tensor, mask: Tensor | None, vocab: int, named: Tensor | None) -> None:
    """Raise IndexError for a target or a named token outside the vocabulary, on the CPU.

    Elsewhere the backend makes its row or column NaN.
    """
    if targets.device.type == "cpu":
        outside_vocabulary(targets, mask, vocab)
        check_named_inside(named, vocab)


def _save(ctx, inputs: tuple, output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[: len(STATS)])


def _saved(ctx, count: int) -> tuple[tuple, RowStats]:
    tensors = ctx.saved_tensors
    return tensors[:count], RowStats(*tensors[count:])


def _row_grads(
    grads: list[Tensor | None], targets: Tensor, successor: Tensor | None, stats: RowStats, alpha: float | Tensor,
    named: Tensor | None,
) -> RowGrads:  # fmt: skip
    """Turn gradients of an operator's outputs into gradients of the row statistics."""
    if named is None:
        return row_grads(_of_rows(grads), targets, successor, stats, alpha)
    *others, g_logprob = grads
    found = row_grads(_of_rows(others), targets, successor, stats, alpha)
    return found if g_logprob is None else named_grads(found, g_logprob, stats.log_total, alpha)


def _of_rows(grads: list[Tensor | None]) -> list[Tensor | None]:
    """Move the gradients of rewards from tokens to rows."""
    return [*grads[: len(STATS)], *(g if g is None else at_rows(g) for g in grads[len(STATS) :])]


def row_grads(
    grads: list[Tensor | None], targets: Tensor, successor: Tensor | None, stats: RowStats, alpha: float | Tensor
) -> RowGrads:
    """Turn gradients of statistics or of the rewards of rows into gradients of the row statistics."""

    def or_zero(g):
        return torch.zeros_like(stats.lse) if g is None else g

    g_lse, g_target, g_entropy, g_mean = grads[:4]
    if successor is None:
        return RowGrads(or_zero(g_lse), or_zero(g_target), g_entropy, g_mean)
    reward, logprob, value, entropy = grads[len(STATS) :]
    g_rewards = RowRewards(or_zero(reward), or_zero(logprob), or_zero(value), entropy)
    return stats_grads(targets, successor, stats.log_total, alpha, g_rewards)
