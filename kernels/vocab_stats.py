"""Statistics of logits (N, V) in one read, and their gradient in one read and one write.

forward   One program summarises BLOCK_V logits of one row, and combine.py merges the pieces of a row. Traffic per row:
          V * itemsize bytes, and 16 bytes per piece.
backward  dz_a = (g_lse - g_entropy (log p_a + H)) p_a / alpha + g_target [a = target] + g_mean / V
          with p_a = exp((z_a - shift) / alpha - log_total). Traffic per row: 2 V * itemsize bytes.

How a row is cut into pieces depends on V alone, so a row's result is bitwise the same in any batch.
"""

import torch
import triton
import triton.language as tl

from .combine import Partials
from .config import LogitsConfig
from .primitives import (
    LN2,
    LOG2E,
    NEG_INF,
    PLAIN_HEAD,
    SUM_SCALE,
    Head,
    apply_head,
    exp2_scale,
    finite_or_zero,
    weight_and_exponent,
)


@triton.jit
def load_logits(
    logits, bias, row, col, m_col, n_inner, stride_outer, stride_inner, stride_vocab, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Load stored logits of one row and apply the head's last step: (BLOCK_V,) fp32, -inf outside m_col."""
    o_row = row // n_inner * stride_outer + row % n_inner * stride_inner
    z = tl.load(logits + o_row + col.to(tl.int64) * stride_vocab, mask=m_col, other=NEG_INF).to(tl.float32)
    b_bias = 0.0
    if HAS_BIAS:
        b_bias = tl.load(bias + col, mask=m_col, other=0.0).to(tl.float32)
    z = apply_head(z, b_bias, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP)
    if HAS_SCALE or HAS_SOFTCAP:  # these change -inf into another number
        z = tl.where(m_col, z, NEG_INF)
    return z


@triton.jit(do_not_specialize=["n_rows", "n_inner", "stride_outer", "first"])
def logits_partials_kernel(
    logits, targets, needed, bias, p_m, p_s, p_t, p_u, p_target,
    n_rows, n_inner, vocab, first, stride_outer, stride_inner, stride_vocab, logit_scale, softcap, c,
    HAS_NEEDED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr, LOGIT_MEAN: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    splits = tl.cdiv(vocab, BLOCK_V)
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    if HAS_NEEDED:
        if tl.load(needed + row) == 0:
            return
    col = split * BLOCK_V + tl.arange(0, BLOCK_V)
    m_col = col < vocab
    z = load_logits(
        logits, bias, row, col, m_col, n_inner, stride_outer, stride_inner, stride_vocab, logit_scale, softcap,
        HAS_BIAS, HAS_SCALE, HAS_SOFTCAP,
    )  # fmt: skip

    m = tl.max(z, 0)
    e, d = weight_and_exponent(z, finite_or_zero(m), c)
    o = split.to(tl.int64) * n_rows + row
    tl.store(p_m + o, m)
    tl.store(p_s + o, tl.sum(e, 0))
    if ENTROPY:
        tl.store(p_t + o, tl.sum(e * d, 0))
    if LOGIT_MEAN:
        tl.store(p_u + o, tl.sum(tl.where(m_col, z * SUM_SCALE, 0.0), 0))
    target = tl.load(targets + row) - first
    if (target >= split * BLOCK_V) & (target < tl.minimum((split + 1) * BLOCK_V, vocab)):
        tl.store(p_target + row, tl.sum(tl.where(col == target, z, 0.0), 0))


@triton.jit(do_not_specialize=["n_inner", "stride_outer", "first"])
def logits_backward_kernel(
    logits, targets, needed, bias, shift, log_total, entropy, g_lse, g_target, g_entropy, g_mean, grad,
    n_inner, vocab, first, total_vocab, stride_outer, stride_inner, stride_vocab, logit_scale, softcap, c, alpha,
    HAS_NEEDED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr, LOGIT_MEAN: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(vocab, BLOCK_V)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_col = col < vocab
    o_grad = grad + row * vocab + col
    if HAS_NEEDED:
        if tl.load(needed + row) == 0:
            tl.store(o_grad, tl.zeros([BLOCK_V], dtype=grad.dtype.element_ty), mask=m_col)
            return
    z = load_logits(
        logits, bias, row, col, m_col, n_inner, stride_outer, stride_inner, stride_vocab, logit_scale, softcap,
        HAS_BIAS, HAS_SCALE, HAS_SOFTCAP,
    )  # fmt: skip
    b_log_total = tl.load(log_total + row)
    e, d = weight_and_exponent(z, finite_or_zero(tl.load(shift + row)), c)
    # log_total is applied as a factor. Subtracting it from every exponent would round the largest p the most.
    share = tl.exp2(-b_log_total * LOG2E) / alpha
    g = tl.load(g_lse + row)
    if ENTROPY:
        b_g_entropy = tl.load(g_entropy + row)
        constant = g + b_g_entropy * (b_log_total - tl.load(entropy + row))
        dz = e * share * (constant - b_g_entropy * (d * LN2))
    else:
        dz = e * (g * share)
    dz = tl.where(b_log_total == NEG_INF, 0.0, dz)  # a row that is all -inf
    dz += tl.where(col == tl.load(targets + row) - first, tl.load(g_target + row), 0.0)
    if LOGIT_MEAN:
        dz += tl.load(g_mean + row) / total_vocab
    if HAS_SOFTCAP:  # the stored logits are matmul products, before bias, scale and softcap
        y = z * (1.0 / softcap)
        dz *= 1.0 - y * y
    if HAS_SCALE:
        dz *= logit_scale
    tl.store(o_grad, dz.to(grad.dtype.element_ty), mask=m_col)


def logits_partials(
    logits, targets, *, alpha: float, entropy: bool, logit_mean: bool, needed=None, config: LogitsConfig | None = None,
    head: Head = PLAIN_HEAD, first: int = 0, out: Partials | None = None,
) -> Partials:  # fmt: skip
    """Return partials (ceil(V / BLOCK_V), N) of logits (B, T, V), any strides, and targets (N = B T,) int64.

    needed  (N,) bool: rows to compute; None: all
    head    turns the stored logits into final logits; its bias covers the V columns given
    first   index of the first column, if the columns are a part of a larger vocabulary
    out     partials to write to; its rows may be a slice of a larger tensor
    """
    outer, inner, vocab = logits.shape
    rows = outer * inner
    config = config or LogitsConfig()
    splits = triton.cdiv(vocab, config.block_v)
    if out is None:
        out = Partials.empty(splits, rows, logits.device, entropy=entropy, logit_mean=logit_mean)
    if rows:
        logits_partials_kernel[(rows * splits,)](
            logits, targets, needed, head.bias, *out,
            out.m.stride(0), inner, vocab, first, *logits.stride(), *head.numbers(), exp2_scale(alpha),
            HAS_NEEDED=needed is not None, **head.flags(), ENTROPY=entropy, LOGIT_MEAN=logit_mean,
            BLOCK_V=config.block_v, num_warps=config.num_warps,
        )  # fmt: skip
    return out


def logits_backward(
    logits, targets, shift, log_total, entropy, g_lse, g_target, g_entropy, g_mean, *, alpha: float, needed=None,
    config: LogitsConfig | None = None, head: Head = PLAIN_HEAD, first: int = 0, vocab: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the gradient (B, T, V) of the stored logits, before bias, scale and softcap, in the logits' dtype.

    shift, log_total and entropy come from the forward's `combine`. The upstream gradients g_* are (N,) float32.
    g_entropy and g_mean are None if they are zero; g_entropy requires entropy.

    head, first  as in `logits_partials`; `vocab` is the size of the whole vocabulary
    out          contiguous output of any dtype
    """
    outer, inner, columns = logits.shape
    rows = outer * inner
    config = config or LogitsConfig()
    if out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if rows:
        logits_backward_kernel[(rows * triton.cdiv(columns, config.block_v),)](
            logits, targets, needed, head.bias, shift, log_total, entropy,
            g_lse, g_target, g_entropy, g_mean, out,
            inner, columns, first, vocab or columns, *logits.stride(), *head.numbers(), exp2_scale(alpha), alpha,
            HAS_NEEDED=needed is not None, **head.flags(), ENTROPY=g_entropy is not None,
            LOGIT_MEAN=g_mean is not None, BLOCK_V=config.block_v, num_warps=config.num_warps,
        )  # fmt: skip
    return out
