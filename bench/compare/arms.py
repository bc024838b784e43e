"""What is compared: each arm computes the negative log-likelihood of every row, and the entropy if it can.

Arms that take logits get hidden @ weight.T in the inputs' dtype, as their users compute it. That product is part of
their time and of their error.
"""

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import packages, peers
from bench.harness.peers import OURS, Inputs, Peer
from endoreward_fast import linear_token_rewards
from endoreward_fast.vocab.compiled import find_compiler


@dataclass(frozen=True)
class Arm:
    """A peer that gives "nll" or "nll, entropy"; `takes` is "hidden" or "logits".

    `interpreted` arms are Triton kernels that run in Triton's interpreter where there is no GPU: on few rows, and
    without a time. Vocabularies are cut at `largest`: our fused kernel has the tests' small tiles there, so it is slow.
    """

    peer: Peer
    takes: str = "hidden"
    interpreted: bool = False
    largest: int | None = None

    def statistics(self, i: Inputs) -> tuple[Tensor, Tensor | None]:
        """Return (nll (N,), entropy (N,) or None)."""
        if self.takes == "logits":
            i = replace(i, logits=i.hidden @ i.weight.T)
        got = self.peer.run(i)
        if self.peer.gives == "stats":
            return got[0] - got[1], None
        return (got, None) if self.peer.gives == "nll" else got


def _ours(impl: str, missing: str | None = None) -> Peer:
    return Peer(functools.partial(_rewards, impl), gives="nll, entropy", missing=missing)


def _rewards(impl: str, i: Inputs):
    """Token rewards of one sequence whose states are the rows: the state of token k + 1 is row k."""
    hidden = F.pad(i.hidden, (0, 0, 0, 1)).unsqueeze(0)  # the last token's state, which nothing needs
    tokens = F.pad(i.targets, (1, 0)).unsqueeze(0)
    out = linear_token_rewards(hidden, i.weight, tokens, softcap=i.shape.softcap, entropy=True, impl=impl)
    return -out.logprob[0, 1:], out.entropy[0, 1:]


def _eager(i: Inputs):
    log_p = F.log_softmax(i.logits.float(), -1)
    return -log_p.gather(1, i.targets.unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def _cross_entropy(i: Inputs) -> Tensor:
    return F.cross_entropy(i.logits, i.targets, reduction="none")


def arms(gpu: bool) -> dict[str, Arm]:
    """Return every arm for this kind of machine: torch, then packages, then ours."""
    return {name: arm(name, gpu) for name in (*torchs(), *PACKAGES, *ours(gpu))}


def arm(name: str, gpu: bool) -> Arm:
    """Return one arm; no other arm's package is imported."""
    if name not in PACKAGES:
        return (torchs() | ours(gpu))[name]
    takes, triton = PACKAGES[name]
    return Arm(packages.CALLS[name].peer(), takes, interpreted=triton and not gpu)


def torchs() -> dict[str, Arm]:
    linear = peers.peers("linear")
    return {
        "torch, log_softmax + gather": Arm(Peer(_eager, gives="nll, entropy"), "logits"),
        "torch, F.cross_entropy": Arm(Peer(_cross_entropy, gives="nll"), "logits"),
        "torch, F.linear_cross_entropy": Arm(linear["F.linear_cross_entropy"]),
        "torch, F.linear_cross_entropy, chunked": Arm(linear["F.linear_cross_entropy, chunked"]),
    }


def ours(gpu: bool) -> dict[str, Arm]:
    no_compiler = "runs on the CPU only" if gpu else None if find_compiler() else "needs a C++ compiler"
    return {
        f"{OURS}, reference": Arm(_ours("reference")),
        f"{OURS}, compiled": Arm(_ours("compiled", no_compiler)),
        f"{OURS}, chunked": Arm(_ours("chunked")),
        f"{OURS}, fused": Arm(_ours("fused"), interpreted=not gpu, largest=None if gpu else 1031),
    }


PACKAGES = {
    # name in packages.CALLS: (takes, whether it is a Triton kernel that the interpreter can run)
    "TRL, selective_log_softmax_and_entropy": ("logits", False),
    "TRL, one pass": ("logits", True),
    "TRL, chunked logprob, entropy": ("hidden", False),
    "liger-kernel": ("hidden", True),
    "liger-kernel, logits": ("logits", True),
    "liger-kernel, scaled, torch fallback": ("hidden", False),
    "liger-kernel, scaled, CuTe, entropy": ("hidden", False),
    "liger-kernel, scaled, cuTile, entropy": ("hidden", False),
    "cut-cross-entropy, unfiltered": ("hidden", True),
    "quack-kernels, store-free": ("hidden", False),
    "quack-kernels, logits": ("logits", False),
    "verl": ("hidden", False),
}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
