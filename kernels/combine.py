"""Merge the partials of vocabulary splits into row statistics, and optionally into token rewards, in one launch.

Partials are (splits, rows) float32: neighbouring rows are neighbours in memory. Each program merges the splits of its
rows in a fixed order, so results are bitwise the same from run to run and in any batch. The kernel reads 8 bytes (16
with entropy and mean) per row and split, about 1/1000 of the traffic of the pass that wrote them.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .primitives import LN2, NEG_INF, NO_TARGET, SUM_SCALE, exp2_scale, finite_or_zero, merge

ROWS_PER_PROGRAM = 128


class Partials(NamedTuple):
    """The output of a pass over the vocabulary. primitives.py defines m, s, t and u."""

    m: torch.Tensor  # (splits, N)
    s: torch.Tensor  # (splits, N)
    t: torch.Tensor | None  # (splits, N), for the entropy
    u: torch.Tensor | None  # (splits, N), for the logit mean
    target_logit: torch.Tensor  # (N,), written only where the row has a target

    @classmethod
    def empty(cls, splits: int, rows: int, device, *, entropy: bool, logit_mean: bool) -> "Partials":
        def field():
            return torch.empty((splits, rows), dtype=torch.float32, device=device)

        target_logit = torch.empty(rows, dtype=torch.float32, device=device)
        return cls(field(), field(), field() if entropy else None, field() if logit_mean else None, target_logit)

    def part(self, splits: slice, rows: slice) -> "Partials":
        """Return a view of the given splits and rows."""
        fields = (None if field is None else field[splits, rows] for field in self[:4])
        return Partials(*fields, self.target_logit[rows])


@triton.jit
def merge_splits(p_m, p_s, p_t, o_row, m_row, n_rows, n_splits, c, ENTROPY: tl.constexpr):
    """Return (m, s, t) of whole rows. A row outside m_row counts as all -inf."""
    o = o_row.to(tl.int64)
    m = tl.load(p_m + o, mask=m_row, other=NEG_INF)
    s = tl.load(p_s + o, mask=m_row, other=0.0)
    t = s
    if ENTROPY:
        t = tl.load(p_t + o, mask=m_row, other=0.0)
    for _ in range(1, n_splits):
        o += n_rows
        b_m = tl.load(p_m + o, mask=m_row, other=NEG_INF)
        b_s = tl.load(p_s + o, mask=m_row, other=0.0)
        b_t = b_s
        if ENTROPY:
            b_t = tl.load(p_t + o, mask=m_row, other=0.0)
        m, s, t = merge(m, s, t, b_m, b_s, b_t, c, ENTROPY)
    return m, s, t


@triton.jit
def log_total_of(s):
    """Return ln s; -inf where s = 0 (a row that is all -inf)."""
    return tl.where(s == 0.0, NEG_INF, tl.log2(tl.where(s == 0.0, 1.0, s)) * LN2)


@triton.jit
def store_row(out, row, b_value, m_value, m_out):
    """Store b_value where m_value is set and 0 in the rest of the output."""
    tl.store(out + row, tl.where(m_value, b_value, 0.0), mask=m_out)


@triton.jit(do_not_specialize=["n_rows", "n_splits"])
def combine_kernel(
    p_m, p_s, p_t, p_u, p_target, targets, needed, successor,
    o_lse, o_target, o_entropy, o_mean, o_shift, o_log_total, o_reward, o_logprob, o_value,
    n_rows, n_splits, vocab, log_vocab, c, alpha,
    HAS_NEEDED: tl.constexpr, ENTROPY: tl.constexpr, LOGIT_MEAN: tl.constexpr, REWARDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_out = row < n_rows
    m_row = m_out
    if HAS_NEEDED:
        m_row = m_out & (tl.load(needed + row, mask=m_out, other=0) != 0)
    m, s, t = merge_splits(p_m, p_s, p_t, row, m_row, n_rows, n_splits, c, ENTROPY)
    log_total = log_total_of(s)
    lse = m / alpha + log_total
    dead = s == 0.0
    lse = tl.where(dead, NEG_INF, lse)

    target = tl.load(targets + row, mask=m_row, other=NO_TARGET)
    has_target = target != NO_TARGET
    # No pass writes a logit for a target outside the vocabulary. A kernel cannot raise, so the row becomes NaN.
    nan = float("nan")
    lost = has_target & ((target < 0) | (target >= vocab))
    q = tl.load(p_target + row, mask=m_row & has_target & ~lost, other=0.0)
    q = tl.where(lost, nan, q)
    lse = tl.where(lost, nan, lse)

    store_row(o_lse, row, lse, m_row, m_out)
    store_row(o_target, row, q, m_row, m_out)
    store_row(o_shift, row, tl.where(lost, nan, m), m_row, m_out)
    store_row(o_log_total, row, log_total, m_row, m_out)
    if ENTROPY:
        h = log_total - t / tl.where(dead, 1.0, s) * LN2
        # Rounding can push h outside [0, ln V]. min and max drop a NaN, so the next line restores it.
        h = tl.minimum(tl.maximum(h, 0.0), log_vocab)
        h = tl.where((s != s) | lost, nan, tl.where(dead, 0.0, h))
        store_row(o_entropy, row, h, m_row, m_out)
    if LOGIT_MEAN:
        o = row.to(tl.int64)
        u = tl.load(p_u + o, mask=m_row, other=0.0)
        for _ in range(1, n_splits):
            o += n_rows
            u += tl.load(p_u + o, mask=m_row, other=0.0)
        store_row(o_mean, row, tl.where(lost, nan, u / vocab / SUM_SCALE), m_row, m_out)

    if REWARDS:
        # Row of the state that the token leads to; -1 after a terminal token.
        after = tl.load(successor + row, mask=m_row, other=-1)
        m_n, s_n, _ = merge_splits(p_m, p_s, p_t, after, m_row & (after >= 0), n_rows, n_splits, c, False)
        value_after = tl.where(s_n == 0.0, 0.0, m_n + alpha * log_total_of(s_n))
        logprob = tl.where(dead, NEG_INF, (q - finite_or_zero(m)) / alpha - log_total)
        # Rounding can push the logprob of a certain token above 0. The comparison keeps a NaN.
        logprob = tl.where(logprob > 0.0, 0.0, logprob)
        reward = tl.where(dead, NEG_INF, q - value_after)
        m_token = m_row & has_target
        store_row(o_reward, row, reward, m_token, m_out)
        store_row(o_logprob, row, tl.where(lost, nan, logprob), m_token, m_out)
        store_row(o_value, row, alpha * lse, m_token, m_out)


def combine(
    partials: Partials, targets, *, vocab: int, alpha: float, needed=None, successor=None
) -> tuple[tuple, tuple | None]:
    """Return (statistics, rewards) of N rows.

    statistics  (lse, target_logit, entropy, logit_mean, shift, log_total), each (N,) float32; None if not requested
    rewards     (reward, logprob, value), each (N,) float32, 0 where the row has no target; None without `successor`

    needed      (N,) bool. Rows where it is False come back 0, and their partials are not read
    successor   (N,) int64: row of the state that each target leads to; -1 after a terminal token

    shift = max_a z_a, log_total = ln sum_a exp((z_a - shift) / alpha), and lse = shift / alpha + log_total. Under a
    large common offset lse rounds away the bits of log_total. The backward needs them, so both parts are returned.
    """
    splits, rows = partials.m.shape
    entropy, logit_mean, rewards = partials.t is not None, partials.u is not None, successor is not None

    def field(wanted=True):
        return torch.empty(rows, dtype=torch.float32, device=partials.m.device) if wanted else None

    stats = (field(), field(), field(entropy), field(logit_mean), field(), field())
    out = (field(), field(), field()) if rewards else None
    if rows:
        combine_kernel[(triton.cdiv(rows, ROWS_PER_PROGRAM),)](
            *partials, targets, needed, successor,
            *stats, *(out or (None, None, None)),
            rows, splits, vocab, math.log(vocab), exp2_scale(alpha), alpha,
            HAS_NEEDED=needed is not None, ENTROPY=entropy, LOGIT_MEAN=logit_mean, REWARDS=rewards,
            BLOCK=ROWS_PER_PROGRAM, num_warps=4,
        )  # fmt: skip
    return stats, out
