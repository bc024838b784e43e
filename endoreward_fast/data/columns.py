"""Turn a row of the input into the samples that the model scores, and their scores into the shape of the row.

| columns                                                | scores                                      |
| prompt (or question) and completion (response, answer) | one number                                  |
| prompt and completions (responses)                     | a list                                      |
| prompt, chosen and rejected                            | {"chosen": ..., "rejected": ...}            |
| chosen and rejected as whole conversations             | the same; their common start is the prompt  |
| the same as hh-rlhf text (Human: ... Assistant: ...)   | the same; the prompt ends at the last       |
|                                                        | "Assistant:" of that start (flag            |
|                                                        | "split_at_speaker")                         |
| messages                                               | one number, for the last assistant turn     |
| prompt_ids and completion_ids                          | one number                                  |

The chat template gets `tools`, `documents` and `chat_template_kwargs` of a row of messages or text. `completion_mask`
marks which of the completion's token ids are scored.

A prompt or completion is text or a list of messages. `chosen` and `rejected` may be lists of completions (RM-Bench has
three styles of each). A dialogue given as text stays text. A model without a chat template reads it unchanged; a chat
template puts the part before the split into one user turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import EndoRewardError
from ..text.messages import check_message, check_text
from .records import is_messages, is_number, kind_of
from .signal_columns import of_signals

PROMPT = ("prompt", "question")
COMPLETION = ("completion", "response", "answer")
COMPLETIONS = ("completions", "responses")
GIVEN = ("tools", "documents", "chat_template_kwargs")
"""columns that go to the chat template"""
SPEAKER = "\n\nAssistant:"
"""hh-rlhf's mark before an assistant turn"""
WANTED = {
    "score": "prompt and completion; prompt and completions; prompt, chosen and rejected; or messages",
    "rank": "prompt and completions; or prompt, chosen and rejected",
    "eval": "prompt, chosen and rejected",
}


class MissingColumns(EndoRewardError):
    """Raised if the row has none of the sets of columns that the command can use."""


@dataclass(frozen=True)
class Task:
    """The samples to score of one row, and the shape of its scores."""

    samples: tuple[dict[str, Any], ...]
    """rows as EndoRewardModel.score takes them"""
    layout: Any
    """positions in `samples`, in the shape of the scores: an int, a list, or {"chosen": ..., "rejected": ...}"""
    flags: tuple[str, ...] = ()
    """keys of `row_flags.FLAGS` that say how the row was read; they hold for every sample"""
    benchmark: str | None = None
    """the benchmark that the row's columns belong to (benchmarks.py); None: the row is not from one of those"""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """what that benchmark's rule needs besides the scores"""


def arrange(layout: Any, value: Callable[[int], Any]) -> Any:
    """Return `layout` with `value(position)` in place of every position."""
    if isinstance(layout, dict):
        return {key: arrange(part, value) for key, part in layout.items()}
    if isinstance(layout, list):
        return [arrange(part, value) for part in layout]
    return value(layout)


def plan(row: Mapping[str, Any], command: str = "score") -> Task:
    """Return what `command` ("score", "rank" or "eval") scores in `row`.

    Raises MissingColumns if columns are missing, and EndoRewardError if their contents cannot be scored.
    """
    return completed(_plan(row, command), row)


def completed(task: Task, row: Mapping[str, Any], *, signals: bool = True) -> Task:
    """Return the task with what the row has for the chat template and, with `signals`, for signals."""
    given = {name: row[name] for name in GIVEN if row.get(name) is not None}
    own = of_signals(row if signals else {}, task.layout, len(task.samples))
    return replace(task, samples=tuple(sample | given | one for sample, one in zip(task.samples, own, strict=True)))


def _plan(row: Mapping[str, Any], command: str) -> Task:
    if "chosen" in row and "rejected" in row:
        return _preference(row)
    if (name := _first(row, COMPLETIONS)) and (prompt := _first(row, PROMPT)) and command != "eval":
        return _listed(row, prompt, name)
    if command == "score":
        if (name := _first(row, COMPLETION)) and (prompt := _first(row, PROMPT)):
            return Task((_sample(_prompt(row[prompt], prompt), _completion(row[name], name)),), 0)
        if "messages" in row:
            return Task(({"messages": _dialogue(row["messages"], "messages")},), 0)
        if "prompt_ids" in row and "completion_ids" in row:
            sample: dict[str, Any] = {key: _ids(row[key], key) for key in ("prompt_ids", "completion_ids")}
            if row.get("completion_mask") is not None:
                sample["completion_mask"] = row["completion_mask"]
            terminal = row.get("terminal")
            return Task(({**sample, "terminal": True if terminal is None else terminal},), 0)
    found = ", ".join(map(str, row)) or "none"
    raise MissingColumns(f"columns wanted: {WANTED[command]}; found: {found}")


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in row), None)


def _listed(row: Mapping[str, Any], prompt: str, name: str) -> Task:
    values = row[name]
    if not isinstance(values, list) or is_messages(values):
        raise EndoRewardError(f"{name}: wanted an array of completions, found {kind_of(values)}")
    start = _prompt(row[prompt], prompt)
    samples = tuple(_sample(start, _completion(v, f"{name}[{i}]")) for i, v in enumerate(values))
    return Task(samples, list(range(len(samples))))


def _preference(row: Mapping[str, Any]) -> Task:
    chosen, rejected = _candidates(row["chosen"]), _candidates(row["rejected"])
    name = _first(row, PROMPT)
    prompt = _prompt(row[name], name) if name else None
    flags: tuple[str, ...] = ()
    if prompt is None and (isinstance(chosen, _Many) or isinstance(rejected, _Many)):
        raise MissingColumns(f"columns wanted: {WANTED['eval']}; found: {', '.join(map(str, row))}")
    if prompt is None:
        prompt, chosen, rejected = _implicit_prompt(chosen, rejected)
        flags = ("split_at_speaker",) if isinstance(prompt, str) and prompt.endswith(SPEAKER) else ()
    samples: list[dict[str, Any]] = []
    layout: dict[str, Any] = {}
    for side, value in (("chosen", chosen), ("rejected", rejected)):
        if value == []:
            raise EndoRewardError(f"{side}: wanted at least one completion, found an empty array")
        many = isinstance(value, _Many)
        at = len(samples)
        for i, one in enumerate(value if many else [value]):
            samples.append(_sample(prompt, _completion(one, f"{side}[{i}]" if many else side)))
        layout[side] = list(range(at, len(samples))) if many else at
    return Task(tuple(samples), layout, flags)


class _Many(list):  # type: ignore[type-arg]
    """A list of several completions, as opposed to one completion that is a list of messages."""


def _candidates(value: Any) -> Any:
    return _Many(value) if isinstance(value, list) and not is_messages(value) else value


def _implicit_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split two whole conversations into (prompt, chosen, rejected). The prompt is their common start.

    It ends with a whole turn. In text without speakers, it ends with a whole word.
    """
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise EndoRewardError(
            "without a prompt, chosen and rejected must both be text or both be messages, "
            f"found {kind_of(chosen)} and {kind_of(rejected)}"
        )
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    if isinstance(chosen, list):
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    elif (speaker := chosen.rfind(SPEAKER, 0, shared)) >= 0:
        shared = speaker + len(SPEAKER)
    else:
        while shared and not (chosen + " ")[shared].isspace():
            shared -= 1
    if not shared:
        raise EndoRewardError("no prompt: chosen and rejected have no common start: add a prompt column")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _sample(prompt: Any, completion: Any) -> dict[str, Any]:
    """Return a prompt and its completion. A completion that repeats the prompt (a whole conversation) loses it."""
    if not isinstance(completion, list):
        return {"prompt": prompt, "completion": completion}
    if isinstance(prompt, list) and completion[: len(prompt)] == prompt:
        completion = completion[len(prompt) :]
        if not completion:
            raise EndoRewardError("the completion repeats the prompt and adds nothing")
    elif isinstance(prompt, str):
        # UltraFeedback has whole conversations, and their first user turn as a text prompt again.
        prompt = [{"role": "user", "content": prompt}] if completion[0]["role"] == "assistant" else []
    if completion[0]["role"] != "assistant":
        prompt, completion = prompt + completion[:-1], completion[-1:]
    return {"prompt": prompt, "completion": completion}


def _prompt(value: Any, name: str) -> Any:
    return _messages(value, name) if is_messages(value) else as_text(value, name)


def _completion(value: Any, name: str) -> Any:
    return _dialogue(value, name) if is_messages(value) else as_text(value, name)


def as_text(value: Any, name: str, wanted: str = "text or messages") -> str:
    """Return `value` as text. Raises EndoRewardError, which names `name`, if it is none."""
    if is_number(value):
        value = str(value)  # JSON files have numeric answers
    if not isinstance(value, str):
        missing = isinstance(value, float)
        found = f"{value}, which stands for a missing value" if missing else kind_of(value)
        raise EndoRewardError(f"{name}: wanted {wanted}, found {found}")
    check_text(value, name)
    return value


def _messages(value: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    for i, message in enumerate(value):
        if not isinstance(message["role"], str):
            raise EndoRewardError(f"{name}[{i}].role: wanted text, found {kind_of(message['role'])}")
        check_message(message, f"{name}[{i}]")
    return value


def _dialogue(value: Any, name: str) -> list[dict[str, Any]]:
    """Return `value`, checked: messages that end with an assistant turn, which is scored."""
    if not is_messages(value):
        raise EndoRewardError(f'{name}: wanted an array of {{"role", "content"}} objects, found {kind_of(value)}')
    messages = _messages(value, name)
    if messages[-1]["role"] != "assistant":
        raise EndoRewardError(f"{name}: the last turn must be the assistant's, found {messages[-1]['role']!r}")
    return messages


def _ids(value: Any, name: str) -> list[int]:
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise EndoRewardError(f"{name}: wanted an array of token ids")
    return value
