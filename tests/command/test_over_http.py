"""`--engine http`: the command asks a server, and writes what the model in its own process would write."""

import json
import threading

import pytest

from cli_harness import put, rows_of, run
from endoreward_fast import EndoRewardModel
from endoreward_fast.remote import transport
from endoreward_fast.remote.address import TOKEN
from endoreward_fast.remote.client import ROWS as ROWS_OF_REQUEST
from stub_server import stub_server

HTTP = ("--engine", "http", "--url")
ROWS = [
    *({"id": i, "prompt": f"What is {i} + 3?", "completion": str(i + 3)} for i in range(20)),
    {"id": 20, "prompt": "?", "completions": ["a", "", "b" * 20]},
    {"id": 21, "prompt": "?", "chosen": ["a", "b"], "rejected": "c"},
    {"id": 22, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "5"}]},
    {"id": 23, "prompt_ids": [5, 6], "completion_ids": [7, 8], "terminal": False, "completion_mask": [1, 0]},
    {"id": 24, "prompt_ids": [5, 6], "completion_ids": [10**6]},
    {"id": 25, "prompt": "?"},
    {"id": 26, "prompt": "?", "completion": "5", "answer_span": "5", "tools": [{"name": "f"}]},
]
LISTS = [{"id": i, "prompt": f"What is {i} + 3?", "completions": ["5", "six", str(i + 3)]} for i in range(4)]


@pytest.fixture(scope="module")
def running():
    with stub_server(EndoRewardModel.from_pretrained("pocket")) as stub:
        yield stub


@pytest.fixture
def server(running, monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    monkeypatch.setattr(transport, "BACKOFF", 0.01)
    monkeypatch.setattr(transport, "JITTER", 0.0)
    running.faults, running.posts, running.token, running.weights = [], [], None, "sha256 of the stub"
    return running


def rounded(value):
    """Return what JSON holds, with numbers to the noise of another batch."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return pytest.approx(value, abs=1e-3) if isinstance(value, float) else value


# --- the output


@pytest.mark.parametrize(
    ("command", "rows", "flags"),
    [
        ("score", ROWS, ()),
        ("score", ROWS, ("--per-token", "--signals", "logprob,answer-logprob", "--alpha", 2, "--reduction", "mean")),
        ("score", ROWS, ("--no-chat", "--max-length", 20, "--truncate", "prompt", "--gamma", 0.9, "--floor", 0.1)),
        ("score", ROWS[:20], ("--system", "Be brief.", "--date", "2026-01-02", "--template-kwargs", '{"a": 1}')),
        ("rank", LISTS, ("--per-token",)),
    ],
)
def test_the_output_is_that_of_the_local_engine(server, tmp_path, command, rows, flags):
    path = put(tmp_path, *rows)
    code = 2 if rows is ROWS else 0
    local = run(command, path, *flags, "-q", code=code)
    remote = run(command, path, *flags, *HTTP, server.url, "-q", code=code)
    ours, theirs = rows_of(remote.stdout), rows_of(local.stdout)
    assert [list(row) for row in ours] == [list(row) for row in theirs]  # the same columns in the same order
    assert ours == [rounded(row) for row in theirs]
    assert remote.stderr == local.stderr


def test_the_summary_names_the_server_and_counts_its_tokens(server, tmp_path):
    said = run("score", put(tmp_path, *ROWS[:3]), *HTTP, server.url).stderr
    assert said.startswith("endoreward: scored 3 of 3 rows, 21 tokens") and said.endswith(f", model {server.url}\n")
    assert said.count("\n") == 1  # no note about the model that --model would take


def test_the_token_comes_from_the_environment(server, tmp_path, monkeypatch):
    server.token = "secret"
    path = put(tmp_path, *ROWS[:3])
    said = run("score", path, *HTTP, server.url, code=2).stderr
    assert f"401: the token is wrong: set {TOKEN} to the server's token" in said
    monkeypatch.setenv(TOKEN, "secret")
    assert len(rows_of(run("score", path, *HTTP, server.url).stdout)) == 3
    monkeypatch.delenv(TOKEN)
    said = run("score", path, *HTTP, server.url.replace("//", "//any:secret@"), code=2).stderr
    assert f"set {TOKEN}" in said and "secret" not in said and said.count("\n") == 1


def test_strict_stops_at_the_first_row_without_a_score(server, tmp_path):
    path = put(tmp_path, *ROWS[:2], ROWS[24], ROWS[3])
    found = run("score", path, *HTTP, server.url, "--strict", code=2)
    assert "line 3: " in found.stderr and "--strict: stopped here" in found.stderr


# --- a server that goes away, and --resume


def gone(handler):
    return handler.hang_up()


def test_a_server_that_goes_away_leaves_finished_rows_and_resume_goes_on(server, tmp_path):
    rows = [{"id": i, "prompt": "What is 2 + 3?", "completion": "5 " * 200 + str(i)} for i in range(900)]
    path, out, whole = put(tmp_path, *rows), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    answer = {"score": 1.5, "num_tokens": 3, "logprob": -1.0}

    def made_up(handler):
        return handler.answer(200, {"rows": [answer] * len(handler.asked["rows"]), "usage": {"tokens": 3}})

    server.faults = [made_up] * 6 + [gone] * 100
    said = run("score", path, *HTTP, server.url, "-o", out, code=2).stderr
    assert said.splitlines()[-1].startswith(f"endoreward: {server.url}: no answer") and "Traceback" not in said
    kept = [row["id"] for row in rows_of(out.read_text())]
    assert 0 < len(kept) < 900 and kept == sorted(set(kept))
    server.faults = [made_up] * 1000
    run("score", path, *HTTP, server.url, "-o", out, "--resume")
    run("score", path, *HTTP, server.url, "-o", whole)
    assert out.read_bytes() == whole.read_bytes()


def test_rows_behind_an_unfinished_one_are_kept_too(running, tmp_path, monkeypatch):
    """The first request gets no answer. The first write comes after the server has gone away."""
    monkeypatch.setattr(transport, "BACKOFF", 0.01)
    rows = [{"id": i, "prompt": "What is 2 + 3?", "completion": str(i)} for i in range(100)]
    path, out, answered = put(tmp_path, *rows), tmp_path / "out.jsonl", threading.Event()
    answer = {"score": 1.5, "num_tokens": 3, "logprob": -1.0}

    def by_number(handler):
        asked = handler.asked["rows"]
        if len(asked) == 100 - ROWS_OF_REQUEST:
            handler.answer(200, {"rows": [answer] * len(asked), "usage": {"tokens": 3}})
            answered.set()
            return True
        answered.wait(20)
        stub.shutdown()
        stub.server_close()
        return handler.hang_up()

    with stub_server(running.model) as stub:
        stub.faults = [by_number] * 10
        said = run("score", path, *HTTP, stub.url, "-o", out, code=2).stderr
    assert "no connection to the server" in said
    assert [row["id"] for row in rows_of(out.read_text())] == list(range(ROWS_OF_REQUEST, 100))


def test_resume_recognises_the_servers_model(server, tmp_path):
    path, out = put(tmp_path, *ROWS[:4]), tmp_path / "out.jsonl"
    run("score", path, *HTTP, server.url, "-o", out)
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())["settings"]
    assert (settings["model"], settings["weights"], settings["served_dtype"]) == ("pocket", server.weights, "float32")
    before = out.read_bytes()
    assert "holds 4 rows" in run("score", path, *HTTP, server.url, "-o", out, "--resume").stderr
    server.weights = "sha256 of another"
    said = run("score", path, *HTTP, server.url, "-o", out, "--resume", code=2).stderr
    assert "was made with the model 'pocket' (sha256 of the stub), not 'pocket' (sha256 of another)" in said
    assert out.read_bytes() == before
    with stub_server(server.model) as other:
        other.dtype = "bfloat16"
        said = run("score", path, *HTTP, other.url, "-o", out, "--resume", code=2).stderr
    assert "'pocket' (sha256 of the stub, float32), not 'pocket' (sha256 of the stub, bfloat16)" in said


def test_a_run_may_go_on_with_another_engine(server, tmp_path):
    from endoreward_fast.model.checkpoint import weights_of

    server.weights = weights_of("pocket")
    path, out = put(tmp_path, *ROWS[:4]), tmp_path / "out.jsonl"
    run("score", path, *HTTP, server.url, "-o", out)
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:2]))
    assert "holds 2 rows" in run("score", path, "-m", "pocket", "-o", out, "--resume").stderr
    assert len(rows_of(out.read_text())) == 4


# --- flags


@pytest.mark.parametrize(
    "flags",
    [
        ("--engine", "http"),
        ("--url", "http://host"),
        ("--engine", "ray", "--url", "http://host"),
        (*HTTP, "host:8000"),
        (*HTTP, "http://host", "--actors", 2),
        *(
            (*HTTP, "http://host", *given)
            for given in [
                ("--model", "pocket"), ("--revision", "v2"), ("--dtype", "bf16"), ("--device", "cpu"),
                ("--subfolder", "a"), ("--gguf-file", "a"), ("--trust-remote-code",), ("--max-tokens-per-batch", 8),
            ]
        ),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit_are_refused_in_one_line(tmp_path, flags):
    said = run("score", put(tmp_path, ROWS[0]), *flags, code=2).stderr
    named = flags[4] if len(flags) > 4 else "url"
    assert said.count("\n") == 1 and str(named) in said


def test_the_commands_name_the_flag_that_the_server_decides_on(tmp_path):
    for flag, value in (("--model", "pocket"), ("--max-tokens-per-batch", 8), ("--revision", "v2")):
        said = run("rank", put(tmp_path, LISTS[0]), *HTTP, "http://host", flag, value, code=2).stderr
        assert f"{flag}: the server at --url has its model and batches: leave {flag} out" in said


def test_a_launcher_is_refused(tmp_path, monkeypatch):
    of_launcher = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 9}
    for name, value in of_launcher.items():
        monkeypatch.setenv(name, str(value))
    said = run("score", put(tmp_path, ROWS[0]), *HTTP, "http://host", code=2).stderr
    assert "--engine http asks one server: start it without a launcher" in said


def test_a_server_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(transport, "BACKOFF", 0.01)
    monkeypatch.delenv(TOKEN, raising=False)
    said = run("score", put(tmp_path, ROWS[0]), *HTTP, "http://127.0.0.1:9", code=2).stderr
    assert said == "endoreward: http://127.0.0.1:9: no connection to the server (Connection refused)\n"
