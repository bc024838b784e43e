"""Who may ask, and how much they may send: checked before anything of a request is read."""

import asyncio
import base64
import binascii
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request

from ..data.json_rows import of_pairs
from .answers import Refusal
from .limits import Limits, is_local, same
from .metrics import OTHER, Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
OPEN = ("/health", "/ready")
"""paths that need no token, because orchestrators ask them"""
DISCARDED, PATIENCE = 2**30, 10
"""Bytes, and seconds, for which a body that is too large is read and dropped. Its sender reads no answer before it has
sent everything"""
SLOWEST = 50_000
"""bytes a second. A body has PATIENCE seconds, and as many more as it takes at this speed"""
ENTRIES = 1024
"""that a list may have even if a request may have fewer rows: a conversation has many turns"""
LARGE = 2**18
"""bytes of a body that is parsed in a thread"""


class Guard:
    """ASGI middleware that answers 401 without the right token.

    A server without a token is local. It refuses other host names than this machine's with 403, because a page in a
    browser could point a name of its own at this machine.
    """

    def __init__(self, app: Any, token: bytes | None, metrics: Metrics) -> None:
        self.app, self.token, self.metrics = app, token, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        refusal = self._refusal(scope) if scope["type"] == "http" and path not in OPEN else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            self.metrics.on_request(OTHER, refusal.answer.status, 0)
            await respond(send, refusal)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = dict(scope["headers"])
        if scope["method"] == "POST" and b"upgrade" in headers.get(b"connection", b"").lower():
            # httptools does not read the body of such a request.
            said = "this server speaks HTTP/1.1: send the request without the header Upgrade (curl: --http1.1)"
            return Refusal(400, said, Connection="close")
        if self.token is None:
            if all(_names_this_machine(value) for name, value in scope["headers"] if name == b"host"):
                return None
            return Refusal(403, "this server has no token, so it answers to localhost only: start it with --token-file")
        given = _token(headers.get(b"authorization", b""))
        if given is not None and same(given, self.token):
            return None
        said = "a token is required: send Authorization: Bearer TOKEN" if given is None else "this is not the token"
        return Refusal(401, said, **{"WWW-Authenticate": 'Basic realm="endoreward", charset="UTF-8"'})


def _names_this_machine(host: bytes) -> bool:
    """Return whether a Host header is "", as some old clients send it, or a local name with or without a port."""
    name, _, port = host.decode("latin-1").lower().rpartition(":")
    name = name if port == "" or port.isdecimal() else f"{name}:{port}".removeprefix(":")
    return host == b"" or is_local(name)


def _token(header: bytes) -> bytes | None:
    """Return the token of an Authorization header: Bearer's, or Basic's password (its user, if that is empty)."""
    scheme, _, value = header.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() != b"basic":
        return None
    try:
        user, _, password = base64.b64decode(value.strip(), validate=True).partition(b":")
    except binascii.Error:
        return None
    return password or user


async def respond(send: Send, refusal: Refusal) -> None:
    """Send a refusal without reading the request."""
    answer = refusal.answer
    headers = {"content-type": "application/json", **answer.headers}
    lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    body = json.dumps(answer.content).encode()
    lines.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": answer.status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


class Bodies:
    """Reads bodies within limits: the bytes of one, the time it takes, and the bytes of all that are not answered."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self._held = limits, 0

    @asynccontextmanager
    async def json_of(self, request: Request) -> AsyncIterator[Any]:
        """Yield the JSON of a request's body. An object with a repeated key is an `Ambiguous`.

        The body counts among the bytes that are held until the block ends.

        Raises Refusal: 415 for another content type, 413 for a large body, 408 for a slow one, 503 if other bodies
        take all the room, 400 for what is no JSON.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, "send JSON, with the header Content-Type: application/json")
        packed = request.headers.get("content-encoding", "").strip().lower()
        if packed not in ("", "identity"):
            raise Refusal(415, "send the body as it is: without compression, and without the header Content-Encoding")
        parts: list[bytes] = []
        try:
            await self._read(request, parts)
            yield await self._json(b"".join(parts))
        finally:
            self._held -= sum(map(len, parts))

    async def _json(self, body: bytes) -> Any:
        # A value takes 100 bytes of memory, and one in the body. Text has commas too, but fewer than tokens.
        if body.count(b",") > self.limits.values:
            raise Refusal(413, f"the body has more than {self.limits.values} values: send fewer rows in one request")
        found = _parsed(body) if len(body) < LARGE else await asyncio.to_thread(_parsed, body)
        self._check_lists(found)
        return found

    def _check_lists(self, body: Any) -> None:
        """Refuse a list with more entries than a request may have rows, before each of its entries is looked at."""
        most = max(self.limits.rows, ENTRIES)
        lists = {k: v for k, v in body.items() if isinstance(v, list)} if isinstance(body, dict) else {}
        for name, entries in lists.items():
            ids = name == "input" and isinstance(entries[0] if entries else None, int)
            if len(entries) > most and not ids:
                said = f"{name[:50]}: {len(entries)} entries in one request: at most {most}, so send several"
                raise Refusal(413, said)

    async def _read(self, request: Request, parts: list[bytes]) -> None:
        """Append the parts of a body to `parts`."""
        most, size, more = self.limits.request_bytes, 0, True
        too_large = Refusal(413, f"the body has more than {most} bytes: send fewer rows in one request")
        started = time.monotonic()
        try:
            if int(request.headers.get("content-length", 0)) > most:
                raise too_large
            while more:
                allowed = min(self.limits.seconds, PATIENCE + size / SLOWEST)
                part, more = await _next(request, started + allowed)
                parts.append(part)
                size, self._held = size + len(part), self._held + len(part)
                if size > most:
                    raise too_large
                if self._held > self.limits.bytes_held:
                    raise Refusal(503, "other requests take all the room: ask again", **{"Retry-After": "1"})
        except asyncio.TimeoutError:
            raise Refusal(408, f"the body came too slowly: {size} bytes in {allowed:.3g} s") from None
        except Refusal:
            if more and request.headers.get("expect") is None:  # with `expect`, nothing more is sent before an answer
                with suppress(asyncio.TimeoutError):
                    await _discard(request)
            raise


async def _next(request: Request, ends: float) -> tuple[bytes, bool]:
    """Return the next part of a body, and whether more follows.

    Raises ClientDisconnect if the client went away, and asyncio.TimeoutError at the time `ends`.
    """
    message = await asyncio.wait_for(request.receive(), ends - time.monotonic())
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)


async def _discard(request: Request) -> None:
    """Read the rest of a body, within bounds, and drop it."""
    left, more, ends = DISCARDED, True, time.monotonic() + PATIENCE
    while more and left > 0:
        part, more = await _next(request, ends)
        left -= len(part)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8-sig"), object_pairs_hook=of_pairs, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise Refusal(400, f"the body is not JSON: {error.msg}, {where}") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deep") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise Refusal(400, f"the body is not JSON: {error}") from None


def _refuse_constant(name: str) -> None:
    raise Refusal(400, f"the body is not JSON: {name} is no JSON number")
