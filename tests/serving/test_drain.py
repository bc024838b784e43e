"""How a server ends: clients that do not send or read do not hold it up, and a second Ctrl-C stops it."""

import json
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import urllib3
import uvicorn

from batchers import SHORT, until
from endoreward_fast.serving import run
from endoreward_fast.serving.app import create_app
from endoreward_fast.serving.limits import Limits
from endoreward_fast.serving.metrics import Metrics
from endoreward_fast.serving.service import Served, Service
from served import PATIENCE, Asker, half_open

LINGER = 0.5


@contextmanager
def running(scorer):
    """A server as `run.serve` runs it. Yields (server, its thread, Asker)."""
    service = Service(scorer, Served(("pocket",), "weights"), window=0)
    local = run.Local(service)
    app = create_app(local, limits=Limits(), token=None, metrics=Metrics())
    server = run._Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"), local)
    with run.listen("127.0.0.1", 0) as listening:
        url = run.url_of(listening)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        until(lambda: server.started)
        try:
            yield server, thread, Asker(url)
        finally:
            scorer.gate.set()
            server.handle_exit(signal.SIGINT, None)
            server.handle_exit(signal.SIGINT, None)
            thread.join()
            service.close(drop=True)


def send(url, body, part=1.0):
    """Send a part of a request. Its answer is not read."""
    data, connection = json.dumps(body).encode(), half_open(url)
    lines = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(f"POST /v1/rewards HTTP/1.1\r\n{lines}".encode() + data[: int(len(data) * part)])
    return connection


def ask(asker, found):
    def post():
        try:
            found.append(asker.post("/v1/rewards", {"rows": [SHORT]}).status)
        except urllib3.exceptions.HTTPError as error:
            found.append(error)

    thread = threading.Thread(target=post)
    thread.start()
    return thread


@pytest.fixture(autouse=True)
def short_linger(monkeypatch):
    monkeypatch.setattr(run, "LINGER", LINGER)


def test_clients_that_do_not_send_or_read_do_not_hold_up_the_end(pocket):
    row = {"prompt_ids": [5] * 6, "completion_ids": [8] * 500}
    with running(pocket) as (server, thread, asker):
        long = {"per_token": True, "texts": False, "entropy": True}  # an answer of megabytes
        idle = send(asker.url, {"rows": [row] * 160, **long})
        until(lambda: server.local.answering)
        until(lambda: not server.local.answering)
        half = send(asker.url, {"rows": [row]}, 0.5)
        pocket.gate.clear()
        found = []
        asking = ask(asker, found)
        until(lambda: server.local.answering)
        server.handle_exit(signal.SIGTERM, None)
        time.sleep(2 * LINGER)
        assert thread.is_alive()  # a request that was accepted is answered first
        pocket.gate.set()
        thread.join(PATIENCE)
        asking.join(PATIENCE)
        assert not thread.is_alive() and found == [200] and not server.stopped
        idle.close(), half.close()


def test_a_second_ctrl_c_stops_and_drops_what_was_accepted(pocket):
    with running(pocket) as (server, thread, asker):
        pocket.gate.clear()
        found = []
        asking = ask(asker, found)
        until(lambda: server.local.answering)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            assert not server.stopped
            server.handle_exit(number, None)
        thread.join(PATIENCE)
        asking.join(PATIENCE)
        assert server.stopped and not thread.is_alive()
        assert isinstance(found[0], urllib3.exceptions.HTTPError) and server.local.answering == 0
