"""What the rows score in-process, and how far an answer of the server is from it."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NOISE = {"float32": (1e-4, 1e-5), "bfloat16": (1.0, 0.02)}
"""{dtype: (nats, share of the score)} by which a score in another batch may differ: matmuls round differently there"""


class WrongScore(Exception):
    """Raised for an answer without a score, or with another one than in-process."""


@dataclass(frozen=True)
class Expected:
    """The scores in-process, in the order of the rows."""

    scores: Sequence[float]
    dtype: str = "float32"

    def allowed(self, row: int) -> float:
        nats, share = NOISE[self.dtype]
        return nats + share * abs(self.scores[row])

    def gap(self, rows: Iterable[int], body: str) -> float:
        """Return the largest difference between an answer's scores and those of `rows`.

        Raises WrongScore if a score is missing or differs by more than float noise.
        """
        found = [answer["score"] for answer in json.loads(body)["rows"]]
        wanted = [row for row in rows if row < len(self.scores)]
        if len(found) != len(wanted):
            raise WrongScore(f"{len(found)} results for {len(wanted)} rows")
        gaps = [self.difference(row, score) for row, score in zip(wanted, found, strict=True)]
        for row, score, gap in zip(wanted, found, gaps, strict=True):
            if not gap <= self.allowed(row):
                raise WrongScore(f"row {row} scores {score}, and {self.scores[row]} in-process")
        return max(gaps)

    def difference(self, row: int, score: float | None) -> float:
        return math.inf if score is None else abs(score - self.scores[row])
