"""Read the fields of a row: prompt and completion as text, messages or token ids."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from ..errors import EndoRewardError
from .messages import Message, are_messages, check_message, check_text, is_text, kind_of, text_of

Row = Mapping[str, Any]


WANTED = "prompt and completion, or messages, or prompt_ids and completion_ids"


def refuse_no_row(row: Any) -> None:
    """Raise EndoRewardError unless `row` is a mapping."""
    if not isinstance(row, Mapping):
        raise EndoRewardError(f"a row is a mapping with {WANTED}; found {type(row).__name__}")


def prompt_and_completion(row: Row) -> tuple[Any, Any]:
    """Return (prompt, completion), each a str or a list of messages.

    The completion of {"messages": [...]} is the last message, and the prompt is all others.
    """
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
    elif "messages" in row:
        messages = row["messages"]
        if not are_messages(messages):
            raise EndoRewardError(f"messages: wanted a list of {{role, content}}, found {kind_of(messages)}")
        prompt, completion = list(messages[:-1]), list(messages[-1:])
    else:
        found = ", ".join(map(str, row)) or "nothing"
        raise EndoRewardError(f"a row needs {WANTED}; found {found}")
    for name, value in (("prompt", prompt), ("completion", completion)):
        if isinstance(value, str):
            check_text(value, name)
        elif not are_messages(value):
            raise EndoRewardError(f"{name}: wanted text or a list of {{role, content}}, found {kind_of(value)}")
        else:
            for i, message in enumerate(value):
                check_message(message, f"{name}[{i}]")
    return prompt, completion


def dialogue(prompt: Any, completion: Any, begun: str = "") -> list[Message]:
    """Join prompt and completion to a conversation, whose last turn is the assistant's.

    `begun` is the text at the end of the prompt that the completion continues (`begun_turn`). It leads the last turn.
    """
    before, turns = _turns(prompt, "user"), _turns(completion, "assistant")
    if begun:
        before, turns = before[:-1], [{**before[-1], "content": begun + text_of(turns[0].get("content"))}]
    turns = before + turns
    role = turns[-1]["role"] if turns else "none"
    if role != "assistant":
        raise EndoRewardError(f"the last message is scored: wanted the assistant's, found {role!r}")
    return turns


def begun_turn(row: Row, prompt: Any, completion: Any) -> str:
    """Return the assistant's text that the prompt ends in, if the completion is a text that continues it; else ""."""
    if "prompt" not in row:  # each entry of "messages" is a whole turn
        return ""
    both = [*_turns(prompt, "user")[-1:], *_turns(completion, "assistant")]
    goes_on = len(both) == 2 and all(turn["role"] == "assistant" and is_text(turn) for turn in both)
    return text_of(both[0].get("content")) if goes_on else ""


def _turns(value: Any, role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def ids_of(row: Row, name: str) -> list[int]:
    """Return the token ids in a field of the row, which may be a list, a tensor or an array."""
    ids = row[name]
    ids = ids.tolist() if hasattr(ids, "tolist") else ids  # tensors and arrays
    kinds = set(map(type, ids)) if isinstance(ids, list | tuple) else {type(None)}
    if not all(issubclass(kind, Integral) and kind is not bool for kind in kinds):
        raise EndoRewardError(f"{name}: wanted a list of token ids, found {kind_of(ids)}")
    return [int(i) for i in ids]


def switch_of(row: Row, name: str) -> bool:
    """Return the true or false in a field of the row; true if the field is absent."""
    value = row.get(name, True)
    value = value.tolist() if hasattr(value, "tolist") else value  # tensors and arrays
    if value not in (0, 1):
        raise EndoRewardError(f"{name}: wanted true or false, found {kind_of(value)}")
    return bool(value)


def mask_of(row: Row, completion: list[int]) -> tuple[bool, ...]:
    """Return the completion_mask of the row: one bool for each token of the completion."""
    mask = row["completion_mask"]
    mask = mask.tolist() if hasattr(mask, "tolist") else mask
    if not isinstance(mask, list | tuple) or any(m not in (0, 1) for m in mask):
        raise EndoRewardError(f"completion_mask: wanted a list of 0 and 1, found {kind_of(mask)}")
    if len(mask) != len(completion):
        raise EndoRewardError(f"completion_mask has {len(mask)} entries, but completion_ids has {len(completion)}")
    return tuple(map(bool, mask))
