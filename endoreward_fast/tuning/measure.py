"""Check a candidate against float64 and time it beside torch.mm, in this process.

`python -m endoreward_fast.tuning.measure` reads requests from standard input and prints the answers (see child.py).
"""

import json
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import first_line
from ..vocab import reference
from ..vocab.choice import configured
from ..vocab.chunked_tiles import uses_native_matmul
from ..vocab.tuned import Choice, Head

CHECKED = 16
"""rows of each batch that are compared with float64"""
PART = 16384
"""vocabulary entries that are converted to float64 at a time"""
FIELDS = ("lse", "target_logit", "entropy")
LEAST_ROUNDS, MOST_ROUNDS = 3, 50
F32 = torch.float32
UNITS = 16
"""units in the last place of float32, at the size of the logits, that a result may be further off than eager torch"""
COVER_CYCLES = 4_000_000  # about 2 ms, in which the host queues a call

Oracle = dict[str, Any]
Checked = tuple[dict[str, float], str | None]
"""the largest errors, and the problem"""
Times = dict[str, dict[str, list[float]]]
"""seconds of each round, by the number of rows and by "candidate" or "matmul"."""


@dataclass(frozen=True)
class Inputs:
    """Random inputs, the same in every process: hidden (N, D) and weight (V, D) with logits of deviation 3."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor

    @classmethod
    def make(cls, head: Head, device: torch.device, rows: int) -> "Inputs":
        dtype, draw = getattr(torch, head.dtype), torch.Generator(device).manual_seed(0)

        def normal(count: int, deviation: float) -> Tensor:
            return torch.empty(count, head.dim, dtype=dtype, device=device).normal_(0, deviation, generator=draw)

        targets = torch.randint(head.vocab, (rows,), device=device, generator=draw)
        return cls(normal(rows, 1.0), normal(head.vocab, 3.0 / head.dim**0.5), targets)


def checked_rows(batches: list[int]) -> list[int]:
    """Return the rows to compare: CHECKED of each batch, its first and its last among them."""
    return sorted({i for n in batches for i in torch.linspace(0, n - 1, min(n, CHECKED)).long().tolist()})


def oracle_of(inputs: Inputs, batches: list[int]) -> Oracle:
    """Return float64 statistics of the checked rows, and how far a candidate's may be from them.

    As in the package's tests, that is the largest error of eager torch, plus UNITS. "exact" holds for candidates with
    float32 logits, "rounded" for those whose logits have the head's dtype. In bfloat16 the second is so wide that a
    candidate could leave out one part in a hundred of the vocabulary.
    """
    rows = checked_rows(batches)
    hidden, targets = inputs.hidden[rows], inputs.targets[rows]

    def stats(dtype: torch.dtype) -> Any:
        parts = [torch.mm(hidden.to(dtype), part.to(dtype).T) for part in inputs.weight.split(PART)]
        double = dtype == torch.float64
        return reference.vocab_stats(torch.cat(parts, 1), targets, entropy=True, dtype=dtype if double else F32)

    exact = stats(torch.float64)
    found: Oracle = {"rows": rows, **{name: getattr(exact, name).tolist() for name in FIELDS}}
    for kind, eager in (("exact", stats(F32)), ("rounded", stats(hidden.dtype))):
        found[kind] = {}
        for name in FIELDS:
            wanted = getattr(exact, name)
            error = (getattr(eager, name).double() - wanted).abs().max().item()
            found[kind][name] = error + UNITS * torch.finfo(F32).eps * max(10.0, wanted.abs().max().item())
    return found


def errors_of(stats: Any, n: int, oracle: Oracle) -> dict[str, float]:
    """Return the largest error of each field of a batch's statistics over the checked rows. NaN counts as infinite."""
    at = [i for i, row in enumerate(oracle["rows"]) if row < n]
    found = {}
    for name in FIELDS:
        if getattr(stats, name) is not None:
            got = getattr(stats, name)[[oracle["rows"][i] for i in at]].double().cpu()
            error = (got - torch.tensor([oracle[name][i] for i in at], dtype=torch.float64)).abs().max().item()
            found[name] = error if error == error else float("inf")
    return found


def wrong(errors: dict[str, float], allowed: dict[str, float]) -> str | None:
    """Describe the errors that are above what is allowed; None if there are none."""
    far = [name for name in errors if not errors[name] <= allowed[name]]
    off = ", ".join(f"{name} is off by {errors[name]:.1e} (allowed {allowed[name]:.1e})" for name in far)
    return f"wrong numbers: {off}" if far else None


def checked(forward: Callable, choice: Choice, inputs: Inputs, batches: list[int], oracle: Oracle) -> Checked:
    """Compare a candidate with the oracle, with and without entropy: these are two binaries of a kernel.

    The kernels promise the same bits from run to run. A race would break that, also in rows that are not compared.
    """
    worst = dict.fromkeys(FIELDS, 0.0)
    for n in batches:
        native = inputs.hidden.device.type == "cpu" and uses_native_matmul(inputs.hidden[:n], inputs.weight)
        allowed = oracle["rounded" if native and choice.impl != "fused" else "exact"]
        for entropy in (True, False):
            stats = _run(forward, inputs, n, entropy=entropy)
            errors = errors_of(stats, n, oracle)
            worst = {name: max(worst[name], errors.get(name, 0.0)) for name in FIELDS}
            if problem := wrong(errors, allowed):
                return worst, problem
        if choice.impl == "fused" and not torch.equal(stats.lse, _run(forward, inputs, n, entropy=False).lse):
            return worst, f"wrong numbers: two runs of {n} rows differ"
    return worst, None


def times_of(forward: Callable, inputs: Inputs, batches: list[int], seconds: float) -> Times:
    """Time the candidate and torch.mm in rounds, for `seconds` or LEAST_ROUNDS. The order alternates."""
    once, end = clock(inputs.hidden.device), time.monotonic() + seconds
    calls = {
        (n, name): call
        for n in batches
        for name, call in (
            ("matmul", lambda n=n: torch.mm(inputs.hidden[:n], inputs.weight.T)),
            ("candidate", lambda n=n: _run(forward, inputs, n, entropy=False)),
        )
    }
    for call in calls.values():
        call()
    found: Times = {str(n): {"matmul": [], "candidate": []} for n in batches}
    for i in range(MOST_ROUNDS):
        if i >= LEAST_ROUNDS and time.monotonic() >= end:
            break
        for (n, name), call in list(calls.items())[:: -1 if i % 2 else 1]:
            found[str(n)][name].append(once(call))
    return found


def clock(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """Return a function that times one call in seconds.

    On a GPU it is the device's time, without Python's: the device waits while the host queues the call. On one CPU
    thread it is the processor's time, which other programs do not lengthen.
    """

    def on_host(call: Callable[[], Any]) -> float:
        start = counter()
        kept = call()
        elapsed = counter() - start
        del kept  # freed outside of the measurement
        return elapsed

    def on_gpu(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(COVER_CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3

    counter = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    return on_gpu if device.type == "cuda" else on_host


def quartiles(numbers: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, middle, high


def _run(forward: Callable, inputs: Inputs, n: int, *, entropy: bool) -> Any:
    stats, _ = forward(
        inputs.hidden[:n], inputs.weight, inputs.targets[:n], bias=None, logit_scale=1.0, softcap=None, alpha=1.0,
        entropy=entropy, logit_mean=False,
    )  # fmt: skip
    return stats


@torch.no_grad()
def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Check, and time if `seconds` is not 0, the candidate of a request."""
    head, device, batches = Head(**request["head"]), torch.device(request["device"]), request["rows"]
    if request.get("threads"):
        torch.set_num_threads(request["threads"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    inputs = Inputs.make(head, device, max(batches))
    found: dict[str, Any] = {"oracle": request.get("oracle") or oracle_of(inputs, batches)}
    try:
        choice = Choice(**request["choice"])
        forward = configured(choice, inputs.hidden, inputs.weight).linear_forward
        found["errors"], problem = checked(forward, choice, inputs, batches, found["oracle"])
        if problem:
            return found | {"problem": problem}
        if request["seconds"]:
            found["times"] = times_of(forward, inputs, batches, request["seconds"])
    except Exception as error:  # a compiler, a launch or an allocation may raise anything
        return found | {"problem": f"{type(error).__name__}: {first_line(error)}"}
    return found | {"threads": torch.get_num_threads()}


if __name__ == "__main__":
    signal.alarm(int(sys.argv[1]))  # ends the process whatever it waits for
    print(json.dumps([answer(request) for request in json.load(sys.stdin)]))
