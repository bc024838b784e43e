"""Render conversations with a tokenizer's chat template, on a fixed day.

A template is a program by the model's author. It may expect content as a string or as a list of parts, and the
arguments of tool calls as an object or as JSON. `Template.fit` finds the form that it writes completely. If it writes
today's date, it gets `Template.day`, so that a run gives the same text on another day.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date as Date
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import EndoRewardError
from .messages import Message, check_text, check_values, is_plain
from .spellings import misspelt, spellings, with_texts

CLOCK = "strftime_now"
"""the function that templates call for the date; transformers provides it"""
RESERVED = (
    "self", "tools", "documents", "messages", "conversation", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", CLOCK,
)  # fmt: skip
"""parameters of apply_chat_template, which a row's template arguments may not use as names"""
MARKS = ("Qz{}MARKzQ", "Jq{}MARKqJ")
"""what `Marked` puts before and after the text of that number: the second form for texts that begin or end in Q or q"""


@dataclass(frozen=True)
class Extras:
    """What a row gives the template besides messages. All of it belongs to the prompt."""

    tools: tuple[Any, ...] | None = None
    """JSON schemas or Python functions, as apply_chat_template takes them"""
    documents: tuple[Mapping[str, str], ...] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """further variables of the template, such as enable_thinking"""

    @classmethod
    def of(cls, row: Mapping[str, Any], default: "Extras") -> "Extras":
        """Return a row's extras; `default` fills in what the row lacks. A value may be JSON text, as tables hold it.

        Raises EndoRewardError, which names the column.
        """
        tools = _list_of("tools", row.get("tools"), functions=True)
        documents = _list_of("documents", row.get("documents"))
        kwargs = _object("chat_template_kwargs", row.get("chat_template_kwargs"))
        return cls(
            default.tools if tools is None else tools or None,
            default.documents if documents is None else documents or None,
            {**default.kwargs, **kwargs},
        )


def _list_of(name: str, value: Any, *, functions: bool = False) -> tuple[Any, ...] | None:
    value = _read(name, value)
    if value is None:
        return None
    fine = isinstance(value, list | tuple) and all(isinstance(v, Mapping) or (functions and callable(v)) for v in value)
    if not fine:
        raise EndoRewardError(f"{name}: wanted a list of JSON objects, found {type(value).__name__}")
    check_values(value, name)
    return tuple(value)


def _object(name: str, value: Any) -> Mapping[str, Any]:
    value = _read(name, value)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise EndoRewardError(f"{name}: wanted a JSON object, found {type(value).__name__}")
    taken = next((key for key in value if key in RESERVED), None)
    if taken is not None:
        raise EndoRewardError(f"{name}: {taken!r} cannot be set there")
    check_values(value, name)
    return {str(key): inner for key, inner in value.items() if inner is not None}


def _read(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=_unambiguous)
    except (ValueError, RecursionError) as error:
        raise EndoRewardError(f"{name}: not valid JSON ({error})") from None


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for n, name in enumerate(names) if name in names[:n])
        raise ValueError(f"the key {twice!r} occurs twice in one object: keep one")
    return found


def as_date(text: str) -> Date:
    """Parse "YYYY-MM-DD". Raises EndoRewardError if the text is not such a day."""
    try:
        return Date.fromisoformat(text) if re.fullmatch(r"\d{4}-\d\d-\d\d", text) else Date(0, 0, 0)
    except (ValueError, TypeError):
        raise EndoRewardError(f"date: wanted a day as YYYY-MM-DD, found {text!r}") from None


@dataclass(frozen=True)
class Template:
    """The chat template of a tokenizer. `day` is the date that it writes, if it writes one."""

    tokenizer: Any
    day: Date = field(default_factory=Date.today)

    @property
    def name(self) -> str:
        """The tokenizer's name in error messages, without folders: a server's errors say nothing about its machine."""
        name = Path(getattr(self.tokenizer, "name_or_path", "") or "")
        name = name.name if name.is_absolute() else str(name) if name.name else ""
        return f"the tokenizer of {name!r}" if name else f"the tokenizer ({type(self.tokenizer).__name__})"

    @cached_property
    def _sources(self) -> dict[bool, str]:
        return {}

    def source(self, *, tools: bool = False) -> str:
        """Return the template's source, of the tool template if there are two. EndoRewardError if there is none."""
        if tools not in self._sources:
            self._sources[tools] = self._source(tools)
        return self._sources[tools]

    def _source(self, tools: bool) -> str:
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise EndoRewardError(
                f"{self.name} has no chat template, so messages cannot be scored: "
                "give prompt and completion as text, or use a model that has one"
            )
        try:
            found: str = self.tokenizer.get_chat_template(tools=[{}] if tools else None)
        except (ValueError, TypeError) as error:
            raise EndoRewardError(f"{self.name}: {str(error).partition(chr(10))[0]}") from error
        return found

    def asks_for_the_date(self, extras: Extras) -> bool:
        """Return whether the template's output may depend on the day."""
        return CLOCK in self.source(tools=bool(extras.tools)) and "date_string" not in extras.kwargs

    def write(self, messages: Sequence[Message], extras: Extras, *, generate: bool = False) -> str:
        """Return the rendered conversation, with the generation prompt if `generate`.

        Raises EndoRewardError if the template refuses the conversation.
        """
        source = self.source(tools=bool(extras.tools))
        dated = {"chat_template": self._clock + source} if CLOCK in source else {}
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tools=None if extras.tools is None else list(extras.tools),
                documents=None if extras.documents is None else list(extras.documents),
                add_generation_prompt=generate, tokenize=False, **dated, **extras.kwargs,
            )  # fmt: skip
        except Exception as error:  # a template is a program by the model's author and may raise anything
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise EndoRewardError(f"the chat template refuses the conversation: {reason}") from error
        check_text(text, "what the chat template writes")
        return text

    @cached_property
    def _clock(self) -> str:
        """A Jinja macro that replaces strftime_now: transformers does not accept another function under that name."""
        spelt = "".join(f"|replace({code!r}, {self.day.strftime(code)!r})" for code in _CODES)
        return f"{{% macro {CLOCK}(format) %}}{{{{ format{spelt} }}}}{{% endmacro %}}\n"

    @cached_property
    def special(self) -> set[str]:
        """The tokenizer's special tokens."""
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return (added | set(self.tokenizer.all_special_tokens)) - {""}

    @cached_property
    def ends(self) -> dict[tuple[str, str], str]:
        """The ends of turns that turn.py has found: {(tail of the conversation, template arguments): end of turn}."""
        return {}

    @cached_property
    def generation_prompt(self) -> str:
        """What opens the assistant's turn after a user's, or "" if the template has no generation prompt."""
        asked = self.fit([{"role": "user", "content": "x"}], Extras())
        try:
            opened = self.write(asked, Extras(), generate=True)
            return opened.removeprefix(self.write(asked, Extras()))
        except EndoRewardError:
            return ""  # the template requires more messages than this one

    @cached_property
    def takes_text(self) -> bool:
        """Whether the template writes content that is a string (a vision model's may expect a list of parts)."""
        mark = MARKS[0].format(0)
        try:
            return mark in self.write([{"role": "user", "content": mark}], Extras())
        except EndoRewardError:
            return True  # the template requires other messages than these, so nothing is known

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template writes a system turn before the user's."""
        mark, user = MARKS[0].format(0), {"role": "user", "content": "x"}
        for messages in ([{"role": "system", "content": mark}, user], [user]):
            try:
                return mark in self.write(self.fit(messages, Extras()), Extras(), generate=True)
            except EndoRewardError:
                continue
        return True  # the template requires other messages than these, so nothing is known

    def fit(self, messages: Sequence[Message], extras: Extras) -> list[dict[str, Any]]:
        """Return `messages` in the form in which the template writes the most of their texts.

        They stay unchanged if the template writes all texts.

        Raises EndoRewardError if the template refuses every form (`spellings` lists them).
        """
        if all(map(is_plain, messages)) and self.takes_text:
            return [dict(message) for message in messages]
        best: tuple[int, list[dict[str, Any]]] | None = None
        refused: EndoRewardError | None = None
        for spelling in spellings(messages):
            marked = Marked(spelling)
            try:
                text = self.write(spelling, extras)
                missing = marked.missing(self.write(marked.messages, extras))
            except EndoRewardError as error:
                refused = refused or error
                continue
            if misspelt(spelling, text, self.source(tools=bool(extras.tools))):
                missing = [*missing, *range(len(messages))]
            if best is None or len(missing) < best[0]:
                best = len(missing), spelling
            if not missing:
                break
        if best is None:
            raise refused or EndoRewardError("the conversation is empty")
        return best[1]


_CODES = "%d %m %Y %B %b %A %a %y %j %H %I %M %S %p %e %F".split()


class Marked:
    """Messages with a mark before and after each of their texts, so that the texts can be found in a rendering."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.marks: list[tuple[str, str]] = []
        self._texts: list[str] = []
        self.messages = [with_texts(message, self._mark) for message in messages]

    def _mark(self, text: str) -> str:
        # A mark differs from the text in its first and last letter. So a rendering with marks and one without differ
        # exactly from where the text begins, and back to where it ends.
        bare, number = text.strip(), len(self.marks)
        front = MARKS[bare[0] in "Qq"].format(number)
        back = MARKS[bare[-1] in "Qq"].format(number)
        self.marks.append((front, back))
        self._texts.append(bare)
        return front + bare + back

    def missing(self, text: str) -> list[int]:
        """Return the numbers of the texts without any mark in `text`."""
        return [i for i, marks in enumerate(self.marks) if not any(mark in text for mark in marks)]

    def lost(self, text: str, unmarked: str) -> list[int]:
        """Return the numbers of the texts that the template does not write whole.

        `text` is the rendering with marks, `unmarked` the one without. A text is whole if `text` has both its marks.
        One mark is enough if `unmarked` has the text: the template may split a text (take the reasoning out of an
        answer) and lose a mark by that.
        """
        found = [sum(text.count(mark) for mark in set(marks)) for marks in self.marks]
        written, bare = "".join(unmarked.split()), ["".join(t.split()) for t in self._texts]
        return [i for i, n in enumerate(found) if n == 0 or (n == 1 and bare[i] not in written)]
