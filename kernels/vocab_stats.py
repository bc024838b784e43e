"""Statistics of logits (N, V) in one read, and their gradient in one read and one write.

forward   One program summarises BLOCK_V logits of one row, and combine.py merges the pieces of a row. Traffic per row:
          V * itemsize bytes, and 16 bytes per piece.
backward  dz_a = (g_lse - g_entropy (log p_a + H)) p_a / alpha + g_target [a = target] + g_mean / V + g_k [a = named_k]
          with p_a = exp((z_a - shift) / alpha - log_total). Traffic per row: 2 V * itemsize bytes.

How a row is cut into pieces depends on V alone, so a row's result is bitwise the same in any batch. Rows that do not
begin at multiples of 16 bytes are summed in another order than those that do.
"""

import torch
import triton
import triton.language as tl

from .combine import Partials
from .config import LogitsConfig, cdiv
from .primitives import (
    LN2,
    LOG2E,
    NEG_INF,
    PLAIN_HEAD,
    SUM_SCALE,
    Head,
    alpha_of,
    apply_head,
    exp2_scale,
    finite_or_zero,
    scale_of,
    weight_and_exponent,
)


@triton.jit
def neighbours(first, BLOCK_V: tl.constexpr):
    """Return BLOCK_V columns from `first` on as (2, BLOCK_V / 8, 4): place (b, a, c) is column 8 a + 4 b + c."""
    o_8 = tl.arange(0, BLOCK_V // 8)[None, :, None] * 8
    return first + o_8 + tl.arange(0, 2)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]


@triton.jit
def eights(first, BLOCK_V: tl.constexpr):
    """Return the same columns as (BLOCK_V / 8, 8)."""
    return first + tl.arange(0, BLOCK_V // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def load_columns(p, stride, first, vocab, other, ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr):
    """Load columns [first, first + BLOCK_V) of one row, in the shape of `neighbours`; `other` from `vocab` on."""
    NARROW: tl.constexpr = p.dtype.element_ty.primitive_bitwidth == 16
    col = eights(first, BLOCK_V) if NARROW else neighbours(first, BLOCK_V)
    p_col = p + col.to(tl.int64) * stride
    if ALIGNED and first + BLOCK_V <= vocab:  # a mask can split wide loads
        x = tl.load(p_col).to(tl.float32)
    else:
        x = tl.load(p_col, mask=col < vocab, other=other).to(tl.float32)
    if NARROW:
        x = tl.permute(tl.reshape(x, (BLOCK_V // 8, 2, 4)), (1, 0, 2))
    return x


@triton.jit
def store_columns(p, x, first, vocab, ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr):
    """Store what `load_columns` would load from a row with stride 1."""
    x = x.to(p.dtype.element_ty)
    if p.dtype.element_ty.primitive_bitwidth == 16:
        col = eights(first, BLOCK_V)
        x = tl.reshape(tl.permute(x, (1, 0, 2)), (BLOCK_V // 8, 8))
    else:
        col = neighbours(first, BLOCK_V)
    if ALIGNED and first + BLOCK_V <= vocab:
        tl.store(p + col, x)
    else:
        tl.store(p + col, x, mask=col < vocab)


@triton.jit
def total(x):
    """Sum (2, BLOCK_V / 8, 4) in an order that does not depend on the dtype of the row."""
    return tl.sum(tl.sum(tl.sum(x, 2), 0), 0)


@triton.jit
def load_logits(
    logits, bias, row, first, vocab, n_inner, stride_outer, stride_inner, stride_vocab, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Load stored logits of one row and apply the head's last step: (2, BLOCK_V / 8, 4) fp32, -inf from vocab on."""
    o_row = row // n_inner * stride_outer + row % n_inner * stride_inner
    if ALIGNED:
        o_row = tl.multiple_of(o_row, 128 // logits.dtype.element_ty.primitive_bitwidth)
    z = load_columns(logits + o_row, stride_vocab, first, vocab, NEG_INF, ALIGNED, BLOCK_V)
    b_bias = 0.0
    if HAS_BIAS:
        b_bias = load_columns(bias, 1, first, vocab, 0.0, True, BLOCK_V)
    z = apply_head(z, b_bias, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP)
    if HAS_SCALE or HAS_SOFTCAP:  # these change -inf into another number
        z = tl.where(neighbours(first, BLOCK_V) < vocab, z, NEG_INF)
    return z


PER_ROW = ["targets", "needed", "named", "c"]
PARTIALS = ["p_m", "p_s", "p_t", "p_u", "p_target", "p_named"]
GRADS = ["alpha", "shift", "log_total", "entropy", "g_lse", "g_target", "g_entropy", "g_mean", "g_named"]


@triton.jit(
    do_not_specialize=["n_rows", "n_inner", "stride_outer", "stride_inner", "first"],
    do_not_specialize_on_alignment=PER_ROW + PARTIALS,
)
def logits_partials_kernel(
    logits, targets, needed, named, bias, p_m, p_s, p_t, p_u, p_target, p_named,
    n_rows, n_inner, vocab, first, stride_outer, stride_inner, stride_vocab, logit_scale, softcap, c,
    HAS_NEEDED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr, LOGIT_MEAN: tl.constexpr, ALPHAS: tl.constexpr, NAMES: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    splits = tl.cdiv(vocab, BLOCK_V)
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    if HAS_NEEDED:
        if tl.load(needed + row) == 0:
            return
    o_v = split * BLOCK_V
    z = load_logits(
        logits, bias, row, o_v, vocab, n_inner, stride_outer, stride_inner, stride_vocab, logit_scale, softcap,
        HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, ALIGNED, BLOCK_V,
    )  # fmt: skip
    col = neighbours(o_v, BLOCK_V)

    m = tl.max(tl.max(tl.max(z, 2), 0), 0)
    e, d = weight_and_exponent(z, finite_or_zero(m), scale_of(c, row, True, ALPHAS))
    o = split.to(tl.int64) * n_rows + row
    tl.store(p_m + o, m)
    tl.store(p_s + o, total(e))
    if ENTROPY:
        tl.store(p_t + o, total(e * d))
    if LOGIT_MEAN:
        tl.store(p_u + o, total(tl.where(col < vocab, z * SUM_SCALE, 0.0)))
    target = tl.load(targets + row) - first
    if (target >= o_v) & (target < tl.minimum(o_v + BLOCK_V, vocab)):
        tl.store(p_target + row, total(tl.where(col == target, z, 0.0)))
    if NAMES:
        for k in range(NAMES):
            token = (tl.load(named + k) - first).to(tl.int32)
            if (token >= o_v) & (token < o_v + BLOCK_V):
                tl.store(p_named + row * NAMES + k, total(tl.where(col == token, z, 0.0)))


@triton.jit(
    do_not_specialize=["n_inner", "stride_outer", "stride_inner", "first"],
    do_not_specialize_on_alignment=PER_ROW + GRADS,
)
def logits_backward_kernel(
    logits, targets, needed, named, bias, shift, log_total, entropy, g_lse, g_target, g_entropy, g_mean, g_named, grad,
    n_inner, vocab, first, total_vocab, stride_outer, stride_inner, stride_vocab, logit_scale, softcap, c, alpha,
    HAS_NEEDED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr, LOGIT_MEAN: tl.constexpr, ALPHAS: tl.constexpr, NAMES: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(vocab, BLOCK_V)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    o_v = (tl.program_id(0) % blocks) * BLOCK_V
    p_grad = grad + row * vocab
    if HAS_NEEDED:
        if tl.load(needed + row) == 0:
            store_columns(p_grad, tl.zeros([2, BLOCK_V // 8, 4], dtype=tl.float32), o_v, vocab, ALIGNED, BLOCK_V)
            return
    z = load_logits(
        logits, bias, row, o_v, vocab, n_inner, stride_outer, stride_inner, stride_vocab, logit_scale, softcap,
        HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, ALIGNED, BLOCK_V,
    )  # fmt: skip
    b_log_total = tl.load(log_total + row)
    e, d = weight_and_exponent(z, finite_or_zero(tl.load(shift + row)), scale_of(c, row, True, ALPHAS))
    # log_total is applied as a factor. Subtracting it from every exponent would round the largest p the most.
    share = tl.exp2(-b_log_total * LOG2E) / alpha_of(alpha, row, True, ALPHAS)
    g = tl.load(g_lse + row)
    if ENTROPY:
        b_g_entropy = tl.load(g_entropy + row)
        constant = g + b_g_entropy * (b_log_total - tl.load(entropy + row))
        dz = e * share * (constant - b_g_entropy * (d * LN2))
    else:
        dz = e * (g * share)
    dz = tl.where(b_log_total == NEG_INF, 0.0, dz)  # a row that is all -inf
    at_target = neighbours(o_v, BLOCK_V) == tl.load(targets + row) - first
    dz += tl.where(at_target, tl.load(g_target + row), 0.0)
    if LOGIT_MEAN:
        dz += tl.load(g_mean + row) / total_vocab
    if NAMES:
        for k in range(NAMES):
            token = (tl.load(named + k) - first).to(tl.int32)
            if (token >= o_v) & (token < o_v + BLOCK_V):
                dz += tl.where(neighbours(o_v, BLOCK_V) == token, tl.load(g_named + row * NAMES + k), 0.0)
    if HAS_SOFTCAP:  # the stored logits are matmul products, before bias, scale and softcap
        y = z * (1.0 / softcap)
        dz *= 1.0 - y * y
    if HAS_SCALE:
        dz *= logit_scale
    store_columns(p_grad, dz, o_v, vocab, ALIGNED, BLOCK_V)


def rows_aligned(logits: torch.Tensor) -> bool:
    """Return whether every row of logits (B, T, V) begins a multiple of 16 bytes behind the first.

    The strides say so, also those of a dimension of size 1: a row alone is loaded like the same row in a batch.
    """
    return all(stride * logits.element_size() % 16 == 0 for stride in logits.stride()[:2])


def logits_partials(
    logits, targets, *, alpha: float | torch.Tensor, entropy: bool, logit_mean: bool, needed=None,
    config: LogitsConfig | None = None, head: Head = PLAIN_HEAD, first: int = 0, out: Partials | None = None,
    named=None,
) -> Partials:  # fmt: skip
    """Return partials (ceil(V / BLOCK_V), N) of logits (B, T, V), any strides, and targets (N = B T,) int64.

    alpha   a number, or (N,) float32: the temperature of each row
    named   (K,) int64: tokens of the larger vocabulary whose logits are wanted too
    needed  (N,) bool: rows to compute; None: all
    head    turns the stored logits into final logits; its bias covers the V columns given
    first   index of the first column, if the columns are a part of a larger vocabulary
    out     partials to write to; its rows may be a slice of a larger tensor
    """
    outer, inner, vocab = logits.shape
    rows = outer * inner
    config, c = config or LogitsConfig(), exp2_scale(alpha)
    splits = cdiv(vocab, config.block_v)
    if out is None:
        out = Partials.empty(
            splits, rows, logits.device, entropy=entropy, logit_mean=logit_mean,
            names=0 if named is None else named.shape[0],
        )  # fmt: skip
    if rows:
        logits_partials_kernel[(rows * splits,)](
            logits, targets, needed, named, head.bias, *out,
            out.m.stride(0), inner, vocab, first, *logits.stride(), *head.numbers(), c,
            HAS_NEEDED=needed is not None, **head.flags(), ENTROPY=entropy, LOGIT_MEAN=logit_mean,
            ALPHAS=c is alpha, NAMES=0 if named is None else named.shape[0],
            ALIGNED=rows_aligned(logits), BLOCK_V=config.block_v, num_warps=config.num_warps,
        )  # fmt: skip
    return out


def logits_backward(
    logits, targets, shift, log_total, entropy, g_lse, g_target, g_entropy, g_mean, g_named=None, *,
    alpha: float | torch.Tensor, needed=None, config: LogitsConfig | None = None, head: Head = PLAIN_HEAD,
    first: int = 0, vocab: int | None = None, out: torch.Tensor | None = None, named=None,
) -> torch.Tensor:  # fmt: skip
    """Return the gradient (B, T, V) of the stored logits, before bias, scale and softcap, in the logits' dtype.

    shift, log_total and entropy come from the forward's `combine`. The upstream gradients g_* are (N,) float32.
    g_entropy and g_mean are None if they are zero; g_entropy requires entropy. g_named is (N, K), for the K tokens of
    `named`.

    alpha, head, first, named  as in `logits_partials`; `vocab` is the size of the whole vocabulary
    out          contiguous output of any dtype
    """
    outer, inner, columns = logits.shape
    rows = outer * inner
    config, c = config or LogitsConfig(), exp2_scale(alpha)
    if out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if rows:
        logits_backward_kernel[(rows * cdiv(columns, config.block_v),)](
            logits, targets, needed, named, head.bias, shift, log_total, entropy,
            g_lse, g_target, g_entropy, g_mean, g_named, out,
            inner, columns, first, vocab or columns, *logits.stride(), *head.numbers(), c, alpha,
            HAS_NEEDED=needed is not None, **head.flags(), ENTROPY=g_entropy is not None,
            LOGIT_MEAN=g_mean is not None, ALPHAS=c is alpha,
            NAMES=0 if named is None else named.shape[0],
            ALIGNED=rows_aligned(logits), BLOCK_V=config.block_v, num_warps=config.num_warps,
        )  # fmt: skip
    return out
