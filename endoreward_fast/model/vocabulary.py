"""Check that a tokenizer's ids belong to a model's vocabulary."""

from typing import Any

from ..errors import EndoRewardError
from ..scoring.scorer import Scorer


def refuse_larger_vocabulary(tokenizer: Any, rows: int) -> None:
    """Raise EndoRewardError if text can be tokenized to ids that the model does not have.

    Special tokens beyond the head are allowed (Gemma 3's text models have an image token): ordinary text does not
    produce them, and a row that spells one out gets an error of its own.
    """
    known = getattr(tokenizer, "added_tokens_decoder", {})
    beyond = [i for i in tokenizer.get_vocab().values() if i >= rows] if len(tokenizer) > rows else []
    if any(i not in known or not known[i].special for i in beyond):
        raise EndoRewardError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's output head only {rows}: "
            "take the tokenizer that belongs to the model, or resize the model's embeddings"
        )


def refuse_other_vocabulary(
    scorer: Scorer, tokenizer: Any, *, asked: str = "the policy", known: str = "the reward model"
) -> None:
    """Raise EndoRewardError, naming both vocabularies, unless `tokenizer` and `scorer` give ids the same meaning.

    Special tokens that only `tokenizer` has (an added padding token) are allowed: a completion that holds one gets an
    error of its own. The message calls the owner of `tokenizer` `asked`, and `scorer` `known`.
    """
    if tokenizer is None or scorer.tokenizer is None or tokenizer is scorer.tokenizer:
        return
    vocabulary, others = scorer.tokenizer.get_vocab(), tokenizer.get_vocab()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    for token, i in others.items():
        if vocabulary.get(token) == i or (token not in vocabulary and i in added and added[i].special):
            continue
        other = scorer.tokenizer.convert_ids_to_tokens(i) if i < len(scorer.tokenizer) else None
        theirs = f"is {other!r}" if other is not None else "does not exist"
        raise EndoRewardError(
            f"{asked}'s vocabulary ({_named(tokenizer, others)}) is not {known}'s "
            f"({_named(scorer.tokenizer, vocabulary)}): token {i} is {token!r} in the first and {theirs} in the "
            "second; token ids can only be scored by a model with the same tokenizer"
        )


def _named(tokenizer: Any, vocabulary: dict[str, int]) -> str:
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    return f"{name}, {len(vocabulary)} tokens"
