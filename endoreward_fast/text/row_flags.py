"""Flags: names and sentences for what a user should know about how a row was read."""

from collections.abc import Collection
from types import MappingProxyType

FLAGS = MappingProxyType(
    {
        "empty": "the completion is empty: only the token that ends it can be scored",
        "truncated": "tokens were cut to fit the limit",
        "bootstrapped": "the episode does not end with the last token: the last reward subtracts V(s')",
        "first_token_unscored": "no token comes before the completion: its first token has no reward",
        "continues_turn": "the prompt ends in the assistant's text: the completion continues that turn",
        "context_turns": "the completion has several turns: only the last is scored",
        "system_in_user": "the chat template has no system turn: the system prompt begins the first user turn",
        "split_at_speaker": "the answers are dialogues as text: each is scored from the last speaker that they share",
        "template_rewrites": "the chat template would change the completion: it is scored as given",
        "template_drops": "the chat template leaves out a part of the turn: the turn is scored without it",
        "white_space": "the chat template changes white space of the turn: the turn is scored with the change",
        "context_changed": "the chat template leaves out or changes a part of an earlier turn: the prompt has the "
        "change",
        "template_ignores": "the chat template ignores some of the tools, documents or template arguments given",
        "opening_differs": "the chat template begins the turn differently from its generation prompt (a thinking "
        "block, say): the turn is scored from the first difference",
        "no_generation_prompt": "the chat template has no generation prompt: what it writes before the turn is used "
        "as one",
        "end_made_up": "the chat template writes no end of turn: the tokenizer's end-of-sequence token is scored as "
        "one",
        "end_in_text": "the completion brings its own end of turn: it is scored once",
        "marks_in_text": "a text contains special tokens of the chat template: they are read as special tokens",
        "null_fields": "a tool or a tool call has null fields, which the template writes as null: remove those that "
        "a table added",
        "dated": "the chat template writes today's date: fix it with date (--date)",
    }
)


def in_words(flags: Collection[str]) -> str | None:
    """Return the sentences of the flags, or None if there are no flags."""
    return "; ".join(FLAGS[flag] for flag in flags) or None


NOTHING_TO_SCORE = "the completion is empty and no token ends it: there is nothing to score"
"""the error of a row without a scored token. The row is not malformed: its completion ranks below all others"""
