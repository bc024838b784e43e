r"""The oracle of the divergence of two vocabulary distributions, in plain eager torch. Autograd differentiates it.

With x = z / alpha, log p = x_p - lse(x_p) and log q = x_q - lse(x_q), per row and in nats:

    KL(p || q)       = sum_a p_a (log p_a - log q_a)
    JSD(beta)(p, q)  = beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q,   0 < beta < 1

Both are at least 0, and exactly 0 for equal rows. 0 log 0 = 0. A logit decides the support: a word with logit -inf has
probability 0, and any other word has a positive one, however small.

    KL   inf if q excludes a word that p does not; such a row has no gradient
    JSD  finite, at most the entropy of (beta, 1 - beta)

A row that is all -inf has probability 0 everywhere. It has no gradient, nor has the row that it is compared with.

Source: the generalised JSD of Agarwal et al., arXiv 2306.13649, in the form of TRL's and verl's code, which cite it.
"""

import math

import torch
from torch import Tensor

from ..reference import _only, final_logits


def divergence(p_logits, q_logits, *, mask=None, beta: float | None = None, alpha=1.0, dtype=torch.float32) -> Tensor:
    """Return KL(p || q), or JSD(beta) if `beta` is given, of logits (..., V): (...) in `dtype`, 0 off the mask."""
    log_p, p_has = _log_softmax(_only(mask, p_logits.to(dtype)) / alpha)
    log_q, q_has = _log_softmax(_only(mask, q_logits.to(dtype)) / alpha)
    p, q = torch.where(p_has, log_p.exp(), 0.0), torch.where(q_has, log_q.exp(), 0.0)
    if beta is None:
        out = torch.where(p_has, p * (log_p - log_q), 0.0).sum(-1)
        out = torch.where((p_has & ~q_has).any(-1), torch.inf, out)
    else:
        over_p, over_q = _logs_over_mixture(log_p, log_q, p_has, q_has, beta)
        out = (beta * p * over_p + (1 - beta) * q * over_q).sum(-1)
    out = torch.where(out < 0, out - out.detach(), out)  # rounding; the gradient stays
    either_dead = ~(p_has.any(-1) & q_has.any(-1))
    out = torch.where(either_dead, out.detach(), out)
    return out if mask is None else torch.where(mask, out, 0.0)


def linear_divergence(p: tuple, q: tuple, *, mask=None, beta=None, alpha=1.0, dtype=torch.float32) -> Tensor:
    """Compute `divergence` of two heads, each (hidden (..., D), weight (V, D), bias, logit_scale, softcap)."""
    logits = (
        final_logits(
            _only(mask, hidden), weight, bias=bias, logit_scale=logit_scale, softcap=softcap, dtype=dtype
        )
        for hidden, weight, bias, logit_scale, softcap in (p, q)
    )  # fmt: skip
    return divergence(*logits, mask=mask, beta=beta, alpha=alpha, dtype=dtype)


def _log_softmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log softmax(x), with 0 in place of -inf, and which words have a probability above 0."""
    has = x != -torch.inf
    top = torch.where(has, x, torch.finfo(x.dtype).min).amax(-1, keepdim=True).detach()
    shifted = torch.where(has, x - top, 0.0)
    total = torch.where(has, shifted.exp(), 0.0).sum(-1, keepdim=True)
    dead = ~has.any(-1, keepdim=True)
    log = shifted - torch.where(dead, 1.0, total).log()
    return torch.where(has, log, 0.0), has


def _logs_over_mixture(log_p, log_q, p_has, q_has, beta: float) -> tuple[Tensor, Tensor]:
    """Return log(p / m) and log(q / m), without the cancellation that a rounded log m would bring.

    With u = log(q / p) <= 0, log(p / m) = -log(1 + (1 - beta) (e^u - 1)); if u > 0, p and q change roles.
    """
    u = log_q - log_p
    q_below, p_below = u.clamp(max=0.0), (-u).clamp(max=0.0)
    p_over = -torch.log1p((1 - beta) * torch.expm1(q_below))
    q_over = -torch.log1p(beta * torch.expm1(p_below))
    over_p = torch.where(u <= 0, p_over, p_below + q_over)
    over_q = torch.where(u <= 0, q_below + p_over, q_over)
    return torch.where(q_has, over_p, -math.log(beta)), torch.where(p_has, over_q, -math.log1p(-beta))
