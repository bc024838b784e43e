"""Questions with one right answer and three wrong answers of similar length. `pocket` is trained and tested on them.

Problems are generated from a seed, with the standard library alone. A hash of what a problem asks (``add 23 45``,
whatever its wording) assigns it to the training split or the held-out split, so the splits do not overlap. A fact can
only be memorised, so for facts the hash is taken of the question's wording.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from .sentences import CORRUPTIONS, SPLITS, Passage, corrupted, is_heldout, passages

__all__ = [
    "CORRUPTIONS",
    "FORMS",
    "IN_CAPITALS",
    "IN_DIGITS",
    "IN_WORDS",
    "SPLITS",
    "TASKS",
    "Passage",
    "Problem",
    "corrupted",
    "in_words",
    "is_heldout",
    "passages",
    "problems",
    "steered",
    "stream",
]  # fmt: skip

IN_WORDS, IN_DIGITS, IN_CAPITALS = "Answer in words.", "Answer in digits.", "Answer in capital letters."
FORMS = ("chat", "plain")

_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()
_TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
_NAMES = "Ann Ben Dan Eva Gus Ida Jon Kim Leo Mia Ned Ola Pam Ron Sue Tim Una Vic".split()
_FRUIT = "apples pears plums figs nuts eggs coins cards books pens stones shells".split()
_WORDS4 = "tree lamp fish bird snow wind fire door road ship leaf sand salt milk rice rope wool iron gold".split()
_WORDS5 = "river cloud stone paper glass horse train bread chair plant music light house table".split()
_CAPITALS = """France Paris,Germany Berlin,Italy Rome,Spain Madrid,Portugal Lisbon,Austria Vienna,Poland Warsaw,
Greece Athens,Norway Oslo,Sweden Stockholm,Finland Helsinki,Denmark Copenhagen,Ireland Dublin,Hungary Budapest,
Russia Moscow,Egypt Cairo,Kenya Nairobi,Japan Tokyo,China Beijing,India Delhi,Cuba Havana,Peru Lima,Canada Ottawa,
Iran Tehran,Iraq Baghdad,Turkey Ankara,Ghana Accra,Chile Santiago,Syria Damascus,Serbia Belgrade"""
_OPPOSITES = """hot cold,big small,fast slow,high low,light dark,early late,wet dry,hard soft,rich poor,young old,
open closed,full empty,near far,long short,thick thin,happy sad,loud quiet,strong weak,clean dirty,deep shallow"""
_CHILDREN = """dog puppy,cat kitten,cow calf,horse foal,sheep lamb,goat kid,pig piglet,hen chick,duck duckling,
bear cub,deer fawn,goose gosling,frog tadpole,swan cygnet"""
_FACTS: dict[str, tuple[tuple[tuple[str, str], ...], tuple[str, ...]]] = {
    "capital": (
        tuple((pair.split()[0], pair.split()[1]) for pair in _CAPITALS.split(",")),
        ("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?",
         "{} has which capital?", "Tell me the capital city of {}."),
    ),
    "opposite": (
        tuple((pair.split()[0], pair.split()[1]) for pair in _OPPOSITES.split(",")),
        ("What is the opposite of {}?", "Which word means the opposite of {}?", "Give the opposite of {}.",
         "If something is not {}, what is it?"),
    ),
    "young": (
        tuple((pair.split()[0], pair.split()[1]) for pair in _CHILDREN.split(",")),
        ("What is a young {} called?", "What do we call the young of a {}?", "Name the young of a {}.",
         "A baby {} is called what?"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """One question. `wrong` holds three different wrong answers, close in length to the right one.

    `key` decides the split. `system` is an instruction on the form of the answer, or None.
    """

    task: str
    key: str
    question: str
    answer: str
    wrong: tuple[str, ...]
    system: str | None = None

    def prompt(self, form: str = "chat") -> str | list[dict[str, str]]:
        """Return the question as chat messages ("chat") or as text that ends in "Answer:" ("plain")."""
        if form == "chat":
            system = [{"role": "system", "content": self.system}] if self.system else []
            return [*system, {"role": "user", "content": self.question}]
        if form == "plain":
            return f"{self.system or ''}\n\nQuestion: {self.question}\nAnswer:".lstrip()
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")

    def completions(self, form: str = "chat") -> list[str]:
        """Return the right answer, then the wrong ones. In "plain" form, each starts with a space."""
        return [" " * (form == "plain") + text for text in (self.answer, *self.wrong)]


@dataclass(frozen=True)
class _Draft:
    """A question before the form of its answer is chosen. `answer` and `wrong` are all numbers or all texts."""

    key: str
    question: str
    answer: int | str
    wrong: Sequence[int | str]


def in_words(number: int) -> str:
    """Spell a whole number from 0 to 999 in English words: 68 gives "sixty-eight"."""
    if not 0 <= number <= 999:
        raise ValueError(f"number must be from 0 to 999, got {number}")
    if number >= 100:
        rest = f" and {in_words(number % 100)}" if number % 100 else ""
        return f"{_ONES[number // 100]} hundred{rest}"
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")


def _near(answer: int, rng: random.Random) -> list[int]:
    """Return wrong numbers, the likeliest mistakes first: off by one or two, off by ten (a lost carry), then any."""
    near = [answer + rng.choice((-2, -1, 1, 2)), answer + rng.choice((-10, 10)), *rng.sample(range(200), 200)]
    return [n for n in dict.fromkeys(near) if 0 <= n < 200 and n != answer]


def _add(rng: random.Random) -> _Draft:
    a, b = rng.randrange(1, 51), rng.randrange(1, 51)
    name, thing = rng.choice(_NAMES), rng.choice(_FRUIT)
    question = rng.choice([
        f"What is {a} + {b}?", f"What is {a} + {b}?", f"{a} + {b} = ?", f"Add {a} and {b}.",
        f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
    ])  # fmt: skip
    return _Draft(f"add {min(a, b)} {max(a, b)}", question, a + b, _near(a + b, rng))


def _subtract(rng: random.Random) -> _Draft:
    b, a = sorted((rng.randrange(1, 61), rng.randrange(1, 61)))
    name, thing = rng.choice(_NAMES), rng.choice(_FRUIT)
    question = rng.choice([
        f"What is {a} - {b}?", f"What is {a} - {b}?", f"{a} - {b} = ?", f"Subtract {b} from {a}.",
        f"{name} has {a} {thing} and gives {b} away. How many {thing} are left?",
    ])  # fmt: skip
    return _Draft(f"subtract {a} {b}", question, a - b, _near(a - b, rng))


def _sequence(rng: random.Random) -> _Draft:
    start, step = rng.randrange(1, 60), rng.choice((1, 2, 3, 4, 5, 10))
    terms = [start + step * i for i in range(5)]
    shown = ", ".join(map(str, terms[:4]))
    question = rng.choice([f"What comes next: {shown}?", f"Continue: {shown}, ...", f"Next number after {shown}?"])
    return _Draft(f"sequence {start} {step}", question, terms[4], _near(terms[4], rng))


def _count(rng: random.Random) -> _Draft:
    letter, other = rng.sample("abcdefgh", 2)
    letters = [rng.choice((letter, other)) for _ in range(rng.randrange(3, 7))]
    shown = " ".join(letters)
    question = rng.choice([f"How many times is {letter} in: {shown}?", f"Count the {letter} in: {shown}"])
    answer = letters.count(letter)
    return _Draft(f"count {letter} {shown}", question, answer, [n for n in rng.sample(range(10), 10) if n != answer])


def _extreme(rng: random.Random) -> _Draft:
    numbers = rng.sample(range(10, 100), 4)
    word, pick = rng.choice([("largest", max), ("smallest", min)])
    shown = f"{numbers[0]}, {numbers[1]}, {numbers[2]} or {numbers[3]}"
    question = rng.choice([f"Which is the {word}: {shown}?", f"Which number is the {word}, {shown}?"])
    answer = pick(numbers)
    return _Draft(f"{word} {sorted(numbers)}", question, answer, [n for n in numbers if n != answer])


def _permutations(right: Sequence[str], rng: random.Random) -> list[str]:
    """Return at least three permutations of `right` other than `right` itself."""
    orders = {tuple(rng.sample(list(right), len(right))) for _ in range(20)} - {tuple(right)}
    return [" ".join(order) for order in sorted(orders)][:: max(1, len(orders) // 3)]


def _reverse(rng: random.Random) -> _Draft:
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randrange(3, 7))
    shown = " ".join(letters)
    question = rng.choice([f"Reverse: {shown}", f"Write {shown} backwards.", f"What is {shown} in reverse order?"])
    return _Draft(f"reverse {shown}", question, " ".join(letters[::-1]), _permutations(letters[::-1], rng))


def _sort(rng: random.Random) -> _Draft:
    digits = rng.sample("0123456789", rng.randrange(3, 7))
    shown, right = " ".join(digits), sorted(digits)
    question = rng.choice([f"Sort: {shown}", f"Put {shown} in order.", f"Write {shown} from smallest to largest."])
    return _Draft(f"sort {shown}", question, " ".join(right), _permutations(right, rng))


def _copy(rng: random.Random) -> _Draft:
    words = rng.sample(_WORDS4 + _WORDS5, rng.randrange(3, 8))
    shown = " ".join(words)
    question = rng.choice([f"Repeat: {shown}", f"Say again: {shown}", f"Copy these words: {shown}"])
    return _Draft(f"copy {shown}", question, shown, _permutations(words, rng))


def _spell(rng: random.Random) -> _Draft:
    number = rng.randrange(1000)
    near = [number + step for step in rng.sample((-100, -10, -1, 1, 10, 100), 6) if 0 <= number + step < 1000]
    others = [n for n in dict.fromkeys([*near, *rng.sample(range(1000), 200)]) if n != number]
    if rng.random() < 0.5:
        question, form = f"Write {number} in words.", in_words
    else:
        question, form = f"Write {in_words(number)} in digits.", str
    return _Draft(f"spell {number}", question, form(number), [form(n) for n in others])


def _position(rng: random.Random) -> _Draft:
    words, i = rng.sample(rng.choice((_WORDS4, _WORDS5)), 4), rng.randrange(4)
    place, shown = ("first", "second", "third", "last")[i], ", ".join(words)
    question = rng.choice([f"Which word is {place}: {shown}?", f"What is the {place} word of: {shown}?"])
    return _Draft(f"position {place} {shown}", question, words[i], [word for word in words if word != words[i]])


def _fact(rng: random.Random) -> _Draft:
    pairs, wordings = rng.choice(list(_FACTS.values()))
    thing, answer = rng.choice(pairs)
    question = rng.choice(wordings).format(thing)
    return _Draft(question, question, answer, rng.sample([other for _, other in pairs if other != answer], 12))


_DRAFTS: dict[str, Callable[[random.Random], _Draft]] = {
    "add": _add, "subtract": _subtract, "sequence": _sequence, "count": _count, "largest": _extreme,
    "reverse": _reverse, "sort": _sort, "copy": _copy, "spell": _spell, "position": _position, "fact": _fact,
}  # fmt: skip
TASKS = tuple(_DRAFTS)
_NUMBER_SYSTEMS = (None, None, IN_DIGITS, IN_WORDS, IN_WORDS)
_TEXT_SYSTEMS = (None, None, IN_CAPITALS)


def _finish(task: str, draft: _Draft, system: str | None) -> Problem:
    """Write the answers in the form that `system` asks for. Keep the three wrong ones that are closest in length."""

    def form(value: int | str) -> str:
        text = in_words(value) if isinstance(value, int) and system == IN_WORDS else str(value)
        return text.upper() if system == IN_CAPITALS else text

    answer = form(draft.answer)
    wrong = sorted((form(value) for value in draft.wrong), key=lambda text: abs(len(text) - len(answer)))
    return Problem(task, draft.key, draft.question, answer, tuple(wrong[:3]), system)


def _draft(task: str, split: str, rng: random.Random) -> _Draft:
    if task not in _DRAFTS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    while True:
        draft = _DRAFTS[task](rng)
        if is_heldout(draft.key) == (split == "heldout"):
            return draft


def stream(seed: int = 0, split: str = "heldout", tasks: Iterable[str] = TASKS) -> Iterator[Problem]:
    """Yield problems without end, cycling through the tasks. The same seed gives the same problems; some repeat."""
    rng, tasks = random.Random(f"{split} {seed}"), tuple(tasks)
    while True:
        for task in tasks:
            draft = _draft(task, split, rng)
            systems = _NUMBER_SYSTEMS if isinstance(draft.answer, int) else _TEXT_SYSTEMS
            yield _finish(task, draft, rng.choice(systems))


def problems(n: int, seed: int = 0, split: str = "heldout", tasks: Iterable[str] = TASKS) -> list[Problem]:
    """Return `n` problems, cycling through the tasks. `split` is "heldout" (never trained on) or "train".

    Facts repeat after about 40.
    """
    return list(islice(stream(seed, split, tasks), n))


def steered(n: int, seed: int = 0, split: str = "heldout") -> list[tuple[Problem, Problem]]:
    """Return `n` pairs of one problem with two system prompts: answer in digits, and answer in words.

    Each answer of a pair is right under one system prompt and in the wrong form under the other, so the system prompt
    alone reverses their order.
    """
    rng, pairs = random.Random(f"steered {split} {seed}"), []
    for i in range(n):
        task = ("add", "subtract", "sequence")[i % 3]
        draft = _draft(task, split, rng)
        pairs.append((_finish(task, draft, IN_DIGITS), _finish(task, draft, IN_WORDS)))
    return pairs
