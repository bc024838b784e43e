"""What is worth knowing about how a row was read, by name."""

from collections.abc import Collection
from types import MappingProxyType

FLAGS = MappingProxyType(
    {
        "empty": "the completion is empty: only the token that ends it can be scored",
        "truncated": "tokens were cut to fit the limit",
        "bootstrapped": "the episode does not end with the last token: V(s') counts after it",
        "first_token_unscored": "nothing comes before the completion, so its first token was chosen in no known state",
        "continues_turn": "the prompt ends within the assistant's turn: the completion goes on with it",
        "context_turns": "of several turns in the completion only the last is scored",
        "system_in_user": "the chat template has no system turn: the system prompt leads the first user turn",
        "split_at_speaker": "a dialogue as text: what follows the last speaker that both answers share is scored",
        "template_rewrites": "the chat template would change the completion: it is scored as written",
        "template_drops": "the chat template leaves out a part of the turn: what it writes is scored",
        "white_space": "the chat template trims or changes white space of the turn: what it writes is scored",
        "context_changed": "the chat template leaves out or rewrites a part of an earlier turn: the prompt is what it "
        "writes",
        "template_ignores": "the chat template makes no use of the tools, documents or template arguments given",
        "opening_differs": "the generation prompt opens the turn otherwise than the chat template writes it (a "
        "thinking block, say): the turn is scored as the template writes it",
        "no_generation_prompt": "the chat template has no generation prompt: what it writes before the turn is taken "
        "for it",
        "end_made_up": "the chat template writes no end of turn: the tokenizer's end of sequence is scored as one",
        "end_in_text": "the completion has its own end of turn: it is scored once",
        "marks_in_text": "a text holds special tokens of the chat template, which are read as such",
        "null_fields": "a tool or a tool call has null fields, which are written as null: leave out those that a table "
        "has filled in",
        "dated": "the chat template writes today's date: date (--date) pins it",
    }
)


def in_words(flags: Collection[str]) -> str | None:
    """What is worth knowing about a row, or None."""
    return "; ".join(FLAGS[flag] for flag in flags) or None


NOTHING_TO_SCORE = "the completion is empty and no token ends it: there is nothing to score"
"""the error of a row without a scored token. It is no fault of the row: such a completion is the worst of any"""
