"""One model that answers requests: bodies in, answers out, without HTTP. A server or a Ray replica holds one."""

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from ..data.records import Ambiguous, record
from ..errors import EndoRewardError
from ..model.checkpoint import on_this_machine, weights_of
from ..remote.wire import MODEL, REWARDS, SERVERS_OWN, VOCABULARY
from ..scoring.arguments import refuse_unknown
from ..scoring.options import ScoreOptions
from ..scoring.scorer import Scorer
from ..text.rows import Row
from .answers import Answer, Refusal
from .batcher import Asked, Batcher, Closed, Full
from .dialects import DIALECTS, Ask, Dialect, Scored
from .limits import Limits
from .metrics import Metrics
from .turns import Turns

LOG = logging.getLogger("endoreward")
OPTIONS = tuple(name for name in ScoreOptions.__dataclass_fields__ if name not in SERVERS_OWN)
"""what a request may set"""
KEPT = 64
"""sets of options that are kept"""
LARGE = 2**18
"""letters and values of a request that is read apart from the others: 50,000 tokens, say"""
MOST_REASONS = 100
"""reasons for missing scores that are written to the log"""
PATHS = (*DIALECTS, MODEL, VOCABULARY)


class Served(NamedTuple):
    """What a server says about its model."""

    names: tuple[str, ...]
    """names by which requests may call it; the first is written into answers"""
    weights: str
    """what tells these weights from others"""

    @classmethod
    def of(cls, model: str, name: str | None = None, **source: Any) -> "Served":
        """Return how a model is served that from_pretrained loads with `source`.

        Its name in answers is `name`, else the model's without the folders of this machine.
        """
        shown = name or (Path(model).name if on_this_machine(model) else model)
        return cls((shown, model), weights_of(model, **source))


class Service:
    """Answer requests with one model.

    scorer     an EndoRewardModel; no other thread may use it while the service is open
    served     its names, and what identifies its weights
    options    defaults of scoring for all requests, as EndoRewardModel.score takes them
    limits     of one request
    batching   arguments of Batcher: window, most_waiting
    """

    def __init__(
        self, scorer: Scorer, served: Served, *, options: Mapping[str, Any] | None = None, limits: Limits | None = None,
        metrics: Metrics | None = None, **batching: Any,
    ) -> None:  # fmt: skip
        self.scorer, self.served, self.limits = scorer, served, limits or Limits()
        self.options = dict(options or {})
        ScoreOptions.of(self.options)  # raises for a wrong default before any request
        self.turns = Turns(scorer)
        self.metrics = Metrics() if metrics is None else metrics
        most = self.options.get("max_tokens_per_batch")
        self.batcher = Batcher(scorer, max_tokens=most, watch=self.metrics, **batching)
        self.metrics.queue_rows.set_function(lambda: self.batcher.rows)
        self.metrics.queue_tokens.set_function(lambda: self.batcher.tokens)
        self._reasons: set[str] = set()
        self._known: dict[frozenset[tuple[str, type, Any]], ScoreOptions] = {}
        self._lock = threading.Lock()

    def check(self) -> None:
        """Score a first row, so that the first request does not pay for what is set up once.

        Raises EndoRewardError if it has no score. Loading the model has compared its head with its logits already.
        """
        options = ScoreOptions.of(self.options | {"system": None, "max_length": None})
        token = min(self.turns.ends, default=0)
        row = {"prompt_ids": [token] * 2, "completion_ids": [token]}
        (found,) = self.batcher.submit(1, lambda: [row], options).future.result()
        if found.error is not None:
            raise EndoRewardError(f"the model cannot score a row of its own tokens: {found.error}")

    async def answer(self, path: str, body: Any = None) -> Answer:
        """Return the answer to a request. If this is cancelled, the rows that wait for it are dropped."""
        try:
            if path == MODEL:
                return Answer(200, self.about())
            if path == VOCABULARY:
                return Answer(200, self.vocabulary)
            return await self._scored(DIALECTS[path], body)
        except Refusal as refusal:
            error: Exception = refusal
            answer = refusal.answer
        except EndoRewardError as refused:
            error, answer = refused, Refusal(422, str(refused)).answer
        except Exception as failed:
            LOG.exception("%s failed", path)
            error, answer = failed, Refusal(500, "the server failed at this request; its log says how").answer
        error.__traceback__ = None  # asyncio keeps the error in a cycle: its frames would keep the body
        return answer

    def about(self) -> dict[str, Any]:
        """Return what a client has to know about the model and the limits."""
        scorer, limits = self.scorer, self.limits
        dtype = next(scorer.model.parameters()).dtype  # type: ignore[attr-defined]
        return {
            "model": self.served.names[0], "version": version("endoreward-fast"), "weights": self.served.weights,
            "dtype": str(dtype).removeprefix("torch."), "max_positions": scorer.positions.limit(None),
            "vocab_size": scorer.vocab_size, "eos_ids": sorted(self.turns.ends),
            "tokenizer": scorer.tokenizer is not None,
            "limits": {
                "request_bytes": limits.request_bytes, "rows": limits.rows, "tokens": limits.tokens,
                "seconds": limits.seconds,
            },
        }  # fmt: skip

    @cached_property
    def vocabulary(self) -> dict[str, Any]:
        """The tokenizer's tokens, which a client compares with its own."""
        tokenizer = self.scorer.tokenizer
        if tokenizer is None:
            raise Refusal(404, "the model has no tokenizer")
        special = [i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special]
        return {"name": self.served.names[0], "tokens": tokenizer.get_vocab(), "special": special}

    def alive(self) -> bool:
        """Return whether rows are still scored. False is a bug: the process has to be started again."""
        return self.batcher.alive()

    def close(self, *, drop: bool = False) -> None:
        """Refuse further requests, and return when all that were accepted are answered; if `drop`, are dropped."""
        self.batcher.close(drop=drop)

    async def _scored(self, dialect: Dialect, body: Any) -> Answer:
        large = is_large(body)
        ask = await asyncio.to_thread(self._ask, dialect, body) if large else self._ask(dialect, body)
        options = self._options(ask.options)
        asked = self._submit(dialect, ask, options, large)
        try:
            results = await asyncio.wait_for(asyncio.wrap_future(asked.future), self.limits.seconds)
        except asyncio.TimeoutError:
            said = f"not scored within {self.limits.seconds:g} s: send fewer rows, or ask again when less waits"
            raise Refusal(504, said) from None
        except Closed as closed:
            raise _elsewhere(closed) from None
        finally:
            self.batcher.cancel(asked)
        scored = Scored(results, options, asked.tokens, self.served.names[0], self.served.weights)
        answer = await asyncio.to_thread(ask.answer, scored) if large else ask.answer(scored)
        self.metrics.on_rows(answer.scored, answer.unscored)
        self._log(answer.reasons)
        return answer

    def _ask(self, dialect: Dialect, body: Any) -> Ask:
        """Return what a body asks for. Raises Refusal or EndoRewardError if it is not what the path takes."""
        # Rows are checked one by one, so that a bad one leaves the others their scores.
        apart = dialect.path == REWARDS and isinstance(body, dict) and not isinstance(body, Ambiguous)
        odd = record("the request", {k: v for k, v in body.items() if k != "rows"} if apart else body)
        if odd.error:
            raise Refusal(422, f"{odd.where}: {odd.error}")
        try:
            parsed = dialect.body.model_validate(body)
        except ValidationError as error:
            raise Refusal(422, _first(error, dialect.body)) from None
        name = getattr(parsed, "model", None)
        if name is not None and name not in self.served.names:
            raise Refusal(404, f"no model {name[:200]!r} here: this server has {self.served.names[0]!r}")
        if dialect.path == REWARDS:
            refuse_unknown(parsed.model_extra or {}, OPTIONS)
        ask = dialect.ask(parsed, self.turns)
        if ask.rows > self.limits.rows:
            raise Refusal(413, f"{ask.rows} rows in one request: at most {self.limits.rows}, so send several")
        return ask

    def _options(self, given: Mapping[str, Any]) -> ScoreOptions:
        """Return the options of a request. Those of the last requests are kept: checking them takes 0.1 ms."""
        try:
            # Equal values may differ in type, and in their meaning: 1, 1.0 and True.
            key = frozenset((name, type(value), value) for name, value in given.items())
        except TypeError:  # tools, say
            return self._checked(given)
        with self._lock:
            known = self._known.get(key)
        if known is None:
            known = self._checked(given)
            with self._lock:
                while len(self._known) >= KEPT:
                    del self._known[next(iter(self._known))]
                self._known[key] = known
        return known

    def _checked(self, given: Mapping[str, Any]) -> ScoreOptions:
        options = {**self.options, **given}
        most = self.options.get("max_length")
        if most is not None and isinstance(options.get("max_length"), int):
            options["max_length"] = min(most, options["max_length"])
        elif most is not None and options.get("max_length") is None:
            options["max_length"] = most
        return ScoreOptions.of(options)

    def _submit(self, dialect: Dialect, ask: Ask, options: ScoreOptions, large: bool) -> Asked:
        most = self.limits.tokens

        def too_many(tokens: int) -> Refusal:
            return Refusal(413, f"{tokens} tokens in one request: at most {most}, so send fewer rows")

        def read() -> Sequence[Row]:
            rows = ask.read()
            # Clients of the other paths take any answer for a reward, so an error of each row would not be seen.
            if options.system and dialect.path != REWARDS and any("prompt_ids" in row for row in rows):
                said = "prompts of this path are whole, so the server's --system has no place: start it without"
                raise Refusal(422, said)
            return rows

        try:
            return self.batcher.submit(ask.rows, read, options, most, too_many, large=large)
        except Full as full:
            said = f"{full}: ask again in {full.seconds} s"
            raise Refusal(dialect.when_full, said, **{"Retry-After": str(full.seconds)}) from None
        except Closed as closed:
            raise _elsewhere(closed) from None

    def _log(self, reasons: tuple[str, ...]) -> None:
        """Log each new reason for a missing reward once."""
        for reason in reasons:
            with self._lock:
                new = reason not in self._reasons and len(self._reasons) < MOST_REASONS
                self._reasons.add(reason) if new else None
            if new:
                LOG.warning("a completion has no reward: %s", reason)


def is_large(body: Any) -> bool:
    """Return whether a body has more than LARGE letters and values. Only so many are looked at."""
    left, inner = LARGE, [body]
    while inner and left > 0:
        value = inner.pop()
        left -= len(value) if isinstance(value, str | list | dict) else 1
        if isinstance(value, dict):
            inner += value.values()
        elif isinstance(value, list) and left > 0:
            inner += (one for one in value if isinstance(one, str | list | dict))
    return left <= 0


def _elsewhere(closed: Closed) -> Refusal:
    return Refusal(503, f"{closed}: ask another server", **{"Retry-After": "1"})


def _first(error: ValidationError, body: type[BaseModel]) -> str:
    """Return the first fault of a body in one line."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = [str(part) for part in fault["loc"]]
    where = place[0] if place else "the request"
    said = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{where}: missing; the fields are {', '.join(body.model_fields)}"
    if fault["type"] == "too_short":
        return f"{where}: empty"
    if fault["type"] == "none_required":
        return f"{where} is {body.model_fields[where].description}"
    return f"{where}: {said[:1].lower()}{said[1:]}"
