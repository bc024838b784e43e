"""Correctness gate: compare some rows of a peer's results with fp64 before it is timed."""

import torch
from torch import Tensor

from bench.harness.peers import Inputs
from endoreward_fast.vocab import reference

GATE_ROWS = 16


class Gate:
    """Compare statistics of some rows, and their gradients where a peer gives them, with fp64.

    Largest absolute error of statistics: 1e-4 in float32, the rounding of a bfloat16 logit (0.13) in bfloat16.
    Largest relative error of gradients over the checked rows: 1e-3 in float32, 5% in bfloat16. For the gradient of
    bfloat16 logits outside the target column, 10%: there, eager torch's bfloat16 probabilities are off by 4%.
    """

    def __init__(self, inputs: Inputs):
        self._inputs = inputs
        on = torch.arange(len(inputs.targets)) if inputs.mask is None else inputs.mask.nonzero().squeeze(1).cpu()
        self._rows = on[:GATE_ROWS].to(inputs.targets.device)
        self._targets = inputs.targets[self._rows]
        self._at = torch.arange(len(self._rows), device=self._rows.device), self._targets
        self._logits = _logits(inputs, self._rows)
        self._oracle = reference.vocab_stats(self._logits, self._targets, entropy=True, dtype=torch.float64)
        dtype = inputs.logits.dtype if inputs.hidden is None else inputs.hidden.dtype
        exact = dtype == torch.float32
        self._tolerance = 1e-4 if exact else 0.13  # half a unit of bfloat16 at 32 is 0.125
        self._relative, self._relative_elsewhere = (1e-3, 1e-3) if exact else (0.05, 0.1)

    def check(self, name: str, gives: str, got) -> None:
        """Check the results of a peer; `gives` as in peers.Peer. Raises AssertionError if they are wrong."""
        lse, target = self._oracle.lse, self._oracle.target_logit
        if gives == "nll":
            self._stats(name, [(got, lse - target)])
        elif gives == "nll, entropy":
            self._stats(name, zip(got, (lse - target, self._oracle.entropy), strict=True))
        elif gives == "summed nll":
            self._summed(name, got)
        elif gives == "stats":
            self._stats(name, zip(got, (lse, target, self._oracle.entropy), strict=False))
        elif gives == "rewards":  # a reward is the target's logit minus the value of the next state
            nll, reward = got
            last = len(self._rows) - 1
            self._stats(name, [(nll, lse - target)])
            self._close(name, reward[self._rows[:last]], (target[:last] - lse[1:]))
        elif gives == "logits gradient":
            self._logits_gradient(name, got[self._rows].double())
        elif gives == "gradients":
            nll, dhidden, dweight = got
            self._stats(name, [(nll, lse - target)])
            self._linear_gradients(name, dhidden, dweight, self._inputs.upstream)
        elif gives == "summed gradients":
            total, dhidden, dweight = got
            self._summed(name, total)
            self._linear_gradients(name, dhidden, dweight, torch.ones_like(self._inputs.upstream))

    def _stats(self, name: str, pairs) -> None:
        for ours, oracle in pairs:
            self._close(name, ours[self._rows], oracle)

    def _close(self, name: str, ours: Tensor, oracle: Tensor) -> None:
        _refuse(name, (ours.double() - oracle).abs().max().item(), self._tolerance)

    def _summed(self, name: str, total: Tensor) -> None:
        """Compare a sum over all rows by its mean, whose error is at most that of a row."""
        inputs = self._inputs
        target = (inputs.hidden.double() * inputs.weight[inputs.targets].double()).sum(-1)
        _refuse(name, (total.double() / len(target) - (self._all_lse() - target).mean()).abs().item(), self._tolerance)

    def _dlogits(self, upstream: Tensor) -> Tensor:
        """Return the (rows, V) gradient of upstream * (lse - target logit) in the logits."""
        p = torch.softmax(self._logits, -1)
        p[self._at] -= 1.0
        return p * upstream[self._rows].double().unsqueeze(1)

    def _logits_gradient(self, name: str, got: Tensor) -> None:
        want = self._dlogits(self._inputs.upstream)
        _refuse(name, _relative(got, want), self._relative)
        got[self._at] = want[self._at] = 0.0
        _refuse(name, _relative(got, want), self._relative_elsewhere)

    def _linear_gradients(self, name: str, dhidden: Tensor, dweight: Tensor, upstream: Tensor) -> None:
        weight, hidden = self._inputs.weight, self._inputs.hidden
        want = sum(
            part @ w.double()
            for part, w in zip(self._dlogits(upstream).split(PART, 1), weight.split(PART), strict=True)
        )
        _refuse(name, _relative(dhidden[self._rows].double(), want), self._relative)
        # Weight gradient at the checked targets, summed over all N rows: probabilities need every row's log-sum-exp.
        columns = self._targets.unique()
        p = torch.exp(hidden.double() @ weight[columns].double().T - self._all_lse().unsqueeze(1))
        g = (p - (self._inputs.targets.unsqueeze(1) == columns).double()) * upstream.double().unsqueeze(1)
        _refuse(name, _relative(dweight[columns].double(), g.T @ hidden.double()), self._relative)

    def _all_lse(self) -> Tensor:
        """Return the (N,) log-sum-exp of all rows, from float32 products."""
        hidden = self._inputs.hidden.float()
        parts = [torch.logsumexp(hidden @ w.float().T, -1) for w in self._inputs.weight.split(PART)]
        return torch.logsumexp(torch.stack(parts).double(), 0)


PART = 16384  # vocabulary entries to convert to float64 at a time: a whole float64 weight may not fit


def _logits(inputs: Inputs, rows: Tensor) -> Tensor:
    if inputs.logits is not None:
        return inputs.logits[rows].double()
    hidden = inputs.hidden[rows].double()
    z = torch.cat([hidden @ part.double().T for part in inputs.weight.split(PART)], 1)
    softcap = inputs.shape.softcap
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def _refuse(name: str, error: float, allowed: float) -> None:
    if not error <= allowed:  # NaN too
        raise AssertionError(f"{name} is off by {error:.2e} (allowed {allowed}); it is not timed")
