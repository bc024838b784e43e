"""What a row may hold: its prompt and completion as text, messages or token ids."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from ..errors import EndoRewardError
from .messages import Message, are_messages, check_message, check_text, is_text, kind_of, text_of

Row = Mapping[str, Any]


WANTED = "prompt and completion, or messages, or prompt_ids and completion_ids"


def refuse_no_row(row: Any) -> None:
    if not isinstance(row, Mapping):
        raise EndoRewardError(f"a row is a mapping with {WANTED}; found {type(row).__name__}")


def prompt_and_completion(row: Row) -> tuple[Any, Any]:
    """Each a str or a list of messages; the prompt of {"messages": ...} is all but the last of them."""
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
    """The conversation that `prompt_and_completion` are; it ends in an assistant's turn, which `begun` leads."""
    before, turns = _turns(prompt, "user"), _turns(completion, "assistant")
    if begun:
        before, turns = before[:-1], [{**before[-1], "content": begun + text_of(turns[0].get("content"))}]
    turns = before + turns
    role = turns[-1]["role"] if turns else "none"
    if role != "assistant":
        raise EndoRewardError(f"the last message is what is scored: wanted the assistant's, found {role!r}")
    return turns


def begun_turn(row: Row, prompt: Any, completion: Any) -> str:
    """The text of the assistant's turn that a row's prompt ends in and its completion, of text, goes on with; or ""."""
    if "prompt" not in row:  # messages are turns, each whole
        return ""
    both = [*_turns(prompt, "user")[-1:], *_turns(completion, "assistant")]
    goes_on = len(both) == 2 and all(turn["role"] == "assistant" and is_text(turn) for turn in both)
    return text_of(both[0].get("content")) if goes_on else ""


def _turns(value: Any, role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def ids_of(row: Row, name: str) -> list[int]:
    ids = row[name]
    ids = ids.tolist() if hasattr(ids, "tolist") else ids  # tensors and arrays
    whole = isinstance(ids, list | tuple) and all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids)
    if not whole:
        raise EndoRewardError(f"{name}: wanted a list of token ids, found {kind_of(ids)}")
    return [int(i) for i in ids]


def switch_of(row: Row, name: str) -> bool:
    """A value of true or false; true where there is none."""
    value = row.get(name, True)
    value = value.tolist() if hasattr(value, "tolist") else value  # a tensor's or an array's
    if value not in (0, 1):
        raise EndoRewardError(f"{name}: wanted true or false, found {kind_of(value)}")
    return bool(value)


def mask_of(row: Row, completion: list[int]) -> tuple[bool, ...]:
    mask = row["completion_mask"]
    mask = mask.tolist() if hasattr(mask, "tolist") else mask
    if not isinstance(mask, list | tuple) or any(m not in (0, 1) for m in mask):
        raise EndoRewardError(f"completion_mask: wanted a list of 0 and 1, found {kind_of(mask)}")
    if len(mask) != len(completion):
        raise EndoRewardError(f"completion_mask has {len(mask)} entries, and completion_ids {len(completion)}")
    return tuple(map(bool, mask))
