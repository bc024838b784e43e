"""What the rows score in-process, and how far an answer of the server may be from it."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from endoreward_fast import EndoRewardModel

NATS, SHARE = 1e-4, 1e-5
"""a score in another batch may differ by NATS + SHARE of the score in float32: matmuls round differently there"""
BEYOND = 2
"""in another dtype, by so many times the largest difference in-process between rows alone and in one list"""


class WrongScore(Exception):
    """Raised for an answer without a score, or with another one than in-process."""


@dataclass(frozen=True)
class Expected:
    """The scores in-process, in the order of the rows."""

    scores: Sequence[float]
    noise: float | None = None
    """the largest difference in-process between a row alone and in the list; None: float32"""

    @classmethod
    def of(cls, scorer: EndoRewardModel, rows: Sequence[dict]) -> "Expected":
        """Score rows in one list, and measure the noise of a model that is not in float32."""
        scores = [found.score for found in scorer.score(rows)]
        if dtype_of(scorer) == "float32":
            return cls(scores)
        alone = (scorer.score([row])[0].score for row in rows)
        return cls(scores, max(abs(a - b) for a, b in zip(alone, scores, strict=True)))

    def allowed(self, row: int) -> float:
        """Return the most that a score of this row may differ."""
        return NATS + SHARE * abs(self.scores[row]) if self.noise is None else BEYOND * self.noise

    def gap(self, rows: Iterable[int], body: str) -> float:
        """Return the largest difference between an answer's scores and those of `rows`.

        Raises WrongScore if a score is missing or differs by more than float noise.
        """
        found = [answer["score"] for answer in json.loads(body)["rows"]]
        wanted = [row for row in rows if row < len(self.scores)]
        if len(found) != len(wanted):
            raise WrongScore(f"{len(found)} results for {len(wanted)} rows")
        gaps = [self._difference(row, score) for row, score in zip(wanted, found, strict=True)]
        for row, score, gap in zip(wanted, found, gaps, strict=True):
            if not gap <= self.allowed(row):
                raise WrongScore(f"row {row} scores {score}, and {self.scores[row]} in-process")
        return max(gaps)

    def _difference(self, row: int, score: float | None) -> float:
        return math.inf if score is None else abs(score - self.scores[row])


def dtype_of(scorer: EndoRewardModel) -> str:
    """Return the name of the dtype that the model's weights have."""
    return str(next(scorer.model.parameters()).dtype).removeprefix("torch.")
