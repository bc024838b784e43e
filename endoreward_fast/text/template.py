"""A tokenizer's chat template: conversations written by it, with all that a row gives it, on a day that is pinned.

A template is a program of the model's author. It may take content as text or as parts, and arguments of tool calls as
an object or as JSON: `Template.fit` finds the spelling that it writes completely. It may write today's date: here that
is always the day it is told.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date as Date
from functools import cached_property
from typing import Any

from ..errors import EndoRewardError
from .messages import Message, check_text, check_values, is_plain
from .spellings import misspelt, spellings, with_texts

CLOCK = "strftime_now"
"""the function by which templates ask for the date: transformers gives it to them"""
RESERVED = (
    "self", "tools", "documents", "messages", "conversation", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", CLOCK,
)  # fmt: skip
"""names that are no template arguments of a row's own: apply_chat_template has them for itself"""
MARKS = ("Qz{}MARKzQ", "Jq{}MARKqJ")


@dataclass(frozen=True)
class Extras:
    """What a row gives its template beside messages: part of the prompt."""

    tools: tuple[Any, ...] | None = None
    """JSON schemas, or functions, as transformers takes them"""
    documents: tuple[Mapping[str, str], ...] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """further variables of the template, such as enable_thinking"""

    @classmethod
    def of(cls, row: Mapping[str, Any], default: "Extras") -> "Extras":
        """Those of a row, which come before the `default` ones. Each may be JSON text, as tables hold it.

        Raises EndoRewardError, naming the column.
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
        raise ValueError(f"the key {twice!r} stands twice in one object: keep one")
    return found


def as_date(text: str) -> Date:
    """The day of "YYYY-MM-DD". EndoRewardError: it is none."""
    try:
        return Date.fromisoformat(text) if re.fullmatch(r"\d{4}-\d\d-\d\d", text) else Date(0, 0, 0)
    except ValueError:
        raise EndoRewardError(f"date: wanted a day as YYYY-MM-DD, found {text!r}") from None


@dataclass(frozen=True)
class Template:
    """The chat template of a tokenizer. `day` is what it is told when it asks for the date."""

    tokenizer: Any
    day: Date = field(default_factory=Date.today)

    @property
    def name(self) -> str:
        """How error messages call the tokenizer."""
        name = getattr(self.tokenizer, "name_or_path", "")
        return f"the tokenizer of {name!r}" if name else f"the tokenizer ({type(self.tokenizer).__name__})"

    @cached_property
    def _sources(self) -> dict[bool, str]:
        return {}

    def source(self, *, tools: bool = False) -> str:
        """The template's text: of the one for tools, where there are two. EndoRewardError: there is none."""
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
        """Whether what the template writes may depend on the day."""
        return CLOCK in self.source(tools=bool(extras.tools)) and "date_string" not in extras.kwargs

    def write(self, messages: Sequence[Message], extras: Extras, *, generate: bool = False) -> str:
        """What the template writes; with `generate` the generation prompt too. EndoRewardError: it refuses."""
        source = self.source(tools=bool(extras.tools))
        dated = {"chat_template": self._clock + source} if CLOCK in source else {}
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tools=None if extras.tools is None else list(extras.tools),
                documents=None if extras.documents is None else list(extras.documents),
                add_generation_prompt=generate, tokenize=False, **dated, **extras.kwargs,
            )  # fmt: skip
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise EndoRewardError(f"the chat template refuses the conversation: {reason}") from error
        check_text(text, "what the chat template writes")
        return text

    @cached_property
    def _clock(self) -> str:
        """The template's own strftime_now: transformers gives the real one, and takes no function in its place."""
        spelt = "".join(f"|replace({code!r}, {self.day.strftime(code)!r})" for code in _CODES)
        return f"{{% macro {CLOCK}(format) %}}{{{{ format{spelt} }}}}{{% endmacro %}}\n"

    @cached_property
    def special(self) -> set[str]:
        """The tokenizer's special tokens."""
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return (added | set(self.tokenizer.all_special_tokens)) - {""}

    @cached_property
    def ends(self) -> dict[tuple[str, str], str]:
        """What ends a turn of text, by all that stands behind it and the template's variables; chat.py fills it in."""
        return {}

    @cached_property
    def generation_prompt(self) -> str:
        """What opens the assistant's turn behind a user's; "" where the template has nothing for it."""
        asked = self.fit([{"role": "user", "content": "x"}], Extras())
        try:
            opened = self.write(asked, Extras(), generate=True)
            return opened.removeprefix(self.write(asked, Extras()))
        except EndoRewardError:
            return ""  # it wants more of a conversation than this

    @cached_property
    def takes_text(self) -> bool:
        """Whether it writes content that is a text (those of vision models may want a list of parts)."""
        mark = MARKS[0].format(0)
        try:
            return mark in self.write([{"role": "user", "content": mark}], Extras())
        except EndoRewardError:
            return True  # it wants more of a conversation than this

    @cached_property
    def takes_system(self) -> bool:
        """Whether it writes a system turn before the user's."""
        mark, user = MARKS[0].format(0), {"role": "user", "content": "x"}
        for messages in ([{"role": "system", "content": mark}, user], [user]):
            try:
                return mark in self.write(self.fit(messages, Extras()), Extras(), generate=True)
            except EndoRewardError:
                continue
        return True  # it wants more of a conversation than this

    def fit(self, messages: Sequence[Message], extras: Extras) -> list[dict[str, Any]]:
        """`messages` in the spelling of which the template writes most, as they are if it writes all.

        Raises EndoRewardError: it refuses each.
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
    """Messages with a mark before and behind each of their texts, to find again in what a template writes."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.marks: list[tuple[str, str]] = []
        self._texts: list[str] = []
        self.messages = [with_texts(message, self._mark) for message in messages]

    def _mark(self, text: str) -> str:
        # A mark begins and ends in other letters than the text, so that where the two part is where the text begins.
        bare, number = text.strip(), len(self.marks)
        front = MARKS[bare[0] in "Qq"].format(number)
        back = MARKS[bare[-1] in "Qq"].format(number)
        self.marks.append((front, back))
        self._texts.append(bare)
        return front + bare + back

    def missing(self, text: str) -> list[int]:
        """Numbers of the texts of which neither mark is in `text`."""
        return [i for i, marks in enumerate(self.marks) if not any(mark in text for mark in marks)]

    def lost(self, text: str, unmarked: str) -> list[int]:
        """Numbers of the texts that are not whole: of which `text` has not both marks, nor one of them and `unmarked`,
        which the template writes without marks, the text itself. It may take a text apart and lose a mark on the way
        (a thought out of an answer)."""
        found = [sum(text.count(mark) for mark in set(marks)) for marks in self.marks]
        written, bare = "".join(unmarked.split()), ["".join(t.split()) for t in self._texts]
        return [i for i, n in enumerate(found) if n == 0 or (n == 1 and bare[i] not in written)]
