"""Conversations as the model's own chat template writes them, cut where the scored turn begins and ends.

    prompt + completion + end     prompt: the template's text up to and with the generation prompt, as the policy saw it
                                  completion + end: what it writes from there to the end of the last turn

The turn is every field of its message: text, parts, reasoning, tool calls. The conversation is written twice, up to the
generation prompt and whole. Where the turn ends is seen from what the template writes behind it: at the end of the
conversation and before a next turn alike (`</s>`, `<|im_end|>` without the newline that no model generates). If it
leaves a last turn open, its end is what stands between it and the token that opens a next one.

Where a template changes the text of a turn (drops its reasoning, say), the turn is scored as it is written there: that
is what a policy has generated. All that is dropped is flagged, in the turn and in those before it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile

from ..errors import EndoRewardError
from .messages import Message, has_nulls, is_blank, is_plain, text_of, without_nulls
from .spellings import texts_of, with_text
from .template import Extras, Marked, Template
from .turn import Turn, behind_marks, said_by, squeezed, up_to_first, without_end


@dataclass(frozen=True)
class Rendered:
    """prompt + completion + end is the conversation; `end` is "" where the template writes no end of turn."""

    prompt: str
    completion: str
    end: str
    flags: tuple[str, ...] = ()


def render(
    template: Template, messages: Sequence[Message], extras: Extras, *, system: str | None = None,
    ends: Collection[str] = (),
) -> Rendered:  # fmt: skip
    """The conversation that ends in the assistant's `messages[-1]`. An empty turn has the completion "".

    `system` is put before the conversation; a system message that is there already follows it after an empty line. A
    template without a place for it (Gemma 2) gets it at the head of the first user turn, flag "system_in_user".
    `ends` are tokens at which the model stops: one that the template puts before every next turn ends this one, if
    nothing else does (GLM's `<|user|>`).

    Raises EndoRewardError: no template, or one that refuses the conversation (its own message is in the line).
    """
    template.source()
    messages = [without_nulls(message) for message in messages]
    prompt, flags = _with_a_system_turn(template, messages[:-1], system)
    turn = Turn(template, [*prompt, messages[-1]], extras, ends)
    found = (
        *_changed_before(turn), *_ignored(template, turn.messages, turn.whole, extras),
        *_marks_in(template, messages, turn.end), *_null_fields(messages, extras),
    )  # fmt: skip
    return Rendered(turn.prompt, turn.completion, turn.end, (*turn.flags, *flags, *found))


def conversation(
    template: Template, messages: Sequence[Message], extras: Extras, *, system: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """(all that the template writes for `messages`, to its very end: what a classifier of conversations is trained on;
    flags).

    Raises EndoRewardError as `render` does, also where the template has no place for `system`.
    """
    template.source()
    turns = template.fit(with_system([without_nulls(message) for message in messages], system), extras)
    text, marked = template.write(turns, extras), Marked(turns)
    other = template.write(marked.messages, extras)
    end = up_to_first(template.special, (behind_marks(text, other) or "").strip())
    lost, last = marked.lost(other, text), len(marked.marks) - len(Marked(turns[-1:]).marks)
    flags: tuple[str, ...] = ("empty",) if is_blank(turns[-1]) else ()
    said = said_by(turns[-1])
    if without_end(said, end) != said:
        flags = (*flags, "end_in_text")
        text = template.write([*turns[:-1], with_text(turns[-1], without_end(said, end))], extras)
    return text, (
        *flags, *(("template_drops",) if any(i >= last for i in lost) else ()),
        *(("context_changed",) if any(i < last for i in lost) else ()), *_ignored(template, turns, text, extras),
        *_marks_in(template, messages, end), *_null_fields(messages, extras),
    )  # fmt: skip


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """`messages` led by the system prompt: `system`, then what a system message of their own says."""
    if not system:
        return list(messages)
    if messages and messages[0].get("role") == "system":
        return [{**messages[0], "content": f"{system}\n\n{text_of(messages[0].get('content'))}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]


def _with_a_system_turn(
    template: Template, prompt: Sequence[Message], system: str | None
) -> tuple[list[Message], tuple[str, ...]]:
    """(prompt led by its system prompt, flags)."""
    led = with_system(prompt, system)
    systems = list(takewhile(lambda message: message["role"] == "system", led))
    if not systems or template.takes_system:
        return led, ()
    said = [text_of(message.get("content")).strip() for message in systems]
    instruction = "\n\n".join(text for text in said if text)
    first, *rest = led[len(systems) :] or [None]
    if not instruction:
        return led[len(systems) :], ()
    if first is None or first.get("role") != "user":
        raise EndoRewardError(
            "the chat template has no place for a system prompt, and no user turn of text comes first"
        )
    together = f"{instruction}\n\n{text_of(first.get('content'))}"
    return [{**first, "content": together}, *rest], ("system_in_user",)


def _in_order(turns: Sequence[Message], written: str) -> bool:
    """Whether each turn is a text that is `written` behind the one before: two may say the same."""
    at = 0
    for turn in turns:
        text = squeezed(turn["content"]) if is_plain(turn) else None
        at = -1 if text is None else written.find(text, at)
        if text is None or at < 0:
            return False
        at += len(text)
    return True


def _changed_before(turn: Turn) -> tuple[str, ...]:
    """A flag if the template leaves out or changes a text of the turns before the last."""
    if _in_order(turn.before, squeezed(turn.opening)):
        return ()
    # A text may be escaped, as in JSON: then its marks are there still.
    marked = Marked(turn.before)
    text = turn.template.write(marked.messages, turn.extras, generate=True)
    return ("context_changed",) if marked.lost(text, turn.opening) else ()


def _ignored(template: Template, messages: Sequence[Message], written: str, extras: Extras) -> tuple[str, ...]:
    """A flag if the template makes nothing of what the row gives it."""
    flags: tuple[str, ...] = ()
    for name in ("tools", "documents"):
        if getattr(extras, name) is not None:
            without = Extras(**{**vars(extras), name: None})
            if template.write(messages, without) == written:
                flags = ("template_ignores",)
    source = template.source(tools=bool(extras.tools))
    return ("template_ignores",) if any(name not in source for name in extras.kwargs) else flags


def _null_fields(messages: Sequence[Message], extras: Extras) -> tuple[str, ...]:
    filled = has_nulls(extras.tools) or any(has_nulls(message.get("tool_calls")) for message in messages)
    return ("null_fields",) if filled else ()


def _marks_in(template: Template, messages: Sequence[Message], end: str) -> tuple[str, ...]:
    """A flag if a text of the conversation holds what the template marks turns with."""
    source = template.source()
    tokenizer = template.tokenizer
    marks = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and str(token) in source}
    marks |= {mark for mark in (tokenizer.bos_token, tokenizer.eos_token, end.strip()) if mark}
    texts = [text for message in messages for text in texts_of(message)]
    return ("marks_in_text",) if any(mark in text for mark in marks for text in texts) else ()
