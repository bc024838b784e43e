"""Interleaved timing, peak memory, a correctness gate before either, and the record of where it was all measured.

On a shared machine only ratios within one run mean anything: each round times every peer once, in an order that
rotates, and a ratio is the median over rounds of (peer / baseline) within the round.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench import peers as registry
from bench import shapes
from endoreward_fast import reference

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GATE_ROWS = 16


@dataclass(frozen=True)
class Case:
    """One line of a results table."""

    subject: str  # "linear" or "logits"
    shape: str  # a name in shapes.SHAPES
    rows: int
    dtype: str = "fp32"
    rounds: int = 5
    without: tuple[str, ...] = ()  # peers to leave out, to save time
    memory: bool = False  # measure extra memory too, each peer in a process of its own
    isa: str | None = None  # hold oneDNN to this instruction set (ONEDNN_MAX_CPU_ISA): stands in for an older chip
    upcast: bool = False  # ours gets hidden as float32, so that it upcasts bfloat16 weights whatever the chip

    @property
    def name(self) -> str:
        held = f" {self.isa}" if self.isa else ""
        return f"{self.subject} {self.shape} N={self.rows} {self.dtype}{held}"


def run_case(case: Case) -> dict:
    """Gate, then time, then (if asked) weigh every peer of a case."""
    if case.isa and os.environ.get("ONEDNN_MAX_CPU_ISA") != case.isa:
        return _in_a_process(case, env={"ONEDNN_MAX_CPU_ISA": case.isa})
    calls, skipped = prepare(case)
    times = interleave(calls, case.rounds)
    return summarise(case, times, skipped, weigh(case, calls) if case.memory else {})


def prepare(case: Case) -> tuple[dict, dict[str, str]]:
    """({peer: call without arguments}, {peer: why it is left out}); every call has passed the gate."""
    shape = shapes.SHAPES[case.shape]
    inputs = registry.make_inputs(case.subject, shape, case.rows, DTYPES[case.dtype])
    gate = Gate(inputs)
    calls, skipped = {}, {}
    for name, peer in registry.peers(case.subject).items():
        reason = peer.missing or registry.unsuited(name, inputs)
        if name in case.without:
            reason = "left out to save time"
        if reason:
            skipped[name] = reason
            continue
        calls[name] = _call(peer, _for_peer(case, name, inputs))
        gate.check(name, peer.gives, calls[name]())
    return calls, skipped


def _for_peer(case: Case, name: str, inputs):
    if case.upcast and name in (registry.OURS, registry.OURS_COMPILED):
        return registry.Inputs(inputs.shape, inputs.targets, inputs.hidden.float(), inputs.weight)
    return inputs


def _call(peer, inputs):
    return lambda: peer.run(inputs)


class Gate:
    """No timing without right numbers: lse and target logit of some rows, against fp64.

    In float32 everyone must be within 1e-4; in bfloat16 within the rounding of a bfloat16 logit, but for `eager`,
    whose error is what it is.
    """

    def __init__(self, inputs: registry.Inputs):
        self._rows = slice(0, GATE_ROWS)
        targets = inputs.targets[self._rows]
        if inputs.logits is not None:
            self._oracle = reference.vocab_stats(inputs.logits[self._rows], targets, dtype=torch.float64)
            dtype = inputs.logits.dtype
        else:
            self._oracle = _linear_oracle(inputs, self._rows)
            dtype = inputs.hidden.dtype
        self._tolerance = 1e-4 if dtype == torch.float32 else 0.13  # half a unit of bfloat16 at 32 is 0.125

    def check(self, name: str, gives: str, got) -> None:
        if gives == "nothing":
            return
        lse, target = self._oracle.lse, self._oracle.target_logit
        pairs = [(got, lse - target)] if gives == "nll" else [(got[0], lse), (got[1], target)]
        for ours, oracle in pairs:
            error = (ours[self._rows].double() - oracle).abs().max().item()
            if not error <= self._tolerance:
                raise AssertionError(f"{name} is off by {error:.2e} (allowed {self._tolerance}); it is not timed")


def _linear_oracle(inputs: registry.Inputs, rows: slice):
    """fp64 logits made in parts of the vocabulary, as a float64 weight may not fit."""
    hidden = inputs.hidden[rows].double()
    z = torch.cat([hidden @ part.double().T for part in inputs.weight.split(16384)], 1)
    if inputs.shape.softcap is not None:
        z = inputs.shape.softcap * torch.tanh(z / inputs.shape.softcap)
    return reference.vocab_stats(z, inputs.targets[rows], dtype=torch.float64)


def interleave(calls: dict, rounds: int) -> dict[str, list[float]]:
    """{peer: seconds of each round}; the order rotates from round to round."""
    names, times = list(calls), {name: [] for name in calls}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(calls[name]))
    return times


def seconds(call) -> float:
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result  # its release is no part of the measurement, and must not overlap the next one
    return elapsed


def summarise(case: Case, times: dict[str, list[float]], skipped: dict[str, str], extra: dict[str, float]) -> dict:
    shape = shapes.SHAPES[case.shape]
    size = DTYPES[case.dtype].itemsize
    baseline = times[next(iter(times))]
    linear = case.subject == "linear"
    return {
        "name": case.name,
        **asdict(case),
        "hidden": shape.hidden if linear else None,
        "vocab": shape.vocab,
        "flops": shapes.linear_flops(case.rows, shape) if linear else None,
        "bytes": (shapes.linear_bytes if linear else shapes.logits_bytes)(case.rows, shape, size),
        "baseline": next(iter(times)),
        "peers": {name: _spread(t, baseline) | {"extra_mib": extra.get(name)} for name, t in times.items()},
        "skipped": skipped,
    }


def _spread(times: list[float], baseline: list[float]) -> dict:
    ratios = [t / b for t, b in zip(times, baseline, strict=True)]
    return {
        "median_s": statistics.median(times),
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


# ------------------------------------------------------------------------------------------------------ memory


def weigh(case: Case, names) -> dict[str, float]:
    return {name: _in_a_process(case, weigh=name)["extra_mib"] for name in names}


def extra_mib(case: Case, name: str) -> float:
    """Peak resident memory during one call, over that before it, with the inputs in place; MiB.

    Counts all memory, the matmul library's and the outputs' included. Meant for a fresh process (`_in_a_process`), in
    which the allocator returns what it frees; a call on a small shape first starts threads and loads code.
    """
    shape = shapes.SHAPES[case.shape]
    peer = registry.peers(case.subject)[name]
    small = registry.make_inputs(case.subject, shapes.Shape("small", 64, 4096, shape.softcap), 8, DTYPES[case.dtype])
    peer.run(_for_peer(case, name, small))
    inputs = _for_peer(case, name, registry.make_inputs(case.subject, shape, case.rows, DTYPES[case.dtype]))
    if name == "torch.compile":  # the compiler's own memory is no part of a call's
        peer.run(inputs)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = _status_kib("VmRSS")
    peer.run(inputs)
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _in_a_process(case: Case, env: dict[str, str] | None = None, weigh: str | None = None) -> dict:
    """The case in a fresh interpreter, which prints its result as the last line."""
    settings = dict(os.environ) | (env or {})
    if weigh:  # every block over 64 KiB straight from the system and straight back
        settings |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "bench.one", json.dumps(asdict(case)), *([weigh] if weigh else [])]
    run = subprocess.run(command, env=settings, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if run.returncode:
        raise RuntimeError(f"{case.name}: {' '.join(command)} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------- the record


def environment() -> dict:
    """Where and when: what a reader needs to judge, or to repeat, the figures."""
    load = os.getloadavg()[0]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported(),
        "load_average_at_start": round(load, 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def write(name: str, record: dict, cases: list[dict]) -> Path:
    """bench/results/<name>.json: {"environment": ..., "cases": [...]}"""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": record, "cases": cases}, indent=1) + "\n")
    return path


def table(result: dict) -> str:
    """One case as text: time, ratio to the baseline with its quartiles, extra memory."""
    lines = [result["name"], f"  {'':32}{'median':>10}  {'/ ' + result['baseline']:>20}  {'quartiles':>13}  extra MiB"]
    for name, p in result["peers"].items():
        memory = "" if p["extra_mib"] is None else f"{p['extra_mib']:.1f}"
        quartiles = f"{p['ratio_low']:.2f}-{p['ratio_high']:.2f}"
        time_ms = f"{p['median_s'] * 1e3:.1f} ms"
        lines.append(f"  {name:32}{time_ms:>10}  {p['ratio']:>20.2f}  {quartiles:>13}  {memory:>9}")
    lines += [f"  {name:32}skipped: {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(lines)
