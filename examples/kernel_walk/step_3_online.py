"""Step 3, online: one read, and the sum is rescaled whenever a larger logit turns up.

What was wrong with step 2: two reads. The pair (m, s) describes the part of the row that has been read, relative to the
largest logit seen so far. When a tile raises the maximum from m to m', the old sum is worth s exp(m - m').

Two more changes. The temperature alpha comes in, and exp becomes exp2, the instruction that the hardware has: with
c = log2(e) / alpha worked out once, exp((z - m) / alpha) = 2^((z - m) c). And as long as every logit read is -inf, the
shift is 0 instead of m, because (-inf) - (-inf) is NaN, and (-inf) - 0 is the -inf that is wanted.

What is wrong with it: a row is one program's work, whatever its length. With 32 rows an H100 uses 32 of its 132
processors.
"""

import math
import sys

import torch
import triton
import triton.language as tl

from against_float64 import show

BLOCK_V = 512


@triton.jit
def online_kernel(logits, out, vocab, stride_row, c, alpha, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m = float("-inf")
    s = 0.0
    for o_v in range(0, vocab, BLOCK_V):
        col = o_v + tl.arange(0, BLOCK_V)
        z = tl.load(logits + row * stride_row + col, mask=col < vocab, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(z, 0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        s = s * tl.exp2((m - shift) * c) + tl.sum(tl.exp2((z - shift) * c), 0)
        m = m_new
    tl.store(out + row, m / alpha + tl.log(s))


def lse(logits: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """(N, V) -> (N,) float32: the log-sum-exp of logits / alpha."""
    out, c = torch.empty(len(logits), device=logits.device), math.log2(math.e) / alpha
    online_kernel[(len(logits),)](logits, out, logits.shape[1], logits.stride(0), c, alpha, BLOCK_V=BLOCK_V)
    return out


def bytes_moved(n: int, vocab: int) -> int:
    """2 bytes a logit, written once and read once."""
    return 2 * n * vocab * 2


def programs(n: int, vocab: int) -> int:
    return n


if __name__ == "__main__":
    show(sys.modules[__name__])
