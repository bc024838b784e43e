"""A row of text, chat or token ids -> the tokens that the model reads and where the scored ones begin.

| row                                                        | scored                                          |
| {"prompt": str, "completion": str}                         | the completion                                  |
| {"prompt": str or messages, "completion": str or messages} | the last assistant turn (earlier ones: context) |
| {"messages": [...]}                                        | the last assistant turn                         |
| {"prompt_ids": [...], "completion_ids": [...]}             | the completion's ids, as they are               |

Text goes through the tokenizer's chat template where it has one (a prompt as the user's turn, a completion as the
assistant's), because that is what a chat model was trained on; chat=False, or "chat": False in the row, scores
prompt + completion as plain text. Without a template, text is plain and messages are refused.

Plain text is tokenized as the tokenizer would (BOS and the like in front), a system prompt going before it with an
empty line between. A completion ends in the tokenizer's end-of-sequence token, a chat turn in the template's
end-of-turn token, unless append_eos=False.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from types import MappingProxyType
from typing import Any, Literal

from .boundary import split_ids, tokenize
from .chat import Rendered, render
from .errors import EndoRewardError

Row = Mapping[str, Any]
Truncate = Literal["prompt", "completion"] | None

FLAGS = MappingProxyType(
    {
        "empty": "the completion is empty: score 0",
        "truncated": "tokens were cut to fit the limit",
        "bootstrapped": "the episode does not end with the last token: V(s') counts after it",
        "first_token_unscored": "nothing comes before the completion, so its first token was chosen in no known state",
        "context_turns": "of several turns in the completion only the last is scored",
        "system_in_user": "the chat template has no system turn: the system prompt leads the first user turn",
        "split_at_speaker": "a dialogue as text: what follows the last speaker that both answers share is scored",
        "template_rewrites": "the chat template would change the completion: it is scored as written",
    }
)


def in_words(flags: Collection[str]) -> str | None:
    """What is worth knowing about a row, or None."""
    return "; ".join(FLAGS[flag] for flag in flags) or None


WANTED = "prompt and completion, or messages, or prompt_ids and completion_ids"


@dataclass(frozen=True)
class Encoded:
    """One row, ready for the model."""

    input_ids: list[int]
    """prompt, then completion"""
    prompt_length: int
    """tokens before the first scored one; all of them if there is nothing to score"""
    terminal: bool
    """whether the episode ends with the last token"""
    truncated: int = 0
    """tokens cut"""
    flags: tuple[str, ...] = ()
    """what is worth knowing about the row: keys of FLAGS"""

    @property
    def note(self) -> str | None:
        """The flags in words, or None."""
        return in_words(self.flags)


@dataclass(frozen=True)
class Encoder:
    """How rows become tokens. See `encode_row` for the fields; without a tokenizer only token ids can be encoded."""

    tokenizer: Any = None
    system: str | None = None
    chat: bool | None = None
    max_length: int | None = None
    truncate: Truncate = None
    append_eos: bool = True
    eos_ids: Collection[int] = ()
    leading: tuple[int, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if self.tokenizer is not None:
            object.__setattr__(self, "leading", _leading_ids(self.tokenizer))

    def encode(self, row: Row) -> Encoded:
        """Tokens of one row. EndoRewardError in one line where it cannot be scored."""
        if not isinstance(row, Mapping):
            raise EndoRewardError(f"a row is a mapping with {WANTED}; found {type(row).__name__}")
        flags: tuple[str, ...] = ()
        terminal = True
        if "prompt_ids" in row and "completion_ids" in row:
            if self.system:
                raise EndoRewardError("a system prompt cannot be put before a row of token ids")
            prompt, completion = (_ids(row, name) for name in ("prompt_ids", "completion_ids"))
            terminal = bool(row.get("terminal", True))
        else:
            prompt, completion, flags = self._text_ids(row)
        if not completion:
            return Encoded(prompt, len(prompt), terminal, flags=(*flags, "empty"))
        length = len(prompt)
        if not prompt:
            bos = getattr(self.tokenizer, "bos_token_id", None)
            if bos is not None and completion[0] != bos:
                prompt, length = [bos], 1
            else:
                length, flags = 1, (*flags, "first_token_unscored")
        return self._fit([*prompt, *completion], length, terminal, flags)

    def _text_ids(self, row: Row) -> tuple[list[int], list[int], tuple[str, ...]]:
        """(prompt ids, completion ids, flags) of a row of text."""
        prompt, completion = prompt_and_completion(row)
        if self.tokenizer is None:
            raise EndoRewardError("text needs a tokenizer, and the model came without one: give it one, or token ids")
        chat = row.get("chat", self.chat)
        plain = isinstance(prompt, str) and isinstance(completion, str)
        if chat is False and not plain:
            raise EndoRewardError("chat=False scores plain text, but the row holds messages")
        if plain and not wants_chat(self.tokenizer, chat):
            before = f"{self.system}\n\n{prompt}" if self.system else prompt
            return self._plain(before, completion)
        turns = dialogue(prompt, completion)
        flags = ("context_turns",) if not isinstance(completion, str) and len(completion) > 1 else ()
        rendered = render(self.tokenizer, turns, system=self.system)
        ids = self._rendered(rendered, empty=not turns[-1]["content"])
        return *ids, (*flags, *rendered.flags)

    def _plain(self, prompt: str, completion: str) -> tuple[list[int], list[int], tuple[str, ...]]:
        before, after = split_ids(self.tokenizer, prompt, completion)
        return [*self.leading, *before], self._with_eos(after), ()

    def _rendered(self, text: Rendered, *, empty: bool) -> tuple[list[int], list[int]]:
        if empty:
            return tokenize(self.tokenizer, text.prompt), []
        end = text.end if self.append_eos else ""
        before, after = split_ids(self.tokenizer, text.prompt, text.completion + end)
        return before, after if end else self._with_eos(after)

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = getattr(self.tokenizer, "eos_token_id", None)
        if not self.append_eos or eos is None or not ids or ids[-1] == eos or ids[-1] in self.eos_ids:
            return ids
        return [*ids, eos]

    def _fit(self, ids: list[int], length: int, terminal: bool, flags: tuple[str, ...]) -> Encoded:
        """Within max_length, by `truncate`."""
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
) -> Encoded:  # fmt: skip
    """Tokens of one row (the module's table says which rows there are).

    system      a system prompt; it comes before the row's own, if that has one
    chat        None: the chat template where the tokenizer has one; False: plain text; True: insist on the template
    max_length  most tokens of prompt and completion; None: no limit
    truncate    what to do beyond: None, refuse the row; "prompt", drop its oldest tokens, keeping BOS and one more at
                least; "completion", cut its end, after which the episode goes on (terminal False)
    append_eos  end the completion with an end-of-sequence (or end-of-turn) token, if it has none
    eos_ids     tokens that count as one, beside the tokenizer's own

    An empty completion has no scored token, whatever append_eos says. Before an empty prompt goes BOS; without one,
    the first token of the completion is not scored.

    Raises EndoRewardError, in one line: keys or types that do not fit, text without a tokenizer, messages without a
    chat template or refused by it, a row beyond the limit.
    """
    encoder = Encoder(
        tokenizer, system=system, chat=chat, max_length=max_length, truncate=truncate, append_eos=append_eos,
        eos_ids=eos_ids,
    )  # fmt: skip
    return encoder.encode(row)


def _leading_ids(tokenizer: Any) -> tuple[int, ...]:
    """Special tokens that the tokenizer puts before a text: BOS, [CLS], or none."""
    bare, full = tokenize(tokenizer, "a"), tokenizer("a", truncation=False)["input_ids"]
    at = next((k for k in range(len(full)) if full[k : k + len(bare)] == bare), 0)
    return tuple(full[:at])


def wants_chat(tokenizer: Any, chat: bool | None) -> bool:
    """Whether text goes through the chat template: as `chat` says, or where there is one."""
    return bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat


def prompt_and_completion(row: Row) -> tuple[Any, Any]:
    """Each a str or a list of messages; the prompt of {"messages": ...} is all but the last of them."""
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
    elif "messages" in row:
        messages = row["messages"]
        if not _are_messages(messages):
            raise EndoRewardError(f"messages: wanted a list of {{role, content}}, found {_kind(messages)}")
        prompt, completion = list(messages[:-1]), list(messages[-1:])
    else:
        found = ", ".join(map(str, row)) or "nothing"
        raise EndoRewardError(f"a row needs {WANTED}; found {found}")
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str) and not _are_messages(value):
            raise EndoRewardError(f"{name}: wanted text or a list of {{role, content}}, found {_kind(value)}")
    return prompt, completion


def _are_messages(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message
        for message in value
    )


def _turns(value: Any, role: str) -> list[Mapping[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def dialogue(prompt: Any, completion: Any) -> list[Mapping[str, Any]]:
    """The conversation that `prompt_and_completion` are; it ends in an assistant's turn of text."""
    turns = _turns(prompt, "user") + _turns(completion, "assistant")
    last = turns[-1] if turns else {"role": "none", "content": None}
    if last["role"] != "assistant":
        raise EndoRewardError(f"the last message is what is scored: wanted the assistant's, found {last['role']!r}")
    if not isinstance(last["content"], str):
        raise EndoRewardError(f"the last message's content: wanted text, found {_kind(last['content'])}")
    return turns


def _ids(row: Row, name: str) -> list[int]:
    ids = row[name]
    ids = ids.tolist() if hasattr(ids, "tolist") else ids  # tensors and arrays
    whole = isinstance(ids, list | tuple) and all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids)
    if not whole:
        raise EndoRewardError(f"{name}: wanted a list of token ids, found {_kind(ids)}")
    return [int(i) for i in ids]


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        odd = next((v for v in value if not isinstance(v, Mapping)), value[0] if value else None)
        keys = f" of keys {', '.join(map(str, odd))}" if isinstance(odd, Mapping) else ""
        return f"a list of {type(odd).__name__}{keys}" if value else "an empty list"
    return "nothing" if value is None else type(value).__name__


def _too_long(tokens: int, completion: int, limit: int, truncate: Truncate) -> str:
    text = f"{tokens} tokens, the limit is {limit}"
    if truncate is None:
        return f'{text}; truncate (--truncate) "prompt" or "completion" would cut it'
    which = f"completion's {completion}" if truncate == "prompt" else f"prompt's {tokens - completion}"
    return f'{text}; truncate="{truncate}" leaves no room beside the {which}'
