"""RemoteModel against a server in a thread: the same scores as the local model's, retries, limits and errors."""

import math
import os
import pickle
import threading
import time
import traceback

import pytest

from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.remote import transport
from endoreward_fast.remote.address import TOKEN, Address
from endoreward_fast.remote.client import RemoteModel
from endoreward_fast.remote.wire import MODEL, REWARDS, VOCABULARY
from remote_cases import OPTIONS, ROWS, close
from stub_server import stub_server


@pytest.fixture(scope="module")
def pocket():
    return EndoRewardModel.from_pretrained("pocket")


@pytest.fixture(scope="module")
def running(pocket):
    with stub_server(pocket, rows=8) as stub:
        yield stub


@pytest.fixture
def server(running, monkeypatch):
    """The server without faults, and a client that does not wait long between two tries."""
    monkeypatch.delenv(TOKEN, raising=False)
    monkeypatch.setattr(transport, "BACKOFF", 0.01)
    monkeypatch.setattr(transport, "JITTER", 0.0)
    running.faults, running.posts, running.gets, running.token, running.busiest = [], [], [], None, 0
    return running


def pairs(count, letters=1):
    return [{"prompt": f"What is {i} + 3?", "completion": str(i) * letters} for i in range(count)]


# --- the same results as a local model


def test_scores_are_those_of_the_local_model(server, pocket):
    close(RemoteModel(server.url).score(ROWS), pocket.score(ROWS))


@pytest.mark.parametrize("options", OPTIONS)
def test_options_mean_the_same_as_for_the_local_model(server, pocket, options):
    close(RemoteModel(server.url).score(ROWS[:10], **options), pocket.score(ROWS[:10], **options))


def test_token_rewards_and_signals_arrive_whole(server, pocket):
    options = {"per_token": True, "entropy": True, "signals": "logprob,answer-logprob"}
    options["signals"] = options["signals"].split(",")
    rows = [ROWS[0] | {"answer_span": "5"}, ROWS[6]]
    for one, other in zip(RemoteModel(server.url).score(rows, **options), pocket.score(rows, **options), strict=True):
        assert (one.tokens.ids, one.tokens.texts) == (other.tokens.ids, other.tokens.texts)
        for name in ("rewards", "logprobs", "values", "entropies"):
            assert getattr(one.tokens, name) == pytest.approx(getattr(other.tokens, name), abs=1e-4)
        assert one.signals == pytest.approx(other.signals, abs=1e-4) and one.signal_errors == other.signal_errors


def test_rank_is_that_of_the_local_model(server, pocket):
    asked = "What is 2 + 3?", ["7", "5", ""]
    found, wanted = RemoteModel(server.url).rank(*asked), pocket.rank(*asked)
    assert [(one.index, one.completion) for one in found] == [(one.index, one.completion) for one in wanted]


def test_the_model_is_described(server, pocket):
    remote = RemoteModel(server.url + "/")
    assert remote.vocab_size == pocket.vocab_size and remote.max_positions == pocket.max_positions
    assert remote.eos_ids == {pocket.tokenizer.eos_token_id} and remote.tokenizer is None
    assert remote.about["weights"] == server.weights
    assert remote.encode(ROWS) == ROWS


def test_no_rows_make_no_request(server):
    assert RemoteModel(server.url).score([]) == [] and not server.posts


# --- requests: size, order, connections


def test_requests_respect_the_servers_number_of_rows_and_results_keep_their_order(server, pocket):
    rows, counted = pairs(50), []
    close(RemoteModel(server.url).score(rows, on_tokens=counted.append), pocket.score(rows))
    assert sorted(len(body["rows"]) for _, body, _ in server.posts) == [2] + [8] * 6
    assert sum(counted) == 7 * 50


def test_requests_respect_the_servers_number_of_bytes(server, pocket, monkeypatch):
    remote = RemoteModel(server.url)
    remote.about["limits"] = {"request_bytes": 500, "rows": 100}
    rows = [*pairs(6, letters=60), {"prompt": "p", "completion": "c" * 500}]
    found = remote.score(rows, system="Be brief.")
    assert all(int(headers["Content-Length"]) <= 500 for _, _, headers in server.posts)
    assert all(one.score is not None for one in found[:6])
    assert "bytes" in found[6].error and "at most 500" in found[6].error


def test_several_requests_are_in_flight_over_few_connections(server):
    together = threading.Barrier(3)

    def wait_for_others(handler):
        together.wait(10)

    server.faults, before = [wait_for_others] * 6, server.connections
    RemoteModel(server.url, concurrency=3).score(pairs(48))
    assert server.busiest == 3 and server.connections - before <= 4  # one is of the GET


def test_results_of_a_fast_request_do_not_wait_for_a_slow_one(server):
    go_on = threading.Event()

    def wait(handler):
        go_on.wait(10)

    server.faults = [wait]
    found = RemoteModel(server.url, concurrency=2).iter_scores(pairs(16))
    first = {place for place, _ in (next(found) for _ in range(8))}
    go_on.set()
    assert first in ({*range(8)}, {*range(8, 16)}) and {place for place, _ in found} == {*range(16)} - first


def test_a_request_that_is_too_large_is_sent_in_halves(server, pocket):
    remote, rows = RemoteModel(server.url), pairs(20)
    remote.about["limits"] = {}  # the server's own limit, 8 rows, is not known
    close(remote.score(rows), pocket.score(rows))
    too_long = [lambda handler: handler.answer(413, {"error": "5000 tokens, at most 100"})] * 2
    server.faults = too_long
    found = remote.score(rows[:1])
    assert found[0].score is None and "413: 5000 tokens, at most 100" in found[0].error


def test_rows_that_choose_their_template_travel_apart(server, pocket):
    rows = [row | ({"chat": False} if i % 2 else {}) for i, row in enumerate(pairs(4))]
    close(RemoteModel(server.url).score(rows), pocket.score(rows))
    close(RemoteModel(server.url).score(rows, chat=True), pocket.score(rows, chat=True))


def test_an_option_that_is_none_is_sent_and_one_that_is_not_given_is_left_to_the_server(server):
    remote = RemoteModel(server.url)
    remote.score(ROWS[:1], system=None, chat=None, alpha=2)
    remote.score([ROWS[0] | {"chat": None}])
    asked = [{name: body[name] for name in body if name != "rows"} for _, body, _ in server.posts]
    assert asked == [{"system": None, "alpha": 2, "chat": None}, {"chat": None}]


def test_rows_without_any_score_are_errors_of_rows(server, pocket):
    rows = [{"prompt_ids": [5], "completion_ids": [10**6]}] * 2
    close(RemoteModel(server.url).score(rows), pocket.score(rows))


# --- retries


def busy(status, **headers):
    return lambda handler: handler.answer(status, {"error": "later"}, **headers)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_refusal_for_now_is_asked_again(server, pocket, status):
    server.faults = [busy(status)] * 2
    close(RemoteModel(server.url).score(ROWS[:1]), pocket.score(ROWS[:1]))
    assert len(server.posts) == 3


def test_a_lost_connection_is_asked_again(server, pocket):
    half = b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"rows"'
    server.faults = [lambda h: h.hang_up(), lambda h: h.wfile.write(half) and h.hang_up()]
    close(RemoteModel(server.url).score(ROWS[:1]), pocket.score(ROWS[:1]))
    assert len(server.posts) == 3


def test_retry_after_is_waited_for(server):
    server.faults = [busy(503, Retry_After=1)]
    began = time.monotonic()
    RemoteModel(server.url).score(ROWS[:1])
    assert time.monotonic() - began >= 1


def test_a_server_that_loads_its_model_is_waited_for(server):
    server.gets_before_ready = 3
    assert RemoteModel(server.url, retries=0).about["model"] == "pocket"
    server.gets_before_ready = 10**6
    with pytest.raises(EndoRewardError, match="503: the model is loading"):
        RemoteModel(server.url, timeout=0.2)
    server.gets_before_ready = 0


def test_a_busy_server_is_asked_until_the_time_is_over_and_not_a_number_of_times(server):
    server.faults = [busy(429, Retry_After="soon")] * 5
    remote = RemoteModel(server.url, retries=0)
    assert remote.score(ROWS[:1])[0].score is not None
    for hour in (3600, "9" * 400):
        server.faults = [busy(429, Retry_After=hour)]
        began = time.monotonic()
        with pytest.raises(EndoRewardError, match="429: later"):
            remote.score(ROWS[:1])
        assert time.monotonic() - began < 5  # that is after the time limit, so waiting is pointless


@pytest.mark.parametrize("fault", [lambda h: h.hang_up(), busy(502), busy(504)])
def test_failures_are_counted(server, fault):
    server.faults = [fault] * 10
    with pytest.raises(EndoRewardError, match=rf"{server.url}: (no |50[24]: later)") as error:
        RemoteModel(server.url, retries=2).score(ROWS[:1])
    assert len(server.posts) == 3 and "\n" not in str(error.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 408, 415, 422, 500])
def test_other_errors_are_one_line_at_once(server, status):
    server.faults = [busy(status)]
    with pytest.raises(EndoRewardError, match=rf"^{server.url}: {status}: later") as error:
        RemoteModel(server.url).score(ROWS[:1])
    assert len(server.posts) == 1 and "\n" not in str(error.value)


def test_a_request_has_a_time_limit(server):
    over = threading.Event()
    server.faults = [lambda handler: over.wait(10)]
    with pytest.raises(EndoRewardError, match=r"no answer in 0\.2 s"):
        RemoteModel(server.url, timeout=0.2).score(ROWS[:1])
    over.set()


def test_after_an_error_no_further_request_is_sent_and_finished_ones_are_kept(server):
    server.faults = [None, lambda h: h.answer(500, {"error": "a bug"})]
    found, scores = [], RemoteModel(server.url, concurrency=2).iter_scores(pairs(80))
    with pytest.raises(EndoRewardError, match="a bug"):
        found.extend(scores)
    assert len(server.posts) <= 4 and 8 <= len(found) <= 24


def test_a_client_outlives_its_server(pocket, server):
    rows, found = pairs(40), []
    with stub_server(pocket, rows=8) as first:
        remote = RemoteModel(first.url, concurrency=2)
        first.faults = [None, None, *[lambda handler: handler.hang_up()] * 100]
        scores = remote.iter_scores(rows)
        found.append(next(scores))
    rest = threading.Thread(target=lambda: found.extend(scores))
    rest.start()
    with stub_server(pocket, rows=8, port=first.server_port) as second:
        rest.join(30)
        assert len(second.posts) == 3
    found = dict(found)
    close([found[i] for i in range(40)], pocket.score(rows))


def test_leaving_early_stops_what_waits(server):
    server.faults = [None, *[busy(503, Retry_After=60)] * 10]
    scores = RemoteModel(server.url, concurrency=2).iter_scores(pairs(80))
    next(scores)
    scores.close()
    for thread in threading.enumerate():
        if thread.name.startswith("endoreward_"):
            thread.join(5)
            assert not thread.is_alive()


def test_a_server_that_is_not_there_is_one_line(server, monkeypatch):
    with pytest.raises(EndoRewardError, match=r"^http://127\.0\.0\.1:9: no connection to the server \(Connection re"):
        RemoteModel("http://127.0.0.1:9", retries=1)


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"rows": []}', b'{"rows": [{}]}', b'{"rows": [3]}'])
def test_an_answer_of_another_kind_is_one_line(server, answer):
    server.faults = [lambda handler: handler.answer(200, answer)]
    with pytest.raises(EndoRewardError, match=rf"^{server.url}.* answers "):
        RemoteModel(server.url).score(ROWS[:1])


# --- options and rows that cannot travel


@pytest.mark.parametrize("options", [{"max_tokens_per_batch": 5}, {"alpha": -1}, {"temperature": 2}])
def test_wrong_options_are_refused_before_a_request(server, options):
    remote = RemoteModel(server.url)
    with pytest.raises(EndoRewardError, match=r"max_tokens_per_batch is the server's|alpha"):
        remote.iter_scores(ROWS, **options)
    with pytest.raises(EndoRewardError):
        remote.encode(ROWS, **options)
    assert not server.posts


def test_a_second_model_is_refused(server, pocket):
    with pytest.raises(EndoRewardError, match="reference is the server's own option"):
        RemoteModel(server.url).score(ROWS, reference=pocket)


def test_what_is_no_json_is_an_error_of_its_row(server):
    deep = []
    for _ in range(2000):
        deep = [deep]
    rows = [{**ROWS[0], "tools": [{"name": {1, 2}}]}, {**ROWS[0], "tools": deep}, {**ROWS[0], "chat": "yes"}, ROWS[0]]
    found = RemoteModel(server.url).score(rows)
    assert [one.error and one.error[:28] for one in found] == [
        "the row cannot be sent to a ", "the row is nested more than ", "chat='yes': expected True, F", None
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{"timeout": 0}, {"retries": -1}, {"concurrency": 0}, {"timeout": "5"}])
def test_settings_of_the_client_are_checked(server, options):
    with pytest.raises(EndoRewardError, match=f"{next(iter(options))}=.*: expected a number above"):
        RemoteModel(server.url, **options)


@pytest.mark.parametrize("name", ["retries", "concurrency"])
def test_a_part_of_a_request_is_refused(server, name):
    for value in (1.5, math.inf):
        with pytest.raises(EndoRewardError, match=f"{name}={value}: expected a number above .* and whole"):
            RemoteModel(server.url, **{name: value})


def test_a_request_without_a_time_limit_is_possible(server):
    server.faults = [busy(503, Retry_After=0)]
    assert RemoteModel(server.url, timeout=math.inf).score(ROWS[:1])[0].score is not None


# --- threads, processes


def test_all_threads_together_have_the_requests_of_one_client(server):
    remote, before, done = RemoteModel(server.url, concurrency=2), server.connections, []
    threads = [threading.Thread(target=lambda: done.append(remote.score(pairs(24)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [len(found) for found in done] == [24] * 4
    assert server.busiest <= 2 and server.connections - before <= 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_its_own_connections(server, pocket):
    """On the same connection, one process would read the other's answer."""
    remote = RemoteModel(server.url)
    remote.score(ROWS[:1])  # one connection is open now
    before = server.connections
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if remote.score(ROWS[:1])[0].score is not None else 1)
        except BaseException:
            traceback.print_exc()
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert server.connections == before + 1
    close(remote.score(ROWS[:1]), pocket.score(ROWS[:1]))
    assert server.connections == before + 1


def test_a_pickled_client_asks_the_same_server(server, pocket):
    server.token = "secret"
    remote = RemoteModel(server.url, "secret", retries=2, concurrency=3)
    remote.score(ROWS[:1])
    gets = len(server.gets)
    again = pickle.loads(pickle.dumps(remote))
    assert len(server.gets) == gets and (again.url, again.concurrency) == (remote.url, 3)
    close(again.score(ROWS[:1]), pocket.score(ROWS[:1]))


# --- the address and the token


@pytest.mark.parametrize(
    ("url", "clean", "token"),
    [
        ("http://host", "http://host", None),
        ("HTTP://host:80/a/", "http://host:80/a", None),
        ("https://[::1]:8/", "https://[::1]:8", None),
        ("http://any:s%40cret@host:1", "http://host:1", "s@cret"),
        ("http://secret@host:1", "http://host:1", "secret"),
    ],
)
def test_an_address_is_read(monkeypatch, url, clean, token):
    monkeypatch.delenv(TOKEN, raising=False)
    found = Address.of(url)
    assert (found.url, found.token) == (clean, token) and (token is None or token not in repr(found))


def test_the_argument_is_before_the_url_and_that_before_the_environment(monkeypatch):
    monkeypatch.setenv(TOKEN, "of-environment\n")
    assert Address.of("http://a:of-url@host", "of-argument").token == "of-argument"
    assert Address.of("http://host").token == "of-environment"
    assert Address.of("http://a:of-url@host").token == "of-url"


@pytest.mark.parametrize(
    "url",
    ["ftp://host", "host:8000", "http://", "http://a:secret@", "http://a:secret@host:port", "http://a:secret@h/?q",
     "http://a:secret@h#f", "http://a:secret@ho st", "http://a:secret@h\n", "ws://a:secret@h", "http://x\\@a:secret@h",
     5],
)  # fmt: skip
def test_no_address_is_one_line_without_the_token(url):
    with pytest.raises(EndoRewardError, match="expected http") as error:
        Address.of(url)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "käse"])
def test_a_token_that_no_header_can_hold_is_not_shown(token):
    with pytest.raises(EndoRewardError, match="the token has spaces") as error:
        Address.of("http://host", token)
    assert token not in str(error.value)


def test_the_token_is_sent_and_never_shown(server, monkeypatch):
    server.token = "secret"
    assert RemoteModel(server.url, "secret").score(ROWS[:1])[0].score is not None
    in_url = server.url.replace("//", "//any:secret@")
    remote = RemoteModel(in_url)
    assert remote.score(ROWS[:1])[0].score is not None
    assert "secret" not in repr(remote) + remote.url
    wrong = RemoteModel(server.url.replace("//", "//any:wrong-one@"))
    with pytest.raises(EndoRewardError, match=f"401: the token is wrong: set {TOKEN} to the server's token") as error:
        wrong.score(ROWS[:1])
    assert "wrong-one" not in str(error.value)


def test_a_redirect_is_not_followed(server, pocket):
    with stub_server(pocket) as other:
        server.faults = [lambda handler: handler.answer(307, {}, Location=f"{other.url}{REWARDS}")]
        with pytest.raises(EndoRewardError, match="307: redirects to another address, which is not followed"):
            RemoteModel(server.url, "secret").score(ROWS[:1])
        assert not other.posts


# --- the vocabulary


def test_the_vocabulary_is_asked_for_once_and_compares_as_a_tokenizers(server, pocket):
    remote = RemoteModel(server.url)
    found = remote.vocabulary()
    assert remote.vocabulary() is found and server.gets == [MODEL, VOCABULARY]
    assert found.get_vocab() == pocket.tokenizer.get_vocab() and len(found) == len(pocket.tokenizer)
    assert found.convert_ids_to_tokens(7) == pocket.tokenizer.convert_ids_to_tokens(7)
    assert found.convert_ids_to_tokens(10**6) is None and found.name_or_path == "pocket"


def test_a_model_without_a_tokenizer_has_no_vocabulary(pocket, monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    with stub_server(EndoRewardModel(pocket.model)) as server:
        assert RemoteModel(server.url).vocabulary() is None


def test_without_urllib3_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "urllib3", None)
    with pytest.raises(EndoRewardError, match="needs urllib3: pip install"):
        RemoteModel("http://127.0.0.1:9")


def test_a_proxys_500_is_asked_again(server):
    server.faults = [lambda h: h.answer(500, b"Internal Server Error", **{"Content-Type": "text/plain"})] * 2
    assert RemoteModel(server.url).score(pairs(1))[0].score is not None and len(server.posts) == 3


def test_other_weights_in_the_middle_are_an_error(server, monkeypatch):
    asking = RemoteModel(server.url)
    monkeypatch.setitem(asking.about, "weights", "sha256 of others")
    server.faults = [lambda h: h.answer(200, {"weights": "sha256 of the stub", "rows": [], "usage": {"tokens": 0}})]
    with pytest.raises(EndoRewardError, match="another model than before"):
        asking.score(pairs(1))
