"""The peers on a GPU, by subject: torch, every package that computes the same numbers, and ours.

    subject                   what is computed                                    baseline
    linear                    statistics from hidden states                       torch.mm
    linear forward+backward   the same with gradients of hidden and weight        the three matmuls that it needs
    linear masked             statistics of a batch that is 80% prompt            the same batch without a mask
    linear rewards            token rewards from hidden states                    statistics of the same rows
    linear search             statistics under every candidate config             torch.mm
    logits, logits entropy    statistics from stored logits                       a device-to-device copy
    logits backward           gradient of the logits, without the forward         a device-to-device copy
    logits rewards            token rewards from stored logits                    statistics of the same rows

The adapters follow the interfaces of liger-kernel 0.8, cut-cross-entropy 25.1, trl 1.16 and quack-kernels 0.6.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import peers as torch_peers
from bench.harness.peers import BARE_MATMUL, DEVICE_COPY, LOGSUMEXP, OURS, THREE_MATMULS, Inputs, Peer
from endoreward_fast import linear_token_rewards, linear_vocab_stats, token_rewards, vocab_stats
from endoreward_fast.vocab.plan import plan_rows

OURS_FUSED, OURS_CHUNKED = f"{OURS}, fused", f"{OURS}, chunked"
FOUR_MATMULS = "four bare matmuls"
STATISTICS_ALONE, TOKEN_REWARDS = f"{OURS}, statistics alone", f"{OURS}, token rewards"
SUBJECTS = (
    *("linear", "linear forward+backward", "linear masked", "linear rewards", "linear search"),
    *("logits", "logits entropy", "logits backward", "logits rewards"),
)
IMPLS = {OURS_CHUNKED: "chunked", OURS_FUSED: "fused"}
TRL_CHUNK = 32768  # as in TRL, where it is private


def peers(subject: str) -> dict[str, Peer]:
    """Return every peer of a subject. The first is the baseline of all ratios, the last is ours."""
    linear = (_linear, _training, _masked, _linear_rewards, _search)
    makers = (*linear, _logits, _entropy, _logits_backward, _logits_rewards)
    return dict(zip(SUBJECTS, makers, strict=True))[subject]()


# ------------------------------------------------------------------------------------------------ packages


def _package(module: str, name: str) -> tuple[Callable | None, str | None]:
    """Return (module.name, None), or (None, why it cannot be imported)."""
    try:
        return getattr(importlib.import_module(module), name), None
    except Exception as error:  # an import may raise anything: no driver, another torch
        return None, f"{module}: {type(error).__name__}: {(str(error) or '-').splitlines()[0][:120]}"


def _adapter(module: str, name: str, nll: Callable, **about) -> Peer:
    """Make a peer from nll(function, inputs), which calls the package's function for the nll of each row."""
    function, missing = _package(module, name)
    return Peer(functools.partial(nll, function), gives="nll", missing=missing, **about)


def _liger_linear(function, i: Inputs) -> Tensor:
    return function.apply(i.hidden, i.weight, i.targets, None, None, -100, 0.0, 0.0, "none", i.shape.softcap)[0]


def _liger_logits(function, i: Inputs) -> Tensor:
    return function.apply(i.logits, i.targets, None, -100, 0.0, 0.0, "none")[0]


def _cce(function, i: Inputs) -> Tensor:
    """Call it without its gradient filter, which drops the gradients of small probabilities."""
    return function(i.hidden, i.weight, i.targets, softcap=i.shape.softcap, reduction="none", filter_eps=None)


def _trl_linear(function, i: Inputs) -> Tensor:
    return -function.apply(i.hidden, i.weight, None, i.targets, 1.0, TRL_CHUNK, i.shape.softcap, 1.0, ())[0]


def _quack_linear(function, i: Inputs) -> Tensor:
    return function(i.hidden, i.weight, None, i.targets, reduction="none")


def _quack_logits(function, i: Inputs) -> Tensor:
    return function(i.logits, i.targets, reduction="none")


def _linear_packages() -> dict[str, Peer]:
    liger = "liger_kernel.ops.fused_linear_cross_entropy"
    return {
        "liger-kernel": _adapter(liger, "LigerFusedLinearCrossEntropyFunction", _liger_linear),
        "cut-cross-entropy, unfiltered": _adapter("cut_cross_entropy", "linear_cross_entropy", _cce),
        "TRL, chunked logprob": _adapter("trl.kernels", "ChunkedLogProbFunction", _trl_linear),
        "quack-kernels": _adapter(
            "quack.linear_cross_entropy", "linear_cross_entropy_func", _quack_linear, bytes_per_logit=6
        ),
    }


# ------------------------------------------------------------------------------------------------ from hidden states


def _linear() -> dict[str, Peer]:
    alike = torch_peers.peers("linear")
    return {
        BARE_MATMUL: Peer(lambda i: torch.mm(i.hidden, i.weight.T), gives="nothing", bytes_per_logit=2),
        "eager": replace(alike["eager"], bytes_per_logit=6),  # logits, and the temporaries of logsumexp
        "torch.compile": replace(alike["torch.compile"], bytes_per_logit=2),
        "F.linear_cross_entropy": replace(alike["F.linear_cross_entropy"], bytes_per_logit=6),
        "F.linear_cross_entropy, chunked": alike["F.linear_cross_entropy, chunked"],
        **_linear_packages(),
        **{name: Peer(functools.partial(_ours_linear, impl)) for name, impl in IMPLS.items()},
    }


def _ours_linear(impl: str, i: Inputs, mask: Tensor | None = None):
    stats = linear_vocab_stats(i.hidden, i.weight, i.targets, mask=mask, softcap=i.shape.softcap, impl=impl)
    return stats.lse, stats.target_logit


def _search() -> dict[str, Peer]:
    """The linear kernel under every candidate config. The results fill the static config table."""
    from endoreward_fast.kernels.config import LINEAR_SEARCH

    def name(c):
        grid = f", {c.persistent} persistent" if c.persistent else ""
        return f"{OURS}, {c.block_n}x{c.block_v}x{c.block_d}/{c.num_stages} {c.num_warps} warps, group {c.group}{grid}"

    missing = None
    if torch.cuda.is_available() and (torch.version.hip or torch.cuda.get_device_capability()[0] not in (9, 10)):
        missing = "the candidates are for Hopper and data-centre Blackwell"
    bare = Peer(lambda i: torch.mm(i.hidden, i.weight.T), gives="nothing", bytes_per_logit=2)
    ours = {name(c): Peer(functools.partial(_under, c), missing=missing) for c in LINEAR_SEARCH}
    return {BARE_MATMUL: bare} | ours


def _under(config, i: Inputs):
    from endoreward_fast.vocab import fused

    stats, _ = fused.linear_forward(
        i.hidden, i.weight, i.targets, bias=None, logit_scale=1.0, softcap=i.shape.softcap, alpha=1.0, entropy=False,
        logit_mean=False, config=config,
    )  # fmt: skip
    return stats.lse, stats.target_logit


def _training() -> dict[str, Peer]:
    """Forward and backward together, through autograd for every peer."""
    timed = {name: peer for name, peer in _linear().items() if name != BARE_MATMUL}
    return {
        THREE_MATMULS: Peer(functools.partial(_matmuls, 3), gives="nothing", bytes_per_logit=2),
        FOUR_MATMULS: Peer(functools.partial(_matmuls, 4), gives="nothing", bytes_per_logit=4),
        **{name: _with_gradients(peer) for name, peer in timed.items()},
    }


def _matmuls(count: int, i: Inputs) -> None:
    """Run the matmuls of a training step: logits (twice if they are recomputed), dhidden, dweight."""
    for _ in range(count - 2):
        z = torch.mm(i.hidden, i.weight.T)
    torch.mm(z, i.weight)
    torch.mm(z.T, i.hidden)


def _with_gradients(peer: Peer) -> Peer:
    def run(i: Inputs):
        leaves = i.hidden.detach().requires_grad_(), i.weight.detach().requires_grad_()

        def call():
            nll = _nll(peer, replace(i, hidden=leaves[0], weight=leaves[1]))
            return nll.detach(), *torch.autograd.grad(nll, leaves, i.upstream.to(nll.dtype))

        return call

    # The backward adds the gradient of the logits.
    more = peer.bytes_per_logit and peer.bytes_per_logit + 4
    return replace(peer, run=run, gives="gradients", in_two_steps=True, bytes_per_logit=more)


def _nll(peer: Peer, i: Inputs) -> Tensor:
    got = peer.run(i)
    return got if peer.gives == "nll" else got[0] - got[1]


def _masked() -> dict[str, Peer]:
    calls = {}
    for name, impl in reversed(IMPLS.items()):
        calls[f"{name}, every row"] = Peer(functools.partial(_ours_linear, impl))
        calls[f"{name}, a fifth"] = Peer(lambda i, impl=impl: _ours_linear(impl, i, i.mask))
    return calls


# ------------------------------------------------------------------------------------------------ from logits


def _logits() -> dict[str, Peer]:
    alike = torch_peers.peers("logits")
    return {
        DEVICE_COPY: Peer(_copy, gives="nothing", in_two_steps=True, bytes_per_logit=2),
        LOGSUMEXP: replace(alike[LOGSUMEXP], bytes_per_logit=4),
        "log_softmax + gather": replace(alike["log_softmax + gather"], bytes_per_logit=4),
        "torch.compile": alike["torch.compile"],
        "liger-kernel": _adapter("liger_kernel.ops.cross_entropy", "LigerCrossEntropyFunction", _liger_logits),
        "quack-kernels": _adapter("quack.cross_entropy", "cross_entropy", _quack_logits),
        **{name: Peer(functools.partial(_ours_logits, impl, False)) for name, impl in IMPLS.items()},
    }


def _copy(i: Inputs) -> Callable:
    out = torch.empty_like(i.logits)
    return lambda: out.copy_(i.logits)


def _ours_logits(impl: str, entropy: bool, i: Inputs):
    stats = vocab_stats(i.logits, i.targets, entropy=entropy, impl=impl)
    return (stats.lse, stats.target_logit, stats.entropy) if entropy else (stats.lse, stats.target_logit)


def _entropy() -> dict[str, Peer]:
    one_pass, missing = _package("trl.kernels", "selective_log_softmax_and_entropy")
    return {
        DEVICE_COPY: _logits()[DEVICE_COPY],
        "eager": Peer(_stats_and_entropy, bytes_per_logit=8),
        "torch.compile": Peer(lambda i: torch_peers.compiled(_entropy_of)(i.logits, i.targets)),
        "TRL, one pass": Peer(lambda i: _trl_entropy(one_pass, i), missing=missing),
        **{name: Peer(functools.partial(_ours_logits, impl, True)) for name, impl in IMPLS.items()},
    }


def _stats_and_entropy(i: Inputs):
    return _entropy_of(i.logits, i.targets)


def _entropy_of(logits: Tensor, targets: Tensor):
    log_p = F.log_softmax(logits, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.logsumexp(logits, -1), logits.gather(1, targets.unsqueeze(1)).squeeze(1), entropy


def _trl_entropy(function: Callable, i: Inputs):
    """Compute the log-sum-exp from TRL's log-probability and the target's logit."""
    logprob, entropy = function(i.logits, i.targets)
    target = i.logits.gather(1, i.targets.unsqueeze(1)).squeeze(1).float()
    return target - logprob, target, entropy


def _logits_backward() -> dict[str, Peer]:
    """The backward alone. The forward runs once, before the timing."""
    alike = _logits()
    liger = replace(alike.pop("liger-kernel"), missing="writes its gradient over the caller's logits, in the forward")
    copy = alike.pop(DEVICE_COPY)
    return {DEVICE_COPY: copy, "liger-kernel": liger, **{name: _logits_gradient(peer) for name, peer in alike.items()}}


def _logits_gradient(peer: Peer) -> Peer:
    def run(i: Inputs):
        leaf = i.logits.detach().requires_grad_()
        nll = _nll(peer, replace(i, logits=leaf))
        upstream = i.upstream.to(nll.dtype)
        return lambda: torch.autograd.grad(nll, leaf, upstream, retain_graph=True)[0]

    return replace(peer, run=run, gives="logits gradient", in_two_steps=True, bytes_per_logit=peer.bytes_per_logit + 4)


# ------------------------------------------------------------------------------------------------ token rewards


def _linear_rewards() -> dict[str, Peer]:
    return {
        STATISTICS_ALONE: Peer(_in_sequences(lambda i, needed, _: _ours_linear("fused", i, needed)), in_two_steps=True),
        TOKEN_REWARDS: _rewards(lambda i, tokens: linear_token_rewards(
            i.hidden.view(*tokens.shape, -1), i.weight, tokens, softcap=i.shape.softcap, impl="fused"
        )),
    }  # fmt: skip


def _logits_rewards() -> dict[str, Peer]:
    def statistics(i, needed, _):
        stats = vocab_stats(i.logits, i.targets, mask=needed, impl="fused")
        return stats.lse, stats.target_logit

    return {
        STATISTICS_ALONE: Peer(_in_sequences(statistics), in_two_steps=True),
        TOKEN_REWARDS: _rewards(lambda i, tokens: token_rewards(
            i.logits.view(*tokens.shape, -1), tokens, impl="fused"
        )),
    }  # fmt: skip


def _in_sequences(run: Callable) -> Callable:
    """Return a peer's `run` in two steps that calls run(inputs, rows that rewards need, tokens (B, T)).

    T is at most 2048. Row k's target is the next token, so statistics and rewards need the same numbers.
    """

    def prepare(i: Inputs):
        tokens = i.targets.roll(1).view(-1, min(len(i.targets), 2048))
        needed = plan_rows(tokens, None, None, None).needed
        return lambda: run(i, needed, tokens)

    return prepare


def _rewards(function: Callable) -> Peer:
    def run(i, _, tokens):
        out = function(i, tokens)
        # Row k predicts token k + 1, so the fields of token k + 1 belong to row k.
        return -out.logprob.flatten()[1:], out.reward.flatten()[1:]

    return Peer(_in_sequences(run), gives="rewards", in_two_steps=True)
