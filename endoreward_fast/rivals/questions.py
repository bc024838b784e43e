"""The questions that a judge asks about rows, and the replies whose probabilities it reads."""

import json
from collections.abc import Sequence
from typing import Any

from ..errors import EndoRewardError
from ..text.encoding import wants_chat
from ..text.messages import spoken
from ..text.rows import Row, prompt_and_completion, refuse_no_row
from ..text.template import Extras

TEXT_ENDING = "\nReply:"
"""end of a question if there is no chat template"""


class Questions:
    """Collects rows of (question, reply) for the language model. Each pair is in `rows` once."""

    def __init__(self, tokenizer: Any, chat: bool | None) -> None:
        self.rows: list[Row] = []
        self._tokenizer, self._chat = tokenizer, chat
        self._known: dict[tuple[str, str, str], int] = {}

    def about(self, row: Row, instruction: str, replies: Sequence[str]) -> list[int] | EndoRewardError:
        """Add `instruction` about a row, and return the positions of its replies in `rows`."""
        found = question_and_answer(row)
        if isinstance(found, EndoRewardError):
            return found
        return self.put(instruction.format(question=found[0], answer=found[1]), replies, row)

    def put(self, text: str, replies: Sequence[str], row: Row) -> list[int]:
        """Add the question `text`, and return the positions of its replies in `rows`.

        The question is chat or plain text, as `row` itself would be.
        """
        chat = wants_chat(self._tokenizer, row.get("chat", self._chat))
        # Template arguments apply to questions too. Tools and documents do not: the text of the question holds them.
        kwargs = {"chat_template_kwargs": row["chat_template_kwargs"]} if row.get("chat_template_kwargs") else {}
        return [self._place(text, reply, {"chat": chat, **kwargs}) for reply in replies]

    def _place(self, text: str, reply: str, how: dict[str, Any]) -> int:
        place = self._known.setdefault((text, reply, repr(how)), len(self.rows))
        if place == len(self.rows):
            ending, space = ("", "") if how["chat"] else (TEXT_ENDING, " ")
            self.rows.append({"prompt": text + ending, "completion": space + reply, **how})
        return place


def question_and_answer(row: Row) -> tuple[str, str] | EndoRewardError:
    """Return (question, answer) of a row as plain text, or the error of a row that has none."""
    try:
        refuse_no_row(row)
        if "prompt_ids" in row:
            raise EndoRewardError("a judge reads text, but the row holds token ids")
        prompt, completion = prompt_and_completion(row)
        return _given(row) + plain_text(prompt), plain_text(completion)
    except EndoRewardError as error:
        return error


def _given(row: Row) -> str:
    """Return the tools and documents of a row as text, which is a part of its question."""
    extras = Extras.of(row, Extras())
    given = (("Tools", extras.tools), ("Documents", extras.documents))
    found = [
        f"{name}: {json.dumps(list(values), ensure_ascii=False, default=repr)}" for name, values in given if values
    ]
    return "".join(f"{text}\n\n" for text in found)


def plain_text(value: Any) -> str:
    """Return a prompt or completion as plain text. Each of several turns has its role before it."""
    if isinstance(value, str):
        return value.strip()
    if len(value) == 1:
        return spoken(value[0]).strip()
    return "\n\n".join(f"{message['role'].capitalize()}: {spoken(message).strip()}" for message in value)
