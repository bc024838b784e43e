"""Find the response in what clients send: in a query behind its prompt, or as the last turn of a conversation."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import EndoRewardError
from ..scoring.sampled import ending_ids, generated_row
from ..scoring.scorer import Scorer
from ..text.boundary import tokenize
from ..text.messages import check_message
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

        The turn begins behind the last generation prompt, and ends with the first token that ends a response.
        """
        opening = self.template.generation_prompt
        if not opening:
            raise EndoRewardError("the model's chat template has no generation prompt: POST to /v1/rewards instead")
        found = self._in_text(conversation, opening) if isinstance(conversation, str) else self._in_ids(conversation)
        if found is None:
            ids = tokenize(self.tokenizer, conversation) if isinstance(conversation, str) else conversation
            return None, Span(len(ids), 0, 0)
        prompt, rest = found
        if special and isinstance(conversation, str) and prompt[: len(self._first)] != self._first:
            prompt = [*self._first, *prompt]
        length = next((i + 1 for i, token in enumerate(rest) if token in self.ends), len(rest))
        return generated_row(prompt, rest[:length], self.ends), Span(len(prompt), length, len(rest) - length)

    def _in_text(self, text: str, opening: str) -> tuple[list[int], list[int]] | None:
        at = text.rfind(opening)
        return None if at < 0 else split_query(self.tokenizer, text, text[: at + len(opening)])

    def _in_ids(self, ids: list[int]) -> tuple[list[int], list[int]] | None:
        opening = tokenize(self.tokenizer, self.template.generation_prompt)
        starts = range(len(ids) - len(opening), -1, -1)
        at = next((i for i in starts if ids[i : i + len(opening)] == opening), None)
        return None if at is None else (ids[: at + len(opening)], ids[at + len(opening) :])

    @cached_property
    def _first(self) -> list[int]:
        """The token that the tokenizer begins a text with, or nothing."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else []
