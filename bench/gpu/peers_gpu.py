"""The peers on a GPU, by subject: torch, every package that computes the same numbers, and ours.

    subject                   what is computed                                    baseline
    linear                    statistics from hidden states                       torch.mm
    linear entropy            the same with the entropy                           torch.mm
    linear forward+backward   the same with gradients of hidden and weight        the three matmuls that it needs
    linear masked             statistics of a batch that is 80% prompt            the same batch without a mask
    linear rewards            token rewards from hidden states                    statistics of the same rows
    linear search             statistics under every candidate config             torch.mm
    logits, logits entropy    statistics from stored logits                       a device-to-device copy
    logits backward           gradient of the logits, without the forward         a device-to-device copy
    logits rewards            token rewards from stored logits                    statistics of the same rows

The adapters of packages are in bench/harness/packages.py, with the versions that they were checked against.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import rewards
from bench.gpu.gradients import logits_gradient, matmuls, with_gradients
from bench.gpu.rewards import ours_linear
from bench.harness import packages
from bench.harness import peers as torch_peers
from bench.harness.peers import BARE_MATMUL, DEVICE_COPY, LOGSUMEXP, OURS, THREE_MATMULS, Inputs, Peer
from endoreward_fast import linear_vocab_stats, vocab_stats

OURS_AUTO, OURS_FUSED, OURS_CHUNKED = (f"{OURS}, {impl}" for impl in ("auto", "fused", "chunked"))
FOUR_MATMULS = "four bare matmuls"
IMPLS = {OURS_AUTO: "auto", OURS_CHUNKED: "chunked", OURS_FUSED: "fused"}
LINEAR_PACKAGES = (
    *("liger-kernel", "liger-kernel, scaled, CuTe", "liger-kernel, scaled, cuTile", "cut-cross-entropy, unfiltered"),
    *("TRL, chunked logprob", "verl", "quack-kernels, logits stored", "quack-kernels, store-free"),
)
ENTROPY_PACKAGES = (
    *("liger-kernel, scaled, CuTe, entropy", "liger-kernel, scaled, cuTile, entropy"),
    *("TRL, chunked logprob, entropy", "verl"),
)
SUMMED_PACKAGES = ("liger-kernel, summed", "quack-kernels, scaled exp, summed")
FORWARD_ONLY = ("quack-kernels, store-free",)


def peers(subject: str) -> dict[str, Peer]:
    """Return every peer of a subject. The first is the baseline of all ratios, the last is ours."""
    return MAKERS[subject]()


# ------------------------------------------------------------------------------------------------ from hidden states


def _linear() -> dict[str, Peer]:
    alike = torch_peers.peers("linear")
    return {
        BARE_MATMUL: _bare(),
        "eager": replace(alike["eager"], bytes_per_logit=6),  # logits, and the temporaries of logsumexp
        "torch.compile": replace(alike["torch.compile"], bytes_per_logit=2),
        "F.linear_cross_entropy": replace(alike["F.linear_cross_entropy"], bytes_per_logit=6),
        "F.linear_cross_entropy, chunked": alike["F.linear_cross_entropy, chunked"],
        **packages.peers(*LINEAR_PACKAGES),
        **{name: Peer(functools.partial(ours_linear, impl)) for name, impl in IMPLS.items()},
    }


def _bare() -> Peer:
    return Peer(lambda i: torch.mm(i.hidden, i.weight.T), gives="nothing", bytes_per_logit=2)


def _linear_entropy() -> dict[str, Peer]:
    return {
        BARE_MATMUL: _bare(),
        "eager": Peer(_eager_entropy, bytes_per_logit=8),
        **packages.peers(*ENTROPY_PACKAGES),
        **{name: Peer(functools.partial(_ours_entropy, impl)) for name, impl in IMPLS.items()},
    }


def _eager_entropy(i: Inputs):
    logits = i.hidden @ i.weight.T
    return _entropy_of(
        logits if i.shape.softcap is None else torch.tanh(logits / i.shape.softcap) * i.shape.softcap, i.targets
    )


def _ours_entropy(impl: str, i: Inputs):
    out = linear_vocab_stats(i.hidden, i.weight, i.targets, softcap=i.shape.softcap, entropy=True, impl=impl)
    return out.lse, out.target_logit, out.entropy


def _search() -> dict[str, Peer]:
    """The linear kernel under every candidate config. The results fill the static config table."""
    from endoreward_fast.kernels.config import LINEAR_SEARCH

    def name(c):
        grid = f", {c.persistent} persistent" if c.persistent else ""
        return f"{OURS}, {c.block_n}x{c.block_v}x{c.block_d}/{c.num_stages} {c.num_warps} warps, group {c.group}{grid}"

    missing = None
    if torch.cuda.is_available() and (torch.version.hip or torch.cuda.get_device_capability()[0] not in (9, 10)):
        missing = "the candidates are for Hopper and data-centre Blackwell"
    ours = {name(c): Peer(functools.partial(_under, c), missing=missing) for c in LINEAR_SEARCH}
    return {BARE_MATMUL: _bare()} | ours


def _under(config, i: Inputs):
    from endoreward_fast.vocab import fused

    stats, _ = fused.linear_forward(
        i.hidden, i.weight, i.targets, bias=None, logit_scale=1.0, softcap=i.shape.softcap, alpha=1.0, entropy=False,
        logit_mean=False, config=config,
    )  # fmt: skip
    return stats.lse, stats.target_logit


def _training() -> dict[str, Peer]:
    """Forward and backward together, through autograd for every peer. Some give the gradients of a sum only."""
    forward = _linear()
    timed = {name: peer for name, peer in forward.items() if name not in (BARE_MATMUL, *FORWARD_ONLY, *IMPLS)}
    timed |= packages.peers(*SUMMED_PACKAGES) | {name: forward[name] for name in IMPLS}
    return {
        THREE_MATMULS: matmuls(3),
        FOUR_MATMULS: matmuls(4),
        **{name: with_gradients(peer) for name, peer in timed.items()},
    }


def _masked() -> dict[str, Peer]:
    return rewards.masked({name: IMPLS[name] for name in (OURS_FUSED, OURS_CHUNKED)})


# ------------------------------------------------------------------------------------------------ from logits


def _logits() -> dict[str, Peer]:
    alike = torch_peers.peers("logits")
    return {
        DEVICE_COPY: Peer(_copy, gives="nothing", in_two_steps=True, bytes_per_logit=2),
        LOGSUMEXP: replace(alike[LOGSUMEXP], bytes_per_logit=4),
        "log_softmax + gather": replace(alike["log_softmax + gather"], bytes_per_logit=4),
        "torch.compile": alike["torch.compile"],
        **packages.peers("liger-kernel, logits", "quack-kernels, logits"),
        **{name: Peer(functools.partial(_ours_logits, impl, False)) for name, impl in IMPLS.items()},
    }


def _copy(i: Inputs) -> Callable:
    out = torch.empty_like(i.logits)
    return lambda: out.copy_(i.logits)


def _ours_logits(impl: str, entropy: bool, i: Inputs):
    stats = vocab_stats(i.logits, i.targets, entropy=entropy, impl=impl)
    return (stats.lse, stats.target_logit, stats.entropy) if entropy else (stats.lse, stats.target_logit)


def _entropy() -> dict[str, Peer]:
    return {
        DEVICE_COPY: _logits()[DEVICE_COPY],
        "eager": Peer(lambda i: _entropy_of(i.logits, i.targets), bytes_per_logit=8),
        "torch.compile": Peer(lambda i: torch_peers.compiled(_entropy_of)(i.logits, i.targets)),
        **packages.peers("TRL, one pass"),
        **{name: Peer(functools.partial(_ours_logits, impl, True)) for name, impl in IMPLS.items()},
    }


def _entropy_of(logits: Tensor, targets: Tensor):
    log_p = F.log_softmax(logits, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.logsumexp(logits, -1), logits.gather(1, targets.unsqueeze(1)).squeeze(1), entropy


def _logits_backward() -> dict[str, Peer]:
    """The backward alone. The forward runs once, before the timing."""
    alike = _logits()
    name = "liger-kernel, logits"
    liger = replace(alike.pop(name), missing="writes its gradient over the caller's logits, in the forward")
    copy = alike.pop(DEVICE_COPY)
    return {DEVICE_COPY: copy, name: liger, **{name: logits_gradient(peer) for name, peer in alike.items()}}


MAKERS = {
    "linear": _linear,
    "linear entropy": _linear_entropy,
    "linear forward+backward": _training,
    "linear masked": _masked,
    "linear rewards": rewards.linear_rewards,
    "linear search": _search,
    "logits": _logits,
    "logits entropy": _entropy,
    "logits backward": _logits_backward,
    "logits rewards": rewards.logits_rewards,
}
SUBJECTS = tuple(MAKERS)
