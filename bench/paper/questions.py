"""Questions for a real model: facts that any model knows, and generated arithmetic.

Much of the toy's quiz (to count letters, to reverse them) says nothing about a real model. Arithmetic is drawn from a
seed. A real model may have seen any of it, so there is no held-out split.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from endoreward_fast.command.facts import facts
from endoreward_fast.pocket.quiz import Problem, problems

GENERATED: dict[str, tuple[str, int, Callable[[int, int], int]]] = {
    "add": ("+", 50, lambda a, b: a + b),
    "subtract": ("-", 50, lambda a, b: a - b),
    "multiply": ("times", 13, lambda a, b: a * b),
}
"""task: sign, numbers below, result"""
MISTAKES = (-10, -2, -1, 1, 2, 10)
BELOW, SYSTEM, EXAMPLE = 20, "Add.", ("3 + 5 = ?", "3 + 5 = 8")


@dataclass(frozen=True)
class Shown(Problem):
    """A problem whose prompt shows one example. Without it, a small model rarely answers in a fixed form."""

    def prompt(self, form: str = "chat") -> list[dict[str, str]]:
        turns = zip(("system", "user", "assistant", "user"), (SYSTEM, *EXAMPLE, self.question), strict=True)
        return [{"role": role, "content": content} for role, content in turns]


def known(per_task: int, seed: int) -> list[Problem]:
    """Return the demo's facts, `per_task` facts answered in one word, and `per_task` problems of each GENERATED task.

    At most 64 different facts in one word are known; `per_task` above that gives no more.
    """
    drawn = {p.answer: p for p in problems(40 * per_task, seed, tasks=["fact"]) if p.system is None}
    return [*facts(), *list(drawn.values())[:per_task], *arithmetic(per_task, seed)]


def arithmetic(per_task: int, seed: int) -> list[Problem]:
    """Return `per_task` different problems of each task in GENERATED, with whole sentences as answers."""
    found = []
    for task, (sign, below, result) in GENERATED.items():
        for a, b in _pairs(per_task, below, f"{task} {seed}"):
            a, b = max(a, b), min(a, b)
            question = f"{a} {sign} {b}"
            answer, *wrong = (f"{question} is {n}." for n in _with_mistakes(result(a, b), f"{question} {seed}"))
            found.append(Problem(task, f"{task} {a} {b}", f"What is {question}?", answer, tuple(wrong)))
    return found


def sums(n: int, seed: int) -> list[Problem]:
    """Return `n` different sums of numbers below BELOW, asked as in EXAMPLE."""
    found = []
    for a, b in _pairs(n, BELOW, f"sums {seed}"):
        answer, *wrong = (f"{a} + {b} = {n}" for n in _with_mistakes(a + b, f"{a} + {b} {seed}"))
        found.append(Shown("add", f"add {min(a, b)} {max(a, b)}", f"{a} + {b} = ?", answer, tuple(wrong)))
    return found


def _pairs(n: int, below: int, seed: str) -> list[tuple[int, int]]:
    """Return `n` pairs of numbers below `below` that differ as sets. EXAMPLE's pair is left out, in its own order."""
    ordered = [(a, b) for a in range(1, below) for b in range(1, below) if (a, b) != (3, 5)]
    random.Random(seed).shuffle(ordered)
    found: dict[frozenset[int], tuple[int, int]] = {}
    for pair in ordered:
        found.setdefault(frozenset(pair), pair)
    if len(found) < n:
        raise ValueError(f"{n} pairs of numbers below {below}: expected at most {len(found)}")
    return list(found.values())[:n]


def _with_mistakes(right: int, seed: str) -> list[int]:
    """Return `right` and three numbers near it that are not it."""
    near = [right + step for step in MISTAKES if right + step >= 0]
    return [right, *random.Random(seed).sample(near, 3)]
