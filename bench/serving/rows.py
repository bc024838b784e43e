"""The rows that are scored, and the requests that ask for them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.serving.load import Request
from endoreward_fast.pocket.quiz import problems
from endoreward_fast.pocket.sentences import CORRUPTIONS, corrupted, passages

REWARDS = "/v1/rewards"
GROUP = 8
"""completions of one prompt, as GRPO samples them"""
Row = dict[str, Any]


def quiz(count: int) -> list[Row]:
    """Return short rows without anything in common: a question with its answer, about 45 tokens of the pocket model."""
    found = problems(count, tasks=("add", "subtract", "sequence", "fact"))
    return [{"prompt": p.prompt("plain"), "completion": f" {p.answer}"} for p in found]


def groups(count: int) -> list[Row]:
    """Return rows in groups of GROUP that share a prompt: passages of text with corrupted continuations."""
    rows = []
    for passage in passages(-(-count // GROUP)):
        for n in range(GROUP):
            kind = CORRUPTIONS[n % len(CORRUPTIONS)]
            text = corrupted(passage.completion, seed=n, kind=kind, rate=0.1 + 0.05 * n) if n else passage.completion
            rows.append({"prompt": passage.prompt, "completion": text})
    return rows[:count]


def rm_bench(file: Path, count: int) -> list[Row]:
    """Return answers of RM-Bench: six to each prompt."""
    asked = json.loads(file.read_text(encoding="utf-8"))
    rows = [{"prompt": a["prompt"], "completion": text} for a in asked for text in a["chosen"] + a["rejected"]]
    if len(rows) < count:
        raise SystemExit(f"bench.serving: {file} has {len(rows)} answers, {count} are needed: lower --rows")
    return rows[:count]


def post(body: Mapping[str, Any] | bytes, path: str = REWARDS, **headers: str) -> bytes:
    """Return a POST request as bytes. Headers are added, or replace those that every request has."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"host": "localhost", "content-type": "application/json", "content-length": str(len(content))}
    named = fields | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


def requests_for(rows: Sequence[Row], size: int, **headers: str) -> list[Request]:
    """Return requests for `size` rows each."""
    return [Request(post({"rows": rows[i : i + size]}, **headers)) for i in range(0, len(rows), size)]
