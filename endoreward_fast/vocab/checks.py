"""Argument checks of the public functions. Each error names the argument, its value and what was expected."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transforming
from torch.autograd.forward_ad import unpack_dual

from ..types import NO_TARGET
from .rows import sequence_starts

LOW_PRECISION = (torch.bfloat16, torch.float16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (*LOW_PRECISION, torch.float32, torch.float64)


def _wrong(name: str, x: Tensor, expected: str) -> ValueError:
    return ValueError(f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}: expected {expected}")


def check_logits(logits: Tensor, name: str = "logits") -> None:
    require_tensors(**{name: logits})
    if logits.ndim < 1 or logits.dtype not in FLOATS or logits.shape[-1] == 0:
        raise _wrong(name, logits, "a floating-point tensor (..., V) with V >= 1")


def check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None, *,
    sharded: bool = False, of: str = "",
) -> None:  # fmt: skip
    """Check a head and its hidden states. `of` is a prefix of the arguments' names in messages."""
    require_tensors(**{f"{of}hidden": hidden, f"{of}weight": weight})
    check_tensors(**{f"{of}bias": bias})
    if hidden.ndim < 1 or hidden.dtype not in FLOATS or hidden.shape[-1] == 0:
        raise _wrong(f"{of}hidden", hidden, "a floating-point tensor (..., D) with D >= 1")
    dim = hidden.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != dim or (weight.shape[0] == 0 and not sharded):
        raise _wrong(f"{of}weight", weight, f"(V, {dim}), D as in {of}hidden {tuple(hidden.shape)}")
    widened = hidden.dtype == torch.float32 and weight.dtype in LOW_PRECISION
    if weight.device != hidden.device or not (weight.dtype == hidden.dtype or widened):
        also = " (or bfloat16, float16)" if hidden.dtype == torch.float32 else ""
        raise _wrong(f"{of}weight", weight, f"{hidden.dtype}{also} on {hidden.device}, like {of}hidden")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != hidden.device):
        raise _wrong(f"{of}bias", bias, f"({weight.shape[0]},), one per row of {of}weight, on {hidden.device}")
    if bias is not None and bias.dtype not in FLOATS:
        raise _wrong(f"{of}bias", bias, "a floating-point tensor")
    check_numbers(**{f"{of}logit_scale": logit_scale, f"{of}softcap": softcap})
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{of}softcap={softcap}: expected a finite number > 0, or None")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"{of}logit_scale={logit_scale}: expected a finite number")


def check_rows(
    targets: Tensor | None, mask: Tensor | None, like: Tensor, name: str, alpha: float | Tensor
) -> tuple[Tensor, Tensor | None]:
    """Check targets and mask of `vocab_stats` against `like` (logits or hidden). Return targets, and mask as bool."""
    check_tensors(targets=targets, mask=mask)
    shape = like.shape[:-1]
    if targets is None:
        targets = torch.full(shape, NO_TARGET, device=like.device)
    if targets.shape != shape or targets.dtype != torch.int64 or targets.device != like.device:
        raise _wrong("targets", targets, f"{tuple(shape)} int64 on {like.device}, for {name} {tuple(like.shape)}")
    mask = _as_bool("mask", mask, shape, like.device)
    check_alpha(alpha, shape, mask, like)
    return targets, mask


def check_rewards(
    tokens: Tensor, mask: Tensor | None, terminal: Tensor | None, cu_seqlens: Tensor | None, like: Tensor,
    name: str, alpha: float | Tensor, *, alpha_of_each: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Check tokens, mask, terminal and cu_seqlens of `token_rewards`. Return mask and terminal as bool.

    `alpha_of_each` says that alpha may be a tensor (B, T).
    """
    require_tensors(tokens=tokens)
    check_tensors(mask=mask, terminal=terminal, cu_seqlens=cu_seqlens)
    if like.ndim != 3:
        raise _wrong(name, like, "(B, T, V)" if name == "logits" else "(B, T, D)")
    shape = like.shape[:2]
    if tokens.shape != shape or tokens.dtype != torch.int64 or tokens.device != like.device:
        raise _wrong("tokens", tokens, f"{tuple(shape)} int64 on {like.device}, for {name} {tuple(like.shape)}")
    flags = _as_bool("mask", mask, shape, like.device), _as_bool("terminal", terminal, shape, like.device)
    if cu_seqlens is not None:
        _check_offsets(cu_seqlens, tokens, like)
    scored = flags[0]
    if alpha_of_each and isinstance(alpha, Tensor):
        scored = ~sequence_starts(tokens, cu_seqlens) & (tokens != NO_TARGET)
        scored = scored if flags[0] is None else scored & flags[0]
    check_alpha(alpha, shape if alpha_of_each else None, scored, like)
    return flags


def _check_offsets(cu_seqlens: Tensor, tokens: Tensor, like: Tensor) -> None:
    integer = cu_seqlens.dtype in (torch.int32, torch.int64)
    if cu_seqlens.ndim != 1 or not integer or cu_seqlens.device != like.device:
        raise _wrong("cu_seqlens", cu_seqlens, f"(S + 1,) int32 or int64 on {like.device}")
    # Offsets on a GPU are not checked: reading them would stall the stream.
    if readable(cu_seqlens):
        total = tokens.numel()
        rising = bool((cu_seqlens.diff() >= 0).all())
        if not (len(cu_seqlens) >= 2 and cu_seqlens[0] == 0 and cu_seqlens[-1] == total and rising):
            raise ValueError(
                f"cu_seqlens={cu_seqlens.tolist()[:8]}...: expected offsets rising from 0 to B * T = {total}"
            )


def check_input_ids(input_ids: Tensor, words: int | None) -> None:
    """Check input_ids of EndoRewardModel, whose model knows the token ids [0, words)."""
    wanted = "expected token ids, a tensor (B, T) int64"
    if isinstance(input_ids, str) or (isinstance(input_ids, list) and input_ids and isinstance(input_ids[0], str)):
        raise ValueError(f"input_ids is text: {wanted}; for text call score(rows)")
    if isinstance(input_ids, Mapping):  # a tokenizer's output
        raise ValueError(f"input_ids is a {type(input_ids).__name__}: {wanted}; unpack it: model(**inputs)")
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids is a {type(input_ids).__name__}: {wanted}")
    if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or not input_ids.numel():
        raise _wrong("input_ids", input_ids, "token ids, (B, T) int64, at least one")
    # Ids on a GPU are left to the embedding's own assertion: reading them here would stall the stream.
    if words is None or not readable(input_ids):
        return
    low, high = (int(x) for x in input_ids.aminmax())
    if low < 0 or high >= words:
        odd = low if low < 0 else high
        raise IndexError(f"input_ids holds {odd}, which is outside the model's vocabulary [0, {words})")


def check_reverse_mode(impl: str, *inputs: Tensor | None) -> None:
    """Refuse forward-mode tangents. A custom operator drops them silently, and its derivative would come out as 0."""
    if any(x is not None and unpack_dual(x).tangent is not None for x in inputs):
        raise ValueError(f"impl={impl!r} has no forward-mode derivative (jvp, jacfwd): use impl='reference'")


def check_numbers(**arguments: float | None) -> None:
    """Raise ValueError for anything but a number, also for text that spells one. None passes."""
    for name, x in arguments.items():
        if x is None or isinstance(x, int | float):
            continue
        if isinstance(x, Tensor) or not hasattr(x, "__float__") or getattr(x, "shape", ()) != ():
            raise ValueError(f"{name} is a {type(x).__name__}: expected a number")


def check_named(named: Sequence[int] | Tensor | None, vocab: int, device: torch.device) -> Tensor | None:
    """Return the token ids `named` as (K,) int64 on `device`; None if there are none.

    An id outside [0, vocab) raises IndexError, unless it is in a tensor on a GPU: reading it would stall the stream.
    """
    if named is None:
        return None
    if isinstance(named, str | bytes) or not isinstance(named, Sequence | Tensor):
        raise ValueError(f"named is a {type(named).__name__}: expected token ids, a list or a tensor (K,) int64")
    if isinstance(named, Tensor):
        if named.ndim != 1 or named.dtype != torch.int64 or not named.numel():
            raise _wrong("named", named, "(K,) int64 with K >= 1")
        if readable(named):
            _refuse_outside(named.tolist(), vocab)
        if named.is_meta and device.type != "meta":
            raise _wrong("named", named, f"token ids on {device}, or on the CPU")
        return named.to(device)
    if not named or not all(isinstance(token, Integral) and not isinstance(token, bool) for token in named):
        raise ValueError(f"named is {list(named)!r}: expected at least one token id, each an integer")
    _refuse_outside(named, vocab)
    return torch.tensor(named, dtype=torch.int64, device=device)


def _refuse_outside(named: Sequence[int], vocab: int) -> None:
    for place, token in enumerate(named):
        if not 0 <= token < vocab:
            raise IndexError(f"named[{place}] is {token}, which is outside the vocabulary [0, {vocab})")


def check_named_inside(named: Tensor | None, vocab: int) -> None:
    """Raise IndexError for an id outside [0, vocab) in a tensor on the CPU. Elsewhere its columns come back NaN."""
    if named is not None and named.device.type == "cpu":
        _refuse_outside(named.tolist(), vocab)


def check_alpha(alpha: float | Tensor, shape: torch.Size | None, mask: Tensor | None, like: Tensor) -> None:
    """Check a temperature. `shape` is the shape of a tensor of temperatures; None: only a number is possible."""
    if isinstance(alpha, Tensor):
        if shape is None:
            raise ValueError("alpha is a tensor: expected a number; no gradient flows into it")
        _check_temperatures(alpha, shape, mask, like.device)
        return
    if alpha is None:
        raise ValueError("alpha is None: expected a finite temperature > 0")
    check_numbers(alpha=alpha)
    if not 0 < alpha < math.inf:  # dynamo cannot trace math.isfinite once alpha has had two values
        raise ValueError(f"alpha={alpha}: expected a finite temperature > 0")


def _check_temperatures(alpha: Tensor, shape: torch.Size, mask: Tensor | None, device: torch.device) -> None:
    if alpha.shape != shape or alpha.dtype != torch.float32 or alpha.device != device:
        raise _wrong("alpha is a tensor, and it", alpha, f"a number, or {tuple(shape)} float32 on {device}")
    if alpha.requires_grad:
        raise ValueError("alpha requires a gradient, and none flows into it: pass alpha.detach()")
    if readable(alpha):
        used = alpha if mask is None else alpha[mask]
        wrong = ~((used > 0) & (used < math.inf))
        if wrong.any():
            where = "" if mask is None else " on the mask"
            raise ValueError(f"alpha holds {used[wrong][0].item()}{where}: expected finite temperatures > 0")


def readable(x: Tensor) -> bool:
    """Return whether a check may read values of x. It would stall a GPU's stream, and can fail under torch.compile and
    torch.func."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not transforming()


def require_tensors(**arguments: Tensor) -> None:
    """Raise ValueError for anything but a tensor, also for None."""
    for name, x in arguments.items():
        if x is None:
            raise ValueError(f"{name} is None: expected a tensor")
    check_tensors(**arguments)


def check_tensors(**arguments: Tensor | None) -> None:
    """Raise ValueError for anything but a tensor. None passes."""
    for name, x in arguments.items():
        if x is not None and not isinstance(x, Tensor):
            made = (
                f"; torch.as_tensor({name}) makes one" if isinstance(x, list | tuple) or hasattr(x, "__array__") else ""
            )
            raise ValueError(f"{name} is a {type(x).__name__}: expected a tensor{made}")


def _as_bool(name: str, x: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor | None:
    return None if x is None else as_bool(name, x, shape, device)


def as_bool(name: str, x: Tensor, shape: torch.Size, device: torch.device | None = None) -> Tensor:
    """Return the mask x as bool, from bool or from the integers 0 and 1. Raises ValueError for a wrong shape or device.

    Other integers raise on the CPU. On a GPU they count as 1, because reading them would stall the stream. So they do
    under torch.compile and torch.func.
    """
    require_tensors(**{name: x})
    wrong_place = device is not None and x.device != device
    if x.shape != shape or wrong_place or x.dtype not in (torch.bool, *INTEGERS):
        where = "" if device is None else f" on {device}"
        raise _wrong(name, x, f"{tuple(shape)} bool, or integers 0 and 1,{where}".rstrip(","))
    if x.dtype == torch.bool:
        return x
    on = x != 0
    if readable(x) and not torch.equal(x, on.to(x.dtype)):
        odd = x[(x != 0) & (x != 1)][0].item()
        raise ValueError(f"{name} holds {odd}: expected bool, or integers 0 and 1")
    return on
