"""What every step of the walk is measured with: easy and hard logits, and the difference from float64.

A case is a set of hidden states, a head's weight and its bias. Steps 1 to 4 read the logits that these make, and step 5
makes them itself.
"""

import os
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

# 1571 is GPT-2's vocabulary of 50257 divided by 32. It is no multiple of any tile, so every step has a ragged last one.
N, VOCAB, DIM = 17, 1571, 40
MANY, FEW, REAL_VOCAB = 32768, 32, 151936  # rows of a training batch, rows of a small one, the vocabulary of Qwen3
PROCESSORS = 132  # streaming multiprocessors of an H100 or H200
CASES = {  # name: (offset of every logit, which words are -inf)
    "ordinary": (0.0, slice(0)),
    "near +100": (100.0, slice(0)),
    "near -10000": (-10000.0, slice(0)),
    "every third is -inf": (0.0, slice(0, None, 3)),
    "the first 1024 are -inf": (0.0, slice(1024)),
    "all are -inf": (0.0, slice(None)),
}


def device() -> str:
    """A GPU if there is one, else the CPU, on which Triton kernels run only in its interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("no GPU found: set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter on the CPU")
    return "cpu"


def inputs(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), weight (V, D), bias (V,), float32; the logits are hidden @ weight.T + bias."""
    seed = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, DIM, generator=seed)
    weight = torch.randn(VOCAB, DIM, generator=seed) / DIM**0.5
    offset, dead = CASES[case]
    bias = torch.full((VOCAB,), offset)
    bias[dead] = -torch.inf
    return hidden.to(device()), weight.to(device()), bias.to(device())


def compute(lse: Callable[..., Tensor], case: str, from_hidden: bool = False) -> tuple[Tensor, Tensor]:
    """A step's log-sum-exp of each row (N,), and that of the same inputs in float64."""
    hidden, weight, bias = inputs(case)
    logits = hidden @ weight.T + bias
    with np.errstate(all="ignore"):  # the interpreter computes with NumPy, which warns of inf and NaN
        ours = lse(hidden, weight, bias) if from_hidden else lse(logits)
    exact = hidden.double() @ weight.double().T + bias.double() if from_hidden else logits.double()
    return ours, torch.logsumexp(exact, -1)


def show(step: ModuleType, from_hidden: bool = False) -> None:
    """Print a step's name, its largest difference from float64 in each case, and its costs by formula."""
    print((step.__doc__ or "").partition("\n")[0])
    for case in CASES:
        ours, exact = compute(step.lse, case, from_hidden)
        difference = torch.where(ours == exact, 0.0, (ours - exact).abs()).max().item()
        print(f"  {case:24} lse {exact[0]:12.4f}  found {ours[0]:12.4f}  largest difference {difference:.1e}")
    moved, programs = step.bytes_moved(MANY, REAL_VOCAB) / 1e9, step.programs(FEW, REAL_VOCAB)
    print(f"  logits and partials moved, N = {MANY}, V = {REAL_VOCAB}, bfloat16: {moved:.2f} GB")
    print(f"  programs, N = {FEW}, V = {REAL_VOCAB}: {programs}, for the {PROCESSORS} processors of an H100")
