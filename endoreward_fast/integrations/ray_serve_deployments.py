"""The two deployments of an application on Ray Serve: an ingress without a model, and replicas of the model."""

import asyncio
import gc
import logging
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Histogram

from ..errors import EndoRewardError
from ..model.model import EndoRewardModel
from ..remote.wire import MODEL as ABOUT
from ..serving.answers import Answer, Refusal
from ..serving.app import create_app
from ..serving.dialects import BUSY, DIALECTS, FULL
from ..serving.guard import respond
from ..serving.limits import TOKEN
from ..serving.metrics import FILLS, SECONDS, Metrics
from ..serving.service import Served, Service
from .ray_serve_arguments import Settings

LOG = logging.getLogger("endoreward")
MODEL, INGRESS = "Model", "Ingress"
"""names of the deployments; a config file of Ray Serve overrides their options by these names"""
OF_BOTH = {"health_check_period_s": 2}
"""so that Ray starts a replica again 2 seconds after it died, and not 10"""
OF_MODEL = {**OF_BOTH, "max_ongoing_requests": 512, "max_queued_requests": 1024, "max_constructor_retry_count": 3}
"""our defaults of Ray's options: enough requests in a replica for its batches, and a bounded queue before them"""
OF_INGRESS = {**OF_BOTH, "max_ongoing_requests": 100_000, "ray_actor_options": {"num_cpus": 0.1}}
LOST = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError)
"""errors of a request whose replica, or the replica's node, went away"""
TRIES = 4
"""replicas that one request is sent to if they die; the request may be what kills them"""
PAUSE = 0.1
"""seconds before the second try; doubled for each further one"""


def build(settings: Settings, token: bytes | None, of_ray: Mapping[str, Any], model: type | None = None) -> Application:
    """Return the application.

    token     required in requests; None: requests from this machine only
    of_ray    Ray's options for the replicas of the model
    model     another class than Model

    Raises EndoRewardError if Ray refuses an option.
    """

    def web() -> FastAPI:  # called in the ingress, after its __init__
        return web_app(serve.get_deployment_handle(MODEL), settings, token)

    try:
        behind = serve.deployment(model or Model, name=MODEL, **{**OF_MODEL, **of_ray})
    except (TypeError, ValueError) as error:
        raise EndoRewardError(f"Ray refuses an argument: {_one_line(error)}") from error
    ingress = serve.ingress(web)(Ingress)
    before = serve.deployment(ingress, name=INGRESS, num_replicas=settings.ingress_replicas, **OF_INGRESS)
    return before.bind(behind.bind(settings), settings.timeout)


def web_app(handle: DeploymentHandle, settings: Settings, token: bytes | None) -> FastAPI:
    """Return the app of the ingress. Without a token, it answers this machine only."""
    app = create_app(Replicas(handle, settings.timeout), limits=settings.limits, token=token, metrics=Metrics())
    if token is None:
        app.add_middleware(LocalOnly)
    return app


def _one_line(error: Exception) -> str:
    """Return Ray's reason in one line. Those of pydantic have several: the number of errors, the field, the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "validation error" in lines[0]:
        return ": ".join(lines[1:3]).partition(" [type=")[0]
    return lines[0]


class Ingress:
    """The ingress, before it gets its app. Ray sends it no request before its `__init__` returns.

    handle, seconds    as in Replicas
    """

    async def __init__(self, handle: DeploymentHandle, seconds: float) -> None:
        replicas = Replicas(handle, seconds)
        while (found := await replicas.answer(ABOUT)).status != 200:
            LOG.warning("no replica of the model answers: %s", found.content)
            await asyncio.sleep(1)


class Model:
    """A replica. It holds the model, and forms batches from the requests that Ray sends to it."""

    def __init__(self, settings: Settings) -> None:
        self._service = Service(
            EndoRewardModel.from_pretrained(
                settings.model, dtype=settings.dtype, device=settings.device, **settings.source
            ),
            Served.of(settings.model, settings.served_name, **settings.source),
            options=settings.options, limits=settings.limits, metrics=RayMetrics(),
            window=settings.window_ms / 1000, most_waiting=settings.max_waiting,
        )  # fmt: skip
        self._service.check()
        gc.collect()
        gc.freeze()  # as serving/run.py does

    async def answer(self, path: str, body: Any = None) -> Answer:
        """Answer one request. Ray cancels this if the client goes away."""
        return await self._service.answer(path, body)

    def check_health(self) -> None:
        """Raise if this replica scores no more. Ray then starts another one in its place."""
        if not self._service.alive():
            raise RuntimeError("the thread that scores has ended: see the log")

    def __del__(self) -> None:
        """Stop. Ray calls this when no request is left, and Python if the model could not be loaded."""
        if hasattr(self, "_service"):
            self._service.close()


class RayMetrics(Metrics):
    """Metrics of a replica. Ray exports them with its own, with the name of the replica."""

    def __init__(self) -> None:
        super().__init__()
        self._of_rows = Counter("endoreward_rows", "Rows, by whether they have a score", ("outcome",))
        self._of_tokens = Counter("endoreward_tokens", "Tokens of scored rows, prompts included")
        self._of_fill = Histogram("endoreward_round_fill", "Tokens of a round over its budget", [*FILLS])
        self._of_round = Histogram("endoreward_round_seconds", "Time that a round took", [*SECONDS])
        self._of_wait = Histogram("endoreward_wait_seconds", "Time that a request waited for a round", [*SECONDS])

    def on_round(self, rows: int, tokens: int, fill: float, seconds: float) -> None:
        """Note a round: its rows and tokens, tokens over the round's budget, and the time it took."""
        super().on_round(rows, tokens, fill, seconds)
        self._of_tokens.inc(tokens)
        self._of_fill.observe(fill)
        self._of_round.observe(seconds)

    def on_wait(self, seconds: float) -> None:
        """Note the time that a request waited for its first round."""
        super().on_wait(seconds)
        self._of_wait.observe(seconds)

    def on_rows(self, scored: int, unscored: int) -> None:
        """Note the rows of an answer."""
        super().on_rows(scored, unscored)
        for outcome, count in (("scored", scored), ("unscored", unscored)):
            if count:  # Ray refuses 0
                self._of_rows.inc(count, {"outcome": outcome})


class Replicas:
    """The replicas of the model behind Ray's handle, as the backend of an app (serving/app.py).

    handle     of the model's deployment
    seconds    the most that one request may take, with the time in which Ray waits for a replica
    pause      seconds before the second try of a request
    """

    def __init__(self, handle: DeploymentHandle, seconds: float, pause: float = PAUSE) -> None:
        self._handle, self._seconds, self._pause = handle, seconds, pause

    def alive(self) -> bool:
        """Return True: Ray itself checks the replicas."""
        return True

    def waits_for(self) -> None:
        """Return None: an ingress takes requests once a replica has answered."""

    async def answer(self, path: str, body: Any = None) -> Answer:
        """Answer one request.

        If its replica dies, another one is asked, up to TRIES in all. If the replica's queue is full, or it takes no
        more requests, Ray chooses one once more. Cancelling this cancels the request at its replica.
        """
        try:
            return await asyncio.wait_for(self._answer(path, body), self._seconds)
        except asyncio.TimeoutError:
            said = f"not scored within {self._seconds:g} s: send fewer rows, or ask again when less waits"
            return Refusal(504, said).answer

    async def _answer(self, path: str, body: Any) -> Answer:
        full = DIALECTS[path].when_full if path in DIALECTS else FULL
        for tried in range(TRIES):
            if tried:
                await asyncio.sleep(self._pause * 2 ** (tried - 1))
            response = self._handle.answer.remote(path, body)
            try:
                found: Answer = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except LOST as error:
                LOG.warning("a replica was lost with a request, try %d of %d: %s", tried + 1, TRIES, _one_line(error))
                continue
            except BackPressureError as error:
                return _later(full, "too many requests wait for a replica: ask again", error.retry_after_s or 1)
            except DeploymentUnavailableError:
                return _later(503, "no replica of the model could start: see Ray Serve's logs", 30)
            if tried or found.status not in (full, BUSY):
                return found
        return _later(503, f"{TRIES} replicas were lost while they had this request: send fewer rows at a time", 10)


def _later(status: int, line: str, seconds: float) -> Answer:
    return Refusal(status, line, **{"Retry-After": f"{seconds:.0f}"}).answer


class LocalOnly:
    """Middleware that refuses requests from other machines. Ray's proxy hands on both ends of the connection."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not _is_local(scope):
            await respond(send, Refusal(403, f"this server has no token, so it is for its own machine: set {TOKEN}"))
        else:
            await self.app(scope, receive, send)


def _is_local(scope: Mapping[str, Any]) -> bool:
    passed_on = any(name in (b"forwarded", b"x-forwarded-for") for name, _ in scope["headers"])
    ends = [scope.get("client"), scope.get("server")]
    return not passed_on and all(end is not None and ip_address(end[0]).is_loopback for end in ends)
