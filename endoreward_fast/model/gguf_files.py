"""GGUF files: the packages that read them, and how their vocabularies split text. Torch is not needed to know."""

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import EndoRewardError

MAGIC = b"GGUF"
READERS = ("gguf", "accelerate")
VERSIONS = (2, 3)
SPLIT = "tokenizer.ggml.pre"
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r")
"""values of SPLIT for vocabularies that were learnt with each digit alone. transformers 5.23 splits their text as GPT-2
does, which changes the tokens of white space before a digit: "\\n\\n1" has "\\n" twice, not "\\n\\n" once."""
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""bytes of a value, by its type"""
TEXT, ARRAY = 8, 9


def refuse_without_readers(name: str) -> None:
    """Raise EndoRewardError if a package that transformers reads GGUF files with is not installed."""
    for package in READERS:
        if find_spec(package) is None:
            raise EndoRewardError(
                f"model {name!r} is read from a GGUF file, and {package} is not installed: pip install {package}"
            )


def with_split(tokenizer: Any, path: Path) -> Any:
    """Return `tokenizer`, which transformers read from the file at `path`, with the split that the file names."""
    if split_of(path) in DIGITS_APART:
        from tokenizers import pre_tokenizers as pre

        steps = [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(steps)
    return tokenizer


def split_of(path: Path) -> str | None:
    """Return the name of the rule that splits text before merges, or None if the file names none.

    The package gguf would read the whole header, which takes seconds.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC or _number(file, 4) not in VERSIONS:
            return None
        _number(file, 8)  # of tensors
        for _ in range(_number(file, 8)):
            key, kind = _text(file), _number(file, 4)
            if key == SPLIT and kind == TEXT:
                return _text(file)
            _skip(file, kind)
    return None


def _number(file: BinaryIO, width: int) -> int:
    (number,) = struct.unpack({4: "<I", 8: "<Q"}[width], file.read(width))
    return number


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, 8)).decode("utf-8", "replace")


def _skip(file: BinaryIO, kind: int) -> None:
    """Move past one value."""
    if kind == TEXT:
        file.seek(_number(file, 8), 1)
    elif kind == ARRAY:
        kind, count = _number(file, 4), _number(file, 8)
        if kind in WIDTHS:
            file.seek(count * WIDTHS[kind], 1)
        else:
            for _ in range(count):
                _skip(file, kind)
    else:
        file.seek(WIDTHS[kind], 1)
