"""Messages of a conversation: check them, tidy them, and read their text.

A message has a role and content. Content is text, a list of parts, or null. An assistant's message may also have tool
calls and reasoning, under the names that chat templates and OpenAI's API use.
"""

import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..errors import EndoRewardError

Message = Mapping[str, Any]


REASONING = ("reasoning_content", "thinking", "reasoning")
"""names of the field that holds the reasoning"""


TEXTS = ("content", *REASONING, "tool_plan", "refusal")
"""fields of a message that hold text of its turn; only tool_calls holds more"""


NO_TEXT = MappingProxyType({"function_call": "wanted tool_calls", "audio": "only text can be scored"})
"""{field that no chat template writes: the end of its error message}"""


TEXT_PARTS = ("text", "thinking", "reasoning")
"""types of parts that hold text; the key of the text is the type's name"""


DEEPEST = 100
"""most levels of nested lists and objects: far fewer than any of Python's JSON and Parquet code supports"""


def are_messages(value: Any) -> bool:
    """Return whether `value` is a list of messages: mappings with a role."""
    return isinstance(value, list | tuple) and all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value
    )


def check_message(message: Message, name: str) -> None:
    """Raise EndoRewardError if a template could not write the message: no content, or a value of the wrong type.

    `name` is what the error calls the message.
    """
    if all(message.get(field) is None for field in (*TEXTS, "tool_calls")):
        if "content" in message:
            raise EndoRewardError(f"{name}.content: wanted text, found nothing")
        raise EndoRewardError(f"{name}: wanted content or tool_calls, found keys {', '.join(map(str, message))}")
    for field, wanted in NO_TEXT.items():
        if message.get(field) is not None:
            raise EndoRewardError(f"{name}.{field}: {wanted}")
    for field in TEXTS:
        value = message.get(field)
        if field == "content" and isinstance(value, list | tuple):
            for i, part in enumerate(value):
                _check_part(part, f"{name}.content[{i}]")
        elif value is not None:
            check_text(value, f"{name}.{field}")
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple | None):
        raise EndoRewardError(f"{name}.tool_calls: wanted a list of calls, found {kind_of(calls)}")
    for i, call in enumerate(calls or ()):
        function = function_of(call) if isinstance(call, Mapping) else None
        if function is None or not isinstance(function.get("name"), str):
            raise EndoRewardError(f"{name}.tool_calls[{i}]: wanted a function with a name, found {kind_of(call)}")
    check_values(message, name)


def check_values(value: Any, name: str, *, levels: int = DEEPEST) -> None:
    """Raise EndoRewardError, naming the place, if anything inside `value` cannot be written as JSON text."""
    if isinstance(value, float) and not math.isfinite(value):
        raise EndoRewardError(f"{name}: NaN and infinity are not valid JSON")
    if isinstance(value, str):
        check_text(value, name)
    inner: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        check_values("".join(map(str, value)), f"{name}, a key")
        inner = [(f"{name}.{key}", one) for key, one in value.items()]
    elif isinstance(value, list | tuple):
        inner = [(f"{name}[{i}]", one) for i, one in enumerate(value)]
    if inner and not levels:
        raise EndoRewardError(f"{name}: nested more than {DEEPEST} levels deep: flatten it")
    for where, one in inner:
        check_values(one, where, levels=levels - 1)


def _check_part(part: Any, name: str) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in TEXT_PARTS:
        found = f"a part of type {kind!r}" if kind is not None else kind_of(part)
        raise EndoRewardError(f"{name}: only parts of text can be scored, found {found}")
    check_text(part.get(kind), f"{name}.{kind}")


def check_text(value: Any, name: str) -> None:
    """Raise EndoRewardError unless `value` is text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise EndoRewardError(f"{name}: wanted text, found {kind_of(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise EndoRewardError(f"{name}: character {error.start + 1} is half of a surrogate pair: remove it") from None


def kind_of(value: Any) -> str:
    """Describe the type of a value, for error messages."""
    if isinstance(value, list | tuple):
        odd = next((v for v in value if not isinstance(v, Mapping)), value[0] if value else None)
        keys = f" of keys {', '.join(map(str, odd))}" if isinstance(odd, Mapping) else ""
        return f"a list of {type(odd).__name__}{keys}" if value else "an empty list"
    if isinstance(value, float) and value != value:
        return "NaN, a missing value"
    return "nothing" if value is None else type(value).__name__


def without_nulls(message: Message) -> dict[str, Any]:
    """Return the message without null fields and without an empty list of tool calls: tables fill these in.

    Content stays: null as null, an empty list of parts as "". Reasoning that is there under two names is kept once. A
    tool call without arguments gets {}.
    """
    kept = {name: value for name, value in message.items() if value is not None or name == "content"}
    thoughts: set[Any] = set()
    for name in REASONING:
        if kept.get(name) in thoughts:
            del kept[name]
        thoughts |= {kept[name]} if name in kept else set()
    if kept.get("content") in ([], ()):
        kept["content"] = ""
    calls = kept.pop("tool_calls", None)
    return {**kept, "tool_calls": [_without_nulls(call) for call in calls]} if calls else kept


def _without_nulls(call: Message) -> dict[str, Any]:
    function = {name: value for name, value in function_of(call).items() if value is not None}
    function.setdefault("arguments", {})
    if function_of(call) is call:
        return function
    return {name: value for name, value in call.items() if value is not None} | {"function": function}


def has_nulls(value: Any) -> bool:
    """Return whether a field of `value` is null, at any depth."""
    if isinstance(value, Mapping):
        return any(inner is None or has_nulls(inner) for inner in value.values())
    return isinstance(value, list | tuple) and any(map(has_nulls, value))


def text_of(content: Any) -> str:
    """Return content as one text: parts are joined, null is ""."""
    if isinstance(content, str):
        return content
    return "".join(part[part["type"]] for part in content or ())


def spoken(message: Message) -> str:
    """Return the whole turn as text that a person can read: reasoning, text, and each tool call as JSON."""
    message = without_nulls(message)
    thought = next((message[name] for name in REASONING if message.get(name)), "")
    pieces = [f"<think>\n{thought}\n</think>" if thought else "", text_of(message.get("content")).strip()]
    pieces += [message[name] for name in ("tool_plan", "refusal") if message.get(name)]
    pieces += [json.dumps(dict(function_of(call)), ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n\n".join(piece for piece in pieces if piece)


def is_plain(message: Message) -> bool:
    """Return whether the message holds a string as content and nothing else."""
    return isinstance(message.get("content"), str) and not any(message.get(name) for name in (*TEXTS[1:], "tool_calls"))


def is_text(message: Message) -> bool:
    """Return whether the message holds text as content, as a string or in parts, and nothing else."""
    content = message.get("content")
    if isinstance(content, list) and any(part["type"] != "text" for part in content):
        return False
    return is_plain({**message, "content": text_of(content)})


def is_blank(message: Message) -> bool:
    """Return whether the message holds only white space."""
    return not spoken(message).strip()


def function_of(call: Message) -> Message:
    """Return the function of a tool call: its "function" field, or the call itself if it has none."""
    inner = call.get("function")
    return inner if isinstance(inner, Mapping) else call
