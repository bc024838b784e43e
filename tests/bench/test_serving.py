"""bench.serving: its load generator and its checks against a small server that goes wrong on request."""

import asyncio
import json
import os
import socket
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import uvicorn

from bench import soak
from bench.harness import timing
from bench.serving import chaos, load, on_ray, rows, server, shown, speed
from bench.serving.load import Reply, Request, Run
from bench.serving.results import Expected, WrongScore
from endoreward_fast import EndoRewardModel
from endoreward_fast.serving.app import create_app
from endoreward_fast.serving.limits import Limits
from endoreward_fast.serving.metrics import Metrics
from endoreward_fast.serving.run import Local
from endoreward_fast.serving.service import Served, Service

ROWS = [{"prompt": "p", "completion": str(n)} for n in range(20)]
EXPECTED = Expected([float(n) for n in range(20)])


class Small:
    """A server whose score of a row is the number in its completion. `answer` may be replaced."""

    def __init__(self):
        self.seen, self.lost, self.answer, self.port = [], 0, self.right, None

    def right(self, head, body):
        """Return (status, content, further headers) for a request."""
        return 200, {"rows": [{"score": float(row["completion"])} for row in json.loads(body)["rows"]]}, {}

    async def talk(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                size = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
                body = await reader.readexactly(min(size, 10**6))
                self.seen.append(body)
                status, content, headers = self.answer(head, body)
                await asyncio.sleep(headers.pop("delay", 0))
                data = json.dumps(content).encode()
                lines = [f"{name}: {value}" for name, value in headers.items()]
                writer.write(
                    "\r\n".join([f"HTTP/1.1 {status} x", f"Content-Length: {len(data)}", *lines, "", ""]).encode()
                )
                writer.write(data)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.lost += 1
        finally:
            writer.close()


@contextmanager
def running(small):
    ready, ends = threading.Event(), []

    async def serve():
        over = asyncio.Event()
        found = await asyncio.start_server(small.talk, "127.0.0.1", 0)
        small.port = found.sockets[0].getsockname()[1]
        ends.append((asyncio.get_running_loop(), over))
        ready.set()
        await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    try:
        yield small
    finally:
        loop, over = ends.pop()
        loop.call_soon_threadsafe(over.set)
        thread.join()


@pytest.fixture
def small():
    with running(Small()) as found:
        yield found


def ask(small, requests, clients=4, **more):
    return asyncio.run(load.drive("127.0.0.1", small.port, clients, requests, **more))


def test_every_request_gets_its_own_reply_in_order(small):
    run = ask(small, rows.requests_for(ROWS, 1), clients=7)
    assert [json.loads(reply.body)["rows"][0]["score"] for reply in run.replies] == EXPECTED.scores
    assert {reply.status for reply in run.replies} == {200} and len(small.seen) == 20
    assert all(reply.began >= 0 and 0 < reply.seconds <= run.seconds for reply in run.replies)


def test_requests_for_groups_hold_every_row_once(small):
    run = ask(small, rows.requests_for(ROWS, 8))
    assert [len(json.loads(reply.body)["rows"]) for reply in run.replies] == [8, 8, 4]


@pytest.mark.parametrize("status", load.RETRYABLE)
def test_a_request_that_is_refused_for_a_time_is_sent_again_after_retry_after(small, status):
    refusals = iter([True])
    small.answer = lambda head, body: (
        (status, {"error": "later"}, {"Retry-After": "0.2"}) if next(refusals, False) else small.right(head, body)
    )
    run = ask(small, rows.requests_for(ROWS[:3], 1), clients=1)
    assert [reply.status for reply in run.replies] == [200] * 3
    assert run.replies[0].refused == (status,) and run.replies[0].seconds >= 0.2 and len(small.seen) == 4


def test_a_lost_connection_is_status_0_and_the_next_request_opens_another(small):
    def answer(head, body):
        if len(small.seen) == 2:
            raise ConnectionError
        return small.right(head, body)

    small.answer = answer
    run = ask(small, rows.requests_for(ROWS[:4], 1), clients=1)
    assert [reply.status for reply in run.replies] == [200, 0, 200, 200]


def test_a_client_that_cancels_closes_its_connection_and_goes_on(small):
    small.answer = lambda head, body: (*small.right(head, body)[:2], {"delay": 0.1})
    whole = rows.requests_for(ROWS[:1], 1)[0].content
    cancelled = [Request(whole, 0.01), Request(whole, 0.01, len(whole) - 5)]
    run = ask(small, [*cancelled, Request(whole)], clients=1)
    assert [reply.status for reply in run.replies] == [-1, -1, 200]
    assert len(small.seen) == 2  # one body never came whole


def test_an_answer_that_nobody_asked_for_is_seen(small):
    talk = small.talk

    async def twice(reader, writer):
        write = writer.write
        writer.write = lambda data: write(data if data.startswith(b"HTTP") else data + b"HTTP/1.1 200 x\r\n")
        await talk(reader, writer)

    small.talk = twice
    with running(small):
        run = ask(small, rows.requests_for(ROWS[:3], 1), clients=1)
    assert [reply.surplus > 0 for reply in run.replies] == [False, True, True]
    found = chaos.judge([chaos.Planned(Request(b""), n) for n in range(3)], run.replies, EXPECTED)
    assert "bytes came before it was sent" in found["wrong"][0]


def test_the_generator_in_its_process_gives_the_same_and_says_when_it_reaches_the_mark(small, tmp_path):
    marks = []
    with load.generator(tmp_path) as generator:
        for _ in range(2):
            run = generator.run(
                small.port, 3, rows.requests_for(ROWS, 1), mark=10, marked=lambda: marks.append(len(small.seen))
            )  # fmt: skip
            speed.note(arm := speed.Arm(3, 1), run, EXPECTED, 1)
    assert arm.gap == 0 and len(arm.latencies) == 20 and 0 < run.cpu_s < 5
    assert len(marks) == 2 and 7 <= marks[0] <= 20


def test_the_mix_has_its_shares_and_every_kind():
    plan = chaos.mix(ROWS, 2000, authorization="Bearer secret")
    kinds = [one.kind for one in plan]
    assert kinds.count("cancelled") == 20 and kinds.count("row") == 1880
    assert set(kinds) == {"row", "cancelled", *chaos.malformed(ROWS[0], authorization="Bearer secret")}
    assert {one.status for one in plan if one.row is None} == {400, 401, 404, 405, 413, 415, 422}
    assert all(b"Bearer" in one.request.content for one in plan)
    assert sum(b"Bearer secret" not in one.request.content for one in plan) == kinds.count("a wrong token")
    assert [one.request for one in plan] == [
        one.request for one in chaos.mix(ROWS, 2000, authorization="Bearer secret")
    ]


def reply(score, status=200, **more):
    return Reply(status, 0, 0.1, json.dumps({"rows": [{"score": score}]}), **more)


@pytest.mark.parametrize(
    ("replies", "said"),
    [
        ([reply(0.0), reply(1.0 + 1e-5)], None),
        ([reply(1.0), reply(0.0)], "row 0 scores 1.0, and 0.0 in-process"),
        ([reply(0.0), reply(1.001)], "row 1 scores 1.001"),
        ([reply(0.0), reply(None)], "row 1 scores None"),
        ([reply(0.0), reply(float("nan"))], "row 1 scores nan"),
        ([reply(0.0), Reply(500, 0, 0.1, "oh")], "got 500, not 200: oh"),
        ([reply(0.0), Reply(0, 0, 0.1)], "got 0, not 200"),
        ([reply(0.0), Reply(-1, 0, 0.1)], "got -1, not 200"),
        ([reply(0.0), Reply(200, 0, 0.1, '{"rows": []}')], "0 results for 1 rows"),
    ],
)
def test_a_wrong_reply_is_found(replies, said):
    found = chaos.judge([chaos.Planned(Request(b""), n) for n in range(2)], replies, EXPECTED)["wrong"]
    assert found == [] if said is None else len(found) in (1, 2) and said in found[0]


def test_a_malformed_request_needs_its_own_status_and_a_line_that_says_why():
    plan = [chaos.Planned(Request(b""), None, "NaN", 400)]
    for status, body, fine in ((400, '{"error": "no"}', True), (422, '{"error": "no"}', False), (400, "{}", False)):
        assert (chaos.judge(plan, [Reply(status, 0, 0.1, body)], EXPECTED)["wrong"] == []) is fine


def test_a_cancelled_request_may_be_answered_before_and_then_has_to_be_right():
    plan = [chaos.Planned(Request(b""), 1, "cancelled")]
    assert chaos.judge(plan, [Reply(-1, 0, 0.1)], EXPECTED)["wrong"] == []
    assert chaos.judge(plan, [reply(1.0)], EXPECTED)["wrong"] == []
    assert chaos.judge(plan, [reply(2.0)], EXPECTED)["wrong"]


def test_memory_is_read_against_answers_and_a_leak_is_found():
    run = Run(100.0, 10.0, 1.0, [Reply(200, n / 10, 0.1) for n in range(100)])
    times = [99 + n / 10 for n in range(130)]
    steady = chaos.flat(chaos.readings([(at, 300.0) for at in times], run), 100)
    assert (steady["first"], steady["growth_of_second_half"]) == (300, 0)
    assert steady["readings"][0]["seconds"] >= 0 and steady["readings"][-1]["rows"] == 100
    leak = chaos.flat(chaos.readings([(at, 300 + 4 * (at - 99)) for at in times], run), 100)
    assert leak["growth_of_second_half"] > 0.03
    killed = chaos.flat(chaos.readings([(at, 300.0) for at in times if at < 105], run), 100)
    assert killed["growth_of_second_half"] is None and killed["last"] == 300


def test_an_answer_in_another_score_is_refused_before_it_is_timed():
    run = Run(0.0, 1.0, 0.1, [reply(0.5)])
    with pytest.raises(WrongScore, match=r"row 0 scores 0\.5"):
        speed.note(speed.Arm(1, 1), run, EXPECTED, 1)
    with pytest.raises(WrongScore, match="request 0 got 503"):
        speed.note(speed.Arm(1, 1), Run(0.0, 1.0, 0.1, [Reply(503, 0, 1, "full")]), EXPECTED, 1)


def test_in_bfloat16_the_noise_in_process_says_what_is_allowed():
    scorer = EndoRewardModel.from_pretrained("pocket", dtype="bfloat16")
    expected = Expected.of(scorer, rows.quiz(12))
    assert 1e-3 < expected.noise < 1 and expected.allowed(3) == 2 * expected.noise
    assert EXPECTED.allowed(10) == pytest.approx(2e-4)


def test_ratios_are_taken_within_a_round():
    base = speed.Arm(seconds=[1.0, 2.0, 1.0], cpu_s=[1.0, 1.0, 1.0])
    arm = speed.Arm(8, 1, [2.0, 4.0, 1.0], [1.25] * 3, [0.1] * 3, [i / 1000 for i in range(1, 101)])
    lists = speed.Arm(seconds=[2.0] * 3, cpu_s=[1.0] * 3)
    found = speed.summary(arm, base, lists, 1000, 50)
    assert found["ratio_to_lists"] == 1.0 and (found["ratio_to_lists_low"], found["ratio_to_lists_high"]) == (0.75, 1.5)
    assert found["ratio"] == 0.5 and found["cpu_ratio"] == 0.8 and found["ms_of_processor_per_row"] == 25
    assert found["latency_ms"]["p50"] == pytest.approx(50.5) and found["latency_ms"]["max"] == 100
    assert found["tokens_per_s"] == 500 and found["latency_ms"]["requests"] == 100


def test_the_processes_of_ray_get_names_that_stay(monkeypatch):
    titles = {
        7: "ray::ServeReplica:rewards:Model", 8: "ray::ServeReplica:rewards:Ingress", 9: "ray::IDLE", 11: "raylet",
        10: "ray::ServeReplica:rewards:Model.answer", 12: "ray::ProxyActor",
    }  # fmt: skip
    killed = []

    def listed(recursive):
        return [
            SimpleNamespace(pid=p, cmdline=lambda p=p: [titles[p]], kill=lambda p=p: killed.append(p)) for p in titles
        ]

    monkeypatch.setattr(on_ray.psutil, "Process", lambda pid: SimpleNamespace(children=listed))
    ray = on_ray.OnRay(SimpleNamespace(pid=1), 0)
    assert {n: p.pid for n, p in ray.processes().items()} == {
        "replica 1": 7,
        "ingress": 8,
        "replica 2": 10,
        "proxy": 12,
    }
    assert ray.kill()["name"] == "replica 1" and killed == [7]
    del titles[7]
    titles[13] = "ray::ServeReplica:rewards:Model"
    assert {"replica 2", "replica 3"} <= ray.processes().keys() and "replica 1" not in ray.processes()


def test_a_short_run_of_the_mix_against_the_real_application(tmp_path):
    scorer, metrics, limits = EndoRewardModel.from_pretrained("pocket"), Metrics(), Limits(request_bytes=chaos.MIB)
    listed = rows.quiz(16)
    expected = Expected.of(scorer, listed)
    service = Service(scorer, Served(("pocket",), "weights"), limits=limits, metrics=metrics)
    app = create_app(Local(service), limits=limits, token=b"a-token-of-tests", metrics=metrics)
    with socket.create_server(("127.0.0.1", 0)) as listening, load.generator(tmp_path) as generator:
        web = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=web.run, kwargs={"sockets": [listening]})
        thread.start()
        here = server.Server(SimpleNamespace(pid=os.getpid()), listening.getsockname()[1], "a-token-of-tests")
        try:
            found = chaos.run(here, generator, listed, expected, 320, clients=16, every=0.02)
        finally:
            web.should_exit = True
            thread.join()
            service.close()
    assert [w for w in found["wrong"] if "memory" not in w] == []  # too short a run to judge memory
    assert found["kinds"].keys() == {"row", "cancelled", *chaos.malformed(listed[0], authorization="x")}
    assert found["gap"] < 1e-3 and found["metrics"]["endoreward_queue_rows"] == 0
    assert found["metrics"]["endoreward_requests_total"] >= 300


def test_metrics_are_summed_over_labels_without_buckets():
    text = '# HELP x y\nx_total{path="/a",status="200"} 3.0\nx_total{path="/b"} 2\nh_bucket{le="1"} 7\nh_sum 1e3\n'
    assert server.sums(text) == {"x_total": 5, "h_sum": 1000}


def test_rows_of_groups_share_their_prompt_and_differ_in_their_completion():
    found = rows.groups(20)
    assert len(found) == 20 and len({row["prompt"] for row in found[:8]}) == 1
    assert len({row["completion"] for row in found[:8]}) == 8 and found[8]["prompt"] != found[0]["prompt"]


def test_the_record_in_results_has_every_step_and_nothing_wrong():
    record = json.loads((timing.RESULTS / "serving.json").read_text())
    cases = {case["step"]: case for case in record["cases"]}
    assert {"quiz", "groups", "smollm2", "chaos", "chaos-ray"} <= cases.keys()
    for case in record["cases"]:
        if case["kind"] == "chaos":
            assert case["wrong"] == [] and case["requests"] == 10_000 and case["kinds"]["row"] == {"200": 9400}
            ours = [m for name, m in case["memory_mib"].items() if name not in chaos.OTHERS]
            assert all((m["growth_of_second_half"] or 0) < soak.GROWTH for m in ours)
        else:
            assert {"1 client", "8 clients", "64 clients"} <= case["arms"].keys()
    assert cases["chaos-ray"]["killed"]["signal"] == "SIGKILL"


def test_the_record_becomes_a_table_and_a_picture(tmp_path):
    base = speed.Arm(None, None, [1.0], [1.0])
    arms = {speed.IN_PROCESS: speed.summary(base, base, base, 9, 3)}
    for clients, size in speed.ARMS:
        arm = speed.Arm(clients, size, [1.1], [1.2], [0.1], [0.01, 0.02])
        arms[speed.named(clients, size)] = speed.summary(arm, base, base, 9, 3)
    named = {"model": "pocket", "workload": "quiz", "dtype": "float32", "threads": 1, "load": 0.5, "load_after": 1}
    case = named | {"kind": "speed", "rows": 3, "tokens": 9, "distinct": 9, "rounds": 1, "arms": arms}
    run = Run(100.0, 10.0, 1.0, [Reply(200, n / 10, 0.1) for n in range(100)])
    memory = {"server": chaos.flat(chaos.readings([(100 + n / 10, 300.0) for n in range(100)], run), 100)}
    plan = [chaos.Planned(Request(b""), 1)]
    storm = named | {"kind": "chaos", "server": "plain", "requests": 100, "seconds": 10, "memory_mib": memory}
    storm |= {"latency_ms": {"p50": 1, "p95": 2, "p99": 3}, "killed": None, **chaos.judge(plan, [reply(1.0)], EXPECTED)}
    assert "64 clients" in shown.table(case) and "all checks passed" in shown.sentence(storm)
    (tmp_path / "serving.json").write_text(
        json.dumps(
            {
                "environment": {"cpu": "x", "cores": 2, "threads": 1, "torch": "2", "date": "2026"},
                "cases": [case, storm],
            }
        )
    )
    assert shown.draw(tmp_path).stat().st_size > 10_000
