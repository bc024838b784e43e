"""Divergence of two stored logits (N, V) per row. endoreward_fast/vocab/divergence/rows.py has the formulas.

partials  One program reads BLOCK_V logits of the same row of p and of q, and summarises them relative to their maxima
          m_p and m_q. With e = 2^((z_p - m_p) c) and d the difference of the two exponents of 2,

              s_p, s_q = sum 2^((z - m) c)          gap = sum e d

          gap is inf where q excludes a word that p does not. Traffic per row: V * itemsize of both.
combine   merges the pieces of a row: shift and log_total of both, and for KL the divergence.
mixture   JSD needs these for m = beta p + (1 - beta) q, and so reads both rows again. Its pieces are sums of
          p log(p / m) and q log(q / m), which the last kernel adds up.

How a row is cut into pieces depends on V alone, and sums run in a fixed order, so a row's result is bitwise the same in
any batch. Equal rows give exactly 0.
"""

import torch
import triton
import triton.language as tl

from .combine import MOST_SPLITS, ROWS_PER_PROGRAM, load_splits, log_total_of, merge_splits, store_row
from .config import LogitsConfig, cdiv
from .primitives import LN2, LOG2E, NEG_INF, exp2_scale, finite_or_zero, weight_and_exponent
from .vocab_stats import load_logits, rows_aligned, total

INF = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-1e38)
"""stands for -inf in an exponent: its weight is 0, and the difference of two exponents is finite"""
STRIDES = ["n_inner", "p_outer", "p_inner", "q_outer", "q_inner"]
PER_ROW = ["needed", "shift_p", "log_total_p", "shift_q", "log_total_q", "mean_p", "mean_q"]
PARTIALS = ["a_p", "s_p", "gap", "a_q", "s_q"]


@triton.jit
def load_pair(
    p, q, row, o_v, vocab, n_inner, p_outer, p_inner, p_vocab, q_outer, q_inner, q_vocab,
    P_ALIGNED: tl.constexpr, Q_ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Load BLOCK_V logits of one row of p and of q: (2, BLOCK_V / 8, 4) fp32 each, -inf from vocab on."""
    z_p = load_logits(
        p, None, row, o_v, vocab, n_inner, p_outer, p_inner, p_vocab, 1.0, 0.0, False, False, False, P_ALIGNED, BLOCK_V
    )
    z_q = load_logits(
        q, None, row, o_v, vocab, n_inner, q_outer, q_inner, q_vocab, 1.0, 0.0, False, False, False, Q_ALIGNED, BLOCK_V
    )
    return z_p, z_q


@triton.jit
def over_mixture(d_p, d_q, log_total_p, log_total_q, beta):
    """Return log(p / m) and log(q / m), from exponents of 2 that are finite.

    With u = log(q / p) and l = log(1 + b (e^-|u| - 1)), where b is 1 - beta if u <= 0 and beta if not,
    log(p / m) = -max(u, 0) - l and log(q / m) = min(u, 0) - l.
    """
    u = (d_q - d_p) * LN2 + (log_total_p - log_total_q)
    b = tl.where(u <= 0.0, 1.0 - beta, beta)
    low = tl.log2(1.0 + b * (tl.exp2(-tl.abs(u) * LOG2E) - 1.0)) * LN2
    return -tl.maximum(u, 0.0) - low, tl.minimum(u, 0.0) - low


@triton.jit(do_not_specialize=["n_rows", *STRIDES], do_not_specialize_on_alignment=["needed", *PARTIALS])
def divergence_partials_kernel(
    p, q, needed, a_p, s_p, gap, a_q, s_q,
    n_rows, n_inner, vocab, p_outer, p_inner, p_vocab, q_outer, q_inner, q_vocab, c,
    HAS_NEEDED: tl.constexpr, KL: tl.constexpr, P_ALIGNED: tl.constexpr, Q_ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    splits = tl.cdiv(vocab, BLOCK_V)
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    if HAS_NEEDED:
        if tl.load(needed + row) == 0:
            return
    z_p, z_q = load_pair(
        p, q, row, split * BLOCK_V, vocab, n_inner, p_outer, p_inner, p_vocab, q_outer, q_inner, q_vocab,
        P_ALIGNED, Q_ALIGNED, BLOCK_V,
    )  # fmt: skip
    m_p = tl.max(tl.max(tl.max(z_p, 2), 0), 0)
    m_q = tl.max(tl.max(tl.max(z_q, 2), 0), 0)
    e_p, d_p = weight_and_exponent(z_p, finite_or_zero(m_p), c)
    d_q = (z_q - finite_or_zero(m_q)) * c
    o = split.to(tl.int64) * n_rows + row
    tl.store(a_p + o, m_p)
    tl.store(s_p + o, total(e_p))
    tl.store(a_q + o, m_q)
    tl.store(s_q + o, total(tl.exp2(d_q)))
    if KL:
        outside = (z_q == NEG_INF) & (z_p != NEG_INF)
        tl.store(gap + o, total(tl.where(outside, INF, e_p * (d_p - tl.maximum(d_q, LOWEST)))))


@triton.jit
def merge_gaps(
    a_p, s_p, gap, a_q, m_p, m_q, row, m_row, n_rows, n_splits, c, SPLITS: tl.constexpr
):  # fmt: skip
    """Return the sum of e d over whole rows with the maxima m_p and m_q; inf where q excludes a word of p."""
    out = tl.zeros([row.shape[0]], dtype=tl.float32)
    for first in range(0, n_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        b_p = load_splits(a_p, split, n_splits, row, m_row, n_rows, NEG_INF)  # (SPLITS, BLOCK)
        b_q = load_splits(a_q, split, n_splits, row, m_row, n_rows, NEG_INF)
        b_s = load_splits(s_p, split, n_splits, row, m_row, n_rows, 0.0)
        b_gap = load_splits(gap, split, n_splits, row, m_row, n_rows, 0.0)
        w, d_p = weight_and_exponent(b_p, finite_or_zero(m_p)[None, :], c)
        d_q = tl.maximum((b_q - finite_or_zero(m_q)[None, :]) * c, LOWEST)
        out += tl.sum(tl.where(b_gap == INF, INF, w * b_gap + w * b_s * (d_p - d_q)), 0)
    return out


@triton.jit(do_not_specialize=["n_rows", "n_splits"], do_not_specialize_on_alignment=["needed", *PARTIALS])
def divergence_combine_kernel(
    a_p, s_p, gap, a_q, s_q, needed, o_divergence, o_shift_p, o_log_total_p, o_shift_q, o_log_total_q, o_mean_p, o_live,
    n_rows, n_splits, c,
    HAS_NEEDED: tl.constexpr, KL: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_out = row < n_rows
    m_row = m_out
    if HAS_NEEDED:
        m_row = m_out & (tl.load(needed + row, mask=m_out, other=0) != 0)
    m_p, t_p, _ = merge_splits(a_p, s_p, s_p, row, m_row, n_rows, n_splits, c, False, SPLITS)
    m_q, t_q, _ = merge_splits(a_q, s_q, s_q, row, m_row, n_rows, n_splits, c, False, SPLITS)
    dead_p, dead_q = t_p == 0.0, t_q == 0.0
    log_total_p = tl.where(dead_p, 0.0, log_total_of(t_p))
    log_total_q = tl.where(dead_q, 0.0, log_total_of(t_q))
    store_row(o_shift_p, row, finite_or_zero(m_p), m_row, m_out)
    store_row(o_shift_q, row, finite_or_zero(m_q), m_row, m_out)
    store_row(o_log_total_p, row, log_total_p, m_row, m_out)
    store_row(o_log_total_q, row, log_total_q, m_row, m_out)
    live = ~(dead_p | dead_q)
    if KL:
        d = merge_gaps(a_p, s_p, gap, a_q, m_p, m_q, row, m_row, n_rows, n_splits, c, SPLITS)
        kl = d / tl.where(dead_p, 1.0, t_p) * LN2 + (log_total_q - log_total_p)
        kl = tl.where(dead_p, 0.0, kl)
        live = live & (kl != INF)
        store_row(o_divergence, row, tl.where(kl < 0.0, 0.0, kl), m_row, m_out)  # rounding; the comparison keeps a NaN
        store_row(o_mean_p, row, tl.where(live, kl, 0.0), m_row, m_out)
    store_row(o_live, row, live.to(tl.float32), m_row, m_out)


@triton.jit(do_not_specialize=["n_rows", *STRIDES], do_not_specialize_on_alignment=["over_p", "over_q", *PER_ROW])
def divergence_mixture_kernel(
    p, q, needed, shift_p, log_total_p, shift_q, log_total_q, over_p, over_q,
    n_rows, n_inner, vocab, p_outer, p_inner, p_vocab, q_outer, q_inner, q_vocab, c, beta,
    HAS_NEEDED: tl.constexpr, P_ALIGNED: tl.constexpr, Q_ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    splits = tl.cdiv(vocab, BLOCK_V)
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    if HAS_NEEDED:
        if tl.load(needed + row) == 0:
            return
    z_p, z_q = load_pair(
        p, q, row, split * BLOCK_V, vocab, n_inner, p_outer, p_inner, p_vocab, q_outer, q_inner, q_vocab,
        P_ALIGNED, Q_ALIGNED, BLOCK_V,
    )  # fmt: skip
    b_p, b_q = tl.load(log_total_p + row), tl.load(log_total_q + row)
    d_p = (z_p - tl.load(shift_p + row)) * c
    d_q = (z_q - tl.load(shift_q + row)) * c
    log_p, log_q = over_mixture(tl.maximum(d_p, LOWEST), tl.maximum(d_q, LOWEST), b_p, b_q, beta)
    o = split.to(tl.int64) * n_rows + row
    tl.store(over_p + o, total(tl.exp2(d_p) * log_p) * tl.exp2(-b_p * LOG2E))
    tl.store(over_q + o, total(tl.exp2(d_q) * log_q) * tl.exp2(-b_q * LOG2E))


@triton.jit(do_not_specialize=["n_rows", "n_splits"], do_not_specialize_on_alignment=["over_p", "over_q", "needed"])
def divergence_sum_kernel(
    over_p, over_q, needed, o_divergence, o_mean_p, o_mean_q, n_rows, n_splits, beta,
    HAS_NEEDED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_out = row < n_rows
    m_row = m_out
    if HAS_NEEDED:
        m_row = m_out & (tl.load(needed + row, mask=m_out, other=0) != 0)
    kl_p = tl.zeros([BLOCK], dtype=tl.float32)
    kl_q = kl_p
    for first in range(0, n_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        kl_p += tl.sum(load_splits(over_p, split, n_splits, row, m_row, n_rows, 0.0), 0)
        kl_q += tl.sum(load_splits(over_q, split, n_splits, row, m_row, n_rows, 0.0), 0)
    jsd = beta * kl_p + (1.0 - beta) * kl_q
    store_row(o_divergence, row, tl.where(jsd < 0.0, 0.0, jsd), m_row, m_out)
    store_row(o_mean_p, row, kl_p, m_row, m_out)
    store_row(o_mean_q, row, kl_q, m_row, m_out)


def divergence(
    p: torch.Tensor, q: torch.Tensor, *, beta: float | None, alpha: float, needed=None,
    config: LogitsConfig | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """Return the fields of vocab/divergence/rows.Stats, each (N,) float32, of logits p and q (B, T, V), N = B T.

    Any strides and dtypes.  needed (N,) bool: rows to compute, the others come back 0; None: all
    """
    outer, inner, vocab = p.shape
    rows, config = outer * inner, config or LogitsConfig()
    splits, device = cdiv(vocab, config.block_v), p.device
    stats = [torch.empty(rows, device=device) for _ in range(8)]
    if not rows:
        return stats
    out, shifts_and_totals, means, live = stats[0], stats[1:5], stats[5:7], stats[7]
    if beta is None:
        means[1].zero_()
    a_p, s_p, gap, a_q, s_q = torch.empty((5, splits, rows), device=device)
    pair = inner, vocab, *p.stride(), *q.stride(), exp2_scale(alpha)
    flags = {"HAS_NEEDED": needed is not None}
    whole = flags | {"SPLITS": min(MOST_SPLITS, 1 << (splits - 1).bit_length()), "BLOCK": ROWS_PER_PROGRAM}
    tiled = flags | {"P_ALIGNED": rows_aligned(p), "Q_ALIGNED": rows_aligned(q), "BLOCK_V": config.block_v}
    tiled["num_warps"] = config.num_warps
    grid, rowwise = (rows * splits,), (cdiv(rows, ROWS_PER_PROGRAM),)
    divergence_partials_kernel[grid](p, q, needed, a_p, s_p, gap, a_q, s_q, rows, *pair, KL=beta is None, **tiled)
    divergence_combine_kernel[rowwise](
        a_p, s_p, gap, a_q, s_q, needed, out, *shifts_and_totals, means[0], live, rows, splits, pair[-1],
        KL=beta is None, **whole, num_warps=4,
    )  # fmt: skip
    if beta is not None:  # the partials of the first pass are no longer needed
        divergence_mixture_kernel[grid](p, q, needed, *shifts_and_totals, a_p, a_q, rows, *pair, beta, **tiled)
        divergence_sum_kernel[rowwise](a_p, a_q, needed, out, *means, rows, splits, beta, **whole, num_warps=4)
    return stats
