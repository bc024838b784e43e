"""Peers that need a GPU, under the same contract as peers.py. Each is an optional package, installed by name
(`pip install .[bench-gpu]`); one that is absent, or that fails on this device, is skipped with the reason.

Interfaces as of liger-kernel 0.8.5, cut-cross-entropy 25.1.1, TRL 1.16.0 and quack-kernels 0.6.5.
"""

import importlib.util

import torch
import torch.nn.functional as F

from bench.peers import Inputs, Peer, compiled, linear_stats, stats

FUSED, CHUNKED = "endoreward_fast, fused", "endoreward_fast, chunked"


def linear_peers() -> dict[str, Peer]:
    """hidden -> statistics, or what a peer gives of them; ours, both ways, last."""
    return {
        "eager": Peer(lambda i: linear_stats(i.hidden, i.weight, i.targets, i.shape.softcap)),
        "torch.compile": Peer(lambda i: compiled(linear_stats)(i.hidden, i.weight, i.targets, i.shape.softcap)),
        "F.linear_cross_entropy": Peer(_torch_linear, "nll", _absent(F, "linear_cross_entropy")),
        "liger-kernel": Peer(_liger, "nll", _uninstalled("liger_kernel")),
        "cut-cross-entropy": Peer(_cut, "nll", _uninstalled("cut_cross_entropy")),
        "quack-kernels": Peer(_quack_linear, "sum of nll", _uninstalled("quack")),
        CHUNKED: Peer(lambda i: _ours_linear(i, "chunked")),
        FUSED: Peer(lambda i: _ours_linear(i, "fused")),
    }


def logits_peers(entropy: bool) -> dict[str, Peer]:
    """Stored logits -> statistics, with the entropy or without."""
    ours = Peer(lambda i: _ours_logits(i, entropy))
    if entropy:
        return {"TRL": Peer(_trl, "nll", _uninstalled("trl")), FUSED: ours}
    return {
        "logsumexp + gather": Peer(lambda i: stats(i.logits, i.targets)),
        "torch.compile": Peer(lambda i: compiled(stats)(i.logits, i.targets)),
        "quack-kernels": Peer(_quack_logits, "nll", _uninstalled("quack")),
        FUSED: ours,
    }


def materialised_bytes(name: str, inputs: Inputs) -> int:
    """What a peer that stores logits takes at its peak, about: them, and float32 copies or gradients."""
    stores = name in ("eager", "torch.compile", "F.linear_cross_entropy") and inputs.hidden is not None
    return len(inputs.targets) * inputs.shape.vocab * 10 if stores else 0


def _uninstalled(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def _absent(module, name: str) -> str | None:
    return None if hasattr(module, name) else f"torch {torch.__version__} does not have it"


def _ours_linear(i: Inputs, impl: str):
    from endoreward_fast import linear_vocab_stats

    out = linear_vocab_stats(i.hidden, i.weight, i.targets, softcap=i.shape.softcap, impl=impl)
    return out.lse, out.target_logit


def _ours_logits(i: Inputs, entropy: bool):
    from endoreward_fast import vocab_stats

    out = vocab_stats(i.logits, i.targets, entropy=entropy, impl="fused")
    return out.lse, out.target_logit


def _torch_linear(i: Inputs):
    return F.linear_cross_entropy(i.hidden, i.weight, i.targets, reduction="none")


def _liger(i: Inputs):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(i.hidden, i.weight, i.targets, reduction="none", softcap=i.shape.softcap)


def _cut(i: Inputs):
    from cut_cross_entropy import linear_cross_entropy

    # No gradient filtering: everyone computes the same thing.
    return linear_cross_entropy(
        i.hidden, i.weight, i.targets, softcap=i.shape.softcap, reduction="none", filter_eps=None
    )


def _quack_linear(i: Inputs):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(i.hidden, i.weight, i.targets, reduction="sum")


def _quack_logits(i: Inputs):
    from quack.cross_entropy import cross_entropy

    return cross_entropy(i.logits, i.targets, reduction="none")


def _trl(i: Inputs):
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return -selective_log_softmax_and_entropy(i.logits, i.targets)[0]
