"""The vocabulary of a model behind a URL, for the comparison with another tokenizer's."""

from collections.abc import Collection, Mapping
from functools import cached_property


class RemoteVocabulary:
    """Tokens and ids of the server's tokenizer, under the names of transformers. It cannot tokenize."""

    def __init__(self, name: str, tokens: Mapping[str, int], special: Collection[int] = ()) -> None:
        self.name_or_path = name
        self.all_special_ids = sorted(special)
        self._tokens = dict(tokens)

    def get_vocab(self) -> dict[str, int]:
        """Return {token: id}."""
        return dict(self._tokens)

    def convert_ids_to_tokens(self, id: int) -> str | None:
        """Return the token with this id, or None."""
        return self._by_id.get(id)

    @cached_property
    def _by_id(self) -> dict[int, str]:
        return {i: token for token, i in self._tokens.items()}

    def __len__(self) -> int:
        return max(self._tokens.values(), default=-1) + 1
