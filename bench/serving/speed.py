"""Throughput and latency beside scoring in-process: the same rows, model, dtype and threads, in one run.
Both have the default budget of tokens.

Rounds time every arm once, in an order that rotates. A ratio is taken within a round: tokens a second of the arm over
those in-process, which is one call `score(rows)`: it sees all rows at once, sorts them by length and reads each shared
prefix once. A server sees as many rows as clients wait for. What that costs without any HTTP is an arm as well: calls
`score` with IN_FLIGHT rows each.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench import prefixes
from bench.harness import timing
from bench.serving.load import Generator, Run
from bench.serving.results import Expected, WrongScore
from bench.serving.rows import Row, requests_for
from bench.serving.server import Server
from endoreward_fast import EndoRewardModel

IN_FLIGHT = 64
IN_PROCESS, LISTS = "in-process, one list", f"in-process, lists of {IN_FLIGHT}"
ONE_BY_ONE = "in-process, one row at a time"
WHOLE = "in-process, one list, prefixes not shared"
ARMS = ((1, 1), (8, 1), (64, 1), (8, 8))
"""(clients, rows of a request)"""
FOR_MANY_ROWS, MANY_ROWS = ((64, 8),), 512
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass
class Arm:
    """What was seen of one arm, a value a round."""

    clients: int | None = None
    rows_per_request: int | None = None
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """processor seconds of the process that scores"""
    generator_s: list[float] = field(default_factory=list)
    """processor seconds of the load generator"""
    latencies: list[float] = field(default_factory=list)
    """of all requests"""
    gap: float = 0.0
    repeated: int = 0
    """requests that were refused for a time and asked again"""


def named(clients: int, size: int) -> str:
    rows = "" if size == 1 else f", {size} rows a request"
    return f"{clients} client{'s' * (clients > 1)}{rows}"


class Wall:
    """A clock for calls that return their own seconds: the generator's clock does not count its reading of the job."""

    def seconds(self, call: Callable[[], float]) -> float:
        return call()


def run_case(
    scorer: EndoRewardModel, server: Server, generator: Generator, rows: Sequence[Row], expected: Expected, rounds: int,
    whole: bool = False, arms: Sequence[tuple[int, int]] = ARMS,
) -> dict:  # fmt: skip
    """Time every arm in `rounds` rounds. Returns the case's record.

    whole    time the list in-process without shared prefixes, too

    Raises WrongScore if an answer is missing or differs from the score in-process.
    """
    encoded = [{"prompt_ids": e.input_ids[: e.prompt_length], "completion_ids": e.input_ids[e.prompt_length :]}
               for e in scorer.encode(rows)]  # fmt: skip
    tokens = sum(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in encoded)
    lists = [rows[i : i + IN_FLIGHT] for i in range(0, len(rows), IN_FLIGHT)]
    computed = {
        IN_PROCESS: prefixes.computed(scorer, rows)[0],
        LISTS: sum(prefixes.computed(scorer, some)[0] for some in lists),
    }
    seen = {name: Arm() for name in (IN_PROCESS, LISTS, ONE_BY_ONE, *[WHOLE] * whole)}
    seen |= {named(*arm): Arm(*arm) for arm in arms}

    def in_process(name: str, lists: Sequence[Sequence[Row]], scorer: EndoRewardModel = scorer) -> float:
        start, busy = time.perf_counter(), time.process_time()
        for one in lists:
            scorer.score(one)
        seen[name].cpu_s.append(time.process_time() - busy)
        return time.perf_counter() - start

    def served(clients: int, size: int) -> float:
        arm, requests = seen[named(clients, size)], requests_for(rows, size)
        busy = server.cpu_s()
        run = generator.run(server.port, clients, requests)
        arm.cpu_s.append(server.cpu_s() - busy)
        note(arm, run, expected, size)
        return run.seconds

    calls = {IN_PROCESS: lambda: in_process(IN_PROCESS, [rows])}
    calls[ONE_BY_ONE] = lambda: in_process(ONE_BY_ONE, [[row] for row in rows])
    calls[LISTS] = lambda: in_process(LISTS, lists)
    if whole:
        calls[WHOLE] = lambda: in_process(WHOLE, [rows], prefixes.Whole(scorer.model, scorer.tokenizer))
    calls |= {named(*arm): lambda arm=arm: served(*arm) for arm in arms}
    for call in calls.values():  # warm: connections, caches, and the score of every row is checked
        call()
    for arm in seen.values():
        for values in (arm.cpu_s, arm.generator_s, arm.latencies):
            values.clear()
    for name, seconds in timing.interleave(calls, rounds, Wall()).items():
        seen[name].seconds = seconds
    return {
        "rows": len(rows), "tokens": tokens, "distinct": prefixes.trie_size(encoded), "computed": computed,
        "rounds": rounds,
        "arms": {name: summary(arm, seen[IN_PROCESS], seen[LISTS], tokens, len(rows)) for name, arm in seen.items()},
    }  # fmt: skip


def note(arm: Arm, run: Run, expected: Expected, size: int) -> None:
    """Check the replies of a run and keep what the summary needs."""
    for place, reply in enumerate(run.replies):
        if reply.status != 200:
            raise WrongScore(f"request {place} got {reply.status}: {reply.body[:200]}")
        arm.gap = max(arm.gap, expected.gap(range(place * size, (place + 1) * size), reply.body))
        arm.repeated += bool(reply.refused)
    arm.generator_s.append(run.cpu_s)
    arm.latencies.extend(reply.seconds for reply in run.replies)


def summary(arm: Arm, base: Arm, lists: Arm, tokens: int, rows: int) -> dict:
    """Summarise an arm beside `base` and `lists`: medians and quartiles over rounds, percentiles over all requests."""
    speeds = [tokens / s for s in arm.seconds]
    ratios = [b / s for b, s in zip(base.seconds, arm.seconds, strict=True)]
    found = {
        "clients": arm.clients, "rows_per_request": arm.rows_per_request,
        **spread("tokens_per_s", speeds), **spread("ratio", ratios),
        **spread("ratio_to_lists", [b / s for b, s in zip(lists.seconds, arm.seconds, strict=True)]),
        "ratio_of_minima": min(base.seconds) / min(arm.seconds),
        "cpu_ratio": statistics.median(b / c for b, c in zip(base.cpu_s, arm.cpu_s, strict=True)),
        "ms_of_processor_per_row": 1e3 * statistics.median(arm.cpu_s) / rows,
    }  # fmt: skip
    if arm.clients is None:
        return found
    ordered = sorted(arm.latencies)
    latency = {name: 1e3 * timing._quantile(ordered, q) for name, q in QUANTILES.items()}
    return found | {
        "latency_ms": latency | {"max": 1e3 * ordered[-1], "requests": len(ordered)},
        "generator_share": statistics.median(g / s for g, s in zip(arm.generator_s, arm.seconds, strict=True)),
        "gap": arm.gap, "repeated": arm.repeated,
    }  # fmt: skip


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    low, high = (timing._quantile(values, q) for q in (0.25, 0.75))
    return {name: statistics.median(values), f"{name}_low": low, f"{name}_high": high}
