"""A server with the interface of `endoreward serve`, a thread of this process, whose faults a test sets.

It scores with a loaded model, by the same rules of columns and of JSON as the server. A fault is a function of the
request's handler. It answers in the server's place, or returns None to let the server answer.
"""

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from endoreward_fast import EndoRewardError
from endoreward_fast.data.columns import arrange, plan
from endoreward_fast.remote.wire import MODEL, REWARDS, VOCABULARY, to_json
from endoreward_fast.scoring.sampled import ending_ids

LIMITS = {"request_bytes": 10**6, "rows": 100, "tokens": 10**6, "seconds": 60}


SCORING = threading.Lock()
"""servers of one process may share a model, which scores for one of them at a time"""


class Stub(ThreadingHTTPServer):
    """`faults` are taken one for each POST. `posts` and `gets` hold what was asked."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, model, port=0, **limits):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.limits, self.token = model, LIMITS | limits, None
        self.faults, self.posts, self.gets, self.errors, self.connections = [], [], [], [], 0
        self.weights, self.dtype = "sha256 of the stub", "float32"
        self.counting = threading.Lock()
        self.busiest = self.busy = self.gets_before_ready = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def verify_request(self, request, client_address):
        self.connections += 1
        return True

    def handle_error(self, request, client_address):
        """Keep the error for the end of the test, unless it is a connection that a test has broken on purpose."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.errors.append(error)

    @contextmanager
    def counted(self):
        with self.counting:
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
        try:
            yield
        finally:
            with self.counting:
                self.busy -= 1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        """Say nothing."""

    def do_GET(self):
        stub = self.server
        stub.gets.append(self.path)
        if stub.gets_before_ready:
            stub.gets_before_ready -= 1
            return self.answer(503, {"error": "the model is loading"}, Retry_After=0)
        model, tokenizer = stub.model, stub.model.tokenizer
        if self.path == MODEL:
            about = {"model": "pocket", "version": "0", "weights": stub.weights, "dtype": stub.dtype}
            about |= {"max_positions": model.max_positions, "vocab_size": model.vocab_size, "limits": stub.limits}
            about |= {"eos_ids": sorted(ending_ids(model)), "tokenizer": tokenizer is not None}
            return self.answer(200, about)
        if self.path == VOCABULARY and tokenizer is not None:
            return self.answer(200, {"name": "pocket", "tokens": tokenizer.get_vocab(), "special": []})
        self.answer(404, {"error": f"there is no {self.path}"})

    def do_POST(self):
        stub = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with stub.counted():
            self.asked = json.loads(body)
            stub.posts.append((self.path, self.asked, dict(self.headers)))
            fault = stub.faults.pop(0) if stub.faults else None
            if fault is None or fault(self) is None:
                self.score(self.asked)

    def score(self, asked):
        stub = self.server
        if stub.token is not None and self.headers.get("Authorization") != f"Bearer {stub.token}":
            return self.answer(401, {"error": "the token is wrong"})
        if self.path != REWARDS or len(asked["rows"]) > stub.limits["rows"]:
            return self.answer(413, {"error": f"more than {stub.limits['rows']} rows"})
        options = {name: value for name, value in asked.items() if name not in ("rows", "model")}
        with SCORING:
            rows = [self.scored(row, options) for row in asked["rows"]]
        if any(row["score"] is not None for row in rows):
            return self.answer(200, {"model": "pocket", "rows": rows, "usage": {"tokens": 7 * len(rows)}})
        self.answer(422, {"error": rows[0]["error"], "rows": rows})

    def scored(self, row, options):
        try:
            task = plan(row)
        except EndoRewardError as error:
            return {"score": None, "num_tokens": 0, "logprob": None, "error": str(error)}
        answers = [to_json(one) for one in self.server.model.score(task.samples, **options)]
        return arrange(task.layout, lambda i: answers[i])

    def answer(self, status, content, **headers):
        """Send an answer. `headers` are written with _ for -."""
        data = content if isinstance(content, bytes) else json.dumps(content, allow_nan=False).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)
        return True

    def hang_up(self):
        """Close the connection without an answer."""
        self.close_connection = True
        self.connection.shutdown(2)
        return True


@contextmanager
def stub_server(model, **limits):
    """Run a Stub on this machine, on a free port unless `limits` have a `port`."""
    stub = Stub(model, **limits)
    thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.shutdown()
        stub.server_close()
        thread.join()
        assert not stub.errors, stub.errors
