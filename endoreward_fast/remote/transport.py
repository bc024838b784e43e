"""Requests to a server over one pool of connections: retries with backoff, within a limit of time."""

import json
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import EndoRewardError, first_line
from .address import TOKEN, Address

if TYPE_CHECKING:
    import urllib3

CONNECT = 10.0
"""most seconds for a connection to be made"""
BACKOFF, LONGEST, JITTER = 0.5, 30.0, 0.25
"""seconds: a second failure in a row waits BACKOFF, and each further one twice as long, up to LONGEST, plus JITTER"""
DAY = 86400.0
"""most seconds of one wait: the system's clocks take no infinity"""
BUSY = (429, 503)
"""the server is there and says when to ask again: only the time limits how often"""
FAILED = (502, 504)
EXCERPT = 400
"""characters that a message quotes of a server's answer"""
HINTS = {
    401: f"set {TOKEN} to the server's token",
    404: "give the address of `endoreward serve`, such as http://HOST:8000",
}


class Refused(EndoRewardError):
    """Raised for an answer that is an error. `status` and `answer` are those of the server."""

    status: int
    answer: dict[str, Any]


class Stopped(Exception):
    """Raised in a request that waits to be sent again, because nobody wants its answer any more."""


@dataclass(frozen=True)
class Connections:
    """The connections of one process."""

    pool: "urllib3.PoolManager"
    turns: threading.BoundedSemaphore
    """held by each request, so that there are no more requests than connections"""


class Transport:
    """Sends JSON to a server, from any thread and any process that is forked from this one.

    address      where the server is
    timeout      seconds that one request may take in all: waiting, sending it again, and the answer. A request begins
                 once a connection is free
    retries      how often a request is sent again after a lost connection, 500 of a proxy, 502 or
                 504. 429 and 503 do not count
    connections  number of connections, and of requests at a time

    Requests are sent again, POST included, because scoring the same rows twice gives the same scores. A redirect is
    never followed, because the token would go to another server.
    """

    def __init__(self, address: Address, *, timeout: float, retries: int, connections: int) -> None:
        try:
            import urllib3
        except ImportError:
            raise EndoRewardError("a model behind a URL needs urllib3: pip install 'urllib3>=2'") from None
        self.url, self.timeout = address.url, timeout
        self._size = connections
        self._of_process: dict[int, Connections] = {}
        self._headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if address.token is not None:
            self._headers["Authorization"] = f"Bearer {address.token}"
        waits: dict[str, Any] = {"backoff_factor": BACKOFF, "backoff_max": LONGEST, "backoff_jitter": JITTER}
        self._failing = urllib3.Retry(total=retries, allowed_methods=None, **waits)
        self._waiting = urllib3.Retry(total=None, allowed_methods=None, **waits)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_of_process": {}}

    def get(self, path: str) -> dict[str, Any]:
        """Return the server's answer. Raises as `post` does."""
        return self._ask("GET", path, None, threading.Event())

    def post(self, path: str, body: bytes, stop: threading.Event) -> dict[str, Any]:
        """Return the server's answer to JSON text. If `stop` is set, waiting ends with Stopped.

        Raises Refused for an error of the server, and EndoRewardError if there is no answer in time or no JSON in it.
        """
        return self._ask("POST", path, body, stop)

    def _ask(self, method: str, path: str, body: bytes | None, stop: threading.Event) -> dict[str, Any]:
        connections = self._connections()
        with connections.turns:
            if stop.is_set():
                raise Stopped
            response = self._response(connections.pool, method, path, body, stop)
        try:
            answer = json.loads(response.data)
        except (ValueError, RecursionError):
            answer = None
        if 300 <= response.status < 400:
            raise self._refused(response.status, {}, "redirects to another address, which is not followed: give that")
        if response.status != 200:
            answer = answer if isinstance(answer, dict) else {}
            said = answer.get("error") if isinstance(answer.get("error"), str) else response.reason
            hint = HINTS.get(response.status)
            raise self._refused(response.status, answer, f"{_short(said)}{f': {hint}' if hint else ''}")
        if not isinstance(answer, dict):
            raise EndoRewardError(f"{self.url}{path} answers without a JSON object: {HINTS[404]}")
        return answer

    def _connections(self) -> Connections:
        """Return the connections of this process. On those of the process that forked it, answers would be mixed up."""
        import urllib3

        mine = os.getpid()
        if mine not in self._of_process:
            pool = urllib3.PoolManager(num_pools=1, maxsize=self._size)
            self._of_process.setdefault(mine, Connections(pool, threading.BoundedSemaphore(self._size)))
        return self._of_process[mine]

    def _response(
        self, pool: "urllib3.PoolManager", method: str, path: str, body: bytes | None, stop: threading.Event
    ) -> "urllib3.BaseHTTPResponse":  # fmt: skip
        """Return the first answer that is not to be asked for again, or the last one."""
        import urllib3

        end = time.monotonic() + self.timeout
        failing, waiting = self._failing, self._waiting
        while True:
            left = min(max(end - time.monotonic(), 0.001), DAY)
            response, error = None, None
            try:
                response = pool.urlopen(
                    method, f"{self.url}{path}", body=body, headers=self._headers, retries=False, redirect=False,
                    timeout=urllib3.Timeout(connect=min(CONNECT, left), read=left),
                )  # fmt: skip
            except urllib3.exceptions.HTTPError as raised:
                error = raised
            if response is not None and response.status not in (*BUSY, *FAILED) and not _of_a_proxy(response):
                return response
            try:
                if response is not None and response.status in BUSY:
                    waiting = waiting.increment(method, path, response)
                    wait = waiting.get_backoff_time()
                else:
                    failing = failing.increment(method, path, response, error)
                    wait = failing.get_backoff_time()
                again = not isinstance(error, urllib3.exceptions.SSLError)
            except urllib3.exceptions.MaxRetryError:
                again, wait = False, 0.0
            wait = max(wait, _retry_after(failing, response))
            if not again or time.monotonic() + wait >= end:
                if response is not None:
                    return response
                raise EndoRewardError(f"{self.url}: {self._why(error)}") from error
            if stop.wait(min(wait, DAY)):
                raise Stopped

    def _refused(self, status: int, answer: dict[str, Any], said: str) -> Refused:
        refused = Refused(f"{self.url}: {status}: {said}")
        refused.status, refused.answer = status, answer
        return refused

    def _why(self, error: BaseException | None) -> str:
        """Return why there is no answer, in words."""
        from urllib3 import exceptions

        if isinstance(error, exceptions.ReadTimeoutError):
            return f"no answer in {self.timeout:g} s"
        if isinstance(error, exceptions.NameResolutionError):
            return "no host has this name"
        inner: BaseException | None = error
        while inner is not None:
            if isinstance(inner, OSError) and inner.strerror:
                return f"no connection to the server ({inner.strerror})"
            inner = next((one for one in inner.args if isinstance(one, BaseException)), inner.__cause__)
        return f"no answer ({first_line(error) if error else 'none came'})"


def _of_a_proxy(response: "urllib3.BaseHTTPResponse") -> bool:
    """Return whether a proxy answers that its server died: that of Ray has status 500 for it, and no JSON."""
    return response.status == 500 and "json" not in response.headers.get("Content-Type", "")


def _retry_after(reader: "urllib3.Retry", response: "urllib3.BaseHTTPResponse | None") -> float:
    """Return the seconds that the server asks to wait; 0 if it does not say, or not in a way that can be read."""
    from urllib3.exceptions import InvalidHeader

    if response is None:
        return 0.0
    try:
        return float(reader.get_retry_after(response) or 0)
    except (InvalidHeader, ValueError, OverflowError):
        return 0.0


def _short(said: Any) -> str:
    line = " ".join(str(said).split())
    return line if len(line) <= EXCERPT else f"{line[:EXCERPT]} ..."
