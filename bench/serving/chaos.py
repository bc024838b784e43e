"""Many requests of which some are wrong, some are cancelled, and a replica may be killed. All others must be right.

5% of the requests are malformed, by each kind of `malformed` in turn. 1% are cancelled: the client sends the whole
request or a part of it, and closes the connection shortly after. Each of the others asks for one row, and has to get
one answer with the score that the row has in-process, within float noise.
"""

import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import psutil

from bench import soak
from bench.harness import timing
from bench.serving.load import Generator, Reply, Request, Run
from bench.serving.results import Expected, WrongScore
from bench.serving.rows import Row, post
from bench.serving.server import Server

CLIENTS = 64
MALFORMED_SHARE, CANCELLED_SHARE = 0.05, 0.01
LONGEST_PATIENCE = 0.06
"""seconds after which the last of the cancelling clients closes; an answer takes longer"""
MIB = 1 << 20
OTHERS = ("proxy",)
"""processes of Ray itself, whose memory is recorded and not judged"""
FLAGS, ARGUMENTS = ("--max-request-mb", "1"), {"max_request_mb": 1}
"""of the server, by command and on Ray: so that a body that is too large is small"""


@dataclass(frozen=True)
class Planned:
    """One request of the mix."""

    request: Request
    row: int | None = None
    """the row that it asks for; None: it is malformed"""
    kind: str = "row"
    """"row", "cancelled" or a key of `malformed`"""
    status: int = 200
    """what a malformed request has to get"""


def malformed(row: Row, **headers: str) -> dict[str, tuple[Request, int]]:
    """Return {kind: (request, its status)}. Each is what `row` asks for with one thing wrong.

    The server has to be started with `FLAGS`.
    """
    good = json.dumps({"rows": [row]}).encode()
    deep = b'{"rows": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    ids = {"prompt_ids": [1, 2], "completion_ids": [10**9]}
    bodies = {
        "cut JSON": (good[:-2], 400),
        "NaN": (good[:-1] + b', "alpha": NaN}', 400),
        "nested 100,000 deep": (deep, 400),
        "a list": (b"[1, 2]", 422),
        "no rows": (b"{}", 422),
        "unknown columns": (b'{"rows": [{"text": "five"}]}', 422),
        "ids outside the vocabulary": (json.dumps({"rows": [ids]}).encode(), 422),
        "an unknown option": (good[:-1] + b', "alhpa": 2}', 422),
        "an option out of range": (good[:-1] + b', "alpha": -1}', 422),
        "another model's name": (good[:-1] + b', "model": "/etc/passwd"}', 404),
    }
    found = {kind: (post(body, **headers), status) for kind, (body, status) in bodies.items()}
    found["an unknown path"] = (post(good, "/v1/scores", **headers), 404)
    found["GET"] = (post(good, **headers).replace(b"POST", b"GET", 1), 405)
    found["not application/json"] = (post(good, **headers | {"content_type": "text/plain"}), 415)
    found["too many rows"] = (post({"rows": [row] * 2000}, **headers), 413)
    found["too large"] = (post(b" " * (MIB + 1) + good, **headers), 413)
    if "authorization" in headers:
        found["a wrong token"] = (post(good, **headers | {"authorization": "Bearer no-token-of-this-server"}), 401)
    return {kind: (Request(content), status) for kind, (content, status) in found.items()}


def mix(rows: Sequence[Row], count: int, seed: int = 0, **headers: str) -> list[Planned]:
    """Return `count` requests, the same for the same seed."""
    drawn = random.Random(seed)
    wrong, cancelled = round(MALFORMED_SHARE * count), round(CANCELLED_SHARE * count)
    kinds = ["malformed"] * wrong + ["cancelled"] * cancelled + ["row"] * (count - wrong - cancelled)
    drawn.shuffle(kinds)
    bad = list(malformed(rows[0], **headers).items())
    asked = [Request(post({"rows": [row]}, **headers)) for row in rows]
    plan, turn = [], 0
    for place, kind in enumerate(kinds):
        row = place % len(rows)
        if kind == "malformed":
            name, (request, status) = bad[turn % len(bad)]
            plan.append(Planned(request, None, name, status))
            turn += 1
        elif kind == "cancelled":
            content = asked[row].content
            cut = drawn.choice((None, len(content) - drawn.randrange(1, len(content) // 2)))
            plan.append(Planned(Request(content, drawn.uniform(0, LONGEST_PATIENCE), cut), row, kind))
        else:
            plan.append(Planned(asked[row], row))
    return plan


def judge(plan: Sequence[Planned], replies: Sequence[Reply], expected: Expected) -> dict:
    """Return what came of the requests by kind, the largest difference of a score, and what is wrong."""
    wrong, gap, by_kind = [], 0.0, {}
    for place, (planned, reply) in enumerate(zip(plan, replies, strict=True)):
        by_kind.setdefault(planned.kind, Counter())[str(reply.status)] += 1
        if reply.surplus:
            wrong.append(f"request {place}: {reply.surplus} bytes came before it was sent")
        if planned.kind == "cancelled" and reply.status == -1:
            continue
        if reply.status != planned.status:
            wrong.append(
                f"request {place} ({planned.kind}) got {reply.status}, not {planned.status}: {reply.body[:200]}"
            )
        elif planned.row is None:
            if not isinstance(json.loads(reply.body).get("error"), str):
                wrong.append(f"request {place} ({planned.kind}): no error in {reply.body[:200]}")
        else:
            try:
                gap = max(gap, expected.gap([planned.row], reply.body))
            except WrongScore as error:
                wrong.append(f"request {place}: {error}")
    return {
        "kinds": {kind: dict(counts) for kind, counts in sorted(by_kind.items())}, "gap": gap, "wrong": wrong,
        "refused_for_a_time": dict(Counter(str(s) for reply in replies for s in reply.refused)),
        "repeated": sum(bool(reply.refused) for reply in replies),
    }  # fmt: skip


Memory = dict[str, list[tuple[float, float]]]
"""readings of resident memory, one list for each process: (time.perf_counter(), MiB)"""


@contextmanager
def watched(server: Server, every: float = 0.25) -> Iterator[Memory]:
    """Read the memory of the server's processes until the block ends. A process that ends is read no more."""
    memory, over = {}, threading.Event()

    def watch() -> None:
        while not over.wait(every):
            for name, process in server.processes().items():
                try:
                    mib = process.memory_info().rss / MIB
                except psutil.NoSuchProcess:
                    continue
                memory.setdefault(name, []).append((time.perf_counter(), round(mib, 2)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        over.set()
        thread.join()


def readings(seen: Sequence[tuple[float, float]], run: Run) -> list[soak.Reading]:
    """Return the readings from the first request to the last answer, each with the number of answers until then."""
    ends = sorted(reply.began + reply.seconds for reply in run.replies)
    found, done = [], 0
    for at, mib in seen:
        seconds = at - run.started
        while done < len(ends) and ends[done] <= seconds:
            done += 1
        if 0 <= seconds <= run.seconds and mib:  # a process that was killed has none
            found.append(soak.Reading(round(seconds, 2), done, mib))
    return found


def flat(found: Sequence[soak.Reading], total: int) -> dict:
    """Return first, last and highest memory, and its growth over the second half of the answers (`soak.growth`).

    The growth is None for a process that did not live through the whole run. The slope is the same in MiB.
    """
    whole = found[0].rows < total / 10 and found[-1].rows > 0.9 * total
    mib = [reading.mib for reading in found]
    growth = soak.growth(list(found)) if whole else None
    return {
        "first": mib[0], "last": mib[-1], "highest": max(mib), "growth_of_second_half": growth,
        "mib_per_1000_requests": None if growth is None else round(growth * mib[-1] / (total / 2000), 3),
        "readings": [asdict(reading) for reading in found],
    }  # fmt: skip


def run(
    server: Server, generator: Generator, rows: Sequence[Row], expected: Expected, count: int,
    kill: Callable[[], dict] | None = None, clients: int = CLIENTS, every: float = 0.25,
) -> dict:  # fmt: skip
    """Send the mix once. Returns the record; its "wrong" is empty if all checks passed.

    kill    kills a replica; called when half of the requests are sent
    """
    plan = mix(rows, count, **server.headers())
    killed: list[dict] = []
    generator.run(server.port, clients, [one.request for one in plan if one.kind == "row"][: 4 * clients])  # warm
    before = server.metrics()
    with watched(server, every) as memory:
        found = generator.run(
            server.port, clients, [one.request for one in plan], mark=count // 2 if kill else None,
            marked=lambda: killed.append(kill()),
        )  # fmt: skip
    record = judge(plan, found.replies, expected)
    seen = {name: readings(of_one, found) for name, of_one in memory.items()}
    record["memory_mib"] = {name: flat(of_one, count) for name, of_one in seen.items() if of_one}
    for name, memory_of in record["memory_mib"].items():
        grown = memory_of["growth_of_second_half"]
        if grown is not None and grown > soak.GROWTH and name not in OTHERS:
            record["wrong"].append(f"memory of {name} grew by {grown:.1%} in the second half")
    answered = [reply for one, reply in zip(plan, found.replies, strict=True) if one.kind == "row"]
    ordered = sorted(reply.seconds for reply in answered)
    return {
        "requests": count, "clients": clients, "rows": len(rows), "seconds": found.seconds,
        "requests_per_s": count / found.seconds, "killed": killed[0] if killed else None,
        "latency_ms": {
            "p50": 1e3 * statistics.median(ordered), "p95": 1e3 * timing._quantile(ordered, 0.95),
            "p99": 1e3 * timing._quantile(ordered, 0.99), "max": 1e3 * ordered[-1],
        },
        "metrics": {name: value - before.get(name, 0.0) for name, value in server.metrics().items()
                    if name.startswith("endoreward")},
        **record,
    }  # fmt: skip
