"""Argument checks of the public functions. Each names the argument, what it was, and what was expected."""

import math

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

LOW_PRECISION = (torch.bfloat16, torch.float16)
FLOATS = (*LOW_PRECISION, torch.float32, torch.float64)


def _say(name: str, x: Tensor, expected: str) -> ValueError:
    return ValueError(f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}: expected {expected}")


def check_logits(logits: Tensor) -> None:
    _check_tensors(logits=logits)
    if logits.ndim < 1 or logits.dtype not in FLOATS or logits.shape[-1] == 0:
        raise _say("logits", logits, "a floating-point tensor (..., V) with V >= 1")


def check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None, *,
    sharded: bool = False,
) -> None:  # fmt: skip
    _check_tensors(hidden=hidden, weight=weight, bias=bias)
    if hidden.ndim < 1 or hidden.dtype not in FLOATS or hidden.shape[-1] == 0:
        raise _say("hidden", hidden, "a floating-point tensor (..., D) with D >= 1")
    dim = hidden.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != dim or (weight.shape[0] == 0 and not sharded):
        raise _say("weight", weight, f"(V, {dim}), D as in hidden {tuple(hidden.shape)}")
    widened = hidden.dtype == torch.float32 and weight.dtype in LOW_PRECISION
    if weight.device != hidden.device or not (weight.dtype == hidden.dtype or widened):
        also = " (or bfloat16, float16)" if hidden.dtype == torch.float32 else ""
        raise _say("weight", weight, f"{hidden.dtype}{also} on {hidden.device}, as hidden")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != hidden.device):
        raise _say("bias", bias, f"({weight.shape[0]},), one per row of weight, on {hidden.device}")
    if bias is not None and bias.dtype not in FLOATS:
        raise _say("bias", bias, "a floating-point tensor")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap}: expected a finite number > 0, or None")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale={logit_scale}: expected a finite number")


def check_rows(targets: Tensor, mask: Tensor | None, like: Tensor, name: str, alpha: float) -> None:
    """targets and mask of `vocab_stats`: the shape of `like` (logits or hidden) without its last axis."""
    _check_tensors(targets=targets, mask=mask)
    _check_alpha(alpha)
    shape = like.shape[:-1]
    if targets.shape != shape or targets.dtype != torch.int64 or targets.device != like.device:
        raise _say("targets", targets, f"{tuple(shape)} int64 on {like.device}, for {name} {tuple(like.shape)}")
    _check_bool("mask", mask, shape, like.device)


def check_rewards(
    tokens: Tensor, mask: Tensor | None, terminal: Tensor | None, cu_seqlens: Tensor | None, like: Tensor,
    name: str, alpha: float,
) -> None:  # fmt: skip
    """tokens, mask, terminal and cu_seqlens of `token_rewards`."""
    _check_tensors(tokens=tokens, mask=mask, terminal=terminal, cu_seqlens=cu_seqlens)
    _check_alpha(alpha)
    if like.ndim != 3:
        raise _say(name, like, "(B, T, V)" if name == "logits" else "(B, T, D)")
    shape = like.shape[:2]
    if tokens.shape != shape or tokens.dtype != torch.int64 or tokens.device != like.device:
        raise _say("tokens", tokens, f"{tuple(shape)} int64 on {like.device}, for {name} {tuple(like.shape)}")
    _check_bool("mask", mask, shape, like.device)
    _check_bool("terminal", terminal, shape, like.device)
    if cu_seqlens is None:
        return
    integer = cu_seqlens.dtype in (torch.int32, torch.int64)
    if cu_seqlens.ndim != 1 or not integer or cu_seqlens.device != like.device:
        raise _say("cu_seqlens", cu_seqlens, f"(S + 1,) int32 or int64 on {like.device}")
    # Reading offsets on a GPU would stall the stream; there they are trusted.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        total = tokens.numel()
        rising = bool((cu_seqlens.diff() >= 0).all())
        if not (len(cu_seqlens) >= 2 and cu_seqlens[0] == 0 and cu_seqlens[-1] == total and rising):
            raise ValueError(
                f"cu_seqlens={cu_seqlens.tolist()[:8]}...: expected offsets rising from 0 to B * T = {total}"
            )


def check_reverse_mode(impl: str, *inputs: Tensor | None) -> None:
    """A custom operator drops a forward-mode tangent without a word: its derivative would come out as 0."""
    if any(x is not None and unpack_dual(x).tangent is not None for x in inputs):
        raise ValueError(f"impl={impl!r} has no forward-mode derivative (jvp, jacfwd): take impl='reference'")


def _check_alpha(alpha: float) -> None:
    if isinstance(alpha, Tensor):
        raise ValueError("alpha is a tensor: expected a number; no gradient flows into it")
    if not 0 < alpha < math.inf:  # not math.isfinite: dynamo cannot trace it once alpha has had two values
        raise ValueError(f"alpha={alpha}: expected a finite temperature > 0")


def _check_tensors(**arguments: Tensor | None) -> None:
    for name, x in arguments.items():
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}: expected a tensor")


def _check_bool(name: str, x: Tensor | None, shape: torch.Size, device: torch.device) -> None:
    if x is not None and (x.shape != shape or x.dtype != torch.bool or x.device != device):
        raise _say(name, x, f"{tuple(shape)} bool on {device}")
