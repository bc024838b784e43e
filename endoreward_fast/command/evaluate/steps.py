"""Turn rewards of tokens into rewards of steps (ProcessBench).

A token belongs to the step that has its first character, white space apart. So the line breaks between two steps belong
to the first of them, unless a token joins them with the start of the second. Tokens before the first step (an empty
thinking block, say) and after the last (the end of the turn) belong to no step: V(s') is 0 behind the last token, so
its reward is a whole logit, on another scale than the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ...errors import EndoRewardError

REDUCTIONS: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "sum": sum,
    "min": min,
}
SIGNALS = ("reward", "logprob")
METHODS = tuple(f"{signal}, {reduction}" for signal in SIGNALS for reduction in REDUCTIONS)
"""what a step is scored with: a signal of its tokens, and how they become one number"""


def steps_of_tokens(texts: Sequence[str], steps: Sequence[str]) -> list[int | None]:
    """Return the index of the step that each token belongs to, or None for a token outside of all steps.

    texts   what each token adds to the text
    steps   their texts

    Raises EndoRewardError if the tokens do not spell the steps, or if a step has no token.
    """
    owner = [n for n, step in enumerate(steps) for _ in _letters(step)]
    spelt = _letters("".join(texts))
    if (at := spelt.find(_letters("".join(steps)))) < 0:
        raise EndoRewardError(
            "the scored tokens do not spell the steps: the completion was cut, or the model's template or tokenizer "
            "changes it"
        )
    found: list[int | None] = []
    seen = -at  # letters of the steps so far; below 0 before the first step
    for text in texts:
        count = len(_letters(text))
        mine = seen if count or not text else seen - 1  # white space belongs to the step before it
        if seen == at == 0 and text and not count:
            mine = 0  # white space at the very start
        found.append(owner[mine] if 0 <= mine < len(owner) else None)
        seen += count
    if (bare := next((n for n in range(len(steps)) if n not in found), None)) is not None:
        raise EndoRewardError(f"no token begins in steps[{bare}]: it has no reward")
    return found


def _letters(text: str) -> str:
    """Return `text` without white space."""
    return "".join(text.split())


def step_scores(table: Any, steps: Sequence[str]) -> tuple[dict[str, tuple[float, ...]], tuple[int, ...]]:
    """Return ({method: score of each step}, tokens of each step) of a TokenTable."""
    owner = steps_of_tokens(table.texts, steps)
    found: dict[str, tuple[float, ...]] = {}
    for signal, values in zip(SIGNALS, (table.rewards, table.logprobs), strict=True):
        parts = _grouped(values, owner, len(steps))
        found |= {f"{signal}, {name}": tuple(map(reduce, parts)) for name, reduce in REDUCTIONS.items()}
    return found, tuple(owner.count(n) for n in range(len(steps)))


def _grouped(values: Iterable[float], owner: Sequence[int | None], count: int) -> list[list[float]]:
    parts: list[list[float]] = [[] for _ in range(count)]
    for value, step in zip(values, owner, strict=True):
        if step is not None:
            parts[step].append(value)
    return parts
