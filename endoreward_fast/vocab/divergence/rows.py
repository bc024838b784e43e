"""What the implementations of the divergence share: a row's statistics and the factors of its gradient.

p and q are the two distributions, softmax(z / alpha) of each. With log p = (z_p - shift_p) / alpha - log_total_p, and
g the upstream gradient of the row:

    KL(p || q)   dz_p = g p (log(p / q) - KL) / alpha                  dz_q = g (q - p) / alpha
    JSD(beta)    dz_p = g beta p (log(p / m) - KL(p || m)) / alpha
                 dz_q = g (1 - beta) q (log(q / m) - KL(q || m)) / alpha
"""

from typing import NamedTuple

import torch
from torch import Tensor

LOWEST = -1e38
"""stands for -inf in an exponent of 2: its weight is 0, and the difference of two exponents is finite"""


class Stats(NamedTuple):
    """Statistics of N rows, each (N,) float32. Rows without a gradient have zeros that give a gradient of 0."""

    divergence: Tensor
    shift_p: Tensor
    """max z_p; 0 for a row that is all -inf"""
    log_total_p: Tensor
    """ln sum exp((z_p - shift_p) / alpha); 0 for a row that is all -inf"""
    shift_q: Tensor
    log_total_q: Tensor
    mean_p: Tensor
    """KL(p || q), or KL(p || m) with beta; 0 where the divergence is infinite"""
    mean_q: Tensor
    """KL(q || m) with beta, else 0"""
    live: Tensor
    """1 if the row has a gradient: its divergence is finite, and neither of its rows is all -inf; else 0"""

    def upstream(self, g: Tensor) -> Tensor:
        """Return the upstream gradients g (N,), 0 in rows without a gradient."""
        return torch.where(self.live != 0, g, 0.0)


class Head(NamedTuple):
    """A head and its hidden states (N, D). z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
