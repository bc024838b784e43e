"""A policy and a reference for the tests of the losses."""

import torch

from endoreward_fast.losses import reval_loss, tbrm_loss
from endoreward_fast.vocab import reference as oracle

B, T, D, V = 5, 9, 16, 70
BETA = 0.3
LOSSES = {"reval": reval_loss, "tbrm": tbrm_loss}


def case():
    """A policy's and a reference's hidden states and heads, and a mask with two turns and a row without any token."""
    torch.manual_seed(0)
    heads = [(torch.randn(B, T, D), torch.randn(V, D) * 2 / D**0.5) for _ in range(2)]
    tokens = torch.randint(0, V, (B, T))
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 3:], mask[1, 1:6], mask[2, 8] = True, True, True
    mask[3, 2:4] = mask[3, 6:8] = True  # two turns
    terminal = torch.zeros_like(mask)
    terminal[0, 8] = terminal[3, 7] = True  # rows 1 and 2 are truncated
    return heads, tokens, mask, terminal, torch.tensor([1.0, 0.0, -0.5, 2.0, 9.0])


def exact(logits, tokens, mask, terminal, alpha=1.0):
    return oracle.token_rewards(logits, tokens, mask=mask, terminal=terminal, alpha=alpha, dtype=torch.float64)


def both(heads, dtype):
    """The logits of policy and reference."""
    return [(h.to(dtype) @ w.to(dtype).T).requires_grad_(n == 0) for n, (h, w) in enumerate(heads)]
