"""Which rows to compute, decided on the device: from tokens to rows, and from a mask to the rows that it keeps.

Nothing is read back to the host, so a CUDA graph can capture both. endoreward_fast/vocab/rows.py has the same rules in
torch; the tests compare them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .config import cdiv
from .primitives import NO_TARGET

BLOCK = 1024


class Kept(NamedTuple):
    """The rows of N that a mask keeps, in order."""

    rows: torch.Tensor  # (N,) int32: the rows that are kept; undefined from `count` on
    count: torch.Tensor  # (1,) int32: how many are kept
    place: torch.Tensor  # (N,) int32: the index in `rows` of a row that is kept


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["mask"])
def keep_kernel(mask, o_rows, o_count, o_place, n, BLOCK: tl.constexpr):
    count = 0
    for first in range(0, n, BLOCK):  # one program: each block begins where the one before it ended
        row = first + tl.arange(0, BLOCK)
        keeps = (tl.load(mask + row, mask=row < n, other=0) != 0).to(tl.int32)
        place = count + tl.cumsum(keeps, 0) - keeps
        tl.store(o_place + row, place, mask=row < n)
        tl.store(o_rows + place, row, mask=keeps != 0)
        count += tl.sum(keeps, 0)
    tl.store(o_count, count)


def keep(mask: torch.Tensor) -> Kept:
    """Return the rows that mask (N,) bool keeps."""
    n = mask.shape[0]
    rows, place = (torch.empty(n, dtype=torch.int32, device=mask.device) for _ in range(2))
    count = torch.empty(1, dtype=torch.int32, device=mask.device)
    keep_kernel[(1,)](mask, rows, count, place, n, BLOCK=BLOCK, num_warps=4)
    return Kept(rows, count, place)


@triton.jit(do_not_specialize_on_alignment=["rows", "count"])
def gather_kernel(x, rows, count, out, width, stride_row, stride_out, stride_column, BLOCK: tl.constexpr):
    place = tl.program_id(0)
    if place >= tl.load(count):
        return
    p_x = x + tl.load(rows + place).to(tl.int64) * stride_row
    p_out = out + place.to(tl.int64) * stride_out
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(p_x + column.to(tl.int64) * stride_column, mask=column < width)
        tl.store(p_out + column, value, mask=column < width)


def gather(x: torch.Tensor, kept: Kept, out: torch.Tensor) -> torch.Tensor:
    """Write the kept rows of x (N, D) to the first rows of out (N, D), whose columns are contiguous. Return out."""
    n, width = x.shape
    gather_kernel[(n,)](
        x, kept.rows, kept.count, out, width, x.stride(0), out.stride(0), x.stride(1), BLOCK=BLOCK, num_warps=4
    )  # fmt: skip
    return out


@triton.jit
def is_offset(offsets, n_offsets, steps, x, m):
    """Return whether x is one of the rising offsets, by binary search in `steps` steps."""
    low = tl.zeros_like(x)
    high = low + n_offsets - 1
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(offsets + middle, mask=m, other=0) < x
        low = tl.where(below & (low < high), middle + 1, low)
        high = tl.where(below, high, middle)
    return tl.load(offsets + low, mask=m, other=-1) == x


@triton.jit
def is_scored(tokens, mask, offsets, x, n, length, n_offsets, steps, HAS_MASK: tl.constexpr, PACKED: tl.constexpr):
    """Return whether token x is scored: on the mask, no first token of a sequence and not the ignore label."""
    m = (x < n) & (x % length != 0)
    scored = m & (tl.load(tokens + x, mask=m, other=NO_TARGET) != NO_TARGET)
    if HAS_MASK:
        scored = scored & (tl.load(mask + x, mask=m, other=0) != 0)
    if PACKED:
        scored = scored & ~is_offset(offsets, n_offsets, steps, x, m)
    return scored


@triton.jit(
    do_not_specialize=["n", "length", "n_offsets", "steps"],
    do_not_specialize_on_alignment=["tokens", "mask", "terminal", "offsets"],
)
def plan_kernel(
    tokens, mask, terminal, offsets, o_targets, o_successor, o_needed, n, length, n_offsets, steps,
    HAS_MASK: tl.constexpr, HAS_TERMINAL: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_row = row < n
    here = is_scored(tokens, mask, offsets, row, n, length, n_offsets, steps, HAS_MASK, PACKED)
    chosen = is_scored(tokens, mask, offsets, row + 1, n, length, n_offsets, steps, HAS_MASK, PACKED)
    if HAS_TERMINAL:
        ends = tl.load(terminal + row, mask=m_row, other=0) != 0
        next_ends = tl.load(terminal + row + 1, mask=chosen, other=0) != 0
    else:  # the last token of each run of the mask
        ends = here & ~chosen
        next_ends = ~is_scored(tokens, mask, offsets, row + 2, n, length, n_offsets, steps, HAS_MASK, PACKED)
    tl.store(o_targets + row, tl.load(tokens + row + 1, mask=chosen, other=NO_TARGET), mask=m_row)
    tl.store(o_successor + row, tl.where(chosen & ~next_ends, row + 1, -1).to(tl.int64), mask=m_row)
    tl.store(o_needed + row, chosen | (here & ~ends), mask=m_row)


def plan(tokens, mask, terminal, cu_seqlens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (targets int64, successor int64, needed bool) of the B * T rows of tokens (B, T), each (B * T,).

    mask, terminal  (B, T) bool or None, as in functional.token_rewards
    cu_seqlens      (S + 1,) integer offsets or None
    """
    tokens, mask, terminal, cu_seqlens = (
        None if x is None else x.contiguous() for x in (tokens, mask, terminal, cu_seqlens)
    )
    n, offsets = tokens.numel(), 0 if cu_seqlens is None else len(cu_seqlens)
    targets, successor = (torch.empty(n, dtype=torch.int64, device=tokens.device) for _ in range(2))
    needed = torch.empty(n, dtype=torch.bool, device=tokens.device)
    if n:
        plan_kernel[(cdiv(n, BLOCK),)](
            tokens, mask, terminal, cu_seqlens, targets, successor, needed,
            n, tokens.shape[1], offsets, offsets.bit_length(),
            HAS_MASK=mask is not None, HAS_TERMINAL=terminal is not None, PACKED=cu_seqlens is not None, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip
    return targets, successor, needed
