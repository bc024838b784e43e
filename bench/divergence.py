"""`python -m bench.divergence`: time and memory of the divergence of two heads, against eager torch, TRL and Liger.

A student and a wider teacher share a vocabulary. Each peer computes the summed divergence of N tokens, and the gradient
of the student's hidden states and weight. Liger takes gradients in its forward and cannot leave the weight out; its
package is optional. Processor time on one thread, in interleaved rounds; peak memory in a fresh process for each peer.
Writes bench/results/divergence.json.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import timing
from bench.harness.clock import Processor
from bench.harness.memory import RETURNING, risen_mib
from endoreward_fast import linear_vocab_divergence, vocab_divergence

BETA = {"forward-kl": 0.0, "jsd": 0.5}
ROOT = Path(__file__).parents[1]
OURS = "endoreward_fast"
EAGER = "eager torch"


@dataclass(frozen=True)
class Case:
    source: str  # hidden states, or stored logits
    kind: str
    rows: int
    vocab: int
    dims: tuple[int, int] = (0, 0)  # student and teacher
    backward: bool = True

    @property
    def name(self) -> str:
        widths = f" D={self.dims[0]},{self.dims[1]}" if self.source == "hidden" else ""
        direction = "forward+backward" if self.backward else "forward"
        return f"{self.source} {self.kind} N={self.rows} V={self.vocab}{widths} {direction}"


CASES = [
    Case(source, kind, rows, vocab, dims, backward)
    for source, rows, vocab, dims in (
        ("hidden", 128, 32000, (512, 1024)), ("hidden", 256, 50257, (128, 256)), ("logits", 32, 151936, (0, 0)),
    )
    for kind in BETA
    for backward in (False, True)
]  # fmt: skip


def inputs(case: Case) -> list[Tensor]:
    """Return the student's tensors, then the teacher's."""
    torch.manual_seed(0)
    if case.source == "logits":
        return [2 * torch.randn(case.rows, case.vocab).requires_grad_(i == 0) for i in range(2)]
    shapes = [(n, dim) for dim in case.dims for n in (case.rows, case.vocab)]
    return [(torch.randn(n, dim) * dim**-0.25).requires_grad_(i < 2) for i, (n, dim) in enumerate(shapes)]


def eager(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    log_pi, log_tau = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    if kind == "forward-kl":
        return (log_tau.exp() * (log_tau - log_pi)).sum()
    pi, tau = log_pi.exp(), log_tau.exp()
    log_m = ((pi + tau) / 2).log()
    return ((tau * (log_tau - log_m)).sum() + (pi * (log_pi - log_m)).sum()) / 2


def _logits(given: list[Tensor]) -> list[Tensor]:
    if len(given) == 2:
        return given
    with torch.no_grad():
        teacher = given[2] @ given[3].T
    return [given[0] @ given[1].T, teacher]


def _ours(case: Case, given: list[Tensor]) -> Tensor:
    return (vocab_divergence if case.source == "logits" else linear_vocab_divergence)(*given, kind=case.kind).sum()


def _gkd(case: Case, given: list[Tensor]) -> Tensor:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(*_logits(given), beta=BETA[case.kind], reduction="sum")


def _trl_chunked(case: Case, given: list[Tensor]) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    args = given[0], given[1], None, given[2], given[3], None, BETA[case.kind]
    return ChunkedDivergenceFunction.apply(*args)[0].sum()


def _liger(case: Case, given: list[Tensor]) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[case.kind], compiled=False)
    return loss(*given, torch.zeros(case.rows, dtype=torch.long)) * case.rows


PEERS: dict[str, Callable[[Case, list[Tensor]], Tensor]] = {
    EAGER: lambda case, given: eager(*_logits(given), case.kind),
    "TRL, GKDTrainer.generalized_jsd_loss": _gkd,
    "TRL, ChunkedDivergenceFunction": _trl_chunked,
    "liger-kernel, LigerFusedLinearJSDLoss": _liger,
    OURS: _ours,
}
HIDDEN_ONLY = ("TRL, ChunkedDivergenceFunction", "liger-kernel, LigerFusedLinearJSDLoss")


def calls_of(case: Case, names: list[str]) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """Return ({peer: call}, {peer: why it is skipped}). Every call has agreed with eager torch."""
    given, calls, skipped = inputs(case), {}, {}
    leaves = [x for x in given if x.requires_grad]

    def run(peer: Callable[[Case, list[Tensor]], Tensor]) -> float:
        with torch.set_grad_enabled(case.backward):
            value = peer(case, given)
            if case.backward:
                torch.autograd.grad(value, leaves)
        return value.item()

    for name in names:
        if case.source == "logits" and name in HIDDEN_ONLY:
            skipped[name] = "takes hidden states"
        elif name.startswith("liger") and not case.backward:
            skipped[name] = "takes gradients in its forward"
        else:
            try:
                run(PEERS[name])
            except ImportError as error:
                skipped[name] = str(error)
                continue
            calls[name] = lambda peer=PEERS[name]: run(peer)
    right = run(PEERS[EAGER])
    for name, call in calls.items():
        if abs(call() - right) > 1e-4 * right:
            raise SystemExit(f"{case.name}: {name} gives {call()}, eager torch {right}: nothing was timed")
    return calls, skipped


def weigh(name: str) -> dict[str, float]:
    """Return {case: peak of extra memory of one call, in MiB} of a peer, measured in a fresh process."""
    command = [sys.executable, "-m", "bench.divergence", "--weigh", name]
    done = subprocess.run(command, env=os.environ | RETURNING, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def weigh_here(name: str) -> dict[str, float]:
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        calls, _ = calls_of(Case(**asdict(case) | {"rows": 2, "vocab": 100}), [name])  # loads code
        given = inputs(case)

        def call(case: Case = case, given: list[Tensor] = given) -> object:
            with torch.set_grad_enabled(case.backward):
                value = PEERS[name](case, given)
                return torch.autograd.grad(value, [x for x in given if x.requires_grad]) if case.backward else value

        if calls:
            found[case.name] = round(risen_mib(call), 1)
    return found


def run(rounds: int, folder: Path) -> Path:
    torch.set_num_threads(1)
    about, records = timing.environment(), []
    extra = {name: weigh(name) for name in PEERS}
    for case in CASES:
        calls, skipped = calls_of(case, list(PEERS))
        times = timing.interleave(calls, rounds, Processor())
        found = {
            name: timing.spread(t, times[EAGER]) | {"extra_mib": extra[name][case.name]} for name, t in times.items()
        }
        print(case.name)
        for name, s in found.items():
            print(f"  {name:40}{s['median_s']:8.3f} s {s['ratio']:7.2f} of eager {s['extra_mib']:9.1f} MiB")
        records.append(asdict(case) | {"case": case.name, "baseline": EAGER, "peers": found, "skipped": skipped})
        written = timing.write("divergence", about, records, folder)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=timing.RESULTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weigh", metavar="PEER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    print(json.dumps(weigh_here(args.weigh)) if args.weigh else run(args.rounds, args.out))
