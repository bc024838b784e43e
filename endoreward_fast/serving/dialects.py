"""What each path asks, and how it answers: our own, OpenRLHF's, slime's, and vLLM's as verl's reward loop uses it.

A dialect turns a body into rows and options for scoring, and results into the content that its clients expect. These
trainers cannot represent a missing reward. A completion that cannot be scored gets UNSCORED (-1e6) and status 200:
their clients ask again after an error, or end the run.
"""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import BaseModel

from ..data.columns import plan
from ..data.items import Item
from ..data.records import record
from ..errors import EndoRewardError
from ..remote.wire import REWARDS
from ..scoring.options import ScoreOptions
from ..scoring.results import RowScore
from ..scoring.sampled import Rewarded, generated_row
from ..text.rows import Row
from .answers import Answer, of_item, shortened, why_unscored
from .bodies import GetReward, Pooled, Pooling, RemoteRM, Rewards
from .turns import Span, Turns

FULL, BUSY = 429, 503
"""statuses of a full queue: verl ends the run at any 4xx"""


@dataclass(frozen=True)
class Ask:
    """What a request wants scored."""

    rows: int
    read: Callable[[], Sequence[Row]]
    """gives the rows; it may tokenize, so it is called in a thread"""
    options: dict[str, Any]
    """of scoring, in place of the server's own"""
    answer: Callable[["Scored"], Answer]


class Scored(NamedTuple):
    """What is known when the rows of a request are scored."""

    results: Sequence[RowScore]
    options: ScoreOptions
    tokens: int
    model: str
    """the name of the served model"""
    weights: str
    """what tells its weights from others"""


@dataclass(frozen=True)
class Dialect:
    """One path of the server."""

    path: str
    body: type[BaseModel]
    ask: Callable[[Any, Turns], Ask]
    when_full: int = FULL


def _rewards(body: Rewards, turns: Turns) -> Ask:
    items = [_item(n, row) for n, row in enumerate(body.rows)]
    samples = [sample for item in items if item.task for sample in item.task.samples]
    owners = [(item, i) for item in items if item.task for i in range(len(item.task.samples))]

    def answer(scored: Scored) -> Answer:
        for (item, i), found in zip(owners, scored.results, strict=True):
            item.results[i] = found
        rows = [of_item(item) for item in items]
        content = {"model": scored.model, "weights": scored.weights, "rows": rows, "usage": {"tokens": scored.tokens}}
        problems = [why_unscored(item) for item in items]
        unscored = sum(problem is not None for problem in problems)
        if unscored < len(items):
            return Answer(200, content, scored=len(items) - unscored, unscored=unscored)
        return Answer(422, {"error": shortened(problems[0] or ""), **content}, unscored=unscored)

    return Ask(len(samples), lambda: samples, dict(body.model_extra or {}), answer)


def _item(number: int, row: Any) -> Item:
    found = record(f"rows[{number}]", row)
    if found.row is None or found.error:
        return Item(found, None, f"{found.where}: {found.error}")
    try:
        return Item(found, plan(found.row))
    except EndoRewardError as error:
        return Item(found, None, f"{found.where}: {error}")


def _sampled(
    count: int, read: Callable[[], Sequence[Row | None]], content: Callable[[list[Rewarded], Scored], Any],
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Ask:  # fmt: skip
    """Ask for the rewards of sampled completions. A row that is None has no response, and so no reward."""

    def rows() -> list[Row]:
        return [generated_row([], [], ()) if row is None else row for row in read()]

    def answer(scored: Scored) -> Answer:
        found = [Rewarded.of(result, scored.options) for result in scored.results]
        why = tuple(rewarded.error for rewarded in found if rewarded.error is not None)
        return Answer(200, content(found, scored), scored=len(found) - len(why), unscored=len(why), reasons=why)

    return Ask(count, rows, {"per_token": True, "texts": False, **options}, answer)


def _get_reward(body: GetReward, turns: Turns) -> Ask:
    if len(body.prompts) != len(body.query):
        raise EndoRewardError(f"query has {len(body.query)} texts and prompts {len(body.prompts)}: give one for each")

    def read() -> list[Row | None]:
        return [turns.of_query(query, prompt) for query, prompt in zip(body.query, body.prompts, strict=True)]

    def content(found: list[Rewarded], scored: Scored) -> dict[str, Any]:
        scores, logs = [rewarded.score for rewarded in found], [rewarded.metrics() for rewarded in found]
        extra = {f"endo_reward_{name}": [log[name] for log in logs] for name in logs[0]}
        return {"rewards": scores, "scores": scores, "extra_logs": extra}

    return _sampled(len(body.query), read, content)


def _remote_rm(body: RemoteRM, turns: Turns) -> Ask:
    def read() -> list[Row | None]:
        prompt = body.prompt if isinstance(body.prompt, str) else turns.opened(body.prompt)
        return [None if prompt is None else turns.of_query(prompt + body.response, prompt)]

    return _sampled(1, read, lambda found, scored: found[0].score)


def _conversations(body: Pooled) -> list[Any]:
    if (body.input is None) == (body.messages is None):
        raise EndoRewardError("wanted either input or messages")
    if body.messages is not None:
        return [{"messages": body.messages}]
    given: Any = body.input
    if not given:
        raise EndoRewardError("input is empty")
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def _pooled(body: Pooled, turns: Turns, kind: str, data: Callable[[Rewarded, Span], dict[str, Any]]) -> Ask:
    conversations = _conversations(body)
    spans: list[Span] = []

    def read() -> Sequence[Row | None]:
        if body.messages is not None:
            return conversations
        found = [turns.last(one, special=body.add_special_tokens) for one in conversations]
        spans.extend(span for _, span in found)
        return [row for row, _ in found]

    def content(found: list[Rewarded], scored: Scored) -> dict[str, Any]:
        # Of messages, only the tokens of the last turn are known here.
        places = spans or [Span(0, len(one.rewards), 0) for one in found]
        head = {"id": f"{kind}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        listed = [{"index": i, **data(*one)} for i, one in enumerate(zip(found, places, strict=True))]
        usage = {"prompt_tokens": scored.tokens, "total_tokens": scored.tokens, "completion_tokens": 0}
        return {**head, "model": scored.model, "data": listed, "usage": usage}

    options = {"chat_template_kwargs": body.chat_template_kwargs} if body.chat_template_kwargs else {}
    return _sampled(len(conversations), read, content, options)


def _classify(body: Pooled, turns: Turns) -> Ask:
    def data(found: Rewarded, span: Span) -> dict[str, Any]:
        return {"label": "reward", "probs": [found.score], "num_classes": 1}

    return _pooled(body, turns, "classify", data)


def _pooling(body: Pooling, turns: Turns) -> Ask:
    def data(found: Rewarded, span: Span) -> dict[str, Any]:
        if body.task == "classify":
            return {"object": "pooling", "data": [found.score]}
        rewards = found.rewards or (found.score,) * max(1, span.response)
        each = [*[0.0] * span.before, *rewards, *[0.0] * span.after]
        return {"object": "pooling", "data": [[reward] for reward in each]}

    return _pooled(body, turns, "pool", data)


def _embeddings(body: Pooled, turns: Turns) -> Ask:
    return _pooled(body, turns, "embd", lambda found, span: {"object": "embedding", "embedding": [found.score]})


DIALECTS = {
    dialect.path: dialect
    for dialect in (
        Dialect(REWARDS, Rewards, _rewards),
        Dialect("/get_reward", GetReward, _get_reward),
        Dialect("/slime", RemoteRM, _remote_rm),
        Dialect("/classify", Pooled, _classify, BUSY),
        Dialect("/pooling", Pooling, _pooling, BUSY),
        Dialect("/v1/embeddings", Pooled, _embeddings, BUSY),
    )
}
