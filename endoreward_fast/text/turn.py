r"""The last turn of a conversation: where it begins and ends in the text that the chat template writes.

A template is a program, so nothing says which characters of its output belong to the turn. `Turn` renders the
conversation several times and compares the results. An example: the user says "Hi", the assistant "Hello.", and the
template is ChatML. From the assistant's header on, the renderings are:

    opening    <|im_start|>assistant\n                                           earlier turns, generation prompt
    whole      <|im_start|>assistant\nHello.<|im_end|>\n                         all turns
    marked     <|im_start|>assistant\nQz0MARKzQHello.Qz0MARKzQ<|im_end|>\n       all turns, the last one with marks
    followed   <|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n...    all turns, and another one

The beginning: `whole` starts with `opening`. So `opening` is the prompt, and the turn begins after it. If `whole` does
not start with `opening`, the turn begins where the two differ (`_split` lists the cases).

The end: `whole` and `marked` finish alike, in "<|im_end|>\n". This is the tail: all that the template writes after the
text. In `followed` the tail is "<|im_end|>\n<|im_start|>user\n...". What both tails begin with ends the turn:
"<|im_end|>". The newline is left out, because no model generates it (`_end_from_tails` lists the other cases).

    prompt  ...<|im_start|>assistant\n        completion  Hello.        end  <|im_end|>
"""

import re
from collections.abc import Collection

from ..errors import EndoRewardError
from .messages import Message, is_blank, is_text, text_of
from .spellings import with_text
from .template import Extras, Marked, Template

NEXT = "QzNEXTzQ"
"""the text of the turn that is put after the last one, to see what the template writes between the two"""


class Turn:
    """The last turn of a conversation, split into `prompt`, `completion` and `end`, with `flags`.

    opening   the turns before it as the template writes them, with the generation prompt
    whole     the whole conversation as the template writes it
    """

    def __init__(self, template: Template, messages: list[Message], extras: Extras, ends: Collection[str]) -> None:
        self.template, self.extras, self._ends = template, extras, ends
        self.messages = template.fit(messages, extras)
        *self.before, self._answer = self.messages
        self.flags: tuple[str, ...] = ()
        self.opening = self.prompt = self._write(generate=True)
        self.whole = self._write(self._answer)
        if self._is_empty():
            # It has no text to mark. Its end is that of a turn with a text.
            filled = _text_turn(self._answer, "x")
            marked = Marked([filled])
            _, self.end = self._find_end(filled, marked, self._write(filled), self._write(*marked.messages))
            self.completion = ""
            return
        shown, written = self._with_markable_text()
        marked = Marked([shown])
        marked_whole = self._write(*marked.messages)
        tail, self.end = self._find_end(shown, marked, written, marked_whole)
        body = self.whole[: len(self.whole) - len(tail)]
        self._split(body, before_text=common_prefix([self.whole, marked_whole]))
        self.completion = self._without_own_end(self.completion)
        if is_text(self._answer):
            self._keep_as_given(text_of(self._answer["content"]))
        elif marked.missing(marked_whole):
            self.flags += ("template_drops",)
        self._compare_white_space()

    def _write(self, *turns: Message, generate: bool = False) -> str:
        return self.template.write([*self.before, *turns], self.extras, generate=generate)

    def _with_markable_text(self) -> tuple[Message, str]:
        """Return (the turn, what the template writes for it). A turn without a text to mark gets the text "x".

        White space cannot be marked. A turn of reasoning alone has no text between its reasoning and its end.
        """
        if said_by(self._answer).strip() or self._answer.get("tool_calls"):
            return self._answer, self.whole
        shown = with_text(self._answer, "x")
        written = self._write(shown)
        front, back = written.rpartition("x")[::2]
        alike = self.whole.startswith(front.rstrip()) and self.whole.endswith(back)
        return (shown, written) if alike or is_blank(self._answer) else (self._answer, self.whole)

    def _is_empty(self) -> bool:
        """Return whether the template writes the turn as it writes an empty one (it may trim white space)."""
        return is_blank(self._answer) and self.whole == self._write(_text_turn(self._answer, ""))

    def _find_end(self, answer: Message, marked: Marked, whole: str, marked_whole: str) -> tuple[str, str]:
        """Return (the tail of the conversation, the part of the tail that ends the turn).

        `whole` and `marked_whole` are the conversation with `answer` as its last turn, without and with marks.
        If the template leaves a last turn of text open, it writes the tail of a tool call as a part of the call. Then
        the tail that is returned is "".
        """
        tail = after_marks(whole, marked_whole)
        if tail is None:
            raise EndoRewardError(
                f"the chat template of {self.template.name} does not write the assistant's turn: give token ids"
            )
        if not answer.get("tool_calls"):
            # The end of a turn of text depends on the tail alone, so the template is asked once for each tail.
            known = self.template.ends
            if (tail, str(self.extras.kwargs)) not in known:
                followed = self._tail_before_next(answer, marked.messages[0])
                known[tail, str(self.extras.kwargs)] = self._end_from_tails(tail, followed, calls=False)
            return tail, known[tail, str(self.extras.kwargs)]
        followed = self._tail_before_next(answer, marked.messages[0])
        if self._ends_turns_of_text():
            return tail, self._end_from_tails(tail, followed, calls=True)
        return "", self._end_from_tails("", (followed or "").removeprefix(tail), calls=True)

    def _ends_turns_of_text(self) -> bool:
        """Return whether the template writes more than white space after a last turn of text."""
        answer = _text_turn(self._answer, "x")
        tail = after_marks(self._write(answer), self._write(*Marked([answer]).messages))
        return bool((tail or "").strip())

    def _tail_before_next(self, answer: Message, marked: Message) -> str | None:
        """Return the tail of `answer` if another turn follows, up to that turn's end; None if none may follow."""
        user, tool = (_text_turn({**answer, "role": role}, NEXT) for role in ("user", "tool"))
        for following in [tool, user] if answer.get("tool_calls") else [user]:
            try:
                whole = self._write(answer, following)
                if NEXT in whole:
                    return after_marks(whole, self._write(marked, following))
            except EndoRewardError:
                continue  # the template may refuse a turn of this role here
        return None

    def _end_from_tails(self, tail: str, followed: str | None, *, calls: bool) -> str:
        """Return the end of a turn, from its `tail` as the last turn and from the one when another turn follows.

        tail has marks, followed begins with all of them    all of the tail
        tail has marks, the two differ earlier              the marks that both begin with
        tail is blank (the turn is left open)               what `followed` has before the token that opens a turn,
                                                            or a token of `ends` that it begins with (GLM: <|user|>)
        no turn may follow, or no mark is common            the tail up to its first special token; all of it for calls
        """
        stripped = tail.rstrip()
        by_its_look = stripped if calls else up_to_first(self.template.special, stripped)
        if followed is None:
            return by_its_look
        common = common_prefix([tail, followed])
        if stripped and len(common) >= len(stripped):
            return stripped
        if stripped:
            return without_partial_mark(common).rstrip() or by_its_look
        special = self.template.special
        opens = up_to_first(special, self.template.generation_prompt.lstrip())
        closed = followed.partition(opens)[0] if opens in special and opens in followed else ""
        if closed.strip():
            return closed.rstrip()
        return next((token for token in self._ends if token and followed.lstrip().startswith(token)), "")

    def _split(self, body: str, before_text: str) -> None:
        """Split `body` into prompt and completion.

        `body` is the conversation without its tail. `before_text` is its part before the first text of the last turn.

        body starts with the opening                 the prompt is the opening. If the template has no generation
                                                     prompt, the header that it writes before the text is added
        an earlier turn changed, because it is no    the prompt is the opening. The completion begins after the last
        longer the last one                          generation prompt in body
        only white space of the opening is missing   the prompt is the opening
        else: opening_differs                        the prompt is what the two have in common, with the generation
                                                     prompt if that follows
        """
        if body.startswith(self.opening):
            header = before_text[len(self.opening) :]
            usual = self.template.generation_prompt
            if header.strip() and self.opening == self._write() and header.startswith(usual):
                self.flags += ("no_generation_prompt",)
                self.prompt = self.opening + usual if usual else before_text.rstrip()
            self.completion = body[len(self.prompt) :]
            return
        common = common_prefix([self.opening, body])
        generation_prompt = self.opening[len(common_prefix([self.opening, self._write()])) :]
        begins = before_text.rfind(generation_prompt) if generation_prompt.strip() else -1
        if len(common) < begins:
            self.completion = body[begins + len(generation_prompt) :]
            return
        at = min(len(before_text), len(common))
        if self.opening[at:].isspace():
            self.completion = body[at:].lstrip()
            return
        if len(common) < len(before_text):
            at = len(without_partial_mark(common))
        usual = self.template.generation_prompt
        if before_text.startswith(usual, at):
            at += len(usual)
        self.flags += ("opening_differs",)
        self.prompt, self.completion = body[:at], body[at:]

    def _without_own_end(self, completion: str) -> str:
        """Return the completion without an end of turn that its text brings: the template writes one as well."""
        found = without_end(completion, self.end)
        if found != completion and "end_in_text" not in self.flags:
            self.flags += ("end_in_text",)
        return found

    def _keep_as_given(self, text: str) -> None:
        """Score `text` itself if the template leaves out a part of it, because the policy generated all of it."""
        text = self._without_own_end(text)
        if squeezed(text) in squeezed(open_thought(self.prompt) + self.completion):
            return
        opened = self.opening[len(self.prompt) :] or open_thought(self.opening)
        self.prompt, self.completion = self.opening, _without_opened(text, opened)
        self.flags = (*(flag for flag in self.flags if flag != "opening_differs"), "template_rewrites")

    def _compare_white_space(self) -> None:
        """Add a flag if the scored text differs from the turn's text in white space."""
        text, scored = self._without_own_end(said_by(self._answer)), open_thought(self.prompt) + self.completion
        if text not in scored and squeezed(text) in squeezed(scored):
            self.flags += ("white_space",)


def without_end(text: str, end: str) -> str:
    """Return `text` without the end of turn that it finishes with, however often it repeats it."""
    mark = end.strip()
    while mark and text.rstrip().endswith(mark):
        text = text.rstrip().removesuffix(mark)
    return text


def after_marks(text: str, marked: str) -> str | None:
    """Return the tail: what `text` has after the last text that is marked in `marked`. None if no mark is written."""
    return None if text == marked else common_prefix([text[::-1], marked[::-1]])[::-1]


def said_by(message: Message) -> str:
    """Return the text of a message's content, without parts that are reasoning."""
    content = message.get("content")
    return text_of([p for p in content if p["type"] == "text"] if isinstance(content, list) else content)


def up_to_first(special: Collection[str], text: str) -> str:
    """Return `text` up to and with its first special token, or all of it if it has none."""
    places = [(text.index(token), -len(token), token) for token in special if token in text]
    if not places:
        return text
    at, _, token = min(places)
    return text[: at + len(token)]


def squeezed(text: str) -> str:
    """Return `text` without white space."""
    return "".join(text.split())


def _text_turn(message: Message, text: str) -> Message:
    """Return a message of the same role that holds `text` alone, as a string or a part like `message`'s content."""
    parts = isinstance(message.get("content"), list)
    return {"role": message["role"], "content": [{"type": "text", "text": text}] if parts else text}


def common_prefix(texts: list[str]) -> str:
    first, last = min(texts), max(texts)  # in alphabetical order, so all others have their common prefix too
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def without_partial_mark(common: str) -> str:
    """Return a common prefix without the mark that it breaks off in: "a <|im_" becomes "a "."""
    return re.sub(r"[<\[{][^\s<>\[\]{}]*$", "", common)


def open_thought(opening: str) -> str:
    """Return the thinking block at the end of a generation prompt, open or already closed; "" if it has none."""
    found = re.search(r"<think>\s*(</think>\s*)?$", opening)
    return found.group() if found else ""


def _without_opened(text: str, opened: str) -> str:
    r"""Return `text` without the beginning that the generation prompt already has ("<think>\n")."""
    marks = opened.split()
    mark = re.match(r"\s*" + r"\s*".join(map(re.escape, marks)), text) if marks else None
    return text[mark.end() :].removeprefix(opened[len(opened.rstrip()) :]) if mark else text
