"""What is refused before a request reaches the model: hosts, headers, bodies of odd kinds and of too many parts."""

import base64
import gzip
import json
import math
import threading

import pytest

from endoreward_fast.serving import connection, guard
from endoreward_fast.serving.answers import Answer
from endoreward_fast.serving.app import LARGE, _in_parts, _is_small
from endoreward_fast.serving.limits import Limits
from served import Gated, half_open, serving

TOKEN = b"a-token-of-many-letters"
PAIR = {"prompt": "What is 2 + 3?", "completion": "5"}
LIMITS = Limits(request_bytes=2_000_000, rows=40, tokens=9000, seconds=20)


@pytest.fixture(scope="module")
def pocket():
    return Gated.pocket()


@pytest.fixture(scope="module")
def server(pocket):
    with serving(pocket, limits=LIMITS) as (asker, local):
        asker.local = local
        yield asker


def raw(server, *lines):
    with half_open(server.url) as opened:
        opened.sendall("\r\n".join((*lines, "Connection: close", "", "")).encode())
        return b"".join(iter(lambda: opened.recv(4096), b""))


# --- the host
@pytest.mark.parametrize("host", ["127.0.0.2", "127.0.0.1:9", "LocalHost", "localhost:", "[::1]", "[::1]:80"])
def test_names_of_this_machine(server, host):
    assert server.get("/v1/model", Host=host).status == 200


@pytest.mark.parametrize("host", ["evil", "localhost.evil", "localhost@evil", ":80", "10.0.0.1", "0.0.0.0", "::"])
def test_other_names(server, host):
    assert server.get("/v1/model", Host=host).status == 403


def test_every_host_of_a_request_counts(server):
    for hosts in (["localhost", "evil"], ["evil", "localhost"]):
        assert b" 403 " in raw(server, "GET /v1/model HTTP/1.1", *(f"Host: {host}" for host in hosts))[:20]


# --- paths
def test_no_path_is_redirected_to_the_host_of_the_request(server):
    for path in ("/v1/rewards/", "/health/", "//health", "/health/../v1/model"):
        answer = raw(server, f"POST {path} HTTP/1.1", "Host: localhost:1", "Content-Length: 0")
        assert b" 404 " in answer[:20] and b"location" not in answer.lower()


def test_only_the_open_paths_need_no_token(pocket):
    with serving(pocket, token=TOKEN) as (asker, _):
        for path in (
            "//health",
            "/health/",
            "/health/../v1/model",
            "/health%2f..%2fv1%2fmodel",
            "/HEALTH",
            "/health;x",
        ):
            assert b" 401 " in raw(asker, f"GET {path} HTTP/1.1", "Host: a")[:20]
        wrong = base64.b64encode(TOKEN + b":x").decode()
        assert asker.get("/v1/model", Authorization=f"Basic {wrong}").status == 401
        metrics = asker.get("/metrics").data.decode()
    assert 'endoreward_requests_total{path="other",status="401"} 7.0' in metrics


# --- heads, which everybody may send
@pytest.mark.parametrize("endless", ["X-{}: " + "a" * 1000 + "\r\n", "a" * 1000])
def test_an_endless_head_is_refused(server, endless):
    """Without a limit it fills the memory, and no token is needed for it."""
    with half_open(server.url) as opened:
        opened.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        with pytest.raises(OSError):
            for n in range(100_000):
                opened.sendall(endless.format(n).encode())
    assert server.get("/health").status == 200


def test_heads_after_bodies_and_in_one_packet_are_counted_alone(server):
    body = json.dumps({"rows": [{"prompt": "a " * 30_000, "completion": "b"}]})
    head = (
        f"POST /v1/rewards HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    with half_open(server.url) as opened:
        opened.sendall((f"{head}\r\n\r\n{body}" * 3 + "GET /health HTTP/1.0\r\n\r\n").encode())
        said = b"".join(iter(lambda: opened.recv(4096), b""))
    assert said.count(b"HTTP/1.1 ") == 4 and b"alive" in said


@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nHost: lo"])
def test_a_connection_that_asks_nothing_is_closed(server, monkeypatch, begun):
    monkeypatch.setattr(connection, "SECONDS", 0.2)
    with half_open(server.url) as idle:
        idle.sendall(begun)
        assert idle.recv(100) == b""


def test_a_connection_is_not_closed_while_a_request_is_answered(server, pocket, monkeypatch):
    """The second request comes before the first answer."""
    monkeypatch.setattr(connection, "SECONDS", 0.1)
    body = json.dumps({"rows": [PAIR]})
    lines = ("POST /v1/rewards HTTP/1.0", "Content-Type: application/json", f"Content-Length: {len(body)}", "", body)
    pocket.gate.clear()
    opens = threading.Timer(0.4, pocket.gate.set)
    opens.start()
    with half_open(server.url) as opened:
        opened.sendall(("GET /health HTTP/1.1\r\n\r\n" + "\r\n".join(lines)).encode())
        said = b"".join(iter(lambda: opened.recv(4096), b""))
    opens.join()
    assert b"alive" in said and b"score" in said


# --- bodies
def test_a_packed_body_is_refused_as_such(server):
    body = gzip.compress(json.dumps({"rows": [PAIR]}).encode())
    answer = server.post("/v1/rewards", body, **{"Content-Encoding": "gzip"})
    assert answer.status == 415 and "without compression" in answer.json()["error"]
    assert server.post("/v1/rewards", {"rows": [PAIR]}, **{"Content-Encoding": "identity"}).status == 200


def test_a_body_after_an_upgrade_is_refused_as_such(server):
    """curl --http2 and Java's client ask for an upgrade with the body, which httptools then does not read."""
    body = json.dumps({"rows": [PAIR]})
    lines = ("POST /v1/rewards HTTP/1.1", "Host: localhost", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c")
    lines += ("HTTP2-Settings: AAMAAABkAAQAAP__", "Content-Type: application/json", f"Content-Length: {len(body)}")
    with half_open(server.url) as opened:
        opened.sendall("\r\n".join((*lines, "", body)).encode())
        said = b"".join(iter(lambda: opened.recv(4096), b""))
    assert b" 400 " in said[:20] and b"--http1.1" in said


def test_a_byte_order_mark_is_no_error(server):
    assert server.post("/v1/rewards", json.dumps({"rows": [PAIR]}).encode("utf-8-sig")).status == 200


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/rewards", {"rows": [[]] * 1025}, "rows: 1025 entries"),
        ("/v1/rewards", {"rows": [1] * 1025}, "rows: 1025 entries"),
        ("/get_reward", {"query": ["a"] * 1025, "prompts": ["a"] * 1025}, "query: 1025 entries"),
        ("/classify", {"messages": [{}] * 1025}, "messages: 1025 entries"),
        ("/classify", {"input": [[1]] * 1025}, "input: 1025 entries"),
        ("/slime", {"prompt": [{}] * 1025, "response": "a"}, "prompt: 1025 entries"),
        ("/v1/rewards", {"rows": [{"prompt_ids": [1] * 90_000, "completion_ids": [1]}]}, "more than 83536 values"),
    ],
)  # fmt: skip
def test_a_body_of_many_parts_is_refused_in_one_line(server, path, body, said):
    """Each part would be looked at and answered, which takes a minute for the millions that fit into 16 MB."""
    answer = server.post(path, body)
    assert answer.status == 413 and said in answer.json()["error"] and len(answer.data) < 300


def test_many_token_ids_and_turns_are_no_long_list(server):
    assert server.post("/classify", {"input": [1] * 2000}).status == 200
    turns = [{"role": role, "content": "a"} for _ in range(30) for role in ("user", "assistant")]
    assert server.post("/classify", {"messages": turns}).json()["data"][0]["probs"][0] > -1e6


def test_names_that_are_no_text_get_a_line(server):
    for body in ({"rows": [{"\ud800": 1}]}, {"rows": [PAIR], "\ud800": 1}, {"rows": [PAIR], "model": "\ud800"}):
        assert server.post("/v1/rewards", body).status in (404, 422)


def test_a_body_that_stops_coming_is_given_up(pocket, monkeypatch):
    """Long before the time limit, because it takes room that others need."""
    monkeypatch.setattr(guard, "PATIENCE", 0.2)
    with serving(pocket, limits=LIMITS) as (asker, _), half_open(asker.url) as slow:
        lines = ("POST /v1/rewards HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Content-Length: 9")
        slow.sendall("\r\n".join((*lines, "", "{")).encode())
        said = slow.recv(400)
        assert b" 408 " in said[:20] and b"1 bytes in 0.2 s" in said


# --- answers
@pytest.mark.parametrize(
    "content",
    [3.5, None, [], {}, {"a": []}, {"a": [1, {"b": "é"}], "c": {"d": None}, "e": "\ud800"}, {"a": [[1, 2]] * 3}],
)
def test_parts_of_an_answer_are_its_json(content):
    assert json.loads(_in_parts(content)) == content


def test_a_large_answer_is_known_by_its_values():
    assert _is_small({"rows": [{"score": 1.0}] * 100}) and _is_small(3.5)
    assert not _is_small({"rows": [{"token_rewards": {"rewards": [0.5] * LARGE}}]})
    assert not _is_small({"tokens": dict.fromkeys(map(str, range(LARGE)))})


def test_a_large_answer_is_the_same(server, pocket):
    row = {"prompt_ids": [5], "completion_ids": [6] * 1300, "terminal": True}
    answer = server.post("/v1/rewards", {"rows": [row], "per_token": True, "texts": False}).json()
    assert not _is_small(answer)
    wanted = pocket.score([row], per_token=True, texts=False)[0].tokens.rewards
    assert answer["rows"][0]["token_rewards"]["rewards"] == pytest.approx(wanted, abs=2e-4)


def test_an_answer_that_cannot_be_written_counts_as_500(server):
    class Broken:
        def waits_for(self):
            return None

        async def answer(self, path, body=None):
            return Answer(200, math.nan)

    service, server.local.service = server.local.service, Broken()
    try:
        answer = server.get("/v1/vocabulary")
    finally:
        server.local.service = service
    assert answer.status == 500 and answer.json()["error"] == "the server failed at this request; its log says how"
    assert 'requests_total{path="/v1/vocabulary",status="500"} 1.0' in server.get("/metrics").data.decode()
