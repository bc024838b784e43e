"""Where a prompt ends and its completion begins, in tokens: exact, although tokenizers merge across the seam.

    prompt_ids + completion_ids      every character of the completion in completion_ids, none of the prompt's

prompt_ids are what the prompt alone gives, which is what a model that generates is shown. If they begin the tokens of
the whole text, the rest is the completion (so "un" + "able" stays [un, ##able], and a SentencePiece model adds no
second space). If the tokenizer merges across the seam ("a " + "b" -> "a", " b"), the completion is tokenized behind
some other text with which it does not merge.
"""

from collections.abc import Iterator
from typing import Any

# Short contexts by the kind of character they end in; each tokenizer merges a completion with few of them.
LETTERS = ("a", "x", "Q", "0", "the", "é", "中")
SPACES = ("\n", " ", "\t", ".\n", "a ")
MARKS = (".", ")", "|", '"', "¶")
TAILS = (1, 2, 3, 5, 8)
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of a part of a character


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text`, with no special tokens added around it. Special tokens spelled out in it are honoured."""
    ids: list[int] = _encode(tokenizer, text)["input_ids"]
    return ids


def split_ids(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """(prompt_ids, completion_ids); neither has special tokens added. completion_ids of "" is []."""
    before = tokenize(tokenizer, prompt)
    if not completion:
        return before, []
    after = _rest(tokenizer, prompt, before, completion)
    if after is not None:
        return before, after

    # What the pieces have to spell: the whole text as this tokenizer keeps it (lower case, NFC, ...).
    text = decode(tokenizer, tokenize(tokenizer, prompt + completion))
    candidates = []
    for context in _contexts(prompt):
        after = _rest(tokenizer, context, tokenize(tokenizer, context), completion)
        if after is not None:
            if decode(tokenizer, before + after) == text:
                return before, after
            candidates.append(after)
    # A tokenizer that loses characters may spell the text with none; behind some context beats on its own.
    return before, next(iter(candidates[1:] + candidates), tokenize(tokenizer, completion))


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Text of token ids, special tokens included, spaces untouched."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def token_texts(tokenizer: Any, ids: list[int], start: int) -> tuple[str, ...]:
    """What each of ids[start:] adds to the text: joined, they are the text of ids[start:] as it reads after the rest.

    A token that ends inside a character adds "", and the one that completes it the whole character.
    """
    if start == len(ids):
        return ()
    # A few tokens of context, since SentencePiece drops the first one's space; but whole characters, of up to 4 bytes.
    froms = [max(0, start - n) for n in (4, 5, 6, 7)]
    whole = [i for i in froms if not decode(tokenizer, ids[i:start]).startswith(BROKEN)]
    ends = [whole[0] if whole else start, start]  # between whole characters
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


def _rest(tokenizer: Any, context: str, before: list[int], completion: str) -> list[int] | None:
    """Tokens of `completion` behind `context`, whose own are `before`; None if they merge, or none would be left."""
    encoding = _encode(tokenizer, context + completion)
    ids: list[int] = encoding["input_ids"]
    n = len(before)
    if ids[:n] != before or len(ids) == n:
        return None
    # Equal ids may still reach across the seam: an unknown character is one token with its unknown neighbours.
    span = encoding.token_to_chars(n - 1) if n and tokenizer.is_fast else None
    return None if span is not None and span.end > len(context) else ids[n:]


def _contexts(prompt: str) -> Iterator[str]:
    """Texts to put before a completion that merges with its prompt: nothing, ends of the prompt, single characters."""
    yield ""
    yield from (prompt[-n:] for n in TAILS if n < len(prompt))
    last = prompt[-1:]
    first = LETTERS if last.isalnum() else SPACES if last.isspace() else MARKS
    kinds = sorted((SPACES, MARKS, LETTERS), key=lambda kind: kind is not first)
    for kind in kinds:
        yield from kind
