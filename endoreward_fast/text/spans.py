"""Find a part of a completion among its tokens, and put another text in its place.

A row's `answer_span` is the part: a text, of which the last occurrence counts, or [start, stop]. Both count characters
of the completion; of a row of token ids, [start, stop] counts tokens of completion_ids.
"""

from collections.abc import Sequence
from itertools import accumulate
from numbers import Integral
from typing import Any, NamedTuple

from ..errors import EndoRewardError
from .boundary import token_texts
from .encoding import Encoded, Encoder
from .messages import are_messages, kind_of
from .rows import Row, ids_of, prompt_and_completion

NAME = "answer_span"
MARK = "zqjxqz"
"""a text that no template writes, in place of the completion"""
BLANK = "\N{NULL}"
"""in place of each character of a special token"""
CHANGED = "the chat template or the tokenizer changes the completion, or it was cut"


class Span(NamedTuple):
    """Characters (of text) or tokens (of ids) start ... stop of a completion; none if start == stop."""

    start: int
    stop: int


def has_ids(row: Row) -> bool:
    """Return whether the row's completion is given as token ids."""
    return "prompt_ids" in row and "completion_ids" in row


def has_prompt(row: Row) -> bool:
    """Return whether the row of text or messages has a prompt and a completion, not one list of messages."""
    return "prompt" in row and "completion" in row


def text_of_completion(row: Row) -> str:
    """Return the text that a row of text or messages scores. EndoRewardError if it is not one text."""
    completion = prompt_and_completion(row)[1]
    last = completion[-1].get("content") if are_messages(completion) and completion else completion
    if not isinstance(last, str):
        raise EndoRewardError(f"{NAME}: wanted a completion of one text, found {kind_of(last)}")
    return last


def span_in(row: Row, tokenizer: Any) -> Span:
    """Return the row's `answer_span` in its completion. EndoRewardError, in one line, if it is not there."""
    given = row[NAME]
    given = given.tolist() if hasattr(given, "tolist") else given  # tensors and arrays
    whole: Sequence[Any] = ids_of(row, "completion_ids") if has_ids(row) else text_of_completion(row)
    if isinstance(given, str):
        if has_ids(row):
            return _in_ids(given, row, tokenizer)
        at = str(whole).rfind(given)
        if at < 0 or not given:
            raise EndoRewardError(f"{NAME}: {_short(given)} is not in the completion: give a text that it contains")
        return Span(at, at + len(given))
    ends = given if isinstance(given, list | tuple) and len(given) == 2 else ()
    if not ends or not all(isinstance(end, Integral) and not isinstance(end, bool) for end in ends):
        raise EndoRewardError(f"{NAME}: wanted a text of the completion, or [start, stop], found {kind_of(given)}")
    start, stop = (int(end) for end in ends)
    if not 0 <= start <= stop <= len(whole):
        unit = "tokens" if has_ids(row) else "characters"
        raise EndoRewardError(f"{NAME}: [{start}, {stop}] is not in the completion, which has {len(whole)} {unit}")
    return Span(start, stop)


def tokens_of(span: Span, row: Row, encoded: Encoded, encoder: Encoder) -> Span:
    """Return the positions in `encoded.input_ids` of the tokens that hold a part of the span, scored or not.

    Raises EndoRewardError if the completion is not found among the tokens, or if the template leaves the span out.
    """
    begin = begin_of_completion(encoded)
    if has_ids(row):
        return Span(begin + span.start, min(begin + span.stop, len(encoded.input_ids)))
    texts = token_texts(encoder.tokenizer, encoded.input_ids, begin)
    text, joined = text_of_completion(row), "".join(texts)
    origin, kept = _place(text, joined, row, encoder)
    start, stop = (min(max(end + origin, kept.start), kept.stop) for end in span)
    if start == stop and span.start < span.stop:
        raise EndoRewardError(f"{NAME}: the chat template leaves these characters out: give others")
    return _covering(texts, begin, start, stop)


def _place(text: str, joined: str, row: Row, encoder: Encoder) -> tuple[int, Span]:
    """Return (the position in `joined` of the completion's first character, the part of `joined` that is of it).

    joined   what the template writes from the completion on. It may trim the completion, and has words of its own:
             "hi" occurs in "<think>", too. If the prompt opens a thought, a start that repeats it is left out
    """
    core = text.strip() or text
    start, floor = joined.find(core), 0
    if start < 0 or joined.find(core, start + 1) >= 0:
        before, after = _around(row, encoder)
        fits = len(before) + len(after) <= len(joined) and joined.startswith(before) and joined.endswith(after)
        content = joined[len(before) : len(joined) - len(after)] if fits else ""
        floor, start = len(before), content.find(core)
        if start < 0 and content.strip() and core.endswith(content.rstrip()):
            start = len(content.rstrip()) - len(core)
        elif start < 0 or not fits:
            raise EndoRewardError(f"{NAME}: the completion is not found among its tokens ({CHANGED}): give token ids")
        start += floor
    stop, origin = start + len(core), start - text.index(core)
    start = max(start, floor)
    while start > max(origin, floor) and joined[start - 1] == text[start - 1 - origin]:
        start -= 1
    while stop < min(origin + len(text), len(joined)) and joined[stop] == text[stop - origin]:
        stop += 1
    return origin, Span(start, stop)


def _around(row: Row, encoder: Encoder) -> tuple[str, str]:
    """Return what the template writes before and after the completion, in its turn."""
    other = encoder.unlimited.encode(with_completion(row, MARK))
    texts = token_texts(encoder.tokenizer, other.input_ids, begin_of_completion(other))
    before, _, after = "".join(texts).partition(MARK)
    return before, after


def with_completion(row: Row, text: str) -> dict[str, Any]:
    """Return the row of text or messages with another text as what is scored."""
    if has_prompt(row) and isinstance(row["completion"], str):
        return {**row, "completion": text}
    name = "completion" if has_prompt(row) else "messages"
    return {**row, name: [*row[name][:-1], {**row[name][-1], "content": text}]}


def begin_of_completion(encoded: Encoded) -> int:
    """Return the position of the completion's first token, which is not scored if no token comes before it."""
    return encoded.prompt_length - ("first_token_unscored" in encoded.flags)


def _in_ids(text: str, row: Row, tokenizer: Any) -> Span:
    """Return the tokens of completion_ids that hold the last occurrence of `text`."""
    if tokenizer is None:
        raise EndoRewardError(f"{NAME}: text needs a tokenizer, and the model has none: give [start, stop] in tokens")
    prompt, completion = (ids_of(row, name) for name in ("prompt_ids", "completion_ids"))
    texts = token_texts(tokenizer, [*prompt, *completion], len(prompt))
    special = set(tokenizer.all_special_ids)
    words = (BLANK * len(t) if i in special else t for i, t in zip(completion, texts, strict=True))
    at = "".join(words).rfind(text)  # "end" is no part of "<|im_end|>"
    if at < 0 or not text:
        raise EndoRewardError(f"{NAME}: {_short(text)} is not in the completion: give a text that it contains")
    return _covering(texts, 0, at, at + len(text))


def _covering(texts: Sequence[str], begin: int, start: int, stop: int) -> Span:
    """Return the positions, from `begin` on, of the texts that hold a part of characters start ... stop.

    A text is "" if its token ends inside a character. The token that completes the character has all of it.
    """
    ends = list(accumulate(map(len, texts)))
    first = next((i for i, end in enumerate(ends) if end > start), len(ends))
    while first and not texts[first - 1]:
        first -= 1
    last = next((i for i, end in enumerate(ends) if end >= stop), len(ends) - 1)
    return Span(begin + first, begin + (last + 1 if stop > start else first))


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
