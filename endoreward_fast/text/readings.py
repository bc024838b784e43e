"""Encode a row once more, as signals need it: behind a privileged prompt, or with a reference answer.

| row key                              | further reading, and its scored tokens                                 |
| `privileged`                         | prompt with the privileged context, completion; the same tokens        |
| `reference_answer` and `answer_span` | prompt, thought, reference answer in the span's place; that answer     |
| the same, without the thought        | prompt, reference answer; that answer                                  |

`privileged` is text or a list of messages. In a chat, text goes to the end of the last user turn, after an empty line
(as SDPO, arXiv 2601.20802, does), and messages follow the prompt. Before a prompt of plain text it goes first, with an
empty line between. A row of token ids has the ids of the whole prompt with the context instead. The completion's tokens
are always those of the row itself.

`reference_answer` is text, or token ids in a row of token ids.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import EndoRewardError
from .encoding import Encoded, Encoder, wants_chat
from .messages import are_messages, check_message, check_text, kind_of
from .rows import Row, ids_of, prompt_and_completion
from .spans import (
    NAME,
    Span,
    begin_of_completion,
    has_ids,
    has_prompt,
    span_in,
    text_of_completion,
    tokens_of,
    with_completion,
)

REFERENCE = "reference_answer"
PRIVILEGED = "privileged"


def answer_span(encoder: Encoder, row: Row, encoded: Encoded) -> Span:
    """Return the positions in `encoded.input_ids` of the row's final answer.

    Raises EndoRewardError, in one line, if the span is empty, not in the completion, or has no scored token.
    """
    span = span_in(row, encoder.tokenizer)
    if span.start == span.stop:
        raise EndoRewardError(f"{NAME}: [{span.start}, {span.stop}] is empty: there is no answer to score")
    start, stop = tokens_of(span, row, encoded, encoder)
    first = encoded.prompt_length
    marked = encoded.completion_mask or (True,) * (len(encoded.input_ids) - first)
    if not any(marked[max(0, start - first) : max(0, stop - first)]):
        raise EndoRewardError(f"{NAME}: no token of the answer is scored: it was cut or masked")
    return Span(max(start, first), stop)


def after_thought(encoder: Encoder, row: Row) -> Encoded:
    """Return prompt, thought and reference answer: the completion with `reference_answer` in place of its answer.

    Only the reference answer is scored, and no token after it is kept.
    """
    span = span_in(row, encoder.tokenizer)
    if not has_ids(row):
        text = text_of_completion(row)
        return _answer(encoder, row, text[: span.start], _reference_text(row), text[span.stop :])
    return _answer_ids(encoder, row, ids_of(row, "completion_ids")[: span.start])


def without_thought(encoder: Encoder, row: Row) -> Encoded:
    """Return prompt and reference answer. Only the reference answer is scored, and no token after it is kept."""
    return _answer_ids(encoder, row, []) if has_ids(row) else _answer(encoder, row, "", _reference_text(row), "")


def privileged(encoder: Encoder, row: Row, encoded: Encoded) -> Encoded:
    """Return the row's scored tokens behind the prompt with the privileged context."""
    given = row[PRIVILEGED]
    if has_ids(row):
        before = ids_of(row, PRIVILEGED)
        if not before:
            raise EndoRewardError(f"{PRIVILEGED}: no token: give the ids of the prompt with the privileged context")
    else:
        other = _named(PRIVILEGED, encoder.unlimited, _with_context(encoder, row, given))
        before = other.input_ids[: begin_of_completion(other)]
    ids = [*before, *encoded.input_ids[begin_of_completion(encoded) :]]
    if encoder.max_length is not None and len(ids) > encoder.max_length:
        raise EndoRewardError(
            f"{PRIVILEGED}: {len(ids)} tokens with the privileged context, the limit is {encoder.max_length}: shorten"
        )
    length = len(ids) - (len(encoded.input_ids) - encoded.prompt_length)
    return replace(encoded, input_ids=ids, prompt_length=length, terminal=True)


def _with_context(encoder: Encoder, row: Row, given: Any) -> dict[str, Any]:
    """Return the row of text or messages with the privileged context in its prompt."""
    prompt, completion = prompt_and_completion(row)
    messages = isinstance(given, list | tuple) and bool(given) and are_messages(given)
    if not messages and not (isinstance(given, str) and given.strip()):
        found = "an empty text" if isinstance(given, str) else kind_of(given)
        raise EndoRewardError(f"{PRIVILEGED}: wanted text or a list of messages, found {found}")
    if isinstance(given, str):
        check_text(given, PRIVILEGED)
    else:
        for i, message in enumerate(given):
            check_message(message, f"{PRIVILEGED}[{i}]")
    plain = isinstance(prompt, str) and isinstance(completion, str)
    if plain and not wants_chat(encoder.tokenizer, row.get("chat", encoder.chat)):
        if messages:
            raise EndoRewardError(f"{PRIVILEGED}: the row is plain text, which has no place for messages: give text")
        return {**row, "prompt": f"{given}\n\n{prompt}"}
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not isinstance(completion, str) and completion[-2:][0]["role"] != "assistant":
        turns += completion[:-1]  # all turns before the scored one are context
        row = {**row, "completion": completion[-1:]} if has_prompt(row) else row
    if messages:
        return _with_prompt(row, [*turns, *given])
    last = next((i for i in reversed(range(len(turns))) if turns[i]["role"] == "user"), None)
    said = None if last is None else turns[last].get("content")
    if last is None or not isinstance(said, str):
        raise EndoRewardError(f"{PRIVILEGED}: the prompt has no user turn of text to add it to: give messages")
    turns[last] = {**turns[last], "content": f"{said}\n\n{given}"}
    return _with_prompt(row, turns)


def _with_prompt(row: Row, turns: list[Any]) -> dict[str, Any]:
    """Return the row with other turns before what is scored."""
    return {**row, "prompt": turns} if has_prompt(row) else {**row, "messages": [*turns, row["messages"][-1]]}


def _reference_text(row: Mapping[str, Any]) -> str:
    text = row[REFERENCE]
    if not isinstance(text, str) or not text.strip():
        found = "an empty text" if isinstance(text, str) else kind_of(text)
        raise EndoRewardError(f"{REFERENCE}: wanted the text of an answer, found {found}")
    check_text(text, REFERENCE)
    return text


def _answer(encoder: Encoder, row: Row, before: str, answer: str, after: str) -> Encoded:
    other = with_completion(row, before + answer + after)
    encoded = _named(REFERENCE, encoder, other)
    span = tokens_of(Span(len(before), len(before) + len(answer)), other, encoded, encoder)
    return _scored(encoded, span)


def _answer_ids(encoder: Encoder, row: Row, before: list[int]) -> Encoded:
    answer = ids_of(row, REFERENCE)
    if not answer:
        raise EndoRewardError(f"{REFERENCE}: no token: give the ids of an answer")
    other = {**row, "completion_ids": [*before, *answer], "completion_mask": None, "terminal": True}
    encoded = _named(REFERENCE, encoder, other)
    stop = begin_of_completion(encoded) + len(before) + len(answer)
    return _scored(encoded, Span(stop - len(answer), stop))


def _named(name: str, encoder: Encoder, row: Row) -> Encoded:
    """Return the row's tokens. An error names the key of the row that asked for them."""
    try:
        return encoder.encode(row)
    except EndoRewardError as error:
        raise EndoRewardError(f"{name}: {error}") from None


def _scored(encoded: Encoded, span: Span) -> Encoded:
    """Return the tokens up to the end of the span, of which only the span is scored."""
    stop = min(span.stop, len(encoded.input_ids))
    start = max(span.start, encoded.prompt_length)
    if start >= stop:
        raise EndoRewardError(f"{REFERENCE}: no token of the answer is scored: it was cut")
    return replace(
        encoded, input_ids=encoded.input_ids[:stop], prompt_length=start, terminal=True, completion_mask=None
    )
