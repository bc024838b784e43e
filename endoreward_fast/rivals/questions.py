"""Questions to a language model about rows, and the replies that are weighed."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import EndoRewardError
from ..text.encoding import wants_chat
from ..text.messages import spoken
from ..text.rows import Row, prompt_and_completion, refuse_no_row
from ..text.template import Extras

if TYPE_CHECKING:
    pass


TEXT_ENDING = "\nReply:"
"""what a question ends in where there is no chat template"""


class Questions:
    """Questions to a language model with the replies to be weighed, each pair once however often it is put."""

    def __init__(self, tokenizer: Any, chat: bool | None) -> None:
        self.rows: list[Row] = []
        self._tokenizer, self._chat = tokenizer, chat
        self._known: dict[tuple[str, str, str], int] = {}

    def about(self, row: Row, instruction: str, replies: Sequence[str]) -> list[int] | EndoRewardError:
        """Places in `rows` of the replies to `instruction` about a row."""
        found = question_and_answer(row)
        if isinstance(found, EndoRewardError):
            return found
        return self.put(instruction.format(question=found[0], answer=found[1]), replies, row)

    def put(self, text: str, replies: Sequence[str], row: Row) -> list[int]:
        """Places in `rows` of the replies to `text`; as chat or as text, as `row` would be scored."""
        chat = wants_chat(self._tokenizer, row.get("chat", self._chat))
        # How the template writes a prompt holds for questions too; what tools there are is said in the question.
        kwargs = {"chat_template_kwargs": row["chat_template_kwargs"]} if row.get("chat_template_kwargs") else {}
        return [self._place(text, reply, {"chat": chat, **kwargs}) for reply in replies]

    def _place(self, text: str, reply: str, how: dict[str, Any]) -> int:
        place = self._known.setdefault((text, reply, repr(how)), len(self.rows))
        if place == len(self.rows):
            ending, space = ("", "") if how["chat"] else (TEXT_ENDING, " ")
            self.rows.append({"prompt": text + ending, "completion": space + reply, **how})
        return place


def question_and_answer(row: Row) -> tuple[str, str] | EndoRewardError:
    try:
        refuse_no_row(row)
        if "prompt_ids" in row:
            raise EndoRewardError("a judge reads text, but the row holds token ids")
        prompt, completion = prompt_and_completion(row)
        return _given(row) + plain_text(prompt), plain_text(completion)
    except EndoRewardError as error:
        return error


def _given(row: Row) -> str:
    """The tools and documents of a row, which are part of its question."""
    extras = Extras.of(row, Extras())
    given = (("Tools", extras.tools), ("Documents", extras.documents))
    found = [
        f"{name}: {json.dumps(list(values), ensure_ascii=False, default=repr)}" for name, values in given if values
    ]
    return "".join(f"{text}\n\n" for text in found)


def plain_text(value: Any) -> str:
    """A prompt or completion as plain text; several turns with the roles before them."""
    if isinstance(value, str):
        return value.strip()
    if len(value) == 1:
        return spoken(value[0]).strip()
    return "\n\n".join(f"{message['role'].capitalize()}: {spoken(message).strip()}" for message in value)
