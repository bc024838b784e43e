"""Step 1, naive: lse = log(sum(exp(z))), one program for each row.

One loop over the vocabulary, one read of each logit. The last tile reaches beyond the vocabulary; a logit that is not
there is loaded as -inf, which adds exp(-inf) = 0 to the sum. (Loaded as 0 it would add exp(0) = 1.)

What is wrong with it: exp overflows float32 above 88.7, so logits near +100 give inf. Below -104 it is 0, so a row in
which every logit is smaller gives -inf. Softmax probabilities do not change with a common offset, and this sum does.
"""

import sys

import torch
import triton
import triton.language as tl

from against_float64 import show

BLOCK_V = 512


@triton.jit
def naive_kernel(logits, out, vocab, stride_row, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # row * stride_row passes 2^31 at 14135 rows of 151936 logits
    s = 0.0
    for o_v in range(0, vocab, BLOCK_V):
        col = o_v + tl.arange(0, BLOCK_V)
        z = tl.load(logits + row * stride_row + col, mask=col < vocab, other=float("-inf"))
        s += tl.sum(tl.exp(z.to(tl.float32)), 0)
    tl.store(out + row, tl.log(s))


def lse(logits: torch.Tensor) -> torch.Tensor:
    """(N, V) -> (N,) float32."""
    out = torch.empty(len(logits), device=logits.device)
    naive_kernel[(len(logits),)](logits, out, logits.shape[1], logits.stride(0), BLOCK_V=BLOCK_V)
    return out


def bytes_moved(n: int, vocab: int) -> int:
    """The matmul before this kernel writes 2 bytes a logit, and the kernel reads them."""
    return 2 * n * vocab * 2


def programs(n: int, vocab: int) -> int:
    return n


if __name__ == "__main__":
    show(sys.modules[__name__])
