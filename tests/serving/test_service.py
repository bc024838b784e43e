"""Options, time limits and memory of a Service, without HTTP."""

import asyncio
import gc
import logging
import weakref

import pytest

from batchers import SHORT, hold, until
from endoreward_fast.remote.wire import REWARDS
from endoreward_fast.serving.limits import Limits
from endoreward_fast.serving.service import Served, Service, is_large
from served import PATIENCE

TALK = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]


class Kept(dict):
    """A row to which weak references can point."""


@pytest.fixture
def open_service(pocket):
    made = []

    def make(**options):
        made.append(Service(pocket, Served(("pocket",), "weights"), window=0, **options))
        return made[-1]

    yield make
    pocket.gate.set()
    for service in made:
        service.close()


def ask(service, *rows, **options):
    return asyncio.run(service.answer(REWARDS, {"rows": list(rows), **options}))


def error_of(answer):
    return answer.content["rows"][0]["error"]


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ({"chat": 0}, {"chat": False}, "chat=False scores plain text"),
        ({"max_length": 8}, {"max_length": 8.0}, "max_length=8.0: expected a whole number"),
    ],
)
def test_options_of_one_request_do_not_depend_on_another(open_service, first, then, said):
    """1, 1.0 and True are equal, but mean different things."""
    service = open_service()
    ask(service, {"messages": TALK}, **first)
    answer = ask(service, {"messages": TALK}, **then)
    assert answer.status == 422 and said in answer.content["error"]


def test_a_server_s_max_length_is_the_most_that_a_request_gets(open_service):
    service = open_service(options={"max_length": 8})
    given = {"prompt_ids": [5] * 8, "completion_ids": [8, 9]}
    for asked in ({}, {"max_length": None}, {"max_length": 100}):
        assert "10 tokens, the limit is 8" in error_of(ask(service, given, **asked))
    assert "the limit is 4" in error_of(ask(service, given, max_length=4))
    assert "max_length=0" in ask(service, given, max_length=0).content["error"]


def test_a_system_prompt_that_has_no_place_is_refused(open_service):
    """Otherwise every completion would get the reward of one that cannot be scored, and the training would go on."""
    service = open_service(options={"system": "Be brief."})
    for path, body in (
        ("/get_reward", {"query": ["2 + 3 = 5"], "prompts": ["2 + 3 ="], "labels": ["5"]}),
        ("/slime", {"prompt": "2 + 3 =", "response": " 5", "label": "5"}),
    ):
        answer = asyncio.run(service.answer(path, body))
        assert answer.status == 422 and "--system" in answer.content["error"]
    assert ask(service, {"messages": TALK}).status == 200


def test_the_time_limit_drops_the_request(pocket, open_service):
    service = open_service(limits=Limits(seconds=0.05))
    first = hold(pocket, service.batcher)
    answer = ask(service, SHORT)
    assert answer.status == 504 and service.batcher.rows == 1
    pocket.gate.set()
    assert first.future.result(PATIENCE)


def test_cancelling_an_answer_drops_the_request(pocket, open_service):
    service = open_service()
    hold(pocket, service.batcher)

    async def leave():
        task = asyncio.create_task(service.answer(REWARDS, {"rows": [SHORT]}))
        while service.batcher.rows < 2:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert service.batcher.rows == 1

    asyncio.run(leave())


def test_a_server_that_scores_no_more_says_so(pocket, open_service):
    def fail(batch):
        raise RuntimeError("CUDA error")

    service = open_service()
    pocket.on_batch = fail
    assert ask(service, SHORT).status == 500
    until(lambda: not service.alive())
    answer = ask(service, SHORT)
    assert answer.status == 503 and "scores no more" in answer.content["error"]


@pytest.mark.parametrize("kind", ["scored", "a bug", "too many tokens", "no model", "cancelled", "too slow"])
def test_nothing_is_kept_of_a_body(pocket, open_service, kind):
    """Garbage that only the collector finds stays for long, because it looks at all objects seldom."""

    def fail(batch):
        if kind == "a bug" and (batch == 999).any():
            raise RuntimeError("a bug")

    service = open_service(limits=Limits(tokens=100, seconds=0.05 if kind == "too slow" else PATIENCE))
    pocket.on_batch = fail
    if kind in ("cancelled", "too slow"):
        hold(pocket, service.batcher)

    async def one():
        row = Kept(prompt_ids=[999] * (200 if kind == "too many tokens" else 5), completion_ids=[8])
        body = {"rows": [row]} | ({"model": "another"} if kind == "no model" else {})
        task = asyncio.create_task(service.answer(REWARDS, body))
        if kind == "cancelled":
            await asyncio.sleep(0.02)
            task.cancel()
        await asyncio.wait([task])
        return weakref.ref(row), None if task.cancelled() else task.result().status

    gc.collect()
    gc.disable()
    logging.disable()  # pytest keeps what is logged
    try:
        kept, status = asyncio.run(one())
        found = {"scored": 200, "a bug": 500, "too many tokens": 413, "no model": 404, "too slow": 504}
        assert status == found.get(kind)
        pocket.gate.set()
        until(lambda: not service.batcher._encoding and not service.batcher.rows)
        ask(service, SHORT)  # the threads have let go of the request before
        until(lambda: kept() is None)
    finally:
        logging.disable(logging.NOTSET)
        gc.enable()


@pytest.mark.parametrize(
    ("body", "large"),
    [
        ({"rows": [{"prompt_ids": list(range(1000)), "completion_ids": [1]}] * 64}, False),
        ({"rows": [{"prompt": "x" * 300_000}]}, True),
        ({"rows": [{"messages": [{"role": "user", "content": "x" * 100}] * 3000}]}, True),
        ({"input": list(range(300_000))}, True),
        ({str(n): 1 for n in range(300_000)}, True),
        ([], False),
        (5, False),
    ],
)
def test_bodies_that_are_read_apart(body, large):
    assert is_large(body) == large
