"""`python -m bench.gpu --output DIR`: every path on a GPU, against the ceiling measured in the same rounds.

The ceiling is what the work cannot do without: torch.mm for hidden states, a device copy for stored logits. Each sample
starts with a cold L2 cache and is timed by device events; peers take turns, and a ratio is taken within its round. No
peer is timed before its numbers have been held against fp64 (harness.Gate).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import endoreward_fast as er
from bench import harness, peers, peers_gpu, shapes

MIB = 1 << 20
L2_FLUSH = 256 * MIB  # larger than any L2 cache


@dataclass(frozen=True)
class Case:
    subject: str  # a key of SUBJECTS
    shape: str
    rows: int
    rounds: int = 9

    @property
    def name(self) -> str:
        return f"{self.subject}, {self.shape}, N={self.rows}"


ROWS, HEADS = (8192, 32768, 512, 64), ("qwen3-0.6b", "llama3.2-1b", "qwen3-8b")  # D = 1024, 2048, 4096
CASES = [
    *(Case("linear", shape, rows) for rows in ROWS for shape in HEADS),
    *(Case(subject, "qwen3-8b", 8192) for subject in ("logits", "logits, entropy", "logits backward")),
    Case("linear backward", "qwen3-8b", 8192, rounds=5),
    Case("token rewards over statistics", "qwen3-8b", 8192),
    Case("80% of the batch masked", "qwen3-8b", 8192),
]


class Timer:
    """Milliseconds of one call, between device events, from a cold L2 cache."""

    def __init__(self, device: torch.device):
        self._flush = torch.empty(L2_FLUSH, dtype=torch.int8, device=device)

    def __call__(self, call: Callable) -> float:
        self._flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        stop.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(stop)


def extra_mib(call: Callable) -> float:
    """Peak device memory during a call, its outputs included, over that before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / MIB


# --------------------------------------------------------------------------------------------------------- subjects
# Each gives ({name: call}, {name: reason for leaving it out}); the first call is the ceiling.


def linear(inputs: peers.Inputs) -> tuple[dict, dict]:
    calls = {"torch.mm": lambda: torch.mm(inputs.hidden, inputs.weight.T)}
    return _gated(calls, peers_gpu.linear_peers(), inputs)


def logits(inputs: peers.Inputs, entropy: bool = False) -> tuple[dict, dict]:
    copy = torch.empty_like(inputs.logits)
    return _gated({"device copy": lambda: copy.copy_(inputs.logits)}, peers_gpu.logits_peers(entropy), inputs)


def logits_backward(inputs: peers.Inputs) -> tuple[dict, dict]:
    z, copy = inputs.logits.requires_grad_(), torch.empty_like(inputs.logits)
    source = inputs.logits.detach()
    upstream = torch.randn(len(z), device=z.device)
    ours = er.vocab_stats(z, inputs.targets, impl="fused").lse
    eager = torch.logsumexp(z, -1)
    calls = {"device copy": lambda: copy.copy_(source)}
    calls["logsumexp"] = lambda: torch.autograd.grad(eager, z, upstream.to(z.dtype), retain_graph=True)
    calls[peers_gpu.FUSED] = lambda: torch.autograd.grad(ours, z, upstream, retain_graph=True)
    return calls, {}


def linear_backward(inputs: peers.Inputs) -> tuple[dict, dict]:
    """Forward and backward; the ceiling is the four matmuls of a path that recomputes its logits."""
    h, w = inputs.hidden, inputs.weight
    z = torch.randn(len(h), 8192, device=h.device, dtype=h.dtype)

    def four_matmuls():
        for part in w.split(8192):
            torch.mm(h, part.T)
            torch.mm(h, part.T)
            torch.mm(z[:, : len(part)], part)
            torch.mm(z[:, : len(part)].T, h)

    calls, skipped = _gated({"four matmuls": four_matmuls}, peers_gpu.linear_peers(), inputs)
    h.requires_grad_(), w.requires_grad_()

    def with_gradient(call):
        def run():
            out = call()
            nll = out if torch.is_tensor(out) else out[0] - out[1]
            return torch.autograd.grad(nll.float().mean(), (h, w))

        return run

    first, *rest = calls
    return {first: calls[first]} | {name: with_gradient(calls[name]) for name in rest}, skipped


def token_rewards_over_statistics(inputs: peers.Inputs) -> tuple[dict, dict]:
    hidden, tokens = inputs.hidden[None], inputs.targets[None]
    return {
        "statistics": lambda: er.linear_vocab_stats(hidden, inputs.weight, tokens, impl="fused"),
        "token rewards": lambda: er.linear_token_rewards(hidden, inputs.weight, tokens, impl="fused"),
    }, {}


def masked(inputs: peers.Inputs) -> tuple[dict, dict]:
    hidden, tokens = inputs.hidden.view(8, -1, inputs.shape.hidden), inputs.targets.view(8, -1)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, int(0.8 * tokens.shape[1]) :] = True
    return {
        "all": lambda: er.linear_token_rewards(hidden, inputs.weight, tokens, impl="fused"),
        "a fifth": lambda: er.linear_token_rewards(hidden, inputs.weight, tokens, mask=mask, impl="fused"),
    }, {}


SUBJECTS = {
    "linear": linear,
    "logits": logits,
    "logits, entropy": lambda inputs: logits(inputs, entropy=True),
    "logits backward": logits_backward,
    "linear backward": linear_backward,
    "token rewards over statistics": token_rewards_over_statistics,
    "80% of the batch masked": masked,
}


def _gated(calls: dict, candidates: dict[str, peers.Peer], inputs: peers.Inputs) -> tuple[dict, dict]:
    gate, skipped = harness.Gate(inputs), {}
    for name, peer in candidates.items():
        reason = peer.missing or peers.unsuited(name, inputs) or _too_large(name, inputs)
        if reason is None:
            reason = _why_it_fails(gate, name, peer, inputs)
        if reason:
            skipped[name] = reason
        else:
            calls[name] = lambda peer=peer: peer.run(inputs)
    return calls, skipped


def _too_large(name: str, inputs: peers.Inputs) -> str | None:
    if inputs.targets.device.type != "cuda":
        return None
    needed, free = peers_gpu.materialised_bytes(name, inputs), torch.cuda.mem_get_info()[0]
    return f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free" if needed > free else None


def _why_it_fails(gate: harness.Gate, name: str, peer: peers.Peer, inputs: peers.Inputs) -> str | None:
    """A peer of other people's that fails here is said and left out; ours must not."""
    try:
        gate.check(name, "nothing" if peer.gives == "sum of nll" else peer.gives, peer.run(inputs))
    except Exception as error:
        if name.startswith("endoreward_fast"):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return None


# ------------------------------------------------------------------------------------------------------ measurement


def run_case(case: Case, device: torch.device, timer: Callable, memory: Callable, deadline: float) -> dict:
    shape = shapes.SHAPES[case.shape]
    subject = "logits" if case.subject.startswith("logits") else "linear"
    inputs = peers.make_inputs(subject, shape, case.rows, torch.bfloat16, device=device)
    calls, skipped = SUBJECTS[case.subject](inputs)
    for call in calls.values():  # compiled, and warm
        call()
    times = {name: [] for name in calls}
    names = list(calls)
    for turn in range(case.rounds):
        if turn >= 3 and time.monotonic() > deadline:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(timer(calls[name]))
    extra = {name: memory(call) for name, call in calls.items()}
    return {
        "name": case.name,
        **asdict(case),
        "hidden": shape.hidden,
        "vocab": shape.vocab,
        "rounds_done": len(times[names[0]]),
        "ceiling": names[0],
        "peers": {name: summary(case, shape, name, t, times[names[0]], extra[name]) for name, t in times.items()},
        "skipped": skipped,
    }


def summary(case: Case, shape: shapes.Shape, name: str, times: list[float], ceiling: list[float], extra: float) -> dict:
    """Medians; `tflops` and `gbps` by formula, of the work that the ceiling does too."""
    ratios = sorted(t / c for t, c in zip(times, ceiling, strict=True))
    seconds = statistics.median(times) / 1e3
    out = {
        "median_ms": statistics.median(times), "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4], "ratio_high": ratios[-1 - len(ratios) // 4], "extra_mib": extra,
    }  # fmt: skip
    if case.subject.startswith("logits"):
        passes = 2 if case.subject == "logits backward" or name == "device copy" else 1  # a copy reads and writes
        out["gbps"] = passes * shapes.logits_bytes(case.rows, shape, 2) / seconds / 1e9
    else:
        matmuls = 4 if case.subject == "linear backward" else 1
        out["tflops"] = matmuls * shapes.linear_flops(case.rows, shape) / seconds / 1e12
    return out


def table(result: dict) -> str:
    lines = [f"{result['name']} ({result['rounds_done']} rounds)"]
    for name, p in result["peers"].items():
        rate = f"{p['gbps']:8.0f} GB/s" if "gbps" in p else f"{p['tflops']:6.0f} TFLOP/s"
        spread = f"{p['ratio']:6.2f} of {result['ceiling']} ({p['ratio_low']:.2f}-{p['ratio_high']:.2f})"
        lines.append(f"  {name:28}{p['median_ms']:9.3f} ms {rate}  {spread}  {p['extra_mib']:9.1f} MiB")
    lines += [f"  {name:28}skipped: {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "gpu", help="folder for gpu.json, gpu.png")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds; cases after it get 3 rounds each")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu: no CUDA or ROCm device here, and it times nothing else", file=sys.stderr)
        sys.exit(2)
    import triton

    device = torch.device("cuda")
    args.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.budget
    about = {"device": torch.cuda.get_device_name(), "triton": triton.__version__} | harness.environment()
    results, timer = [], Timer(device)
    for case in CASES:
        results.append(run_case(case, device, timer, extra_mib, deadline))
        print(table(results[-1]), flush=True)
        (args.output / "gpu.json").write_text(json.dumps({"environment": about, "cases": results}, indent=1) + "\n")
        torch.cuda.empty_cache()
    from bench import plot_gpu

    plot_gpu.draw(args.output)


if __name__ == "__main__":
    main()
