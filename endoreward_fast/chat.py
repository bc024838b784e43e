"""Conversations as the model's own chat template writes them, cut where the scored completion begins and ends.

The scored text is the last assistant turn and its end-of-turn token. Where it begins is asked of the template, not
guessed: the same conversation is rendered with a marker for that turn. What the template writes before the marker is
prompt (headers, an empty thinking block), what it writes after it up to the first special token is the end of turn
(`</s>`, `<|im_end|>` without the newline that no model generates). White space between the generation prompt and the
marker (Llama 2, Mistral: "[/INST] answer") is the completion's, since the model generates it.

A template that rewrites the turn (drops its reasoning, say) is not followed: the turn is scored as it is written,
after the generation prompt, which is the text that a model generating it would have seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import EndoRewardError

MARKER = "zqjMARKERjqz"
THINK = "<think>"
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Rendered:
    """prompt + completion + end is the conversation; `end` is "" where the template writes no end-of-turn token."""

    prompt: str
    completion: str
    end: str
    flags: tuple[str, ...] = ()


def render(tokenizer: Any, messages: Sequence[Message], *, system: str | None = None) -> Rendered:
    """The conversation that ends in the assistant's `messages[-1]`, through the tokenizer's chat template.

    `system` is put before the conversation; a system message that is there already follows it after an empty line. A
    template without a place for it (Gemma 2) gets it at the head of the first user turn, flag "system_in_user".

    Raises EndoRewardError: no template, or one that refuses the conversation (its own message is in the line).
    """
    _refuse_without_template(tokenizer)
    prompt = with_system(messages[:-1], system)
    instruction = _system_text(prompt)
    rendered = None
    try:
        rendered = _render(tokenizer, prompt, messages[-1])
    except EndoRewardError:
        if not instruction:
            raise
    if rendered is None or instruction not in rendered.prompt:
        rendered = _render(tokenizer, _system_in_user(prompt), messages[-1])
        rendered = replace(rendered, flags=(*rendered.flags, "system_in_user"))
    return rendered


def conversation(tokenizer: Any, messages: Sequence[Message], *, system: str | None = None) -> str:
    """All that the template writes for `messages`, to its very end: what a classifier of conversations is trained on.

    Raises EndoRewardError as `render` does, also where the template has no place for `system`.
    """
    _refuse_without_template(tokenizer)
    return _apply(tokenizer, with_system(messages, system))


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """`messages` led by the system prompt: `system`, then what a system message of their own says."""
    if not system:
        return list(messages)
    if messages and messages[0].get("role") == "system" and isinstance(messages[0].get("content"), str):
        return [{**messages[0], "content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]


def name_of(tokenizer: Any) -> str:
    """How error messages call a tokenizer."""
    name = getattr(tokenizer, "name_or_path", "")
    return f"the tokenizer of {name!r}" if name else f"the tokenizer ({type(tokenizer).__name__})"


def _refuse_without_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise EndoRewardError(
            f"{name_of(tokenizer)} has no chat template, so messages cannot be scored: "
            "give prompt and completion as text, or use a model that has one"
        )


def _system_text(messages: Sequence[Message]) -> str:
    """What a leading system message says; "" where there is none."""
    content = messages[0].get("content") if messages and messages[0].get("role") == "system" else None
    return content.strip() if isinstance(content, str) else ""


def _system_in_user(messages: Sequence[Message]) -> list[Message]:
    system, *rest = messages
    if not rest or rest[0].get("role") != "user" or not isinstance(rest[0].get("content"), str):
        raise EndoRewardError(
            "the chat template has no place for a system prompt, and no user turn of text comes first"
        )
    return [{**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def _render(tokenizer: Any, prompt: list[Message], answer: Message) -> Rendered:
    content = answer["content"]
    opening = _apply(tokenizer, prompt, generate=True)
    before, found, after = _apply(tokenizer, [*prompt, {**answer, "content": MARKER}]).partition(MARKER)
    if not found:
        raise EndoRewardError(f"the chat template of {name_of(tokenizer)} does not write the assistant's turn")
    end = _end_of_turn(tokenizer, after)
    whole = _apply(tokenizer, [*prompt, answer])
    for head in (before, opening):
        body = whole[len(head) : len(whole) - len(after)]
        if whole == head + body + after and body in (content, content.strip(), content.rstrip(), content.lstrip()):
            space = head[len(opening) :] if head.startswith(opening) else ""
            space = space if space.isspace() else ""
            return Rendered(head[: len(head) - len(space)], space + body, end)
    if opening.rstrip().endswith(THINK) and content.lstrip().startswith(THINK):
        opening = opening[: opening.rindex(THINK)]  # the turn opens the thinking block itself
    return Rendered(opening, content, end, ("template_rewrites",))


def _apply(tokenizer: Any, messages: list[Message], *, generate: bool = False) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False)
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EndoRewardError(f"the chat template refuses the conversation: {reason}") from error
    return text


def _end_of_turn(tokenizer: Any, text: str) -> str:
    """`text` up to and with its first special token; "" if it has none."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    places = [(text.index(token), -len(token), token) for token in special if token and token in text]
    if not places:
        return ""
    at, _, token = min(places)
    return text[: at + len(token)]
