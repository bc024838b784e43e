"""Split text into prompt tokens and completion tokens, exactly, even if the tokenizer merges across the boundary.

    prompt_ids + completion_ids      completion_ids hold every character of the completion, and none of the prompt

prompt_ids are the tokens of the prompt alone, because that is what a generating model is given. The completion's tokens
are found in one of two ways:

- The tokens of prompt + completion start with prompt_ids. Then the rest is the completion. So "un" + "able" stays
  [un, ##able], and a SentencePiece model adds no second space.
- The tokenizer merges across the boundary ("a " + "b" becomes "a", " b"). Then the completion is tokenized after
  another text, with which it does not merge.
"""

from collections.abc import Iterator
from typing import Any

# Short contexts, by the kind of their last character. A tokenizer merges a given completion with few of them.
LETTERS = ("a", "x", "Q", "0", "the", "é", "中")
SPACES = ("\n", " ", "\t", ".\n", "a ")
MARKS = (".", ")", "|", '"', "¶")
TAILS = (1, 2, 3, 5, 8)
BROKEN = "\N{REPLACEMENT CHARACTER}"  # a decoder writes it for an incomplete character


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of `text`. No special tokens are added; those spelled out in `text` are recognised."""
    ids: list[int] = _encode(tokenizer, text)["input_ids"]
    return ids


def split_ids(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Return (prompt_ids, completion_ids), without added special tokens. The completion "" gives []."""
    before = tokenize(tokenizer, prompt)
    if not completion:
        return before, []
    after = _tokens_after(tokenizer, prompt, before, completion)
    if after is not None:
        return before, after

    # The tokens have to decode to the whole text as this tokenizer normalises it (lower case, NFC, ...).
    text = decode(tokenizer, tokenize(tokenizer, prompt + completion))
    candidates = []
    for context in _contexts(prompt):
        after = _tokens_after(tokenizer, context, tokenize(tokenizer, context), completion)
        if after is not None:
            if decode(tokenizer, before + after) == text:
                return before, after
            candidates.append(after)
    # No candidate may decode to the text if the tokenizer loses characters. Then prefer one that has a context.
    return before, next(iter(candidates[1:] + candidates), tokenize(tokenizer, completion))


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of token ids, with special tokens and without any clean-up of spaces."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def token_texts(tokenizer: Any, ids: list[int], start: int) -> tuple[str, ...]:
    """Return the text that each of ids[start:] adds. Joined, they are the text of ids[start:] in its context.

    A token that ends inside a character adds "". The token that completes the character adds all of it.
    """
    if start == len(ids):
        return ()
    # Decode with 4 tokens of context, because SentencePiece drops the space of the first token. A character may take 4
    # byte tokens, so up to 7 are tried until the context starts with a whole character.
    froms = [max(0, start - n) for n in (4, 5, 6, 7)]
    whole = [i for i in froms if not decode(tokenizer, ids[i:start]).startswith(BROKEN)]
    ends = [whole[0] if whole else start, start]  # positions between whole characters
    texts = []
    for i in range(start, len(ids)):
        context = ends[-min(4, len(ends))]
        known, text = decode(tokenizer, ids[context : ends[-1]]), decode(tokenizer, ids[context : i + 1])
        complete = not text.endswith(BROKEN) or i + 1 == len(ids)
        texts.append(text[len(known) :] if complete else "")
        if complete:
            ends.append(i + 1)
    return tuple(texts)


def _encode(tokenizer: Any, text: str) -> Any:
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)


def _tokens_after(tokenizer: Any, context: str, before: list[int], completion: str) -> list[int] | None:
    """Return the tokens of `completion` after `context`, which has the tokens `before`.

    None if the tokenizer merges the two, or if no token would be left.
    """
    encoding = _encode(tokenizer, context + completion)
    ids: list[int] = encoding["input_ids"]
    n = len(before)
    if ids[:n] != before or len(ids) == n:
        return None
    # Equal ids may still cross the boundary: a tokenizer may join neighbouring unknown characters into one token.
    span = encoding.token_to_chars(n - 1) if n and tokenizer.is_fast else None
    return None if span is not None and span.end > len(context) else ids[n:]


def _contexts(prompt: str) -> Iterator[str]:
    """Yield contexts to tokenize a completion after: nothing, ends of the prompt, short texts (LETTERS, ...)."""
    yield ""
    yield from (prompt[-n:] for n in TAILS if n < len(prompt))
    last = prompt[-1:]
    first = LETTERS if last.isalnum() else SPACES if last.isspace() else MARKS
    kinds = sorted((SPACES, MARKS, LETTERS), key=lambda kind: kind is not first)
    for kind in kinds:
        yield from kind
