"""The HTTP side of a server: paths, bodies, statuses, and a page that explains them. It needs no model.

`Backend` answers. It is a service.Service in this process, or a handle to replicas (integrations/ray_serve.py).
"""

import asyncio
import json
import logging
import time
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..remote.wire import MODEL, VOCABULARY
from .answers import Answer, Refusal
from .dialects import DIALECTS
from .guard import Bodies, Guard
from .limits import Limits
from .metrics import OTHER, Metrics

LOG = logging.getLogger("endoreward")
GONE = 499
"""status, in metrics alone, of a request whose client went away"""
LARGE = 5000
"""values of an answer that is written in a thread"""
ERRORS = {
    400: "no JSON, or a request for HTTP/2", 401: "no token, or another",
    403: "not localhost, and the server has no token", 404: "no such model", 408: "a body that comes too slowly",
    413: "too many bytes, rows or tokens", 415: "not application/json", 422: "fields or rows that cannot be scored",
    429: "too many rows wait (verl's paths: 503); see Retry-After", 503: "not ready, or about to end; see Retry-After",
    504: "not scored within the time limit",
}  # fmt: skip
DESCRIPTION = "Rewards of a causal language model, from its logits: r = Q(s, a) - V(s'). An error is one line of JSON."


class Backend(Protocol):
    """What answers requests."""

    def waits_for(self) -> str | None:
        """Return what the server waits for before it can answer, such as its model; None: it is ready."""

    def alive(self) -> bool:
        """Return whether the server can still answer, now or once it is ready."""

    async def answer(self, path: str, body: Any = None) -> Answer:
        """Return the answer to a request. Cancelling this drops the request."""


def create_app(backend: Backend, *, limits: Limits, token: bytes | None, metrics: Metrics) -> FastAPI:
    """Return the application.

    token     required in every request except those to /health and /ready; None: only local names are answered
    """
    app = FastAPI(title="endoreward serve", version=version("endoreward-fast"), description=DESCRIPTION, redoc_url=None)
    app.router.redirect_slashes = False  # a redirect to the Host of the request, and without TLS behind a proxy
    app.add_middleware(Guard, token=token, metrics=metrics)
    bodies = Bodies(limits)

    async def answered(request: Request, path: str, reads: bool) -> Response:
        started = time.monotonic()
        status = GONE  # if this is cancelled
        try:
            try:
                response = await _answered(request, path, reads)
            except Exception:  # answered here, because uvicorn closes a connection when an exception reaches it
                LOG.exception("%s failed", path)
                response = _failed()
            status = response.status_code
            return response
        finally:
            metrics.on_request(path, status, time.monotonic() - started)

    async def _answered(request: Request, path: str, reads: bool) -> Response:
        try:
            if (missing := backend.waits_for()) is not None:
                raise Refusal(503, f"not ready: {missing}", **{"Retry-After": "1"})
            async with bodies.json_of(request) if reads else nullcontext() as body:
                answer = await _unless_gone(request, backend.answer(path, body))
        except Refusal as refusal:
            answer = refusal.answer
        except ClientDisconnect:
            answer = None
        if answer is None:
            return Response(status_code=GONE)
        small = _is_small(answer.content)
        body = _dumps(answer.content) if small else await asyncio.to_thread(_in_parts, answer.content)
        return Response(body, answer.status, dict(answer.headers), "application/json")

    def add(path: str, method: str, reads: bool, **documented: Any) -> None:
        async def endpoint(request: Request) -> Response:
            return await answered(request, path, reads)

        endpoint.__name__ = f"{method.lower()}{path.replace('/', '_')}"
        described: dict[int | str, dict[str, Any]] = {status: {"description": said} for status, said in ERRORS.items()}
        app.add_api_route(path, endpoint, methods=[method], responses=described, **documented)

    for dialect in DIALECTS.values():
        schema = {"schema": dialect.body.model_json_schema()}
        body = {"requestBody": {"required": True, "content": {"application/json": schema}}}
        add(dialect.path, "POST", True, summary=_summary(dialect.body), openapi_extra=body)
    add(MODEL, "GET", False, summary="The served model, and the limits of a request")
    add(VOCABULARY, "GET", False, summary="The tokenizer's tokens, to compare with one's own")

    @app.get("/health", summary="200 while the server lives; otherwise start it again")
    async def health() -> Response:
        alive = backend.alive()
        said = {"status": "alive"} if alive else {"error": "the server scores no more: start it again"}
        return JSONResponse(said, 200 if alive else 500)

    @app.get("/ready", summary="200 once the model is loaded and checked, until the server is about to end")
    async def ready() -> Response:
        missing = backend.waits_for()
        said = {"status": "ready"} if missing is None else {"error": f"not ready: {missing}"}
        return JSONResponse(said, 200 if missing is None else 503, {} if missing is None else {"Retry-After": "1"})

    @app.get("/metrics", summary="Counters for Prometheus", response_class=PlainTextResponse)
    async def read_metrics() -> Response:
        metrics.ready.set(backend.waits_for() is None)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        said = {404: f"no such path: the paths are {', '.join(DIALECTS)}", 405: "this path takes another method"}
        metrics.on_request(OTHER, error.status_code, 0)
        content = {"error": said.get(error.status_code, str(error.detail))}
        return JSONResponse(content, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _failed()

    return app


def _failed() -> Response:
    return JSONResponse({"error": "the server failed at this request; its log says how"}, 500)


async def _unless_gone(request: Request, answering: Any) -> Answer | None:
    """Return the answer, or None if the client goes away first. What answers is cancelled then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.ensure_future(answering), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        for task in (answer, leaving):
            task.cancel()


def _is_small(content: Any) -> bool:
    """Return whether content has less than LARGE values. Only so many are looked at."""
    left, inner = LARGE, [content]
    while inner and left > 0:
        value = inner.pop()
        if isinstance(value, (dict, list)):
            left -= len(value)
            inner.extend((value.values() if isinstance(value, dict) else value) if left > 0 else ())
    return left > 0


def _in_parts(content: Any) -> bytes:
    """Return content as JSON. Other threads run between its parts, because json holds the interpreter for each."""
    if not isinstance(content, dict):
        return _dumps(content)
    parts = []
    for name, value in content.items():
        listed = b"[" + b",".join(map(_dumps, value)) + b"]" if isinstance(value, list) else _dumps(value)
        parts.append(_dumps(name) + b":" + listed)
    return b"{" + b",".join(parts) + b"}"


def _dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def _summary(body: Any) -> str:
    return str(body.__doc__).partition("\n")[0].rstrip(".")
