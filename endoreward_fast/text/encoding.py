"""Encode a row of text, messages or token ids: the tokens that the model reads, and which of them are scored.

| row                                                        | scored                                          |
| {"prompt": str, "completion": str}                         | the completion                                  |
| {"prompt": str or messages, "completion": str or messages} | the last assistant turn (earlier ones: context) |
| the same, the prompt ends in an assistant's text           | what the completion adds to that turn           |
| {"messages": [...]}                                        | the last assistant turn                         |
| {"prompt_ids": [...], "completion_ids": [...]}             | completion_ids, unchanged                       |
| the same with "completion_mask": [0 or 1, ...]             | completion_ids with a 1 in the mask             |

A row may also have `tools`, `documents` and `chat_template_kwargs`. They belong to its prompt. A turn is every field of
its message: content (text or parts of text), reasoning, tool calls.

Chat or plain. If the tokenizer has a chat template, text goes through it, because a chat model was trained on that. A
prompt becomes the user's turn, a completion the assistant's. chat=False, or "chat": False in the row, scores
prompt + completion as plain text. Without a template, text is plain and messages are refused.

Special tokens. Plain text gets the special tokens that the tokenizer adds in front (BOS, [CLS]). A completion ends with
the tokenizer's end-of-sequence token, and a chat turn with the template's end of turn, unless append_eos=False. Special
tokens that a text already has are not added again.

An empty completion is its end token alone, because a model that says nothing ends its turn at once. If no token ends
it, nothing is scored.

completion_mask marks the tokens that the policy chose. The model reads the others (a tool's answer, say), but they have
no reward. The episode does not end before them: a marked token followed by an unmarked one has the V(s') of the state
right after it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from ..errors import EndoRewardError
from .boundary import split_ids, tokenize
from .chat import render
from .row_flags import in_words
from .rows import Row, begun_turn, dialogue, ids_of, mask_of, prompt_and_completion, refuse_no_row, switch_of
from .template import Extras, Template, as_date

Truncate = Literal["prompt", "completion"] | None


@dataclass(frozen=True)
class Encoded:
    """One row, ready for the model."""

    input_ids: list[int]
    """the prompt's tokens, then the completion's"""
    prompt_length: int
    """number of tokens before the first scored one; all if nothing is scored"""
    terminal: bool
    """whether the episode ends with the last token, so that V(s') = 0 there"""
    truncated: int = 0
    """number of tokens cut to fit max_length"""
    flags: tuple[str, ...] = ()
    """keys of `row_flags.FLAGS`, which explains them"""
    completion_mask: tuple[bool, ...] | None = None
    """for each token from prompt_length on, whether it is scored; None: all are"""
    answer: tuple[int, int] | None = None
    """positions in input_ids at which the final answer starts and stops, if a signal needs them"""
    others: Mapping[str, "Encoded"] = field(default_factory=dict)
    """further readings of the row that signals need (readings.py), each under the name of the need"""
    unmet: Mapping[str, str] = field(default_factory=dict)
    """{need of signals: why this row does not meet it}"""

    @property
    def num_scored(self) -> int:
        """The number of scored tokens."""
        mask = self.completion_mask
        return len(self.input_ids) - self.prompt_length if mask is None else sum(mask)

    @property
    def note(self) -> str | None:
        """The flags in words, or None."""
        return in_words(self.flags)


@dataclass(frozen=True)
class Encoder:
    """Encodes rows. `encode_row` documents the fields. Without a tokenizer, only rows of token ids can be encoded."""

    tokenizer: Any = None
    system: str | None = None
    chat: bool | None = None
    max_length: int | None = None
    truncate: Truncate = None
    append_eos: bool = True
    eos_ids: Collection[int] = ()
    extras: Extras = field(default_factory=Extras)
    date: str | None = None

    @cached_property
    def template(self) -> Template:
        """The tokenizer's chat template, which writes the same date for every row."""
        return Template(self.tokenizer) if self.date is None else Template(self.tokenizer, as_date(self.date))

    @cached_property
    def unlimited(self) -> "Encoder":
        """The same encoder without a limit of length."""
        return replace(self, max_length=None)

    @cached_property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The special tokens that the tokenizer adds (before a text, after it), such as BOS or [CLS]."""
        return _around_ids(self.tokenizer)

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """The tokens at which the model stops; the tokenizer's end of sequence is the last of them."""
        known = (i for i in self.eos_ids if 0 <= i < len(self.tokenizer))
        named = (*self.tokenizer.convert_ids_to_tokens(list(known)), getattr(self.tokenizer, "eos_token", None))
        return tuple(token for token in dict.fromkeys(named) if token)

    def encode(self, row: Row) -> Encoded:
        """Encode one row. Raises EndoRewardError, in one line, if it cannot be scored."""
        refuse_no_row(row)
        flags: tuple[str, ...] = ()
        terminal = True
        if "prompt_ids" in row and "completion_ids" in row:
            if self.system:
                raise EndoRewardError(
                    "a system prompt cannot be added to a row of token ids: put its ids into prompt_ids"
                )
            prompt, completion = (ids_of(row, name) for name in ("prompt_ids", "completion_ids"))
            terminal = switch_of(row, "terminal")
            flags = () if completion else ("empty",)
        else:
            prompt, completion, flags = self._text_ids(row)
        if not completion:
            return Encoded(prompt, len(prompt), terminal, flags=flags)
        length = len(prompt)
        if not prompt:
            bos = getattr(self.tokenizer, "bos_token_id", None)
            if bos is not None and completion[0] != bos:
                prompt, length = [bos], 1
            else:
                length, flags = 1, (*flags, "first_token_unscored")
        encoded = self._fit([*prompt, *completion], length, terminal, flags)
        if row.get("completion_mask") is None or "completion_ids" not in row:
            return encoded
        mask = mask_of(row, completion)[length - len(prompt) :]
        mask = mask[: len(encoded.input_ids) - encoded.prompt_length]
        if not any(mask):
            raise EndoRewardError("completion_mask: no token of the completion is marked, so there is none to score")
        return replace(encoded, completion_mask=mask)

    def _text_ids(self, row: Row) -> tuple[list[int], list[int], tuple[str, ...]]:
        """Return (prompt ids, completion ids, flags) of a row of text."""
        prompt, completion = prompt_and_completion(row)
        if self.tokenizer is None:
            raise EndoRewardError(
                "text needs a tokenizer, and the model has none: give the model a tokenizer, or the row token ids"
            )
        chat = row.get("chat", self.chat)
        plain = isinstance(prompt, str) and isinstance(completion, str)
        if chat is False and not plain:
            raise EndoRewardError(
                "chat=False scores plain text, but the row holds messages: give text, or leave out chat=False"
            )
        if plain and not wants_chat(self.tokenizer, chat):
            before = f"{self.system}\n\n{prompt}" if self.system else prompt
            extras = Extras.of(row, self.extras)
            before, after, flags = self._plain(before, completion)
            return before, after, (*flags, *(() if extras == Extras() else ("template_ignores",)))
        begun = begun_turn(row, prompt, completion)
        flags: tuple[str, ...] = ("context_turns",) if not isinstance(completion, str) and len(completion) > 1 else ()
        extras = Extras.of(row, self.extras)
        dated = self.date is None and self.template.asks_for_the_date(extras)
        text = render(self.template, dialogue(prompt, completion, begun), extras, system=self.system, ends=self._ends)
        before_it, scored = _split_after(begun, text.completion)
        flags = (*flags, *text.flags, *(("dated",) if dated else ()), *(("continues_turn",) if begun else ()))
        flags = flags if scored or "empty" in flags else (*flags, "empty")
        end = text.end if self.append_eos or "end_in_text" in text.flags else ""
        if text.completion.endswith(self._ends):  # it already ends, in a stop token other than the template's
            end = ""
        before, after = split_ids(self.tokenizer, text.prompt + before_it, scored + end)
        if end or not self.append_eos:
            return before, after, flags
        ended = self._with_eos(after)
        return before, ended, (*flags, *(("end_made_up",) if ended != after else ()))

    def _plain(self, prompt: str, completion: str) -> tuple[list[int], list[int], tuple[str, ...]]:
        before, after = split_ids(self.tokenizer, prompt, completion)
        leading, _ = self.around
        leading = () if tuple(before[: len(leading)]) == leading else leading
        return [*leading, *before], self._with_eos(after), () if after else ("empty",)

    def _has_ended(self, ids: list[int]) -> bool:
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return bool(ids) and (ids[-1] == eos or ids[-1] in self.eos_ids)

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return ids if not self.append_eos or eos is None or self._has_ended(ids) else [*ids, eos]

    def _fit(self, ids: list[int], length: int, terminal: bool, flags: tuple[str, ...]) -> Encoded:
        """Return the tokens as `Encoded`, cut to max_length as `truncate` says."""
        if not terminal:
            flags = (*flags, "bootstrapped")
        limit = self.max_length
        if limit is None or len(ids) <= limit:
            return Encoded(ids, length, terminal, flags=flags)
        over = len(ids) - limit
        if self.truncate == "prompt":
            bos = getattr(self.tokenizer, "bos_token_id", None)
            first = int(ids[0] == bos and length > 1)
            if length - first - 1 >= over:
                ids = ids[:first] + ids[first + over :]
                return Encoded(ids, length - over, terminal, over, (*flags, "truncated"))
        elif self.truncate == "completion" and limit > length:
            flags = (*(flag for flag in flags if flag != "bootstrapped"), "truncated", "bootstrapped")
            return Encoded(ids[:limit], length, False, over, flags)
        raise EndoRewardError(_too_long(len(ids), len(ids) - length, limit, self.truncate))


def encode_row(
    tokenizer: Any, row: Row, *, system: str | None = None, chat: bool | None = None, max_length: int | None = None,
    truncate: Truncate = None, append_eos: bool = True, eos_ids: Collection[int] = (),
    extras: Extras | None = None, date: str | None = None,
) -> Encoded:  # fmt: skip
    """Encode one row. The table at the top of this module lists the kinds of rows.

    system      a system prompt; it comes before the row's own, if the row has one
    chat        None: use the chat template if the tokenizer has one; False: plain text; True: require the template
    max_length  the most tokens that prompt and completion may have together; None: no limit
    truncate    what to do with a longer row. None: refuse it. "prompt": drop the oldest tokens of the prompt, except
                BOS and at least one more. "completion": cut the completion's end; the episode goes on (terminal False)
    append_eos  end the completion with an end-of-sequence (or end-of-turn) token, if it has none
    eos_ids     tokens that end a sequence, besides the tokenizer's
    extras      tools, documents and template arguments for rows that have none
    date        "YYYY-MM-DD": the date that a template writes; None: today

    An empty completion is encoded as the token that ends it. If there is no such token, no token is scored; the same
    holds for an empty list of ids. An empty prompt becomes BOS. If there is no BOS, the first token of the completion
    is not scored.

    Raises EndoRewardError, in one line, for wrong keys or types, text without a tokenizer, messages without a chat
    template, messages that the template refuses, and a row above max_length.
    """
    encoder = Encoder(
        tokenizer, system=system, chat=chat, max_length=max_length, truncate=truncate, append_eos=append_eos,
        eos_ids=eos_ids, extras=extras or Extras(), date=date,
    )  # fmt: skip
    return encoder.encode(row)


def _around_ids(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    bare, full = tokenize(tokenizer, "a"), tokenizer("a", truncation=False)["input_ids"]
    at = next((k for k in range(len(full)) if full[k : k + len(bare)] == bare), 0)
    return tuple(full[:at]), tuple(full[at + len(bare) :])


def wants_chat(tokenizer: Any, chat: bool | None) -> bool:
    """Return whether text goes through the chat template: `chat`, or whether there is a template if `chat` is None."""
    return bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat


def _split_after(begun: str, completion: str) -> tuple[str, str]:
    """Split a completion after `begun`, the text that the prompt already has of it."""
    at = completion.find(begun)
    if at < 0:  # the row adds nothing to `begun`, and the template trims it
        begun = begun.rstrip()
        at = completion.find(begun)
    if at < 0:
        raise EndoRewardError(
            "the chat template changes the turn that the prompt begins, so it cannot be split: give token ids"
        )
    return completion[: at + len(begun)], completion[at + len(begun) :]


def _too_long(tokens: int, completion: int, limit: int, truncate: Truncate) -> str:
    text = f"{tokens} tokens, the limit is {limit}"
    if truncate is None:
        return f'{text}: set truncate (--truncate) to "prompt" or "completion", or shorten the row'
    which = f"completion's {completion}" if truncate == "prompt" else f"prompt's {tokens - completion}"
    return f'{text}; truncate="{truncate}" leaves no room for the {which} tokens: shorten the row'
