"""Run a server in this process: listen, load the model, answer until told to stop, and drain."""

import asyncio
import gc
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn

from ..errors import EndoRewardError
from .answers import Answer
from .app import create_app
from .connection import Connection
from .limits import Limits
from .metrics import Metrics
from .service import Service

LINGER = 20
"""seconds that connections get after the last answer, while the server ends"""


@dataclass
class Local:
    """The backend of a server with a model in this process."""

    service: Service | None = None
    ending: bool = False
    error: BaseException | None = None
    """why the model could not be loaded"""
    answering: int = 0
    """requests that were accepted and are not answered"""

    def waits_for(self) -> str | None:
        """Return what the server waits for before it can answer, or None."""
        return "the server is about to end" if self.ending else "the model is loading" if self.service is None else None

    def alive(self) -> bool:
        """Return whether the server can still answer, now or once it is ready."""
        return self.service is None or self.ending or self.service.alive()

    async def answer(self, path: str, body: Any = None) -> Answer:
        """Return the answer of the service."""
        assert self.service is not None  # the application asks waits_for first
        self.answering += 1
        try:
            return await self.service.answer(path, body)
        finally:
            self.answering -= 1


class _Server(uvicorn.Server):
    """uvicorn's server. The first signal drains: requests that were accepted are answered. A second Ctrl-C stops."""

    def __init__(self, config: uvicorn.Config, local: Local) -> None:
        super().__init__(config)
        self.local = local
        self.stopped = False
        """whether a second Ctrl-C ended it"""

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Take a signal. Unlike uvicorn's own method, this does not keep it, to raise it again at the end."""
        self.stopped = self.stopped or (self.local.ending and sig == signal.SIGINT)
        self.local.ending = self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what was accepted, and close every connection."""
        cut = asyncio.ensure_future(self._cut())
        await super().shutdown(sockets)
        cut.cancel()

    async def _cut(self) -> None:
        """Close the connections of clients that do not send their bodies, or do not read their answers."""
        answered = time.monotonic()
        while not self.stopped and time.monotonic() - answered < LINGER:
            if self.local.answering:
                answered = time.monotonic()
            await asyncio.sleep(0.1)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def serve(
    load: Callable[[Metrics], Service], listening: socket.socket, *, limits: Limits, token: bytes | None,
    on_ready: Callable[[], None],
) -> None:  # fmt: skip
    """Answer requests on a socket until SIGTERM or Ctrl-C, and then until all that were accepted are answered.

    load        returns the service; called in a thread, while /health answers already
    on_ready    called when the service can answer

    Raises what `load` raises, and KeyboardInterrupt if a second Ctrl-C came before all were answered.
    """
    metrics, local = Metrics(), Local()
    app = create_app(local, limits=limits, token=token, metrics=metrics)
    config = uvicorn.Config(
        app, log_config=None, log_level="error", access_log=False, server_header=False, date_header=False,
        lifespan="off", proxy_headers=False, timeout_keep_alive=75, http=Connection,
    )  # fmt: skip
    server = _Server(config, local)

    def prepare() -> None:
        try:
            service = load(metrics)
            service.check()
            # A full collection looks at each object of torch and the model, and stops everything for 0.25 s.
            gc.collect()
            gc.freeze()
        except BaseException as error:  # raised again by the main thread
            local.error = error
            server.should_exit = True
        else:
            local.service = service
            if not local.ending:
                on_ready()

    threading.Thread(target=prepare, name="load", daemon=True).start()
    server.run(sockets=[listening])
    if local.service is not None:
        local.service.close(drop=server.stopped)
    if local.error is not None:
        raise local.error
    if server.stopped:
        raise KeyboardInterrupt


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Port 0 takes a free one.

    Raises EndoRewardError: a host that is no address of this machine, a port that is taken or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise EndoRewardError(f"--host {host}: {error.strerror or error}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise EndoRewardError(f"cannot listen on {host} port {port}: {error.strerror}: choose another --port") from None
    return sock


def url_of(listening: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def log_to_stderr() -> None:
    """Write the log of this process to standard error, one line each; errors with their traceback."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("endoreward: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
