"""Run a server in this process: listen, load the model, answer until told to stop, and drain."""

import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

STOPS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Local:
    """The backend of a server with a model in this process."""

    service: Service | None = None
    ending: bool = False
    error: BaseException | None = None
    """why the model could not be loaded"""

    def waits_for(self) -> str | None:
        """Return what the server waits for before it can answer, or None."""
        return "the server is about to end" if self.ending else "the model is loading" if self.service is None else None

    def alive(self) -> bool:
        """Return whether the server can still answer, now or once it is ready."""
        return self.service is None or self.ending or self.service.alive()

    async def answer(self, path: str, body: Any = None) -> Answer:
        """Return the answer of the service."""
        assert self.service is not None  # the application asks waits_for first
        return await self.service.answer(path, body)


class _Server(uvicorn.Server):
    """uvicorn's server. The first signal drains: requests that were accepted are answered. A second one stops."""

    def __init__(self, config: uvicorn.Config, local: Local) -> None:
        super().__init__(config)
        self._local = local

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Take a signal."""
        self._local.ending = True
        super().handle_exit(sig, frame)


def serve(
    load: Callable[[Metrics], Service], listening: socket.socket, *, limits: Limits, token: bytes | None,
    on_ready: Callable[[], None],
) -> None:  # fmt: skip
    """Answer requests on a socket until SIGTERM or Ctrl-C, and then until all that were accepted are answered.

    load        returns the service; called in a thread, while /health answers already
    on_ready    called when the service can answer

    Raises what `load` raises.
    """
    metrics, local = Metrics(), Local()
    app = create_app(local, limits=limits, token=token, metrics=metrics)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, date_header=False, lifespan="off",
        proxy_headers=False, timeout_keep_alive=75, http=Connection,
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
            on_ready()

    threading.Thread(target=prepare, name="load", daemon=True).start()
    with _no_second_signal():
        server.run(sockets=[listening])
    if local.service is not None and not server.force_exit:
        local.service.close()
    if local.error is not None:
        raise local.error


@contextmanager
def _no_second_signal() -> Iterator[None]:
    """Ignore the signals that uvicorn raises again when it has ended because of them."""
    before = {number: signal.signal(number, lambda *_: None) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
