"""Peers of training: the same functions with their gradients, and the matmuls that a training step needs."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench.harness.peers import Inputs, Peer


def matmuls(count: int) -> Peer:
    """Run the matmuls of a training step: logits (twice if they are recomputed), dhidden, dweight."""

    def run(i: Inputs) -> None:
        for _ in range(count - 2):
            z = torch.mm(i.hidden, i.weight.T)
        torch.mm(z, i.weight)
        torch.mm(z.T, i.hidden)

    return Peer(run, gives="nothing", bytes_per_logit=2.0 * (count - 2))


def nll(peer: Peer, i: Inputs) -> Tensor:
    """Return the negative log-likelihood that a peer gives: (N,), or its sum if it gives no more than that."""
    got = peer.run(i)
    if peer.gives in ("nll", "summed nll"):
        return got
    return got[0] if peer.gives == "nll, entropy" else got[0] - got[1]


def with_gradients(peer: Peer) -> Peer:
    """Forward and backward together, through autograd."""
    summed = peer.gives == "summed nll"

    def run(i: Inputs) -> Callable:
        leaves = i.hidden.detach().requires_grad_(), i.weight.detach().requires_grad_()

        def call():
            loss = nll(peer, replace(i, hidden=leaves[0], weight=leaves[1]))
            upstream = None if summed else i.upstream.to(loss.dtype)
            return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)

        return call

    # The backward adds the gradient of the logits.
    more = peer.bytes_per_logit and peer.bytes_per_logit + 4
    gives = "summed gradients" if summed else "gradients"
    return replace(peer, run=run, gives=gives, in_two_steps=True, bytes_per_logit=more)


def logits_gradient(peer: Peer) -> Peer:
    """The backward alone. The forward runs once, before the timing."""

    def run(i: Inputs) -> Callable:
        leaf = i.logits.detach().requires_grad_()
        loss = nll(peer, replace(i, logits=leaf))
        upstream = i.upstream.to(loss.dtype)
        return lambda: torch.autograd.grad(loss, leaf, upstream, retain_graph=True)[0]

    return replace(peer, run=run, gives="logits gradient", in_two_steps=True, bytes_per_logit=peer.bytes_per_logit + 4)
