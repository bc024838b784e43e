"""Merge the partials of vocabulary splits into row statistics, and optionally into token rewards, in one launch.

Partials are (splits, rows) float32: neighbouring rows are neighbours in memory. Each program loads all splits of its
rows and sums them in a tree whose shape depends on their number alone, so results are bitwise the same from run to run
and in any batch. The kernel reads 8 bytes (16 with entropy and mean) per row and split, about 1/1000 of the traffic of
the pass that wrote them.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .config import cdiv
from .primitives import (
    LN2,
    NEG_INF,
    NO_TARGET,
    SUM_SCALE,
    alpha_of,
    exp2_scale,
    finite_or_zero,
    merge,
    scale_of,
    weight_and_exponent,
)

ROWS_PER_PROGRAM = 16
MOST_SPLITS = 128  # splits that one tile holds; more are merged tile by tile


class Partials(NamedTuple):
    """The output of a pass over the vocabulary. primitives.py defines m, s, t and u."""

    m: torch.Tensor  # (splits, N)
    s: torch.Tensor  # (splits, N)
    t: torch.Tensor | None  # (splits, N), for the entropy
    u: torch.Tensor | None  # (splits, N), for the logit mean
    target_logit: torch.Tensor  # (N,), written only where the row has a target
    named: torch.Tensor | None = None  # (N, K), logits of named tokens

    @classmethod
    def empty(
        cls, splits: int, rows: int, device, *, entropy: bool, logit_mean: bool, names: int = 0
    ) -> "Partials":  # fmt: skip
        def field():
            return torch.empty((splits, rows), dtype=torch.float32, device=device)

        target_logit = torch.empty(rows, dtype=torch.float32, device=device)
        named = torch.empty((rows, names), dtype=torch.float32, device=device) if names else None
        return cls(field(), field(), field() if entropy else None, field() if logit_mean else None, target_logit, named)

    def part(self, splits: slice, rows: slice) -> "Partials":
        """Return a view of the given splits and rows."""
        fields = (None if field is None else field[splits, rows] for field in self[:4])
        return Partials(*fields, self.target_logit[rows], None if self.named is None else self.named[rows])


@triton.jit
def load_splits(p, split, n_splits, o_row, m_row, pitch, other):
    """Load partials (SPLITS, BLOCK) of the given splits and rows."""
    o = split.to(tl.int64)[:, None] * pitch + o_row[None, :]
    return tl.load(p + o, mask=(split < n_splits)[:, None] & m_row[None, :], other=other)


@triton.jit
def merge_splits(p_m, p_s, p_t, o_row, m_row, pitch, n_splits, c, ENTROPY: tl.constexpr, SPLITS: tl.constexpr):
    """Return (m, s, t) of whole rows. A row outside m_row counts as all -inf. c is a number, or (BLOCK,)."""
    m = tl.full([o_row.shape[0]], NEG_INF, dtype=tl.float32)
    s = tl.zeros([o_row.shape[0]], dtype=tl.float32)
    t = s
    for first in range(0, n_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        a_m = load_splits(p_m, split, n_splits, o_row, m_row, pitch, NEG_INF)  # (SPLITS, BLOCK)
        a_s = load_splits(p_s, split, n_splits, o_row, m_row, pitch, 0.0)
        b_m = tl.max(a_m, 0)
        w, d = weight_and_exponent(a_m, finite_or_zero(b_m)[None, :], c)
        b_t = t
        if ENTROPY:
            a_t = load_splits(p_t, split, n_splits, o_row, m_row, pitch, 0.0)
            b_t = tl.sum(w * (a_t + a_s * d), 0)
        m, s, t = merge(m, s, t, b_m, tl.sum(a_s * w, 0), b_t, c, ENTROPY)
    return m, s, t


@triton.jit
def log_total_of(s):
    """Return ln s; -inf where s = 0 (a row that is all -inf)."""
    return tl.where(s == 0.0, NEG_INF, tl.log2(tl.where(s == 0.0, 1.0, s)) * LN2)


@triton.jit
def logprob_of(z, m, log_total, alpha, dead):
    """Return log pi of a logit z of the row; -inf in a row that is all -inf."""
    logprob = tl.where(dead, NEG_INF, (z - finite_or_zero(m)) / alpha - log_total)
    # Rounding can push the logprob of a certain token above 0. The comparison keeps a NaN.
    return tl.where(logprob > 0.0, 0.0, logprob)


@triton.jit
def store_row(out, row, b_value, m_value, m_out):
    """Store b_value where m_value is set and 0 in the rest of the output."""
    tl.store(out + row, tl.where(m_value, b_value, 0.0), mask=m_out)


@triton.jit
def store_token(out, row, b_value, m_token, n_rows):
    """Store b_value at the token that was chosen in the row, one place further on, and 0 at all other tokens."""
    store_row(out + 1, row, b_value, m_token, row < n_rows - 1)
    tl.store(out + row, 0.0, mask=row == 0)


@triton.jit(
    do_not_specialize=["n_rows", "n_splits", "pitch"],
    do_not_specialize_on_alignment=[
        "p_m", "p_s", "p_t", "p_u", "p_target", "p_named", "targets", "needed", "place", "successor", "named", "c",
        "alpha",
    ],
)  # fmt: skip
def combine_kernel(
    p_m, p_s, p_t, p_u, p_target, p_named, targets, needed, place, successor, named,
    o_lse, o_target, o_entropy, o_mean, o_shift, o_log_total, o_named, o_reward, o_logprob, o_value, o_token_entropy,
    n_rows, n_splits, pitch, vocab, log_vocab, c, alpha,
    HAS_NEEDED: tl.constexpr, HAS_PLACE: tl.constexpr, ENTROPY: tl.constexpr, LOGIT_MEAN: tl.constexpr,
    REWARDS: tl.constexpr, ALPHAS: tl.constexpr, NAMES: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_out = row < n_rows
    m_row = m_out
    if HAS_NEEDED:
        m_row = m_out & (tl.load(needed + row, mask=m_out, other=0) != 0)
    o_row = row
    if HAS_PLACE:
        o_row = tl.load(place + row, mask=m_row, other=0)
    b_alpha = alpha_of(alpha, row, m_row, ALPHAS)
    m, s, t = merge_splits(
        p_m, p_s, p_t, o_row, m_row, pitch, n_splits, scale_of(c, row, m_row, ALPHAS), ENTROPY, SPLITS
    )  # fmt: skip
    log_total = log_total_of(s)
    lse = m / b_alpha + log_total
    dead = s == 0.0
    lse = tl.where(dead, NEG_INF, lse)

    target = tl.load(targets + row, mask=m_row, other=NO_TARGET)
    has_target = target != NO_TARGET
    # No pass writes a logit for a target outside the vocabulary. A kernel cannot raise, so the row becomes NaN.
    nan = float("nan")
    lost = has_target & ((target < 0) | (target >= vocab))
    q = tl.load(p_target + o_row, mask=m_row & has_target & ~lost, other=0.0)
    q = tl.where(lost, nan, q)
    lse = tl.where(lost, nan, lse)

    store_row(o_lse, row, lse, m_row, m_out)
    store_row(o_target, row, q, m_row, m_out)
    store_row(o_shift, row, tl.where(lost, nan, m), m_row, m_out)
    store_row(o_log_total, row, log_total, m_row, m_out)
    m_token = m_row & has_target
    if NAMES:
        for k in range(NAMES):
            token = tl.load(named + k)
            b_named = tl.load(p_named + o_row.to(tl.int64) * NAMES + k, mask=m_row, other=0.0)
            b_named = logprob_of(b_named, m, log_total, b_alpha, dead)
            b_named = tl.where(lost | (token < 0) | (token >= vocab), nan, b_named)
            store_row(o_named + k, row.to(tl.int64) * NAMES, b_named, m_row, m_out)
    if ENTROPY:
        h = log_total - t / tl.where(dead, 1.0, s) * LN2
        # Rounding can push h outside [0, ln V]. min and max drop a NaN, so the next line restores it.
        h = tl.minimum(tl.maximum(h, 0.0), log_vocab)
        h = tl.where((s != s) | lost, nan, tl.where(dead, 0.0, h))
        store_row(o_entropy, row, h, m_row, m_out)
        if REWARDS:
            store_token(o_token_entropy, row, h, m_token, n_rows)
    if LOGIT_MEAN:
        u = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, n_splits, SPLITS):
            split = first + tl.arange(0, SPLITS)
            u += tl.sum(load_splits(p_u, split, n_splits, o_row, m_row, pitch, 0.0), 0)
        store_row(o_mean, row, tl.where(lost, nan, u / vocab / SUM_SCALE), m_row, m_out)

    if REWARDS:
        # Row of the state that the token leads to; -1 after a terminal token.
        after = tl.load(successor + row, mask=m_row, other=-1)
        m_after = m_row & (after >= 0)
        c_n, alpha_n = scale_of(c, after, m_after, ALPHAS), alpha_of(alpha, after, m_after, ALPHAS)
        if HAS_PLACE:
            after = tl.load(place + after, mask=m_after, other=0).to(tl.int64)
        m_n, s_n, _ = merge_splits(p_m, p_s, p_t, after, m_after, pitch, n_splits, c_n, False, SPLITS)
        value_after = tl.where(s_n == 0.0, 0.0, m_n + alpha_n * log_total_of(s_n))
        logprob = logprob_of(q, m, log_total, b_alpha, dead)
        reward = tl.where(dead, NEG_INF, q - value_after)
        store_token(o_reward, row, reward, m_token, n_rows)
        store_token(o_logprob, row, tl.where(lost, nan, logprob), m_token, n_rows)
        store_token(o_value, row, b_alpha * lse, m_token, n_rows)


def combine(
    partials: Partials, targets, *, vocab: int, alpha: float | torch.Tensor, needed=None, place=None, successor=None,
    named=None,
) -> tuple[tuple, tuple | None]:  # fmt: skip
    """Return (statistics, rewards) of N rows.

    statistics  (lse, target_logit, entropy, logit_mean, shift, log_total, log pi of named tokens), each (N,) float32,
                the last (N, K); None if not requested
    rewards     (reward, logprob, value, entropy), each (N,) float32; None without `successor`. They stand at the token
                that was chosen in a row: row i at place i + 1. Every other place is 0

    alpha       a number, or (N,) float32: the temperature of each row
    named       (K,) int64: the tokens whose logits are `partials.named`
    needed      (N,) bool. Rows where it is False come back 0, and their partials are not read
    place       (N,) int32: the column of the partials that belongs to a row; None: column i belongs to row i
    successor   (N,) int64: row of the state that each target leads to; -1 after a terminal token. The last row has no
                target

    shift = max_a z_a, log_total = ln sum_a exp((z_a - shift) / alpha), and lse = shift / alpha + log_total. Under a
    large common offset lse rounds away the bits of log_total. The backward needs them, so both parts are returned.
    """
    (splits, pitch), rows = partials.m.shape, targets.shape[0]
    entropy, logit_mean, rewards = partials.t is not None, partials.u is not None, successor is not None
    names = 0 if named is None else named.shape[0]

    def field(wanted=True):
        return partials.m.new_empty(rows) if wanted else None

    c = exp2_scale(alpha)
    of_named = partials.m.new_empty(rows, names) if names else None
    stats = (field(), field(), field(entropy), field(logit_mean), field(), field(), of_named)
    out = (field(), field(), field(), field(entropy)) if rewards else None
    if rows:
        combine_kernel[(cdiv(rows, ROWS_PER_PROGRAM),)](
            *partials, targets, needed, place, successor, named,
            *stats, *(out or (None,) * 4),
            rows, splits, pitch, vocab, math.log(vocab), c, alpha,
            HAS_NEEDED=needed is not None, HAS_PLACE=place is not None, ENTROPY=entropy, LOGIT_MEAN=logit_mean,
            REWARDS=rewards, ALPHAS=c is alpha, NAMES=names,
            SPLITS=min(MOST_SPLITS, 1 << (splits - 1).bit_length()), BLOCK=ROWS_PER_PROGRAM, num_warps=4,
        )  # fmt: skip
    return stats, out
