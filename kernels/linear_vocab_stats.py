"""Partials of softmax statistics from hidden (N, D) and weight (V, D); the logits never leave the chip.

A piece of work is one tile of tokens and one split of the vocabulary. For each vocabulary tile of the split, a program
computes the matmul over D in an fp32 accumulator, applies the head's bias, scale and softcap to it, and merges the tile
into the running (m, s, t, u) of each token. The cost is 2 N V D flops and one read of the weight per group of token
tiles: `group` token tiles process a split together and share its weight in L2.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .combine import Partials
from .config import LinearConfig, cdiv
from .primitives import (
    NEG_INF,
    PLAIN_HEAD,
    SUM_SCALE,
    Head,
    apply_head,
    exp2_scale,
    finite_or_zero,
    merge,
    scale_of,
    weight_and_exponent,
)
from .rows import Kept, gather


@triton.jit
def token_tile_and_split(work, n_rows, splits, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Return (token tile, split) of a piece of work. The token tile varies fastest within a group."""
    tiles = tl.cdiv(n_rows, BLOCK_N)
    first = work // (GROUP * splits) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    inner = work % (GROUP * splits)
    return first + inner % size, inner // size


@triton.jit
def logits_tile(
    hidden, weight, o_n, o_v, n_rows, vocab, dim, stride_hidden, stride_weight,
    TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return hidden[o_n:, :] @ weight[o_v:, :].T as (BLOCK_N, BLOCK_V) fp32; 0 outside the arrays."""
    acc = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    row = o_n + tl.arange(0, BLOCK_N)
    col = o_v + tl.arange(0, BLOCK_V)
    for o_d in range(0, dim, BLOCK_D):
        if TMA:
            h = hidden.load([o_n, o_d])
            w = weight.load([o_v, o_d])
        else:
            k = o_d + tl.arange(0, BLOCK_D)
            p_h = hidden + row.to(tl.int64)[:, None] * stride_hidden + k[None, :]
            p_w = weight + col.to(tl.int64)[:, None] * stride_weight + k[None, :]
            h = tl.load(p_h, mask=(row < n_rows)[:, None] & (k < dim)[None, :], other=0.0)
            w = tl.load(p_w, mask=(col < vocab)[:, None] & (k < dim)[None, :], other=0.0)
        if UPCAST:  # the interpreter computes bf16 dots wrongly
            h, w = h.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(h, w.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_targets(targets, o_row, m_row, vocab):
    """Return the targets of rows as int32; -1 for those outside the vocabulary."""
    target = tl.load(targets + o_row, mask=m_row, other=-1)
    return tl.where((target >= 0) & (target < vocab), target, -1).to(tl.int32)


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def tiles_with_targets(target, first, end, BLOCK_V: tl.constexpr):
    """Return an int32 whose bit i says that tile i of the split [first, end) holds a target."""
    here = (target >= first) & (target < end)
    tile = tl.where(here, (target - first) // BLOCK_V, 0)
    return tl.reduce(tl.where(here, 1 << tile, 0), 0, either)


# sm_90: the code for a V that is a multiple of 16 spilled, and so did that for a split known only at run time.
@triton.jit(
    do_not_specialize=["n_rows", "vocab"],
    do_not_specialize_on_alignment=[
        "targets", "named", "p_m", "p_s", "p_t", "p_u", "p_target", "p_named", "rows", "count", "c",
    ],
)  # fmt: skip
def linear_partials_kernel(
    hidden, weight, bias, targets, rows, count, named, p_m, p_s, p_t, p_u, p_target, p_named,
    n_rows, vocab, dim, stride_hidden, stride_weight, logit_scale, softcap, c,
    HAS_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr, LOGIT_MEAN: tl.constexpr, ALPHAS: tl.constexpr, NAMES: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    splits = tl.cdiv(vocab, SPLIT)
    pitch = n_rows
    if HAS_ROWS:
        n_rows = tl.load(count)
    # The loop runs once if each piece of work has its own program, and several times in a persistent grid.
    for work in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_N) * splits, tl.num_programs(0)):
        tile, split = token_tile_and_split(work, n_rows, splits, BLOCK_N, GROUP)
        o_n = tile * BLOCK_N
        row = o_n + tl.arange(0, BLOCK_N)
        m_row = row < n_rows
        first = split * SPLIT
        end = tl.minimum(first + SPLIT, vocab)
        o_row = tl.load(rows + row, mask=m_row, other=0) if HAS_ROWS else row
        target = load_targets(targets, o_row, m_row, vocab)
        c_row = scale_of(c, o_row, m_row, ALPHAS)
        hit_tiles = tiles_with_targets(target, first, end, BLOCK_V)

        m = tl.full([BLOCK_N], NEG_INF, dtype=tl.float32)
        s = tl.zeros([BLOCK_N], dtype=tl.float32)
        t = tl.zeros([BLOCK_N], dtype=tl.float32)
        u = tl.zeros([BLOCK_N], dtype=tl.float32)
        for o_v in range(first, end, BLOCK_V):
            z = logits_tile(
                hidden, weight, o_n, o_v, n_rows, vocab, dim, stride_hidden, stride_weight,
                TMA, UPCAST, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
            )  # fmt: skip
            col = o_v + tl.arange(0, BLOCK_V)
            b_bias = 0.0
            if HAS_BIAS:
                b_bias = tl.load(bias + col, mask=col < vocab, other=0.0).to(tl.float32)[None, :]
            z = apply_head(z, b_bias, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP)
            if LOGIT_MEAN:
                u += tl.sum(tl.where((col < vocab)[None, :], z * SUM_SCALE, 0.0), 1)
            if o_v + BLOCK_V > vocab:  # only the last tile has columns outside the vocabulary
                z = tl.where((col < vocab)[None, :], z, NEG_INF)

            m_hit = (target >= o_v) & (target < tl.minimum(o_v + BLOCK_V, vocab))
            # One tile in 5 holds a target at 128 tokens and V = 151936.
            if (hit_tiles >> ((o_v - first) // BLOCK_V)) & 1 != 0:
                b_target = tl.sum(tl.where(col[None, :] == target[:, None], z, 0.0), 1)
                tl.store(p_target + row, b_target, mask=m_hit)

            if NAMES:
                for k in range(NAMES):
                    token = (tl.load(named + k) - o_v).to(tl.int32)
                    if (token >= 0) & (token < BLOCK_V):
                        b_named = tl.sum(tl.where((tl.arange(0, BLOCK_V) == token)[None, :], z, 0.0), 1)
                        tl.store(p_named + row.to(tl.int64) * NAMES + k, b_named, mask=m_row)

            b_m = tl.max(z, 1)
            e, d = weight_and_exponent(z, finite_or_zero(b_m)[:, None], c_row[:, None] if ALPHAS else c)
            b_t = t
            if ENTROPY:
                b_t = tl.sum(e * d, 1)
            m, s, t = merge(m, s, t, b_m, tl.sum(e, 1), b_t, c_row, ENTROPY)

        o = split.to(tl.int64) * pitch + row
        tl.store(p_m + o, m, mask=m_row)
        tl.store(p_s + o, s, mask=m_row)
        if ENTROPY:
            tl.store(p_t + o, t, mask=m_row)
        if LOGIT_MEAN:
            tl.store(p_u + o, u, mask=m_row)


def tma_usable(x: torch.Tensor) -> bool:
    """Return whether TMA can read x: unit stride in D, 16-byte aligned base and row pitch, rows that do not overlap."""
    return (
        x.stride(1) == 1
        and x.stride(0) >= x.shape[1]
        and x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
    )


def linear_partials(
    hidden, weight, targets, *, alpha: float | torch.Tensor, entropy: bool, logit_mean: bool, config: LinearConfig,
    split: int, head: Head = PLAIN_HEAD, kept: Kept | None = None, tma: bool = False, interpreted: bool = False,
    programs: int | None = None, named=None,
) -> Partials:  # fmt: skip
    """Return partials (ceil(V / split), N) of hidden (N, D), weight (V, D) of the same dtype, and targets (N,) int64.

    alpha     a number, or (N,) float32: the temperature of each row
    named     (K,) int64: tokens whose logits are wanted too
    split     vocabulary entries of a split, see config.vocab_split
    kept      the rows to compute; None: all. Column i of the partials belongs to the i-th row that is kept
    tma       load through TMA; requires `tma_usable(weight)`. hidden is copied if TMA cannot read it: the alignment of
              a batch must not decide which kernel runs, or a row's bits would depend on it
    programs  size of a persistent grid; None: one program per piece of work
    """
    (rows, dim), vocab = hidden.shape, weight.shape[0]
    splits = cdiv(vocab, split)
    c = exp2_scale(alpha)
    names = 0 if named is None else named.shape[0]
    partials = Partials.empty(splits, rows, hidden.device, entropy=entropy, logit_mean=logit_mean, names=names)
    if not rows:
        return partials
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    if kept is not None:
        hidden = gather(hidden, kept, with_aligned_rows(hidden))
    elif hidden.stride(1) != 1 or (tma and not tma_usable(hidden)):
        hidden = with_aligned_rows(hidden).copy_(hidden)
    strides = hidden.stride(0), weight.stride(0)
    if tma:
        hidden = TensorDescriptor.from_tensor(hidden, [config.block_n, config.block_d])
        weight = TensorDescriptor.from_tensor(weight, [config.block_v, config.block_d])
    work = cdiv(rows, config.block_n) * splits
    grid = min(work, programs) if programs else work
    linear_partials_kernel[(grid,)](
        hidden, weight, head.bias, targets, *(kept[:2] if kept else (None, None)), named, *partials,
        rows, vocab, dim, *strides, *head.numbers(), c,
        HAS_ROWS=kept is not None, **head.flags(), ENTROPY=entropy, LOGIT_MEAN=logit_mean,
        ALPHAS=c is alpha, NAMES=names, TMA=tma,
        UPCAST=interpreted, PRECISION="ieee", BLOCK_N=config.block_n, BLOCK_V=config.block_v, BLOCK_D=config.block_d,
        SPLIT=split, GROUP=config.group, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return partials


def with_aligned_rows(hidden: torch.Tensor) -> torch.Tensor:
    """Return new memory of hidden's shape whose rows begin at multiples of 16 bytes, as TMA demands."""
    rows, dim = hidden.shape
    step = 16 // hidden.element_size()
    return hidden.new_empty(rows, cdiv(dim, step) * step)[:, :dim]
