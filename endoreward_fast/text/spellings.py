"""Rewrite messages: change their texts, or put them into the forms that templates expect."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .messages import REASONING, TEXTS, Message, function_of, spoken, text_of


def with_texts(message: Message, change: Callable[[str], str]) -> dict[str, Any]:
    """Return the message with `change` applied to every text that is not blank.

    This includes the names and arguments of tool calls. Numbers in arguments become texts.
    """

    def changed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: changed(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [changed(inner) for inner in value]
        text = value if isinstance(value, str) else json.dumps(value)
        return change(text) if text.strip() else value

    def in_part(part: Message) -> dict[str, Any]:
        return {**part, part["type"]: changed(part[part["type"]])}

    def in_call(call: Message) -> dict[str, Any]:
        function = dict(function_of(call))
        arguments = function.get("arguments")
        known = parsed(arguments)
        function["name"] = change(function["name"])
        if known is not None:
            new = changed(known)
            # Keep arguments that do not change as they are: json.dumps could format them differently.
            function["arguments"] = arguments if new == known else new if known is arguments else json.dumps(new)
        elif isinstance(arguments, str):
            function["arguments"] = changed(arguments)
        return {**call, "function": function} if "function" in call else function

    found = dict(message)
    for name in TEXTS:
        if isinstance(found.get(name), str):
            found[name] = changed(found[name])
    if isinstance(found.get("content"), list | tuple):
        found["content"] = [in_part(part) for part in found["content"]]
    if found.get("tool_calls"):
        found["tool_calls"] = [in_call(call) for call in found["tool_calls"]]
    return found


def texts_of(message: Message) -> list[str]:
    """Return every text of the message: in its fields, parts and tool calls."""
    found: list[str] = []

    def keep(text: str) -> str:
        found.append(text)
        return text

    with_texts(message, keep)
    return found


def with_text(message: Message, text: str) -> dict[str, Any]:
    """Return the message with `text` as its content. Parts that hold reasoning stay."""
    content = message.get("content")
    if not isinstance(content, list):
        return {**message, "content": text}
    kept = [part for part in content if part["type"] != "text"]
    return {**message, "content": [*kept, {"type": "text", "text": text}]}


def parsed(arguments: Any) -> Any:
    """Return a tool call's arguments, an object or its JSON, as an object. None if they are neither."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    return arguments if isinstance(arguments, Mapping) else None


def spellings(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """Yield the conversation in every form that a chat template may expect; unchanged first. All say the same.

    - Content as a string, or as one part of text.
    - Content of a turn without any as "", or as null.
    - Arguments of tool calls as an object, or as JSON.
    """
    seen: list[list[dict[str, Any]]] = []
    for content in (_same, _as_text, _as_one_part):
        for blank in (_same, _blank_text, _blank_null):
            for arguments in (_same, _as_object, _as_json):
                found = [arguments(blank(content(dict(message)))) for message in messages]
                if found not in seen:
                    seen.append(found)
                    yield found


def _same(message: dict[str, Any]) -> dict[str, Any]:
    return message


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    thought = text_of([part for part in content if part["type"] != "text"])
    found = {**message, "content": text_of([part for part in content if part["type"] == "text"])}
    return found | {REASONING[0]: thought} if thought else found


def _as_one_part(message: dict[str, Any]) -> dict[str, Any]:
    message = _as_text(message)
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _blank_text(message: dict[str, Any]) -> dict[str, Any]:
    return message if message.get("content") else {**message, "content": ""}


def _blank_null(message: dict[str, Any]) -> dict[str, Any]:
    return message if message.get("content") or not message.get("tool_calls") else {**message, "content": None}


def _as_object(message: dict[str, Any]) -> dict[str, Any]:
    return _with_arguments(message, lambda arguments: arguments if parsed(arguments) is None else parsed(arguments))


def _as_json(message: dict[str, Any]) -> dict[str, Any]:
    return _with_arguments(message, lambda a: json.dumps(a, ensure_ascii=False) if isinstance(a, Mapping) else a)


def _with_arguments(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message

    def in_call(call: Message) -> Message:
        function = function_of(call)
        if "arguments" not in function:
            return call
        function = {**function, "arguments": change(function["arguments"])}
        return {**call, "function": function} if "function" in call else function

    return {**message, "tool_calls": [in_call(call) for call in calls]}


def misspelt(messages: Sequence[Message], text: str, source: str) -> bool:
    """Return whether `text` shows a value of `messages` as Python prints it: a list of parts, a dict, None.

    Then the template (`source`) expects another form of `messages`.
    """

    def is_printed(value: Any) -> bool:
        spelt = json.dumps(value, ensure_ascii=False)
        return repr(value) in text and (isinstance(value, str) or repr(value) != spelt)

    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and any(repr(p) in text or json.dumps(p) in text for p in content):
            return True
        for call in message.get("tool_calls") or ():
            arguments = function_of(call).get("arguments")
            if isinstance(arguments, Mapping) and arguments and is_printed(arguments):
                return True
            if isinstance(arguments, str) and parsed(arguments) is not None and json.dumps(arguments) in text:
                return True
    if any(message.get("content", "") is None for message in messages):
        return text.count("None") > source.count("None") + str([spoken(m) for m in messages]).count("None")
    return False
