r"""A conversation as the model's chat template writes it, split into prompt, completion and end of turn.

    prompt                     the template's text up to and with the generation prompt, as the policy saw it
    completion                 what the template writes from there on for the last turn: text, reasoning, tool calls
    end                        the mark that ends the turn, such as "<|im_end|>"

For example, in ChatML with the turns user "Hi" and assistant "Hello.":

    prompt                     "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    completion                 "Hello."
    end                        "<|im_end|>", without the newline after it: no model generates that

turn.py finds where the turn begins and ends. This module prepares the messages (null fields, the system prompt) and
checks what the template does with them.

If the template drops a part of a turn, the turn is scored as the template writes it, except that a turn of text alone
is scored as given, because a policy generated it. Every such change is a flag (row_flags.py), in earlier turns too.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile

from ..errors import EndoRewardError
from .messages import Message, has_nulls, is_blank, is_plain, text_of, without_nulls
from .spellings import texts_of, with_text
from .template import Extras, Marked, Template
from .turn import Turn, after_marks, said_by, squeezed, up_to_first, without_end


@dataclass(frozen=True)
class Rendered:
    """A conversation as text: prompt + completion + end. `end` is "" if the template writes no end of turn."""

    prompt: str
    completion: str
    end: str
    flags: tuple[str, ...] = ()


def render(
    template: Template, messages: Sequence[Message], extras: Extras, *, system: str | None = None,
    ends: Collection[str] = (),
) -> Rendered:  # fmt: skip
    """Render a conversation whose last message is the assistant's. An empty turn has the completion "".

    system   put before the conversation, and before the text of a system message that it already has, with an empty
             line between. If the template has no system turn (Gemma 2), it leads the first user turn instead, and the
             flag "system_in_user" says so
    ends     tokens at which the model stops. If the template writes no end of turn, but one of these before every next
             turn (GLM: "<|user|>"), that token is the end

    Raises EndoRewardError if there is no template, or if the template refuses the conversation. The message then holds
    the template's own.
    """
    template.source()
    messages = [without_nulls(message) for message in messages]
    prompt, flags = _place_system(template, messages[:-1], system)
    turn = Turn(template, [*prompt, messages[-1]], extras, ends)
    found = (
        *_changed_before(turn), *_ignored(template, turn.messages, turn.whole, extras),
        *_marks_in(template, messages, turn.end), *_null_fields(messages, extras),
    )  # fmt: skip
    return Rendered(turn.prompt, turn.completion, turn.end, (*turn.flags, *flags, *found))


def conversation(
    template: Template, messages: Sequence[Message], extras: Extras, *, system: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """Return (all that the template writes for `messages`, flags), as a classifier of conversations reads it.

    Raises EndoRewardError as `render` does, and if the template refuses a system turn. `system` is never moved to a
    user turn.
    """
    template.source()
    turns = template.fit(with_system([without_nulls(message) for message in messages], system), extras)
    text, marked = template.write(turns, extras), Marked(turns)
    marked_text = template.write(marked.messages, extras)
    end = up_to_first(template.special, (after_marks(text, marked_text) or "").strip())
    lost = marked.lost(marked_text, text)
    earlier = len(marked.marks) - len(Marked(turns[-1:]).marks)  # number of texts in the turns before the last
    flags: tuple[str, ...] = ("empty",) if is_blank(turns[-1]) else ()
    said = said_by(turns[-1])
    if without_end(said, end) != said:
        flags = (*flags, "end_in_text")
        text = template.write([*turns[:-1], with_text(turns[-1], without_end(said, end))], extras)
    return text, (
        *flags, *(("template_drops",) if any(i >= earlier for i in lost) else ()),
        *(("context_changed",) if any(i < earlier for i in lost) else ()), *_ignored(template, turns, text, extras),
        *_marks_in(template, messages, end), *_null_fields(messages, extras),
    )  # fmt: skip


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """Return `messages` with `system` first. The text of their own system message, if any, comes after it."""
    if not system:
        return list(messages)
    if messages and messages[0].get("role") == "system":
        return [{**messages[0], "content": f"{system}\n\n{text_of(messages[0].get('content'))}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]


def _place_system(
    template: Template, prompt: Sequence[Message], system: str | None
) -> tuple[list[Message], tuple[str, ...]]:
    """Return (the prompt with its system prompt, flags): a system turn, or the head of the first user turn."""
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
            "the chat template has no place for a system prompt, and no user turn follows to hold it: leave it out"
        )
    together = f"{instruction}\n\n{text_of(first.get('content'))}"
    return [{**first, "content": together}, *rest], ("system_in_user",)


def _are_in_order(turns: Sequence[Message], written: str) -> bool:
    """Return whether `written` holds the text of every turn, each after the one before it."""
    at = 0
    for turn in turns:
        text = squeezed(turn["content"]) if is_plain(turn) else None
        at = -1 if text is None else written.find(text, at)
        if text is None or at < 0:
            return False
        at += len(text)
    return True


def _changed_before(turn: Turn) -> tuple[str, ...]:
    """Return a flag if the template drops or changes a text of a turn before the last."""
    if _are_in_order(turn.before, squeezed(turn.opening)):
        return ()
    # The template may escape a text, as JSON does, or write it elsewhere. The marks around it are still found.
    marked = Marked(turn.before)
    text = turn.template.write(marked.messages, turn.extras, generate=True)
    return ("context_changed",) if marked.lost(text, turn.opening) else ()


def _ignored(template: Template, messages: Sequence[Message], written: str, extras: Extras) -> tuple[str, ...]:
    """Return a flag if the template does not use the tools, documents or template arguments of the row."""
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
    """Return a flag if a text of the conversation holds a special token that the template uses."""
    source = template.source()
    tokenizer = template.tokenizer
    marks = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and str(token) in source}
    marks |= {mark for mark in (tokenizer.bos_token, tokenizer.eos_token, end.strip()) if mark}
    texts = [text for message in messages for text in texts_of(message)]
    return ("marks_in_text",) if any(mark in text for mark in marks for text in texts) else ()
