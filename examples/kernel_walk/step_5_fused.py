"""Step 5, fused with the matmul: the logits never leave the chip.

What was wrong with step 4: the logits in memory. Here a program makes them itself. It owns BLOCK_N rows of hidden
states and one split of the vocabulary. For each tile of BLOCK_V words it multiplies the rows by that part of the
weight, in float32 registers, adds the bias, and folds the tile into (m, s) as in step 3. The partials are those of
step 4, and so is the kernel that combines them.

Columns beyond the vocabulary have a product of 0 here, which is no -inf, so they are masked after the matmul.

A matmul reads its operands tile by tile with or without this. What is gone is N V b bytes written, N V b bytes read
again, and N V b bytes held. Here weight is read once for every 16 rows, which is slow; docs/kernel-walk.md says
how the production kernel shares it.
"""

import math
import sys

import torch
import triton
import triton.language as tl

from against_float64 import show
from step_4_split import combine, finite_or_zero, merge

BLOCK_N, BLOCK_V, BLOCK_D, SPLIT = 16, 128, 32, 512


@triton.jit
def fused_kernel(
    hidden, weight, bias, p_m, p_s, n_rows, vocab, dim, c,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    for o_v in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, vocab), BLOCK_V):
        col = o_v + tl.arange(0, BLOCK_V)
        z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for o_d in range(0, dim, BLOCK_D):
            k = o_d + tl.arange(0, BLOCK_D)
            m_h, m_w = (row[:, None] < n_rows) & (k[None, :] < dim), (col[None, :] < vocab) & (k[:, None] < dim)
            h = tl.load(hidden + row[:, None].to(tl.int64) * dim + k[None, :], mask=m_h, other=0.0)
            w = tl.load(weight + col[None, :].to(tl.int64) * dim + k[:, None], mask=m_w, other=0.0)
            z = tl.dot(h, w, z, input_precision="ieee")  # the default rounds float32 inputs to TF32
        z += tl.load(bias + col, mask=col < vocab, other=0.0)[None, :]
        z = tl.where(col[None, :] < vocab, z, float("-inf"))
        b_m = tl.max(z, 1)
        b_s = tl.sum(tl.exp2((z - finite_or_zero(b_m)[:, None]) * c), 1)
        m, s = merge(m, s, b_m, b_s, c)
    tl.store(p_m + split * n_rows + row, m, mask=row < n_rows)
    tl.store(p_s + split * n_rows + row, s, mask=row < n_rows)


def lse(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """hidden (N, D), weight (V, D), bias (V,), contiguous float32 -> (N,): of (hidden @ weight.T + bias) / alpha."""
    (n, dim), vocab, c = hidden.shape, len(weight), math.log2(math.e) / alpha
    p_m, p_s = torch.empty(2, triton.cdiv(vocab, SPLIT), n, device=hidden.device)
    fused_kernel[triton.cdiv(n, BLOCK_N), len(p_m)](
        hidden, weight, bias, p_m, p_s, n, vocab, dim, c,
        BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D, SPLIT=SPLIT,
    )  # fmt: skip
    return combine(p_m, p_s, c, alpha)


def bytes_moved(n: int, vocab: int) -> int:
    """No logits; the partials as in step 4."""
    return 2 * 8 * n * triton.cdiv(vocab, SPLIT)


def programs(n: int, vocab: int) -> int:
    return triton.cdiv(n, BLOCK_N) * triton.cdiv(vocab, SPLIT)


if __name__ == "__main__":
    show(sys.modules[__name__], from_hidden=True)
