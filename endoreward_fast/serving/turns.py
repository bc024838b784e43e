"""Find the response in what clients send: in a query behind its prompt, or as the last turn of a conversation."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import EndoRewardError
from ..scoring.sampled import ending_ids, generated_row
from ..scoring.scorer import Scorer
from ..text.boundary import decode, tokenize
from ..text.messages import check_message
from ..text.opening import Opening
from ..text.query import split_query
from ..text.rows import Row
from ..text.template import Extras, Template


class Span(NamedTuple):
    """How many tokens a conversation has before its response, in it, and after it."""

    before: int
    response: int
    after: int


class Turns:
    """Reads prompts and responses with a model's tokenizer and chat template. Templates of requests are never used."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.ends = ending_ids(scorer)
        """ids that end a response"""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises EndoRewardError if it has none."""
        if self._scorer.tokenizer is None:
            raise EndoRewardError("this path takes text, and the model has no tokenizer: POST token ids to /v1/rewards")
        return self._scorer.tokenizer

    @cached_property
    def template(self) -> Template:
        """The model's chat template."""
        return Template(self.tokenizer)

    def of_query(self, query: str, prompt: str) -> Row | None:
        """Return the row of a query that begins with its prompt, or None if it does not."""
        found = split_query(self.tokenizer, query, prompt)
        return None if found is None else generated_row(*found, self.ends)

    def opened(self, messages: Sequence[dict[str, Any]]) -> str | None:
        """Return the prompt that the template writes for messages, the start of the next turn included.

        None if it cannot write them, as with images. Raises EndoRewardError if there is no template.
        """
        today = Template(self.tokenizer)
        today.source()
        try:
            for i, message in enumerate(messages):
                check_message(message, f"prompt[{i}]")
            return today.write(today.fit(messages, Extras()), Extras(), generate=True)
        except EndoRewardError:
            return None

    def last(self, conversation: str | list[int], *, special: bool) -> tuple[Row | None, Span]:
        """Return the row of a conversation's last assistant turn, or None if none is found, and where it is.

        conversation   as the chat template writes it, as text or as token ids
        special        begin text with the token that the tokenizer begins with, if it does not yet

        The turn begins after the last header of an assistant's turn (text/opening.py), and ends with the first token
        that ends a response.
        """
        found = self._in_text(conversation) if isinstance(conversation, str) else self._in_ids(conversation)
        if found is None:
            ids = tokenize(self.tokenizer, conversation) if isinstance(conversation, str) else conversation
            return None, Span(len(ids), 0, 0)
        prompt, rest = found
        if special and isinstance(conversation, str) and prompt[: len(self._first)] != self._first:
            prompt = [*self._first, *prompt]
        length = next((i + 1 for i, token in enumerate(rest) if token in self.ends), len(rest))
        return generated_row(prompt, rest[:length], self.ends), Span(len(prompt), length, len(rest) - length)

    def _in_text(self, text: str) -> tuple[list[int], list[int]] | None:
        found = self._opening.split(text)
        return None if found is None else split_query(self.tokenizer, "".join(found), found[0])

    def _in_ids(self, ids: list[int]) -> tuple[list[int], list[int]] | None:
        """Split token ids. They stay as they are: a token across the boundary belongs to the prompt."""
        if not all(0 <= i < self._scorer.vocab_size for i in ids):
            return [], ids  # no tokens of this model: encoding the row says so
        header = tokenize(self.tokenizer, self._opening.header)
        starts = range(len(ids) - len(header), -1, -1)
        # Text that only looks like the header has other tokens. The header's may also differ, next to other text.
        start = next((i for i in starts if ids[i : i + len(header)] == header), None)
        text = decode(self.tokenizer, ids[start or 0 :])
        found = self._opening.split(text, first=start is not None)
        if found is None:
            return None
        length = len(text) - len(found[1])
        at = bisect_left(range(len(ids)), length, start or 0, key=lambda n: len(decode(self.tokenizer, ids[start:n])))
        return ids[:at], ids[at:]

    @cached_property
    def _opening(self) -> Opening:
        return Opening.of(self.template)

    @cached_property
    def _first(self) -> list[int]:
        """The token that the tokenizer begins a text with, or nothing."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else []
