"""Real text that comes with every Python installation, and ways to corrupt it.

The text is documentation: the docstrings of the standard library, and the language reference that ``help()`` prints.
``tools/train_pocket.py``, which trains the embedded model, imports this module. `is_heldout` keeps the same tenth of
the text out of the training data in every Python version.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import random
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CORRUPTIONS = ("swap_words", "shuffle_letters", "replace_characters")
SPLITS = ("train", "heldout")

# Modules that some installations lack, or that hold mostly tables and test cases.
_SKIPPED = {"antigravity", "ensurepip", "idlelib", "lib2to3", "msilib", "test", "this", "tkinter", "turtledemo"}
_WORD = re.compile(r"\w+(?:['-]\w+)*")


@dataclass(frozen=True)
class Passage:
    """A piece of real documentation, split at white space: ``prompt + completion`` is the original text."""

    source: str
    prompt: str
    completion: str


def is_heldout(key: str) -> bool:
    """Return True for about a tenth of all keys, by their hash: the same on every machine and Python version."""
    return hashlib.sha256(key.encode()).digest()[0] < 26


def _wanted(key: str, split: str) -> bool:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return is_heldout(key) == (split == "heldout")


def stdlib_sources(split: str) -> Iterator[tuple[str, str]]:
    """Yield (module name, source text) for each standard library module in `split`, sorted by top-level name."""
    root = Path(sysconfig.get_path("stdlib"))
    for top in sorted(sys.stdlib_module_names - _SKIPPED):
        if top.startswith("_sysconfigdata"):
            continue
        folder = root / top
        for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [root / f"{top}.py"]:
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            if path.is_file() and _SKIPPED.isdisjoint(name.split(".")) and _wanted(f"module {name}", split):
                yield name, path.read_text(encoding="utf-8", errors="replace")


def docstrings(name: str, source: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, cleaned docstring) for each documented module, class and function in `source`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield f"{name}.{getattr(node, 'name', '')}".rstrip("."), text.strip()


def reference_topics(split: str) -> Iterator[tuple[str, str]]:
    """Yield (topic, text) of the language reference behind ``help("topic")``; nothing if it is not installed."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for topic in sorted(topics):
        if _wanted(f"topic {topic}", split):
            yield f"help({topic!r})", inspect.cleandoc(topics[topic])


def documents(split: str) -> Iterator[tuple[str, str]]:
    """Yield (source, text) for every documentation text in `split`. Duplicate docstrings are yielded once."""
    seen: set[str] = set()
    for name, source in stdlib_sources(split):
        for place, text in docstrings(name, source):
            if text not in seen:
                seen.add(text)
                yield place, text
    yield from reference_topics(split)


def passages(n: int, seed: int = 0, split: str = "heldout") -> list[Passage]:
    """Return `n` passages of prose, or fewer if the installation has fewer.

    A passage has 200 to 900 characters and is split after a third. The completion starts with the white space at the
    split, so prompt and completion concatenate to the original.
    """
    found: list[Passage] = []
    for place, text in documents(split):
        text = text[:900].rsplit("\n\n", 1)[0] if len(text) > 900 else text
        letters = sum(character.isalpha() or character == " " for character in text)
        if not 200 <= len(text) <= 900 or letters < 0.85 * len(text) or ">>>" in text:
            continue
        cut = re.compile(r"\s").search(text, len(text) // 3)
        if cut:
            found.append(Passage(place, text[: cut.start()], text[cut.start() :]))
    return random.Random(f"passages {seed}").sample(found, min(n, len(found)))


def _swap_words(text: str, rng: random.Random, rate: float) -> str:
    words = list(_WORD.finditer(text))
    picked = sorted(rng.sample(range(len(words)), min(len(words), max(2, round(rate * len(words))))))
    order = picked[1:] + picked[:1]  # a rotation: every picked word moves
    new = {i: words[j].group() for i, j in zip(picked, order, strict=True)}
    return _substitute(text, words, new)


def _shuffle_letters(text: str, rng: random.Random, rate: float) -> str:
    words = list(_WORD.finditer(text))
    long = [i for i, word in enumerate(words) if len(set(word.group())) > 1]
    new = {}
    for i in rng.sample(long, min(len(long), max(1, round(rate * len(long))))):
        letters = list(words[i].group())
        while "".join(letters) == words[i].group():
            rng.shuffle(letters)
        new[i] = "".join(letters)
    return _substitute(text, words, new)


def _replace_characters(text: str, rng: random.Random, rate: float) -> str:
    characters = list(text)
    letters = [i for i, character in enumerate(characters) if character.isalpha()]
    for i in rng.sample(letters, min(len(letters), max(1, round(rate * len(letters) / 3)))):
        characters[i] = rng.choice([c for c in "abcdefghijklmnopqrstuvwxyz" if c != characters[i]])
    return "".join(characters)


def _substitute(text: str, words: list[re.Match[str]], new: dict[int, str]) -> str:
    parts, end = [], 0
    for i, word in enumerate(words):
        parts += [text[end : word.start()], new.get(i, word.group())]
        end = word.end()
    return "".join(parts) + text[end:]


_CORRUPT: dict[str, Callable[[str, random.Random, float], str]] = {
    "swap_words": _swap_words,
    "shuffle_letters": _shuffle_letters,
    "replace_characters": _replace_characters,
}


def corrupted(text: str, seed: int = 0, kind: str = "swap_words", rate: float = 0.3) -> str:
    """Corrupt `text` without changing its length.

    kind   "swap_words" moves words to one another's places, "shuffle_letters" shuffles the letters inside words,
           "replace_characters" replaces letters by random ones
    rate   the fraction of words to change; for "replace_characters", a third of it is the fraction of letters

    Raises ValueError for any other kind.
    """
    if kind not in _CORRUPT:
        raise ValueError(f"kind must be one of {', '.join(CORRUPTIONS)}, got {kind!r}")
    return _CORRUPT[kind](text, random.Random(f"{kind} {seed}"), rate)
