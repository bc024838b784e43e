"""Check every peer, time the peers in interleaved rounds, and write the record: for CPU and GPU.

On a shared machine, only ratios within one run are meaningful. Each round times every peer once, in an order that
rotates. A ratio is the median over rounds of (peer / baseline) within the round. clock.py measures the single call.
"""

import contextlib
import json
import os
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from bench.harness import peers as registry
from bench.harness import shapes
from bench.harness.cases import Case
from bench.harness.clock import Host
from bench.harness.environment import environment
from bench.harness.gate import Gate
from bench.harness.memory import in_a_process

__all__ = ["Budget", "Case", "Gate", "environment", "interleave", "prepare", "run_case", "summarise", "table", "write"]

RESULTS = Path(__file__).parents[1] / "results"
HOST = Host()
LEAST_ROUNDS = 3
PEER_SECONDS = 90  # for a peer's first call on a GPU, which may compile


class Budget:
    """Time budget of a run in seconds. Each case gets an equal share of what is left when it starts."""

    def __init__(self, seconds: float, cases: int, now=time.monotonic):
        self._now, self._end, self._cases = now, now() + seconds, cases

    def left(self) -> float:
        return self._end - self._now()

    def next_case(self):
        """Return enough(rounds): whether the next case has used its share and done at least LEAST_ROUNDS."""
        end = self._now() + self.left() / max(self._cases, 1)
        self._cases -= 1
        return lambda rounds: rounds >= LEAST_ROUNDS and self._now() >= end


def run_case(case: Case, clock=HOST, enough=lambda rounds: False) -> dict:
    """Check, time and, if the case asks for it, measure the memory of every peer. `enough` may end the rounds early."""
    if case.isa and os.environ.get("ONEDNN_MAX_CPU_ISA") != case.isa:
        return in_a_process(case, env={"ONEDNN_MAX_CPU_ISA": case.isa})
    calls, skipped = prepare(case, clock)
    queue = {name: clock.queue_seconds(call) for name, call in calls.items()}
    times = interleave(calls, case.rounds, clock, enough)
    extra = clock.weigh(case, calls) if case.memory else {}
    return summarise(case, times, skipped, extra, queue)


def prepare(case: Case, clock=HOST) -> tuple[dict, dict[str, str]]:
    """Return ({peer: call without arguments}, {peer: why it is skipped}). Every call has passed the gate.

    On a GPU, a peer that fails is skipped with its error. A failure of ours, or of any peer on the CPU, is raised.
    """
    shape = shapes.find(case.shape)
    inputs = registry.make_inputs(case.subject, shape, case.rows, case.torch_dtype, device=clock.device)
    gate = Gate(inputs)
    calls, skipped = {}, {}
    for name, peer in registry.peers(case.subject, case.gpu).items():
        if case.only and name not in case.only:
            continue
        reason = peer.missing or peer.obstacle(inputs) or _too_large(peer, case, clock)
        if name in case.without:
            reason = "left out to save time"
        if reason:
            skipped[name] = reason
            continue
        ours = name.startswith(registry.OURS)
        try:
            with contextlib.nullcontext() if ours or not case.gpu else limited(PEER_SECONDS):
                call = peer.prepare(case.for_peer(name, inputs))
                gate.check(name, peer.gives, call())
        except Exception as error:
            if not case.gpu or ours:
                raise
            skipped[name] = f"failed: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"
            continue
        calls[name] = call
    return calls, skipped


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after this time, as soon as Python code runs there."""

    def stop(number, frame) -> None:
        raise TimeoutError(f"no result after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _too_large(peer: registry.Peer, case: Case, clock) -> str | None:
    need = peer.bytes_per_logit * case.rows * shapes.find(case.shape).vocab
    free = clock.free_bytes() if need else None
    if free is None or need <= free:
        return None
    return f"needs about {need / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"


def interleave(calls: dict, rounds: int, clock=HOST, enough=lambda rounds: False) -> dict[str, list[float]]:
    """Return {peer: seconds of each round}. The order rotates from round to round; only whole rounds are run."""
    names, times = list(calls), {name: [] for name in calls}
    for turn in range(rounds):
        if enough(turn):
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(clock.seconds(calls[name]))
    return times


def summarise(
    case: Case, times: dict[str, list[float]], skipped: dict[str, str], extra: dict[str, float], queue=None
) -> dict:
    shape, first = shapes.find(case.shape), next(iter(times))
    done = len(times[first])
    flops, traffic, share = case.flops(), case.bytes(), case.share_of_ceiling(first)
    peers = {}
    for name, t in times.items():
        peers[name] = found = spread(t, times[first])
        is_ceiling = share is not None and name == first
        own = 1 / share if is_ceiling else 1.0  # a copy moves more bytes than the subject's minimum
        found["gb_per_s"] = traffic and own * traffic / found["median_s"] / 1e9
        found["tflops"] = flops and own * flops / found["median_s"] / 1e12
        found["of_ceiling"] = share and (1.0 if is_ceiling else share / found["ratio"])
        found["extra_mib"] = extra.get(name)
        found["queue_s"] = (queue or {}).get(name)
    return {
        "name": case.name,
        **asdict(case),
        "rounds_done": done,
        "stopped": f"time budget: {done} of {case.rounds} rounds" if done < case.rounds else None,
        "hidden": shape.hidden if case.linear else None,
        "vocab": shape.vocab,
        "flops": flops,
        "bytes": traffic,
        "is_ceiling": share is not None,
        "baseline": first,
        "peers": peers,
        "skipped": skipped,
    }


def spread(times: list[float], baseline: list[float]) -> dict:
    ratios = [t / b for t, b in zip(times, baseline, strict=True)]
    return {
        "median_s": statistics.median(times),
        "low_s": _quantile(times, 0.25),
        "high_s": _quantile(times, 0.75),
        "min_s": min(times),
        "max_s": max(times),
        "ratio": statistics.median(ratios),
        "ratio_of_minima": min(times) / min(baseline),
        "ratio_low": _quantile(ratios, 0.25),
        "ratio_high": _quantile(ratios, 0.75),
    }


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


# ------------------------------------------------------------------------------------------------- the record


def write(name: str, record: dict, cases: list[dict], folder: Path | None = None) -> Path:
    """Write {"environment": ..., "cases": [...]} to <name>.json in `folder`, bench/results by default.

    The file is replaced at once, so a process that is killed here leaves the one before.
    """
    path = (folder or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"environment": record, "cases": cases}, indent=1) + "\n")
    return part.replace(path)


def table(result: dict) -> str:
    """Format one case as text: time, ratio to the baseline with quartiles, rates by formula, extra memory."""
    if result.get("failed"):
        return f"{result['name']}\n  {result['failed']}"
    stopped = f"  ({result['stopped']})" if result["stopped"] else ""
    head = f"  {'':40}{'median':>11}  {'/ ' + result['baseline']:>20}  {'quartiles':>13}{'GB/s':>8}{'TFLOP/s':>9}"
    lines = [result["name"] + stopped, head + f"{'of ceiling':>12}{'extra MiB':>11}"]
    for name, p in result["peers"].items():
        time_ms = f"{p['median_s'] * 1e3:.3f} ms" if p["median_s"] < 0.1 else f"{p['median_s'] * 1e3:.1f} ms"
        quartiles = f"{p['ratio_low']:.2f}-{p['ratio_high']:.2f}"
        rates = f"{_cell(p['gb_per_s'], '.0f'):>8}{_cell(p['tflops'], '.1f'):>9}{_cell(p['of_ceiling'], '.1%'):>12}"
        memory = f"{_cell(p['extra_mib'], '.1f'):>11}"
        lines.append(f"  {name:40}{time_ms:>11}  {p['ratio']:>20.3f}  {quartiles:>13}{rates}{memory}")
    lines += [f"  {name:40}skipped: {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
