"""Split the text of a prompt and its sampled response into token ids, for trainers that pass no ids."""

from typing import Any

from .boundary import decode, split_ids, tokenize


def split_query(tokenizer: Any, query: str, prompt: str) -> tuple[list[int], list[int]] | None:
    """Return the ids of prompt and response of `query`, or None if the query does not start with the prompt.

    Both are text with special tokens, as OpenRLHF passes them. The prompt is tokenized alone. The response's tokens are
    those that its text adds to the prompt's (boundary.py); they equal the sampled tokens if the policy split its text
    as the tokenizer does. In the query, the prompt may have lost tokens on its left, or be spelled as the tokenizer
    decodes it.
    """
    whole = tokenize(tokenizer, prompt)
    if query.startswith(prompt):
        return whole, _response(tokenizer, query, prompt, whole, query[len(prompt) :])
    # Longest first. At least half of the prompt must be left: any query may start with the prompt's last letters.
    for cut in range(len(whole) // 2 + 1):
        opening = decode(tokenizer, whole[cut:])
        if opening and query.startswith(opening):
            return whole[cut:], _response(tokenizer, query, prompt, whole[cut:], query[len(opening) :])
    return None


def _response(tokenizer: Any, query: str, prompt: str, prompt_ids: list[int], text: str) -> list[int]:
    """Return the response's ids such that prompt and response decode to the query."""
    # SentencePiece tokenizers decode a special token with a space after it, and add a second one when encoding.
    found = [split_ids(tokenizer, prompt, response)[1] for response in (text, text.removeprefix(" "))]
    spelt = (ids for ids in found if tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=False) == query)
    return next(spelt, found[0])
