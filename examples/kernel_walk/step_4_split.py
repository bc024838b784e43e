"""Step 4, split: several programs share a row, and a second kernel merges what they found.

What was wrong with step 3: too few programs. Here each program reads SPLIT logits of one row, without a loop, and
stores the pair (m, s) of its piece: a partial. Two partials merge into one of the same form by the rule of step 3, so
the combine kernel takes them one after the other. The size of a piece depends on nothing else, and the order of the
merges is fixed: a row has the same bits in any batch and in any run. (Atomic additions would give up both.)

What is wrong with it: the logits. The matmul has to write all N V of them before this kernel reads them, and they have
to fit: N V b bytes are 10 GB for 32768 rows of 151936 logits in bfloat16.
"""

import math
import sys

import torch
import triton
import triton.language as tl

from against_float64 import show

SPLIT = 512  # logits of a piece


@triton.jit
def finite_or_zero(m):
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def split_kernel(logits, p_m, p_s, n_rows, vocab, stride_row, c, SPLIT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    col = split * SPLIT + tl.arange(0, SPLIT)
    z = tl.load(logits + row * stride_row + col, mask=col < vocab, other=float("-inf")).to(tl.float32)
    m = tl.max(z, 0)
    tl.store(p_m + split * n_rows + row, m)
    tl.store(p_s + split * n_rows + row, tl.sum(tl.exp2((z - finite_or_zero(m)) * c), 0))


@triton.jit
def merge(m_a, s_a, m_b, s_b, c):
    """Two pieces of the same rows as one."""
    m = tl.maximum(m_a, m_b)
    shift = finite_or_zero(m)
    return m, s_a * tl.exp2((m_a - shift) * c) + s_b * tl.exp2((m_b - shift) * c)


@triton.jit
def combine_kernel(p_m, p_s, out, n_rows, n_splits, c, alpha, BLOCK_N: tl.constexpr):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = row < n_rows
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    for split in range(n_splits):
        o = split * n_rows + row
        b_m = tl.load(p_m + o, mask=m_row, other=float("-inf"))
        b_s = tl.load(p_s + o, mask=m_row, other=0.0)
        m, s = merge(m, s, b_m, b_s, c)
    tl.store(out + row, m / alpha + tl.log(s), mask=m_row)


def combine(p_m: torch.Tensor, p_s: torch.Tensor, c: float, alpha: float) -> torch.Tensor:
    """Partials (splits, N) -> (N,) float32."""
    splits, n = p_m.shape
    out = torch.empty(n, device=p_m.device)
    combine_kernel[(triton.cdiv(n, 16),)](p_m, p_s, out, n, splits, c, alpha, BLOCK_N=16)
    return out


def lse(logits: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """(N, V) -> (N,) float32: the log-sum-exp of logits / alpha."""
    (n, vocab), c = logits.shape, math.log2(math.e) / alpha
    p_m, p_s = torch.empty(2, triton.cdiv(vocab, SPLIT), n, device=logits.device)
    split_kernel[n, len(p_m)](logits, p_m, p_s, n, vocab, logits.stride(0), c, SPLIT=SPLIT)
    return combine(p_m, p_s, c, alpha)


def bytes_moved(n: int, vocab: int) -> int:
    """Logits as in step 3; two float32 a piece, written and read."""
    return 2 * n * vocab * 2 + 2 * 8 * n * triton.cdiv(vocab, SPLIT)


def programs(n: int, vocab: int) -> int:
    return n * triton.cdiv(vocab, SPLIT)


if __name__ == "__main__":
    show(sys.modules[__name__])
