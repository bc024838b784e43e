"""Gradients of the divergence of two stored logits, in one read of both rows and one write of each gradient.

vocab/divergence/rows.py has the formulas. Traffic per row: V * itemsize of both, and of each gradient.
"""

import torch
import triton
import triton.language as tl

from .config import LogitsConfig, cdiv
from .divergence import LOWEST, PER_ROW, STRIDES, load_pair, over_mixture
from .primitives import LN2, LOG2E, exp2_scale, weight_and_exponent
from .vocab_stats import rows_aligned, store_columns


@triton.jit(do_not_specialize=STRIDES, do_not_specialize_on_alignment=["g", *PER_ROW])
def divergence_backward_kernel(
    p, q, needed, g, shift_p, log_total_p, shift_q, log_total_q, mean_p, mean_q, grad_p, grad_q,
    n_inner, vocab, p_outer, p_inner, p_vocab, q_outer, q_inner, q_vocab, c, alpha, beta,
    HAS_NEEDED: tl.constexpr, KL: tl.constexpr, OF_P: tl.constexpr, OF_Q: tl.constexpr, P_ALIGNED: tl.constexpr,
    Q_ALIGNED: tl.constexpr, GRAD_ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(vocab, BLOCK_V)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    o_v = (tl.program_id(0) % blocks) * BLOCK_V
    o_grad = row * vocab
    if HAS_NEEDED:
        if tl.load(needed + row) == 0:
            zeros = tl.zeros([2, BLOCK_V // 8, 4], dtype=tl.float32)
            if OF_P:
                store_columns(grad_p + o_grad, zeros, o_v, vocab, GRAD_ALIGNED, BLOCK_V)
            if OF_Q:
                store_columns(grad_q + o_grad, zeros, o_v, vocab, GRAD_ALIGNED, BLOCK_V)
            return
    z_p, z_q = load_pair(
        p, q, row, o_v, vocab, n_inner, p_outer, p_inner, p_vocab, q_outer, q_inner, q_vocab,
        P_ALIGNED, Q_ALIGNED, BLOCK_V,
    )  # fmt: skip
    b_p, b_q, b_mean = tl.load(log_total_p + row), tl.load(log_total_q + row), tl.load(mean_p + row)
    # log_total is applied as a factor. Subtracting it from every exponent would round the largest p the most.
    scale = tl.load(g + row) / alpha
    share_p, share_q = scale * tl.exp2(-b_p * LOG2E), scale * tl.exp2(-b_q * LOG2E)
    e_p, d_p = weight_and_exponent(z_p, tl.load(shift_p + row), c)
    d_q = (z_q - tl.load(shift_q + row)) * c
    e_q, d_q = tl.exp2(d_q), tl.maximum(d_q, LOWEST)
    if KL:
        if OF_P:
            dz_p = e_p * share_p * ((d_p - d_q) * LN2 + (b_q - b_p - b_mean))
            store_columns(grad_p + o_grad, dz_p, o_v, vocab, GRAD_ALIGNED, BLOCK_V)
        if OF_Q:
            store_columns(grad_q + o_grad, e_q * share_q - e_p * share_p, o_v, vocab, GRAD_ALIGNED, BLOCK_V)
    else:
        d_p = tl.maximum((z_p - tl.load(shift_p + row)) * c, LOWEST)  # a word that underflows still has a ratio
        log_p, log_q = over_mixture(d_p, d_q, b_p, b_q, beta)
        if OF_P:
            dz_p = e_p * (beta * share_p) * (log_p - b_mean)
            store_columns(grad_p + o_grad, dz_p, o_v, vocab, GRAD_ALIGNED, BLOCK_V)
        if OF_Q:
            dz_q = e_q * ((1.0 - beta) * share_q) * (log_q - tl.load(mean_q + row))
            store_columns(grad_q + o_grad, dz_q, o_v, vocab, GRAD_ALIGNED, BLOCK_V)


def divergence_backward(
    p: torch.Tensor, q: torch.Tensor, g, shift_p, log_total_p, shift_q, log_total_q, mean_p, mean_q, *,
    beta: float | None, alpha: float, needs: tuple[bool, bool], needed=None, config: LogitsConfig | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Return the gradients of logits p and q (B, T, V), contiguous and in their dtypes; None where `needs` is False.

    g and the statistics are (N,) float32 contiguous; g is 0 in rows without a gradient. needed is as in `divergence`.
    """
    outer, inner, vocab = p.shape
    rows, config = outer * inner, config or LogitsConfig()
    grads = tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
        for x, need in zip((p, q), needs, strict=True)
    )
    if rows and any(needs):
        size = min(x.element_size() for x in grads if x is not None)
        divergence_backward_kernel[(rows * cdiv(vocab, config.block_v),)](
            p, q, needed, g, shift_p, log_total_p, shift_q, log_total_q, mean_p, mean_q, *grads,
            inner, vocab, *p.stride(), *q.stride(), exp2_scale(alpha), alpha, beta or 0.0,
            HAS_NEEDED=needed is not None, KL=beta is None, OF_P=needs[0], OF_Q=needs[1], P_ALIGNED=rows_aligned(p),
            Q_ALIGNED=rows_aligned(q), GRAD_ALIGNED=vocab * size % 16 == 0, BLOCK_V=config.block_v,
            num_warps=config.num_warps,
        )  # fmt: skip
    return grads
