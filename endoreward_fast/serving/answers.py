"""Answers to requests, and refusals."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data.columns import arrange
from ..data.items import Item
from ..remote.wire import to_json
from ..text.row_flags import NOTHING_TO_SCORE

EXCERPT = 1000
"""letters of an error"""


@dataclass(frozen=True)
class Answer:
    """Status, content for JSON, and headers. Plain data, because it travels between processes."""

    status: int
    content: Any
    headers: Mapping[str, str] = field(default_factory=dict)
    scored: int = 0
    """rows with a score"""
    unscored: int = 0
    reasons: tuple[str, ...] = ()
    """why rows of an answer that cannot say so have no score"""


class Refusal(Exception):
    """Raised to answer with an error: a status, and one line that says what was wrong and what to do."""

    def __init__(self, status: int, line: str, **headers: str) -> None:
        super().__init__(line)
        self.answer = Answer(status, {"error": shortened(line)}, headers)


def shortened(line: str) -> str:
    """Return a text as one line of at most EXCERPT letters: what it quotes of a request may be long."""
    line = " ".join(line.split())
    return line if len(line) <= EXCERPT else f"{line[:EXCERPT]} ..."


def of_item(item: Item) -> dict[str, Any]:
    """Return the answer to a row: the fields of `wire.to_json`, each in the shape of the row's score."""
    if item.task is None:
        return {"score": None, "num_tokens": 0, "logprob": None, "error": shortened(item.error or "")}
    given = list(item.task.flags)
    answers = []
    for position in range(len(item.task.samples)):
        answer = to_json(item.results[position])
        if "error" in answer:
            answer["error"] = shortened(answer["error"])
        if given:
            answer["flags"] = given + answer.get("flags", [])
        if answer["score"] is None and "error" not in answer:
            answer["error"] = item.problem(position)
        answers.append(answer)
    layout = item.task.layout
    if isinstance(layout, int):
        return answers[0]
    names = dict.fromkeys(name for answer in answers for name in answer)
    return {name: arrange(layout, [answer.get(name) for answer in answers].__getitem__) for name in names}


def why_unscored(item: Item) -> str | None:
    """Return why no sample of the row has a score, or None if one has, or if there was nothing to score."""
    if item.task is None:
        return item.error
    problems = [item.problem(i) for i in range(len(item.task.samples))]
    silent = any(found.error == NOTHING_TO_SCORE for found in item.results.values())
    return None if silent or None in problems else problems[0]
