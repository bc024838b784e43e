"""Servers for tests: in this process, with a model that can be held up, and as the real command."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import urllib3
import uvicorn

from endoreward_fast import EndoRewardModel
from endoreward_fast.serving.app import create_app
from endoreward_fast.serving.connection import Connection
from endoreward_fast.serving.limits import Limits
from endoreward_fast.serving.metrics import Metrics
from endoreward_fast.serving.run import Local, listen, url_of
from endoreward_fast.serving.service import Served, Service

PATIENCE = 60


class Gated(EndoRewardModel):
    """A model whose passes wait while its gate is closed. It counts them, and the tokens that it reads."""

    def __init__(self, model, tokenizer):
        super().__init__(model, tokenizer)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.batches = []
        self.on_batch = None
        self.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.batches.append(ids.clone())
        if self.on_batch is not None:
            self.on_batch(ids)
        self.entered.release()
        assert self.gate.wait(PATIENCE)

    @classmethod
    def pocket(cls):
        whole = EndoRewardModel.from_pretrained("pocket")
        return cls(whole.model, whole.tokenizer)


class Asker:
    """Asks a server."""

    def __init__(self, url, token=None):
        self.url, self.headers = url, {} if token is None else {"Authorization": f"Bearer {token}"}
        self.pool = urllib3.PoolManager(maxsize=16, retries=False, timeout=PATIENCE)

    def get(self, path, **headers):
        return self.pool.request("GET", self.url + path, headers=self.headers | headers)

    def post(self, path, body, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kinds = {"Content-Type": "application/json", **self.headers, **headers}
        return self.pool.request("POST", self.url + path, body=data, headers=kinds)

    def wait_until_ready(self):
        ends = time.monotonic() + PATIENCE
        while self.get("/ready").status != 200:
            assert time.monotonic() < ends
            time.sleep(0.05)
        return self


@contextmanager
def serving(scorer, *, limits=None, token=None, **options):
    """Serve a scorer in this process. Yields (Asker, Local)."""
    limits, metrics = limits or Limits(), Metrics()
    service = Service(scorer, Served(("pocket", "pocket"), "weights"), limits=limits, metrics=metrics, **options)
    local = Local(service)
    app = create_app(local, limits=limits, token=token, metrics=metrics)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", http=Connection))
    listening = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield Asker(url_of(listening), token and token.decode()), local
    finally:
        server.should_exit = True
        thread.join()
        service.close()
        listening.close()


@contextmanager
def command(*arguments, **environment):
    """Run `endoreward serve`. Yields (process, Asker) once it listens. A process that is left is killed."""
    given = {"ENDOREWARD_TUNED": "0", "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "endoreward_fast", "serve", "--port", "0", *arguments],
        env={k: v for k, v in os.environ.items() if k != "ENDOREWARD_TOKEN"} | given, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        url = None
        for line in process.stderr:
            if " on http://" in line:
                url = line.split(" on ")[1].strip()
                break
        yield process, None if url is None else Asker(url, environment.get("ENDOREWARD_TOKEN"))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def half_open(url):
    """A TCP connection to a server."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), PATIENCE)
