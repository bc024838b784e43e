"""Tokenize prompts as TRL's trainers do, with templates, tools and environments (written against TRL 1.16)."""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from ..errors import EndoRewardError
from ..scoring.sampled import Ids, Own

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Rendering:
    """The template and tools with which a trainer renders its prompts."""

    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Any] = ()

    def prompt_ids(self, tokenizer: Any, prompts: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> list[Ids]:
        """Tokenize prompts: text with the tokenizer's special tokens, messages with the chat template.

        columns  optional values for each prompt: `environments` (TRL's instances, whose methods are tools), `tools` and
                 `chat_template_kwargs` (TRL's names in data sets)

        Raises EndoRewardError: no tokenizer, or a template that raises for the conversation.
        """
        if tokenizer is None:
            raise EndoRewardError("prompts need a tokenizer: EndoReward(model, tokenizer)")
        if all(isinstance(p, str) for p in prompts):
            ids: list[Ids] = tokenizer(text=list(prompts))["input_ids"]
            return ids
        rows = [
            self._apply(tokenizer, prompt, generate=True, tools=tools, options=options)
            for prompt, (tools, options) in zip(prompts, self._by_row(len(prompts), columns), strict=True)
        ]
        return rows

    def own_tokens(self, tokenizer: Any, completion: Messages, ids: Ids) -> Own | None:
        """Mark the tokens that the policy chose: all but the tools' answers. None if an answer is not found."""
        own, start = [1] * len(ids), 0
        for role, turns in groupby(completion, key=lambda message: message.get("role")):
            if role != "tool":
                continue
            answer = self._answer_ids(tokenizer, list(turns))
            width = len(answer)
            starts = range(start, len(ids) - width + 1)
            at = next((i for i in starts if list(ids[i : i + width]) == answer), None)
            if at is None or not width:
                return None
            start = at + width
            own[at:start] = [0] * width
        return own

    def _by_row(self, rows: int, columns: Mapping[str, Sequence[Any]]) -> Iterator[tuple[list[Any], Mapping[str, Any]]]:
        """Yield (tools, template arguments) for each prompt."""
        for i in range(rows):
            environment, tools, options = (
                columns[name][i] if name in columns else None
                for name in ("environments", "tools", "chat_template_kwargs")
            )
            tools = json.loads(tools) if isinstance(tools, str) else tools
            yield (
                [*self.tools, *_methods(environment), *(tools or ())],
                {**self.chat_template_kwargs, **(options or {})},
            )

    def _answer_ids(self, tokenizer: Any, answers: list[Mapping[str, Any]]) -> list[int]:
        """Return the ids that the trainer appends after a tool call: the answers, and the start of the next turn."""
        call = {"type": "function", "function": {"name": answers[0].get("name", ""), "arguments": {}}}
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        options = self.chat_template_kwargs
        before = list(self._apply(tokenizer, turns, generate=False, tools=[], options=options))
        whole = list(self._apply(tokenizer, [*turns, *answers], generate=True, tools=[], options=options))
        ends = [i for i, token in enumerate(before) if token == tokenizer.eos_token_id]
        before = before[: ends[-1] + 1] if ends else before  # drop the template's newline after the turn
        return whole[len(before) :] if whole[: len(before)] == before else []

    def _apply(
        self, tokenizer: Any, messages: Messages, *, generate: bool, tools: list[Any], options: Mapping[str, Any]
    ) -> Ids:  # fmt: skip
        try:
            ids: Ids = tokenizer.apply_chat_template(
                conversation=list(messages), tools=tools or None, chat_template=self.chat_template,
                add_generation_prompt=generate, tokenize=True, return_dict=True, **options,
            )["input_ids"]  # fmt: skip
        except Exception as error:  # a template is the model author's code and may raise anything
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise EndoRewardError(f"the chat template raised an error for a prompt: {reason}") from error
        return ids

    def with_trainers_template(self, tokenizer: Any) -> "Rendering":
        """Replace a template that is not prefix-preserving by TRL's training template, as the trainer does."""
        from trl.chat_template_utils import get_training_chat_template, is_chat_template_prefix_preserving

        if self.chat_template is not None or is_chat_template_prefix_preserving(tokenizer):
            return self
        return Rendering(get_training_chat_template(tokenizer), self.chat_template_kwargs, self.tools)


def answered_by_tools(completion: Any) -> bool:
    """Return whether a completion contains answers of tools."""
    return not isinstance(completion, str) and any(message.get("role") == "tool" for message in completion)


def _methods(environment: Any) -> list[Any]:
    """Return the methods of a TRL environment that are tools."""
    names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    names = [name for name in names if not name.startswith("_") and name not in ("reset", "get_reward")]
    return [getattr(environment, name) for name in names] if environment is not None else []
