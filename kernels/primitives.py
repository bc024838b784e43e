"""The maths that every kernel shares: the head's last step, and log-sum-exp in pieces.

A piece is a part of a row. It is summarised relative to its largest logit m, which keeps the unit of z and so is exact.
c = log2(e) / alpha turns a difference of logits into an exponent of 2:

    m = max z      s = sum 2^((z - m) c)      t = sum 2^((z - m) c) (z - m) c      u = sum 2^-32 z

Two pieces merge into one of the same form (`merge`). The statistics of the whole row, in nats, are

    lse     = m / alpha + ln s
    entropy = ln s - (t / s) ln 2
    mean    = 2^32 u / V
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
NO_TARGET = tl.constexpr(-100)
# 2^-256 is 0 in fp32. Exponents are clamped here before they multiply a weight, which avoids 0 * -inf.
UNDERFLOW = tl.constexpr(-256.0)
# Scale of the sum behind the logit mean. Without it, words masked with their dtype's lowest number would overflow the
# sum. A power of two keeps every bit of logits above 1e-28 in size.
SUM_SCALE = tl.constexpr(2.0**-32)
NEG_INF = tl.constexpr(float("-inf"))


class Head(NamedTuple):
    """The steps after the head's matmul: z = softcap * tanh(logit_scale * (product + bias) / softcap)."""

    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def numbers(self) -> tuple[float, float]:
        return self.logit_scale, self.softcap or 0.0

    def flags(self) -> dict[str, bool]:
        return {
            "HAS_BIAS": self.bias is not None,
            "HAS_SCALE": self.logit_scale != 1.0,
            "HAS_SOFTCAP": self.softcap is not None,
        }


PLAIN_HEAD = Head()


def exp2_scale(alpha: float | torch.Tensor) -> float | torch.Tensor:
    """Return c of the formulas above, rounded once, on the host. Temperatures (N,) stay what they are: see `scale_of`.

    A kernel's argument c is thus a number, or a pointer to the temperatures of rows. Triton compiles it for each.
    """
    if not isinstance(alpha, float) and isinstance(alpha, torch.Tensor):  # the first of these takes a third of the time
        return alpha
    return math.log2(math.e) / alpha


@triton.jit
def scale_of(c, row, m_row, ALPHAS: tl.constexpr):
    """Return c of rows: the number c or, with ALPHAS, log2(e) / alpha from temperatures that c points to."""
    if ALPHAS:
        c = LOG2E / tl.load(c + row, mask=m_row, other=1.0)
    return c


@triton.jit
def alpha_of(alpha, row, m_row, ALPHAS: tl.constexpr):
    """Return the temperature of rows: the number alpha or, with ALPHAS, one for each that alpha points to."""
    if ALPHAS:
        alpha = tl.load(alpha + row, mask=m_row, other=1.0)
    return alpha


@triton.jit
def apply_head(
    z, b_bias, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """Return softcap * tanh(logit_scale * (z + bias) / softcap); each step runs only if its flag is set."""
    if HAS_BIAS:
        z += b_bias
    if HAS_SCALE:
        z *= logit_scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z * (1.0 / softcap))  # one division per program instead of one per logit
    return z


@triton.jit
def tanh(x):
    """Return tanh(x), accurate to 2 units in the last place.

    libdevice's tanh exists neither in the interpreter nor on every target. 1 - 2 / (e^2x + 1) loses digits near 0; the
    polynomial of Cephes' tanhf (S. Moshier) replaces it there.
    """
    y = x * x
    near = -5.70498872745e-3
    near = near * y + 2.06390887954e-2
    near = near * y - 5.37397155531e-2
    near = near * y + 1.33314422036e-1
    near = near * y - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * y * near, far)


@triton.jit
def finite_or_zero(m):
    """Return the shift to subtract: m, or 0 where m is -inf. Then -inf - shift stays -inf."""
    return tl.where(m == NEG_INF, 0.0, m)


@triton.jit
def weight_and_exponent(z, shift, c):
    """Return the weight 2^((z - shift) c) and its exponent, clamped where the weight is 0. The weight keeps a NaN."""
    d = (z - shift) * c
    return tl.exp2(d), tl.maximum(d, UNDERFLOW)


@triton.jit
def merge(m_a, s_a, t_a, m_b, s_b, t_b, c, ENTROPY: tl.constexpr):
    """Merge two pieces (m, s, t) of the same rows into one."""
    m = tl.maximum(m_a, m_b)
    shift = finite_or_zero(m)
    w_a, d_a = weight_and_exponent(m_a, shift, c)
    w_b, d_b = weight_and_exponent(m_b, shift, c)
    s = s_a * w_a + s_b * w_b
    t = t_a
    if ENTROPY:
        t = w_a * (t_a + s_a * d_a) + w_b * (t_b + s_b * d_b)
    return m, s, t
