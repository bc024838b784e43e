"""The load generator, a process of its own: many clients, each with one connection, that take requests in turn.

It imports neither torch nor an HTTP library, because it shares the processors with the server. A request is bytes that
were prepared before the clock starts. Started by `Generator`, it reads one job a line and answers each with one line.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

RETRYABLE = (429, 503)
"""statuses after which the documented client asks again: the queue is full; the server loads or drains"""
PATIENCE = 60.0
"""seconds for one answer, and for one request with its repetitions"""
ROOT = Path(__file__).parents[2]
MARKED, DONE = "marked", "done"


@dataclass(frozen=True)
class Request:
    """One request as bytes, and what the client does with it."""

    content: bytes
    cancel_after: float | None = None
    """close the connection after so many seconds, without waiting for the answer; None: wait"""
    cut: int | None = None
    """with `cancel_after`: send only so many bytes"""


@dataclass(frozen=True)
class Reply:
    """What came of one request."""

    status: int
    """of the last answer; 0: the connection was lost; -1: the client cancelled it"""
    began: float
    """seconds since the start of the run"""
    seconds: float
    """from the first byte sent to the last byte of the last answer, with waiting for repetitions"""
    body: str = ""
    refused: tuple[int, ...] = ()
    """statuses of RETRYABLE that came before"""
    surplus: int = 0
    """bytes that came before the request was sent: an answer that nobody waits for"""


@dataclass
class Run:
    """What came of all requests, in their order."""

    started: float
    """when the first byte was sent, on the clock that all processes share (time.perf_counter)"""
    seconds: float
    """from the first byte sent to the last answer"""
    cpu_s: float
    """processor seconds of the generator in that time"""
    replies: list[Reply] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """One client's connection. It understands answers with a content-length."""

    def __init__(self) -> None:
        self.received, self.answer, self.transport, self.closed = bytearray(), None, None, False

    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        self._complete()

    def connection_lost(self, error) -> None:
        self.closed = True
        if self.answer and not self.answer.done():
            self.answer.set_exception(ConnectionError("the server closed the connection before it answered"))

    def send(self, content: bytes) -> asyncio.Future:
        """Send a request. Return the future of its (status, headers, body)."""
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(content)
        return self.answer

    def _complete(self) -> None:
        end = self.received.find(b"\r\n\r\n")
        if self.answer is None or self.answer.done() or end < 0:
            return
        lines = bytes(self.received[:end]).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        size = end + 4 + int(headers["content-length"])
        if len(self.received) >= size:
            body = bytes(self.received[end + 4 : size]).decode("utf-8")
            del self.received[:size]
            self.answer.set_result((int(lines[0].split(" ", 2)[1]), headers, body))


class Client:
    """Asks one request after the other on one connection; opens another when the server closed it."""

    def __init__(self, host: str, port: int, started: float) -> None:
        self.host, self.port, self.started, self.connection = host, port, started, None

    async def connected(self) -> Connection:
        if self.connection is None or self.connection.closed or self.connection.transport.is_closing():
            loop = asyncio.get_running_loop()
            _, self.connection = await loop.create_connection(Connection, self.host, self.port)
        return self.connection

    def close(self) -> None:
        if self.connection is not None:
            self.connection.transport.abort()
            self.connection = None

    async def ask(self, request: Request) -> Reply:
        """Ask once, and again after each answer of RETRYABLE, as long as PATIENCE lasts."""
        began, refused, surplus = time.perf_counter(), [], 0
        while True:
            status, headers, body, came_before = await self.once(request)
            surplus += came_before
            now = time.perf_counter()
            if status not in RETRYABLE or now - began > PATIENCE:
                return Reply(status, began - self.started, now - began, body, tuple(refused), surplus)
            refused.append(status)
            await asyncio.sleep(float(headers.get("retry-after", 1)))

    async def once(self, request: Request) -> tuple[int, dict, str, int]:
        """Return (status, headers, body, bytes that came before the request)."""
        connection = await self.connected()
        surplus = len(connection.received)
        connection.received.clear()
        answer = connection.send(request.content[: request.cut])
        patience = PATIENCE if request.cancel_after is None else request.cancel_after
        try:
            status, headers, body = await asyncio.wait_for(answer, patience)
        except (asyncio.TimeoutError, ConnectionError) as error:
            self.close()
            cancelled = request.cancel_after is not None
            return -1 if cancelled else 0, {}, f"{type(error).__name__}: {error}", surplus
        if headers.get("connection", "").lower() == "close":
            self.close()
        return status, headers, body, surplus


async def drive(
    host: str, port: int, clients: int, requests: Sequence[Request], mark: int | None = None,
    marked: Callable[[], None] = lambda: None,
) -> Run:  # fmt: skip
    """Let each client take the next request as soon as it has an answer. Connections are open before the clock starts.

    `marked` is called when request number `mark` is about to be sent.
    """
    waiting, replies = deque(enumerate(requests)), [None] * len(requests)
    started = time.perf_counter()
    team = [Client(host, port, started) for _ in range(clients)]
    await asyncio.gather(*(client.connected() for client in team))

    async def work(client: Client) -> None:
        while waiting:
            place, request = waiting.popleft()
            if place == mark:
                marked()
            replies[place] = await client.ask(request)

    started, busy = time.perf_counter(), time.process_time()
    for client in team:
        client.started = started
    await asyncio.gather(*(work(client) for client in team))
    run = Run(started, time.perf_counter() - started, time.process_time() - busy, replies)
    for client in team:
        client.close()
    return run


# --------------------------------------------------------------------------------------------- both sides of the pipe


class Generator:
    """The generator's process, as the benchmark sees it."""

    def __init__(self, process: subprocess.Popen, folder: Path) -> None:
        self.process, self.folder = process, folder

    def run(
        self, port: int, clients: int, requests: Sequence[Request], host: str = "127.0.0.1", mark: int | None = None,
        marked: Callable[[], None] = lambda: None,
    ) -> Run:  # fmt: skip
        """Send all requests, and call `marked` when number `mark` is sent. Raises RuntimeError if the process fails."""
        source, target = self.folder / "requests.jsonl", self.folder / "replies.json"
        source.write_text("".join(json.dumps(_written(request)) + "\n" for request in requests))
        job = {"host": host, "port": port, "clients": clients, "requests": str(source), "replies": str(target)}
        self.process.stdin.write(json.dumps(job | {"mark": mark}) + "\n")
        self.process.stdin.flush()
        while (said := self.process.stdout.readline().strip()) != DONE:
            if said != MARKED:
                raise RuntimeError(f"the load generator ended with exit code {self.process.wait()}")
            marked()
        found = json.loads(target.read_text())
        replies = [Reply(**reply | {"refused": tuple(reply["refused"])}) for reply in found["replies"]]
        return Run(**found | {"replies": replies})


@contextmanager
def generator(folder: Path) -> Iterator[Generator]:
    """Start the generator. `folder` takes its requests and replies."""
    command = [sys.executable, "-m", "bench.serving.load"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, **pipes) as process:
        yield Generator(process, folder)
        process.stdin.close()


def _written(request: Request) -> dict:
    return asdict(request) | {"content": request.content.decode("latin-1")}


def _read(line: str) -> Request:
    found = json.loads(line)
    return Request(**found | {"content": found["content"].encode("latin-1")})


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        with open(job["requests"]) as file:
            requests = [_read(line) for line in file]
        marked = partial(print, MARKED, flush=True)
        run = asyncio.run(drive(job["host"], job["port"], job["clients"], requests, job["mark"], marked))
        Path(job["replies"]).write_text(json.dumps(asdict(run)))
        print(DONE, flush=True)


if __name__ == "__main__":
    main()
