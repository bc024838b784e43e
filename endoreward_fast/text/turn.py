"""The last turn of a conversation: where it begins and ends in what the template writes."""

import re
from collections.abc import Collection

from ..errors import EndoRewardError
from .messages import Message, is_blank, is_text, text_of
from .spellings import with_text
from .template import Extras, Marked, Template

NEXT = "QzNEXTzQ"
"""what a next turn says where it is asked what comes before it"""


class Turn:
    """The last turn of a conversation: `prompt`, `completion`, `end` and `flags` of what is scored."""

    def __init__(self, template: Template, messages: list[Message], extras: Extras, ends: Collection[str]) -> None:
        self.template, self.extras, self._ends = template, extras, ends
        self.messages = template.fit(messages, extras)
        *self.before, self._answer = self.messages
        self.flags: tuple[str, ...] = ()
        self.opening = self.prompt = self._write(generate=True)
        self.whole = self._write(self._answer)
        if self._is_empty():
            spoken_in = _saying(self._answer, "x")
            marked = Marked([spoken_in])
            _, self.end = self._ending(spoken_in, marked, self._write(spoken_in), self._write(*marked.messages))
            self.completion = ""
            return
        shown, written = self._shown()
        marked = Marked([shown])
        other = self._write(*marked.messages)
        behind, self.end = self._ending(shown, marked, written, other)
        body = self.whole[: len(self.whole) - len(behind)]
        self._cut(body, _shared([self.whole, other]))
        self.completion = self._without_own_end(self.completion)
        if is_text(self._answer):
            self._put_back(text_of(self._answer["content"]))
        elif marked.missing(other):
            self.flags += ("template_drops",)
        self._compare_white_space()

    def _write(self, *turns: Message, generate: bool = False) -> str:
        return self.template.write([*self.before, *turns], self.extras, generate=generate)

    def _shown(self) -> tuple[Message, str]:
        """(the turn with a text where it has none, what the template writes for it).

        White space cannot be marked, and a turn that only thinks has more behind its thought than the end of a turn.
        """
        if said_by(self._answer).strip() or self._answer.get("tool_calls"):
            return self._answer, self.whole
        shown = with_text(self._answer, "x")
        written = self._write(shown)
        front, back = written.rpartition("x")[::2]
        alike = self.whole.startswith(front.rstrip()) and self.whole.endswith(back)
        return (shown, written) if alike or is_blank(self._answer) else (self._answer, self.whole)

    def _is_empty(self) -> bool:
        """Whether the turn says nothing, to the template: that may trim white space."""
        return is_blank(self._answer) and self.whole == self._write(_saying(self._answer, ""))

    def _ending(self, answer: Message, marked: Marked, whole: str, other: str) -> tuple[str, str]:
        """(all that the template writes behind the last text of the turn, what of that ends the turn).

        `whole` and `other` are the conversation as it is and with that text marked.
        """
        last = behind_marks(whole, other)
        if last is None:
            raise EndoRewardError(f"the chat template of {self.template.name} does not write the assistant's turn")
        if not answer.get("tool_calls"):
            # What stands behind a text is all that its end depends on: it is asked for once.
            known = self.template.ends
            if (last, str(self.extras.kwargs)) not in known:
                before_a_next = self._before_a_next_turn(answer, marked.messages[0])
                known[last, str(self.extras.kwargs)] = self._end_of(last, before_a_next, calls=False)
            return last, known[last, str(self.extras.kwargs)]
        before_a_next = self._before_a_next_turn(answer, marked.messages[0])
        closed = ""
        if not self._ends_turns_of_text():
            closed = last  # the rest of the call, and nothing that ends the turn
            before_a_next = (before_a_next or "").removeprefix(last)
        end = self._end_of(last[len(closed) :], before_a_next, calls=True)
        return "" if closed else last, end

    def _ends_turns_of_text(self) -> bool:
        answer = _saying(self._answer, "x")
        behind = behind_marks(self._write(answer), self._write(*Marked([answer]).messages))
        return bool((behind or "").strip())

    def _before_a_next_turn(self, answer: Message, marked: Message) -> str | None:
        """What the template writes between this turn and a next one, and then that; None if it takes none."""
        user, tool = (_saying({**answer, "role": role}, NEXT) for role in ("user", "tool"))
        for following in [tool, user] if answer.get("tool_calls") else [user]:
            try:
                whole = self._write(answer, following)
                if NEXT in whole:
                    return behind_marks(whole, self._write(marked, following))
            except EndoRewardError:
                continue  # a template may not want such a turn here
        return None

    def _end_of(self, last: str, before_a_next: str | None, *, calls: bool) -> str:
        whole = last.rstrip()
        by_its_look = whole if calls else up_to_first(self.template.special, whole)
        if before_a_next is None:
            return by_its_look
        shared = _shared([last, before_a_next])
        if whole and len(shared) >= len(whole):
            return whole
        if whole:
            return _whole_marks(shared).rstrip() or by_its_look
        special = self.template.special
        opens = up_to_first(special, self.template.generation_prompt.lstrip())
        closed = before_a_next.partition(opens)[0] if opens in special and opens in before_a_next else ""
        if closed.strip():
            return closed.rstrip()
        return next((token for token in self._ends if token and before_a_next.lstrip().startswith(token)), "")

    def _cut(self, body: str, before_text: str) -> None:
        """`body`, the conversation up to the end of its last text, into prompt and completion."""
        if body.startswith(self.opening):
            header = before_text[len(self.opening) :]
            usual = self.template.generation_prompt
            if header.strip() and self.opening == self._write() and header.startswith(usual):
                self.flags += ("no_generation_prompt",)
                self.prompt = self.opening + usual if usual else before_text.rstrip()
            self.completion = body[len(self.prompt) :]
            return
        shared = _shared([self.opening, body])
        added = self.opening[len(_shared([self.opening, self._write()])) :]
        turn = before_text.rfind(added) if added.strip() else -1
        if len(shared) < turn:  # an earlier turn is written otherwise, now that it is not the last
            self.completion = body[turn + len(added) :]
            return
        at = min(len(before_text), len(shared))
        if self.opening[at:].isspace():
            self.completion = body[at:].lstrip()
            return
        if len(shared) < len(before_text):
            at = len(_whole_marks(shared))
        usual = self.template.generation_prompt
        if before_text.startswith(usual, at):
            at += len(usual)
        self.flags += ("opening_differs",)
        self.prompt, self.completion = body[:at], body[at:]

    def _without_own_end(self, completion: str) -> str:
        """The completion without the end of turn that its text already has: the template writes it once more."""
        found = without_end(completion, self.end)
        if found != completion and "end_in_text" not in self.flags:
            self.flags += ("end_in_text",)
        return found

    def _put_back(self, text: str) -> None:
        """Where the template leaves out something of a turn of text, what was written is scored."""
        text = self._without_own_end(text)
        if squeezed(text) in squeezed(_open_thought(self.prompt) + self.completion):
            return
        open_thought = self.opening[len(self.prompt) :] or _open_thought(self.opening)
        self.prompt, self.completion = self.opening, _behind_opening(text, open_thought)
        self.flags = (*(flag for flag in self.flags if flag != "opening_differs"), "template_rewrites")

    def _compare_white_space(self) -> None:
        """A flag where the white space of the turn's text is not as it is scored."""
        text, scored = self._without_own_end(said_by(self._answer)), _open_thought(self.prompt) + self.completion
        if text not in scored and squeezed(text) in squeezed(scored):
            self.flags += ("white_space",)


def without_end(text: str, end: str) -> str:
    """A text without the marks at its end that end a turn."""
    mark = end.strip()
    while mark and text.rstrip().endswith(mark):
        text = text.rstrip().removesuffix(mark)
    return text


def _whole_marks(shared: str) -> str:
    """What two texts share without the part of a mark in whose middle they part."""
    return re.sub(r"[<\[{][^\s<>\[\]{}]*$", "", shared)


def _saying(message: Message, text: str) -> Message:
    """A message of the same role that says that alone, in the spelling that this one's content has."""
    parts = isinstance(message.get("content"), list)
    return {"role": message["role"], "content": [{"type": "text", "text": text}] if parts else text}


def said_by(message: Message) -> str:
    """The text of a message's content, without thoughts among its parts."""
    content = message.get("content")
    return text_of([p for p in content if p["type"] == "text"] if isinstance(content, list) else content)


def behind_marks(text: str, marked: str) -> str | None:
    """What is written behind the text that is marked; None if no mark is written."""
    return None if text == marked else _shared([text[::-1], marked[::-1]])[::-1]


def _open_thought(opening: str) -> str:
    """The thinking block that a generation prompt opens, and may close at once, or ""."""
    found = re.search(r"<think>\s*(</think>\s*)?$", opening)
    return found.group() if found else ""


def _behind_opening(text: str, lost: str) -> str:
    """A text without what the generation prompt already holds of it (`lost`: "<think>" and a newline)."""
    marks = lost.split()
    mark = re.match(r"\s*" + r"\s*".join(map(re.escape, marks)), text) if marks else None
    return text[mark.end() :].removeprefix(lost[len(lost.rstrip()) :]) if mark else text


def up_to_first(special: Collection[str], text: str) -> str:
    """`text` up to and with its first special token; all of it if it has none."""
    places = [(text.index(token), -len(token), token) for token in special if token in text]
    if not places:
        return text
    at, _, token = min(places)
    return text[: at + len(token)]


def squeezed(text: str) -> str:
    return "".join(text.split())


def _shared(texts: list[str]) -> str:
    """What the texts begin with, all of them (between the first and the last in order stand no others)."""
    short, long = min(texts), max(texts)
    return short[: next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))]
