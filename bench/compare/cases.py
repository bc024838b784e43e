"""Inputs on which accuracy is compared, with statistics and gradients in float64."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.harness.peers import Inputs
from bench.harness.shapes import Shape

HIDDEN = 128
ROWS, INTERPRETED_ROWS = 16, 4


@dataclass(frozen=True)
class Case:
    """Logits with this standard deviation around `offset`; `peaked` makes every other target the likeliest token."""

    name: str
    vocab: int
    spread: float = 3.0
    offset: float = 0.0
    peaked: bool = False


CASES = (
    Case("normal", 4096),
    Case("peaked", 4096, spread=30.0, peaked=True),
    Case("offset 1e4", 4096, offset=1e4),
    Case("all negative", 50257, offset=-200.0),
    Case("V = 50257", 50257),
    Case("V = 151669", 151669),
)


@dataclass(frozen=True)
class Truth:
    """float64: nll (N,), entropy (N,), and the gradients of sum(upstream * nll) in hidden and weight."""

    nll: Tensor
    entropy: Tensor
    dhidden: Tensor
    dweight: Tensor


def make(case: Case, dtype: torch.dtype, rows: int, device: torch.device, hidden: int = HIDDEN) -> Inputs:
    """Make inputs. The offset comes from one more component that all hidden states and all weights share."""
    on = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    states = torch.randn(ROWS, hidden, **on)[:rows]
    weight = torch.randn(case.vocab, hidden, **on) * (case.spread / (hidden - 1) ** 0.5)
    size = math.sqrt(abs(case.offset))
    states[:, 0], weight[:, 0] = size, math.copysign(size, case.offset)
    states, weight = states.to(dtype), weight.to(dtype)
    targets = torch.randint(0, case.vocab, (ROWS,), **on)[:rows]
    upstream = torch.rand(ROWS, **on)[:rows] + 0.5
    if case.peaked:
        targets[::2] = (states.double() @ weight.double().T).argmax(1)[::2]
    return Inputs(Shape(case.name, hidden, case.vocab), targets, upstream, hidden=states, weight=weight)


def truth(i: Inputs) -> Truth:
    hidden, weight = i.hidden.double(), i.weight.double()
    log_p = torch.log_softmax(hidden @ weight.T, -1)
    at = torch.arange(len(i.targets), device=log_p.device), i.targets
    dlogits = log_p.exp()
    entropy = -(dlogits * log_p).sum(-1)
    dlogits[at] -= 1.0
    dlogits *= i.upstream.double().unsqueeze(1)
    return Truth(-log_p[at], entropy, dlogits @ weight, dlogits.T @ hidden)


def some_rows(i: Inputs, rows: Tensor) -> Inputs:
    return replace(i, hidden=i.hidden[rows], targets=i.targets[rows], upstream=i.upstream[rows])
