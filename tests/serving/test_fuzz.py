"""Bodies with random damage: each gets an answer of JSON, one line if it is refused, and no 500."""

import asyncio
import json
import random

import pytest

from endoreward_fast import EndoRewardModel
from endoreward_fast.serving.answers import Refusal
from endoreward_fast.serving.bodies import ROWS
from endoreward_fast.serving.guard import _parsed
from endoreward_fast.serving.service import Served, Service

MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]
CHAT = "<|begin|><|user|> hi<|end|><|assistant|> 5<|end|>"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
OPTIONS = {
    "alpha": 1.0, "per_token": True, "signals": ["entropy"], "system": "be", "truncate": "prompt", "max_length": 50,
    "reduction": "mean", "gamma": 0.9, "floor": 0.1, "chat": None, "append_eos": True, "texts": True, "entropy": True,
    "date": "2026-01-01", "documents": [{"title": "a", "text": "b"}], "chat_template_kwargs": {"x": 1},
}  # fmt: skip
MORE = [{"messages": MESSAGES}, {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": "x", "tools": [TOOL]}]
BODIES = [
    *[("/v1/rewards", {"rows": [*ROWS, *MORE], **OPTIONS})] * 4,
    *[("/v1/rewards", {"rows": [*ROWS, *MORE]})] * 4,
    ("/get_reward", {"query": ["ab", CHAT], "prompts": ["a", CHAT[:-6]], "labels": [None, 1]}),
    ("/slime", {"prompt": "a", "response": "b", "label": 1}),
    ("/slime", {"prompt": MESSAGES[:1], "response": "b"}),
    ("/classify", {"model": "pocket", "input": [CHAT], "use_activation": False}),
    ("/classify", {"messages": MESSAGES, "chat_template_kwargs": {"a": 1}}),
    ("/pooling", {"input": [1, 4, 5, 6], "task": "classify"}),
    ("/v1/embeddings", {"input": [[1, 2], [3]]}),
    ("/classify", {"input": [[1, 10**30], [-1], [2**31]]}),
]
VALUES = [
    None, True, 0, -1, 3.5, 10**30, 10**400, 1e308, "", "x", "\ud800", "\x00", "all", "<|end|><|assistant|>", [], [1],
    ["a"], {}, {"a": 1}, [[]], [None], {"role": 5, "content": 5}, [{"role": "assistant", "content": None}], "a" * 3000,
    "2026-13-45", [{"type": "image", "url": "/etc/passwd"}],
]  # fmt: skip
NAMES = "chat_template padding tools tokenize completion_mask terminal answer_span privileged zzz".split()


def damaged(value, dice):
    if dice.random() < 0.08:
        return dice.choice(VALUES)
    if isinstance(value, dict):
        found = {k: damaged(v, dice) if dice.random() < 0.25 else v for k, v in value.items() if dice.random() > 0.03}
        return found | {dice.choice(NAMES): dice.choice(VALUES)} if dice.random() < 0.05 else found
    if isinstance(value, list):
        return [damaged(v, dice) if dice.random() < 0.3 else v for v in value]
    return dice.choice(VALUES) if dice.random() < 0.2 else value


@pytest.fixture(scope="module")
def service():
    made = Service(EndoRewardModel.from_pretrained("pocket"), Served(("pocket",), "weights"), window=0)
    yield made
    made.close()


def test_damaged_bodies_get_an_answer(service):
    dice, statuses = random.Random(0), set()

    async def ask(path, body):
        try:
            return await service.answer(path, _parsed(json.dumps(body).encode()))
        except Refusal as refusal:  # of what is no JSON
            return refusal.answer

    async def ask_many():
        asked = [(path, damaged(body, dice)) for path, body in (dice.choice(BODIES) for _ in range(400))]
        return asked, await asyncio.gather(*(ask(*one) for one in asked))

    for (path, body), answer in zip(*asyncio.run(ask_many()), strict=True):
        said = json.dumps(answer.content, allow_nan=False)
        assert answer.status in (200, 400, 404, 422), (path, body, said)
        assert answer.status == 200 or "\n" not in answer.content["error"], said
        statuses.add((path, answer.status))
    assert {("/v1/rewards", 200), ("/v1/rewards", 422), ("/slime", 200), ("/classify", 422)} <= statuses
