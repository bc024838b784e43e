"""`endoreward serve` as a process: it starts or says in one line why not, drains on SIGTERM, and can be killed."""

import signal
import socket
import threading
import time

import pytest
import urllib3

from cli_harness import run
from endoreward_fast import EndoRewardError
from endoreward_fast.serving.limits import is_local, token_in
from endoreward_fast.serving.run import listen
from served import PATIENCE, command

TOKEN = "a-token-of-many-letters"
PAIR = {"prompt": "What is 2 + 3?", "completion": "5"}
LONG = [{"prompt_ids": [5 + n] * 600, "completion_ids": [8] * 200} for n in range(16)]


def waiting(asker):
    lines = asker.get("/metrics").data.decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("endoreward_queue_rows "))


def ask_in_threads(asker, bodies):
    found = [None] * len(bodies)

    def ask(n):
        try:
            found[n] = asker.post("/v1/rewards", bodies[n]).json()
        except urllib3.exceptions.HTTPError as error:
            found[n] = error

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(bodies))]
    [thread.start() for thread in threads]
    return found, threads


def until(condition):
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_killed_server_starts_again_on_its_port_and_drains_on_sigterm(tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    with command() as (process, asker):
        assert asker.get("/health").status == 200  # before the model is loaded
        asker.wait_until_ready()
        wanted = asker.post("/v1/rewards", {"rows": [PAIR]}).json()
        found, threads = ask_in_threads(asker, [{"rows": LONG}])
        until(lambda: waiting(asker) == 16)
        process.kill()
        [thread.join(PATIENCE) for thread in threads]
        assert isinstance(found[0], urllib3.exceptions.HTTPError)
    arguments = ("--port", asker.url.rpartition(":")[2], "--token-file", str(token), "--served-name", "mine")
    with command(*arguments) as (process, asker):
        asker.wait_until_ready()
        assert asker.post("/v1/rewards", {"rows": [PAIR]}).status == 401
        asker.headers["Authorization"] = f"Bearer {TOKEN}"
        assert asker.post("/v1/rewards", {"rows": [PAIR]}).json() == wanted | {"model": "mine"}
        found, threads = ask_in_threads(asker, [{"rows": LONG}, *[{"rows": [PAIR]}] * 8])
        until(lambda: waiting(asker) >= 16)
        process.send_signal(signal.SIGTERM)
        [thread.join(PATIENCE) for thread in threads]
        assert len(found[0]["rows"]) == 16 and all(row["score"] is not None for row in found[0]["rows"])
        # One that arrived after the signal was never accepted.
        answered = [one for one in found[1:] if isinstance(one, dict)]
        assert all("rows" in one or "about to end" in one["error"] for one in answered)
        assert process.wait(PATIENCE) == 0
        with pytest.raises(urllib3.exceptions.HTTPError):
            asker.get("/health")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.org"])
def test_a_host_that_others_reach_needs_a_token(host, monkeypatch):
    monkeypatch.delenv("ENDOREWARD_TOKEN", raising=False)
    with pytest.raises(EndoRewardError, match="a token is required"):
        token_in(None, needed=not is_local(host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_this_machines_own_hosts_need_none(host, monkeypatch):
    monkeypatch.delenv("ENDOREWARD_TOKEN", raising=False)
    assert token_in(None, needed=not is_local(host)) is None
    monkeypatch.setenv("ENDOREWARD_TOKEN", TOKEN)
    assert token_in(None, needed=not is_local(host)) == TOKEN.encode()


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        (TOKEN, 0o640, "other users can read it: run `chmod 600"),
        (TOKEN, 0o604, "other users can read it"),
        ("", 0o600, "at least 16"),
        ("short", 0o600, "at least 16"),
        ("a token with some spaces", 0o600, "no space"),
        ("ein-Schlüssel-mit-Umlaut", 0o600, "ASCII"),
    ],
)
def test_token_files_that_are_refused(tmp_path, text, mode, said):
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(EndoRewardError, match=said) as refused:
        token_in(str(file), needed=True)
    assert str(file) in str(refused.value) and (not text or text not in str(refused.value))


def test_token_files_that_are_no_files(tmp_path):
    for name, said in ((tmp_path / "absent", "No such file"), (tmp_path, "directory|not a file")):
        with pytest.raises(EndoRewardError, match=said):
            token_in(str(name), needed=True)


def test_the_command_refuses_in_one_line(tmp_path):
    cases = [
        (("--host", "0.0.0.0"), "a token is required"),
        (("--port", "70000"), "--port"),
        (("--max-rows", "0"), "--max-rows"),
        (("--window-ms", "-1"), "--window-ms"),
        (("--timeout", "nan"), "--timeout"),
        (("--token-file", str(tmp_path / "absent")), "No such file"),
    ]
    for arguments, said in cases:
        result = run("serve", *arguments, code=2)
        assert said in result.stderr and result.stderr.count("\n") == 1, arguments
    with pytest.raises(EndoRewardError, match="--host no such host"):
        listen("no such host", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("serve", "--port", str(taken.getsockname()[1]), code=2)
    assert "Address already in use" in result.stderr


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    result = run("serve", "--port", "0", "-m", str(tmp_path), code=2)
    assert tmp_path.name in result.stderr
