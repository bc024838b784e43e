"""Measure every candidate for a head and choose one."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..vocab.tuned import Head
from .candidates import Candidate
from .child import Answer, Request
from .measure import quartiles

ROWS = {"cpu": (16, 128), "cuda": (64, 8192)}
"""rows as in decoding and as in training or scoring. One choice holds for both, and for every other number"""
LEAST_ROWS = 512
MARGIN = 0.03
"""A candidate must take this share less time than a plainer one. Smaller differences come and go."""
LIMIT = 90.0
"""seconds for one candidate, with the start of its process and its compilation"""
WEIGHTS_PER_SECOND = 1e7
"""A CPU may need this long to make a head and its float64 statistics; the limit grows by it."""

Ask = Callable[[Sequence[Request], float], Sequence[Answer]]


@dataclass(frozen=True)
class Measured:
    """What was found about a candidate: its time as a ratio to torch.mm, or its problem."""

    candidate: Candidate
    ratios: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)
    """by the number of rows: quartiles over rounds"""
    problem: str | None = None
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Geometric mean of the median ratios; infinite for a candidate with a problem."""
        if self.problem or not self.ratios:
            return math.inf
        return math.exp(sum(math.log(middle) for _, middle, _ in self.ratios.values()) / len(self.ratios))

    def to_json(self) -> dict[str, Any]:
        about = {"name": self.candidate.name, **asdict(self.candidate.choice), "errors": dict(self.errors)}
        if self.problem:
            return about | {"problem": self.problem}
        return about | {"score": self.score, "ratios": {str(n): list(q) for n, q in self.ratios.items()}}


def rows_for(head: Head, device: torch.device) -> tuple[int, int]:
    """Return the numbers of rows to measure. On a GPU the logits of torch.mm take at most a quarter of its memory."""
    few, many = ROWS[device.type]
    if device.type == "cuda":
        row = head.vocab * getattr(torch, head.dtype).itemsize
        while many > LEAST_ROWS and many * row > torch.cuda.get_device_properties(device).total_memory / 4:
            many //= 2
    return few, many


def measured_in_turn(
    head: Head, device: torch.device, found: Sequence[Candidate], seconds: float, ask: Ask
) -> Iterator[Measured]:
    """Yield each candidate's measurement as it ends. `seconds` is shared among the candidates."""
    rows = rows_for(head, device)
    limit = LIMIT + (head.dim * head.vocab / WEIGHTS_PER_SECOND if device.type == "cpu" else 0)
    oracle = None  # computed by the first candidate's process, before the candidate runs
    for candidate in found:
        request = {
            "head": asdict(head), "device": str(device), "rows": list(rows), "oracle": oracle,
            "choice": asdict(candidate.choice), "seconds": seconds / len(found),
        }  # fmt: skip
        [answer] = ask([request], limit)
        oracle = answer.get("oracle", oracle)
        yield _measured(candidate, answer, rows)


def _measured(candidate: Candidate, answer: Answer, rows: Sequence[int]) -> Measured:
    errors = answer.get("errors", {})
    if "problem" in answer:
        return Measured(candidate, problem=answer["problem"], errors=errors)
    ratios = {}
    for n in rows:
        times = answer["times"][str(n)]
        ratios[n] = quartiles([ours / bare for ours, bare in zip(times["candidate"], times["matmul"], strict=True)])
    return Measured(candidate, ratios, errors=errors)


def chosen(results: Sequence[Measured]) -> Measured | None:
    """Return the fastest, where a later candidate must be faster by MARGIN than each that it replaces.

    So it is faster than the rule by MARGIN, or is the rule, and no other is faster by MARGIN. None if all failed.
    """
    taken = None
    for result in results:
        if not math.isinf(result.score) and (taken is None or result.score <= taken.score * (1 - MARGIN)):
            taken = result
    return taken


def reason(results: Sequence[Measured], taken: Measured) -> str:
    """Say why a candidate was taken."""
    standard = results[0]
    if taken is standard:
        return f"it is auto's rule, and no other candidate takes {MARGIN:.0%} less time"
    if standard.problem:
        why = f"{standard.candidate.name}, which is auto's rule, failed"
    else:
        why = f"{1 - taken.score / standard.score:.0%} less time than {standard.candidate.name}, which is auto's rule"
        why += f" ({taken.score:.2f} against {standard.score:.2f})"
    fastest = min(results, key=lambda result: result.score)
    if fastest.score < taken.score:
        why += f"; `{fastest.candidate.name}`, the fastest, takes less than {MARGIN:.0%} less"
    return why
