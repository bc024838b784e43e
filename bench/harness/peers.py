"""The implementations that ours is compared with, one adapter each. `Peer.gives` says what an adapter returns.

A peer that cannot run here is reported with the reason.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.shapes import Shape
from endoreward_fast import linear_vocab_stats, vocab_stats
from endoreward_fast.functional import Impl
from endoreward_fast.vocab.compiled import find_compiler

OURS = "endoreward_fast"
OURS_COMPILED = "endoreward_fast, compiled"
BARE_MATMUL = "bare matmul"
LOGSUMEXP = "logsumexp + gather"
THREE_MATMULS = "three bare matmuls"
DEVICE_COPY = "device copy"
SUBJECTS = ("linear", "logits")


@dataclass(frozen=True)
class Inputs:
    """hidden (N, D) and weight (V, D), or logits (N, V); targets (N,).

    upstream (N,) is the gradient of each row's negative log-likelihood. mask (N,) bool marks the rows to compute.
    """

    shape: Shape
    targets: Tensor
    upstream: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None
    logits: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Peer:
    """One implementation. `gives` says what `run` returns:

    "nothing"            nothing that is checked
    "stats"              lse, target_logit and, optionally, entropy
    "nll"                lse - target_logit
    "nll, entropy"       both
    "summed nll"         the sum of nll over all rows
    "rewards"            nll, reward
    "gradients"          nll, gradients of hidden and weight
    "summed gradients"   summed nll, its gradients of hidden and weight
    "logits gradient"    gradient of the logits
    """

    run: Callable[[Inputs], object]
    gives: str = "stats"
    missing: str | None = None  # why it cannot run here
    obstacle: Callable[[Inputs], str | None] = lambda inputs: None  # why it cannot run on these inputs
    bytes_per_logit: float = 0.0  # device memory at its peak; a peer that does not fit is skipped with the reason
    in_two_steps: bool = False  # run returns the call to time; what run itself does (a forward, say) is not timed

    def prepare(self, inputs: Inputs) -> Callable[[], object]:
        return self.run(inputs) if self.in_two_steps else functools.partial(self.run, inputs)


def make_inputs(
    subject: str, shape: Shape, rows: int, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
) -> Inputs:
    """Make random inputs whose logits have a standard deviation of about 3, as in trained models."""
    generator = torch.Generator(device).manual_seed(seed)
    on = {"generator": generator, "device": device}
    targets = torch.randint(0, shape.vocab, (rows,), **on)
    inputs = Inputs(shape, targets, upstream=torch.rand(rows, **on) + 0.5)
    if subject.startswith("logits"):
        logits = torch.empty(rows, shape.vocab, dtype=dtype, device=device)
        for part in logits.split(1024):
            part.copy_(torch.randn(part.shape, **on).mul_(3.0))
        return replace(inputs, logits=logits)
    hidden = torch.randn(rows, shape.hidden, **on).to(dtype)
    weight = torch.empty(shape.vocab, shape.hidden, dtype=dtype, device=device)
    for part in weight.split(
        16384
    ):  # in parts, because a float32 copy of the whole weight takes up to twice its memory
        part.copy_(torch.randn(part.shape, **on).mul_(3.0 / shape.hidden**0.5))
    mask = completion_mask(rows).to(device) if subject == "linear masked" else None
    return replace(inputs, hidden=hidden, weight=weight, mask=mask)


def completion_mask(rows: int) -> Tensor:
    """Return an (N,) bool mask with the last fifth of each sequence on. Sequences have at most 2048 tokens."""
    length = min(rows, 2048)
    return torch.arange(rows) % length >= length - length // 5


def peers(subject: str, gpu: bool = False) -> dict[str, Peer]:
    """Return every peer of a subject. The first is the baseline of all ratios, the last is ours."""
    if gpu:
        from bench.gpu import peers_gpu

        return peers_gpu.peers(subject)
    if subject == "linear":
        return {
            BARE_MATMUL: Peer(lambda i: i.hidden @ i.weight.T, gives="nothing"),
            "eager": Peer(_eager_linear),
            "torch.compile": _compiled(linear_stats, lambda i: (i.hidden, i.weight, i.targets, i.shape.softcap)),
            "F.linear_cross_entropy": _linear_cross_entropy(chunked=False),
            "F.linear_cross_entropy, chunked": _linear_cross_entropy(chunked=True),
            OURS_COMPILED: Peer(functools.partial(_ours_linear, impl="compiled"), missing=_no_compiler()),
            OURS: Peer(_ours_linear),
        }
    return {
        LOGSUMEXP: Peer(lambda i: stats(i.logits, i.targets)),
        "log_softmax + gather": Peer(_log_softmax, gives="nll"),
        "torch.compile": _compiled(stats, lambda i: (i.logits, i.targets)),
        OURS_COMPILED: Peer(functools.partial(_ours_logits, impl="compiled"), missing=_no_compiler()),
        OURS: Peer(_ours_logits),
    }


def no_softcap(i: Inputs) -> str | None:
    return None if i.shape.softcap is None else "has no softcap"


def _no_compiler() -> str | None:
    return None if find_compiler() else "needs a C++ compiler, and there is none"


def _ours_linear(i: Inputs, impl: Impl = "chunked"):
    out = linear_vocab_stats(i.hidden, i.weight, i.targets, softcap=i.shape.softcap, impl=impl)
    return out.lse, out.target_logit


def _ours_logits(i: Inputs, impl: Impl = "chunked"):
    out = vocab_stats(i.logits, i.targets, impl=impl)
    return out.lse, out.target_logit


def stats(logits: Tensor, targets: Tensor):
    return torch.logsumexp(logits, -1), logits.gather(1, targets.unsqueeze(1)).squeeze(1)


def linear_stats(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None):
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return stats(logits, targets)


def _eager_linear(i: Inputs):
    return linear_stats(i.hidden, i.weight, i.targets, i.shape.softcap)


def _log_softmax(i: Inputs):
    return -torch.log_softmax(i.logits, -1).gather(1, i.targets.unsqueeze(1)).squeeze(1)


def _compiled(function: Callable, arguments: Callable[[Inputs], tuple]) -> Peer:
    return Peer(lambda i: compiled(function)(*arguments(i)))


@functools.cache  # compile at the first use, because loading the compiler takes seconds
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def _linear_cross_entropy(chunked: bool) -> Peer:
    """Adapt torch's function. It gives the negative log-likelihood only, and stores the logits unless chunked."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if not hasattr(F, "linear_cross_entropy") or (chunked and options is None):
        return Peer(lambda i: None, missing=f"torch {torch.__version__} does not have it")
    how = {"reduction": "none"} | ({"options": options()} if chunked else {})
    return Peer(
        lambda i: F.linear_cross_entropy(i.hidden, i.weight, i.targets, **how), gives="nll", obstacle=no_softcap
    )
