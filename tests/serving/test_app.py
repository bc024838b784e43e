"""A server in this process: what each path answers, its limits, and that a bad request leaves it as it was."""

import base64
import json
import threading
import time

import pytest

from endoreward_fast.remote.wire import of_json
from endoreward_fast.scoring.sampled import UNSCORED
from endoreward_fast.serving.dialects import DIALECTS
from endoreward_fast.serving.limits import Limits
from served import PATIENCE, Gated, half_open, serving
from tiny_models import sampled_rewards

TOKEN = b"a-token-of-many-letters"
CHAT = "<|begin|><|user|> What is 2 + 3?<|end|><|assistant|>"
PAIR = {"prompt": "What is 2 + 3?", "completion": "5"}
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]


@pytest.fixture(scope="module")
def pocket():
    return Gated.pocket()


@pytest.fixture(scope="module")
def server(pocket):
    limits = Limits(request_bytes=200_000, rows=40, tokens=9000, seconds=20)
    with serving(pocket, limits=limits, most_waiting=60, options={"max_length": 4000}) as (asker, _):
        yield asker


@pytest.fixture(autouse=True)
def still_answers(server, pocket):
    yield
    pocket.gate.set()
    assert server.post("/v1/rewards", {"rows": [PAIR]}).status == 200


def oracle(pocket, prompt, response, ends=None):
    ids = [pocket.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response)]
    return sampled_rewards(pocket, *ids, pocket.eos_ids if ends is None else ends)


# --- rows
ROWS = [
    PAIR,
    {"prompt": "What is 2 + 3?", "completions": ["5", "6", ""]},
    {"prompt": "What is 2 + 3?", "chosen": "5", "rejected": ["6", "7"]},
    {"messages": MESSAGES},
    {"prompt_ids": [5, 6, 7], "completion_ids": [8, 9, 10], "terminal": False, "completion_mask": [1, 0, 1]},
    {"question": "What is 2 + 3?", "answer": 5},
]


def test_rows_get_the_scores_of_the_model_in_their_shape(server, pocket):
    found = server.post("/v1/rewards", {"rows": ROWS}).json()
    pair, wrong = (s.score for s in pocket.score([PAIR, {**PAIR, "completion": "6"}]))
    masked = pocket.score([ROWS[4]])[0]
    first, several, preference, chat, ids, aliases = found["rows"]
    assert [first["score"], chat["score"], aliases["score"]] == pytest.approx([pair] * 3, abs=2e-4)
    assert several["score"][:2] == pytest.approx([pair, wrong], abs=2e-4)
    assert several["flags"][2] == ["empty"] and several["num_tokens"] == [3, 3, 1]
    assert preference["score"]["chosen"] == pytest.approx(pair, abs=2e-4) and len(preference["score"]["rejected"]) == 2
    assert ids["score"] == pytest.approx(masked.score, abs=2e-4) and ids["flags"] == ["bootstrapped"]
    assert found["model"] == "pocket" and found["usage"]["tokens"] > 50


def test_tokens_options_and_signals_on_request(server, pocket):
    options = {"per_token": True, "alpha": 0.5, "reduction": "mean", "entropy": True, "signals": "all"}
    row = {**PAIR, "answer_span": "5"}
    (answer,) = server.post("/v1/rewards", {"rows": [row], **options}).json()["rows"]
    (wanted,) = pocket.score([row], **options)
    found = of_json(answer)
    assert found.tokens.ids == wanted.tokens.ids and found.tokens.texts == wanted.tokens.texts
    for name in ("rewards", "logprobs", "values", "entropies"):
        assert getattr(found.tokens, name) == pytest.approx(getattr(wanted.tokens, name), abs=2e-4)
    assert found.signals == pytest.approx(wanted.signals, abs=2e-4) and "answer-logprob" in found.signals
    assert found.score == pytest.approx(wanted.score, abs=2e-4)


def test_a_bad_row_leaves_the_others_their_scores(server):
    bad = [5, {"x": 1}, {"prompt_ids": [1], "completion_ids": [99999]}, {"prompt": "a", "completion": None}]
    bad += [{"prompt": "a", "completion": ["\ud800"]}, {"prompt": "x " * 9000, "completion": "y"}]
    answer = server.post("/v1/rewards", {"rows": [*bad, PAIR]})
    rows = answer.json()["rows"]
    assert answer.status == 200 and rows[-1]["score"] is not None
    assert all(row["score"] is None and "\n" not in row["error"] for row in rows[:-1])
    alone = server.post("/v1/rewards", {"rows": bad})
    assert alone.status == 422 and alone.json()["rows"] == rows[:-1] and alone.json()["error"] == rows[0]["error"]


def test_an_empty_completion_is_an_answer(server):
    answer = server.post("/v1/rewards", {"rows": [{"prompt_ids": [1], "completion_ids": []}]})
    assert answer.status == 200 and answer.json()["rows"][0]["score"] is None


# --- dialects
def test_openrlhfs_queries(server, pocket):
    responses = [" 5<|end|>", " 5 and", "<|end|>"]
    body = {"query": [CHAT + r for r in responses] + ["other"], "prompts": [CHAT] * 4, "labels": [None, "5", {}, 1]}
    answer = server.post("/get_reward", body)
    found = answer.json()
    wanted = [oracle(pocket, CHAT, r) for r in responses]
    assert answer.status == 200 and set(found) == {"rewards", "scores", "extra_logs"}
    assert found["rewards"] == pytest.approx([*(w.sum().item() for w in wanted), UNSCORED], abs=5e-4)
    assert found["scores"] == found["rewards"]
    assert found["extra_logs"]["endo_reward_length"] == [*map(len, wanted), 0]
    assert found["extra_logs"]["endo_reward_unscored"] == [0, 0, 0, 1]


@pytest.mark.parametrize("response", [" 5<|end|>", " 5 and"])
def test_slimes_samples(server, pocket, response):
    wanted = oracle(pocket, CHAT, response).sum().item()
    for prompt in (CHAT, MESSAGES[:1]):
        answer = server.post("/slime", {"prompt": prompt, "response": response, "label": None})
        assert answer.status == 200 and answer.json() == pytest.approx(wanted, abs=5e-4)


def test_a_sample_without_a_reward_is_a_number_that_is_never_the_best(server):
    image = [{"role": "user", "content": [{"type": "image", "url": "/etc/passwd"}]}]
    for body in ({"prompt": CHAT, "response": ""}, {"prompt": image, "response": "5"}):
        answer = server.post("/slime", body)
        assert (answer.status, answer.json()) == (200, UNSCORED)


def test_vllms_paths_score_the_last_turn(server, pocket):
    wanted = oracle(pocket, CHAT, " 5<|end|>")
    text = f"{CHAT} 5<|end|>\n"
    ids = pocket.tokenizer(text, add_special_tokens=False)["input_ids"]
    for given in ({"input": text}, {"input": [ids]}, {"input": ids}, {"messages": MESSAGES}):
        found = server.post("/classify", {"model": "pocket", "use_activation": False, **given}).json()
        assert found["data"][-1]["probs"] == pytest.approx([wanted.sum().item()], abs=5e-4)
    two = server.post("/classify", {"input": [text, "no turn"]}).json()
    assert [one["probs"][0] for one in two["data"]] == pytest.approx([wanted.sum().item(), UNSCORED], abs=5e-4)
    each = server.post("/pooling", {"input": text}).json()["data"][0]["data"]
    assert len(each) == len(ids) and [r for (r,) in each[-len(wanted) - 1 :]] == pytest.approx(
        [*wanted.tolist(), 0], abs=5e-4
    )
    assert not any(r for (r,) in each[: -len(wanted) - 1])
    one = server.post("/pooling", {"input": text, "task": "classify"}).json()["data"][0]["data"]
    assert one == pytest.approx([wanted.sum().item()], abs=5e-4)
    sglang = server.post("/v1/embeddings", {"model": "pocket", "input": text}).json()
    assert sglang["data"][-1]["embedding"] == pytest.approx(one, abs=5e-4)


def test_the_page_has_a_working_example_for_every_path(server):
    paths = server.get("/openapi.json").json()["paths"]
    assert server.get("/docs").status == 200 and set(DIALECTS) < set(paths)
    for path in DIALECTS:
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert server.post(path, schema["example"]).status == 200, path


def test_what_a_client_is_told_about_the_model(server, pocket):
    about = server.get("/v1/model").json()
    assert (about["model"], about["vocab_size"], about["eos_ids"]) == ("pocket", 1024, sorted(pocket.eos_ids))
    assert about["limits"] == {"request_bytes": 200_000, "rows": 40, "tokens": 9000, "seconds": 20}
    assert server.get("/v1/vocabulary").json()["tokens"] == pocket.tokenizer.get_vocab()


# --- bad requests
@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{bad", 400, "not JSON"),
        (b"\xff", 400, "UTF-8"),
        (b'{"rows": [{"prompt": NaN}]}', 400, "NaN"),
        (b'{"rows": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", 400, "nested too deep"),
        (b'{"rows": [1' + b"0" * 5000 + b"]}", 400, "not JSON"),
        ([1], 422, "found an array"),
        ({}, 422, "rows: missing"),
        ({"rows": []}, 422, "rows: empty"),
        ({"rows": PAIR}, 422, "rows"),
        (b'{"rows": [], "rows": []}', 422, "twice"),
        ({"rows": [PAIR], "alhpa": 1}, 422, "did you mean 'alpha'"),
        ({"rows": [PAIR], "alpha": "x"}, 422, "alpha='x'"),
        ({"rows": [PAIR], "signals": 5}, 422, "signals"),
        ({"rows": [PAIR], "system": 5}, 422, "system"),
        ({"rows": [PAIR], "reference": "/etc/passwd"}, 422, "no option 'reference'"),
        ({"rows": [PAIR], "max_tokens_per_batch": 1}, 422, "no option"),
        ({"rows": [PAIR], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, 422, "chat_template"),
        ({"rows": [{**PAIR, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}]}, 422, "chat_template"),
        ({"rows": [PAIR], "model": "/etc/passwd"}, 404, "no model '/etc/passwd' here"),
        ({"rows": [PAIR] * 41}, 413, "at most 40"),
        ({"rows": [{"prompt": "a", "completions": ["b"] * 41}]}, 413, "at most 40"),
        ({"rows": [{"prompt": "x " * 1900, "completion": "y"}] * 5}, 413, "at most 9000"),
        ({"rows": [{"prompt": "x" * 300_000, "completion": "y"}]}, 413, "200000 bytes"),
        ({"rows": [{"prompt_ids": [1], "completion_ids": [10**30]}]}, 422, "vocabulary"),
        ({"rows": [{"prompt_ids": [1], "completion_ids": [-1]}]}, 422, "token ids"),
    ],
)  # fmt: skip
def test_bad_requests_get_one_line_and_their_status(server, body, status, said):
    answer = server.post("/v1/rewards", body)
    assert answer.status == status and said in answer.json()["error"] and "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/get_reward", {"query": ["a"], "prompts": []}, "one for each"),
        ("/get_reward", {"query": "a", "prompts": ["a"]}, "query"),
        ("/get_reward", {"query": ["\ud800"], "prompts": ["a"]}, "query"),
        ("/slime", {"prompt": "a"}, "response: missing"),
        ("/slime", {"prompt": 5, "response": "a"}, "prompt"),
        ("/classify", {}, "either input or messages"),
        ("/classify", {"input": []}, "input is empty"),
        ("/classify", {"input": "a", "use_activation": True}, "use_activation"),
        ("/classify", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "templates of requests are not used"),
        ("/pooling", {"input": "a", "encoding_format": "base64"}, "encoding_format"),
    ],
)  # fmt: skip
def test_bad_bodies_of_the_dialects(server, path, body, said):
    answer = server.post(path, body)
    assert answer.status == 422 and said in answer.json()["error"]


def test_other_paths_methods_and_content_types(server):
    assert server.post("/unknown", {}).status == 404
    assert "/v1/rewards" in server.post("/unknown", {}).json()["error"]
    assert server.get("/get_reward").status == 405
    assert server.post("/v1/rewards", {"rows": [PAIR]}, **{"Content-Type": "text/plain"}).status == 415


def test_a_server_without_a_token_answers_to_local_names_only(server):
    for name in ("evil.example", "evil.example:8000", "localhost.evil.example"):
        answer = server.get("/v1/model", Host=name)
        assert answer.status == 403 and "token" in answer.json()["error"]
    for name in ("localhost", "127.0.0.1:80", "[::1]:80"):
        assert server.get("/v1/model", Host=name).status == 200


# --- waiting
def test_a_full_queue_says_when_to_ask_again(server, pocket):
    pocket.gate.clear()
    found = []
    first = threading.Thread(target=lambda: found.append(server.post("/v1/rewards", {"rows": [PAIR] * 40})))
    first.start()
    until(lambda: queue_rows(server) == 40)
    for path, status in (("/v1/rewards", 429), ("/classify", 503)):  # verl ends the run at a 429
        body = {"rows": [PAIR] * 21} if path == "/v1/rewards" else {"input": [CHAT] * 21}
        answer = server.post(path, body)
        assert answer.status == status and 1 <= int(answer.headers["Retry-After"]) <= 60
        assert "40 rows wait" in answer.json()["error"]
    pocket.gate.set()
    first.join(PATIENCE)
    assert found[0].status == 200


def test_a_client_that_goes_away_stops_costing(server, pocket):
    pocket.gate.clear()
    held = threading.Thread(target=server.post, args=("/v1/rewards", {"rows": [PAIR]}))
    held.start()
    until(lambda: queue_rows(server) == 1)
    body = json.dumps({"rows": [PAIR] * 30}).encode()
    with half_open(server.url) as connection:
        connection.sendall(head(len(body)) + body)
        until(lambda: queue_rows(server) == 31)
    until(lambda: queue_rows(server) == 1)
    pocket.gate.set()
    held.join(PATIENCE)
    assert 'requests_total{path="/v1/rewards",status="499"} 1.0' in server.get("/metrics").data.decode()


def test_a_slow_body_does_not_hold_up_the_others(server):
    with half_open(server.url) as slow:
        slow.sendall(head(500) + b'{"rows": [')
        assert server.post("/v1/rewards", {"rows": [PAIR]}).status == 200


def test_a_body_that_is_announced_as_too_large_is_refused_before_it_is_sent(server):
    with half_open(server.url) as connection:
        expecting = head(10**12).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
        connection.sendall(expecting)
        assert b" 413 " in connection.recv(200)
    assert server.post("/v1/rewards", b" " * 5_000_000).status == 413  # sent whole before the answer is read


def test_a_body_of_unknown_length_has_the_same_limit(server):
    parts = (b" " * 50_000 for _ in range(10))
    answer = server.pool.request(
        "POST", server.url + "/v1/rewards", body=parts, headers={"Content-Type": "application/json"}, chunked=True
    )
    assert answer.status == 413 and "200000 bytes" in answer.json()["error"]


def test_errors_do_not_name_folders(pocket):
    template, pocket.tokenizer.chat_template = pocket.tokenizer.chat_template, None
    try:
        with serving(pocket) as (asker, _):
            answer = asker.post("/v1/rewards", {"rows": [{"messages": MESSAGES}]})
    finally:
        pocket.tokenizer.chat_template = template
    assert answer.status == 422 and "tokenizer of 'pocket' has no chat template" in answer.json()["error"]


def test_time_limits_of_body_and_answer(pocket):
    with serving(pocket, limits=Limits(seconds=0.3)) as (asker, local):
        with half_open(asker.url) as slow:
            slow.sendall(head(9) + b"{")
            assert b" 408 " in slow.recv(200)
        pocket.gate.clear()
        started = time.monotonic()
        try:
            answer = asker.post("/v1/rewards", {"rows": [PAIR]})
        finally:
            pocket.gate.set()
        assert time.monotonic() - started < PATIENCE / 3  # and not when the client gives up
        assert answer.status == 504 and "0.3 s" in answer.json()["error"]
        until(lambda: local.service.batcher.rows == 0)


def test_bodies_that_are_being_read_have_a_common_limit(pocket):
    limits = Limits(request_bytes=1000, seconds=20)
    with serving(pocket, limits=limits) as (asker, _):
        held = [half_open(asker.url) for _ in range(32)]
        try:
            for connection in held:
                connection.sendall(head(999) + b" " * 998)
            until(lambda: asker.post("/v1/rewards", b" " * 900 + b"{}").status == 503)
        finally:
            [connection.close() for connection in held]
        until(lambda: asker.post("/v1/rewards", {"rows": [PAIR]}).status == 200)


def test_bodies_count_until_they_are_answered(pocket):
    body = json.dumps({"rows": [PAIR]}).encode() + b" " * 900
    with serving(pocket, limits=Limits(request_bytes=1000, seconds=PATIENCE)) as (asker, _):
        pocket.gate.clear()
        statuses = []
        threads = [
            threading.Thread(target=lambda: statuses.append(asker.post("/v1/rewards", body).status)) for _ in range(40)
        ]
        [thread.start() for thread in threads]
        until(lambda: len(statuses) >= 7)
        assert set(statuses) == {503}
        pocket.gate.set()
        [thread.join(PATIENCE) for thread in threads]
        assert statuses.count(200) == 40 - statuses.count(503) >= 30


def test_errors_quote_only_the_beginning_of_what_is_long(server):
    answer = server.post("/v1/rewards", {"rows": [{"x" * 5000: 1}], "model": None})
    assert answer.status == 422 and len(answer.data) < 3000


def test_a_bug_answers_500_and_says_nothing(pocket):
    def fail(batch):
        if (batch == 997).any():
            raise RuntimeError("/secret/path")

    with serving(pocket) as (asker, _):
        pocket.on_batch = fail
        try:
            answer = asker.post("/v1/rewards", {"rows": [{"prompt_ids": [997], "completion_ids": [5]}]})
        finally:
            pocket.on_batch = None
        assert answer.status == 500 and "secret" not in answer.data.decode()
        assert asker.post("/v1/rewards", {"rows": [PAIR]}).status == 200


def test_a_server_that_is_not_ready_says_so(pocket):
    with serving(pocket) as (asker, local):
        service, local.service = local.service, None
        assert asker.get("/health").status == 200
        for answer in (asker.get("/ready"), asker.post("/v1/rewards", {"rows": [PAIR]})):
            assert answer.status == 503 and answer.headers["Retry-After"] and "loading" in answer.json()["error"]
        local.service = service
        assert asker.get("/ready").status == 200


# --- the token
def test_requests_need_the_token(pocket):
    with serving(pocket, token=TOKEN) as (asker, _):
        right = base64.b64encode(b"anyone:" + TOKEN).decode()
        for given in (f"Bearer {TOKEN.decode()}", f"Basic {right}", f"basic {right}"):
            assert asker.get("/v1/model", Authorization=given).status == 200
            assert asker.get("/v1/model", Authorization=given, Host="trainer-7.cluster").status == 200
        wrong = base64.b64encode(b"anyone:nothing").decode()
        for given in (
            "",
            "Bearer",
            "Bearer nothing",
            f"Bearer {TOKEN.decode()}x",
            f"Basic {wrong}",
            "Basic ?",
            "Digest x",
        ):
            for path in ("/v1/model", "/metrics", "/docs", "/openapi.json", "/unknown", "/v1/vocabulary"):
                answer = asker.get(path, Authorization=given)
                assert answer.status == 401 and "token" in answer.json()["error"]
                assert TOKEN.decode() not in answer.data.decode()
            assert asker.post("/v1/rewards", {"rows": [PAIR]}, Authorization=given).status == 401
        assert asker.get("/health", Authorization="").status == asker.get("/ready", Authorization="").status == 200


def test_metrics_count_what_happened(pocket):
    with serving(pocket) as (asker, _):
        asker.post("/v1/rewards", {"rows": [PAIR, {"x": 1}]})
        asker.post("/v1/rewards", b"{")
        until(lambda: b"endoreward_rounds_total 1.0" in asker.get("/metrics").data)
        text = asker.get("/metrics").data.decode()
    for line in (
        'endoreward_requests_total{path="/v1/rewards",status="200"} 1.0',
        'endoreward_requests_total{path="/v1/rewards",status="400"} 1.0',
        'endoreward_rows_total{outcome="scored"} 1.0', 'endoreward_rows_total{outcome="unscored"} 1.0',
        "endoreward_queue_rows 0.0", "endoreward_ready 1.0",
        "endoreward_round_fill_count 1.0", 'endoreward_request_seconds_count{path="/v1/rewards"} 2.0',
    ):  # fmt: skip
        assert line in text, line


def test_many_clients_at_once(server, pocket):
    rows = [{"prompt": f"What is {n} + 3?", "completion": str(n + 3)} for n in range(48)]
    wanted = [found.score for found in pocket.score(rows)]
    found = [None] * len(rows)

    def ask(n):
        found[n] = server.post("/v1/rewards", {"rows": [rows[n]]}).json()["rows"][0]["score"]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(rows))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == pytest.approx(wanted, abs=2e-4)


def head(length):
    lines = (
        "POST /v1/rewards HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    )
    return "\r\n".join((*lines, "\r\n")).encode()


def queue_rows(server):
    lines = server.get("/metrics").data.decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("endoreward_queue_rows ")))


def until(condition):
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)
