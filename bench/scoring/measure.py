"""Check every arm's numbers, choose its batch size, time the arms in interleaved rounds, and weigh them.

An arm is timed only if its scores agree with ours in float32, with every batch size that is tried. Scores in float32
must agree within its noise. In bfloat16 the arms round differently, so their gap to the float32 scores is bounded
loosely. Both gaps are reported.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from bench.harness import timing
from bench.prefixes import Processor
from bench.scoring.arms import OURS_WHOLE, Arm, Loaded, Score
from bench.scoring.rows import Row


class Weighed(NamedTuple):
    """What the process returns that measures an arm's memory."""

    extra_mib: float
    scores: list[float]


Weigh = Callable[[str, int], Weighed]
NOISE = {"float32": (1e-3, 1e-5), "bfloat16": (1.0, 0.02)}
"""nats, and share of the score, by which a score may differ from ours in float32"""


class WrongNumbers(Exception):
    """An arm's scores are not those of the others."""


class Watched:
    """A call that keeps its last result and the wall time of each call."""

    def __init__(self, call: Callable[[], list[float]]) -> None:
        self.call = call
        self.walls: list[float] = []
        self.found: list[float] = []

    def __call__(self) -> None:
        start = time.perf_counter()
        self.found = self.call()
        self.walls.append(time.perf_counter() - start)


def expected_scores(loaded: Loaded, rows: Sequence[Row], ours: Arm, size: int) -> list[float]:
    """Return the scores that every arm must give: ours, without shared prefixes."""
    return ours.load(loaded)(rows, size)


def gap(found: Sequence[float], expected: Sequence[float], dtype: str) -> float:
    """Return the largest difference, in nats. Raises WrongNumbers if a score differs by more than the noise."""
    if len(found) != len(expected):
        raise WrongNumbers(f"{len(found)} scores for {len(expected)} rows")
    apart = [abs(one - other) for one, other in zip(found, expected, strict=True)]
    nats, share = NOISE[dtype]
    for i, (difference, score) in enumerate(zip(apart, expected, strict=True)):
        allowed = nats + share * abs(score)
        if not difference <= allowed:  # a NaN is not
            raise WrongNumbers(f"row {i}: {found[i]:.4f}, and ours is {score:.4f}: {allowed:.4f} apart is allowed")
    return max(apart)


def tuned(score: Score, arm: Arm, rows: Sequence[Row], expected: Sequence[float], dtype: str) -> dict:
    """Return {"size", "unit", "tried": {size: processor seconds}, "gap"}: one checked pass for each batch size."""
    tried, apart, clock = {}, 0.0, Processor()
    for size in arm.sizes:
        watched = Watched(lambda size=size: score(rows, size))
        tried[size] = clock.seconds(watched)
        apart = max(apart, gap(watched.found, expected, dtype))
    return {"size": min(tried, key=tried.get), "unit": arm.unit, "tried": tried, "gap": apart}


def checked(
    name: str, arm: Arm, score: Score, rows: Sequence[Row], expected: Sequence[float], dtype: str, weigh: Weigh
) -> dict:
    """Return what is known of an arm before it is timed. Raises WrongNumbers if its scores are not `expected`.

    The batch size is chosen on the first half of the rows, to save time. All rows are checked in the process that
    measures memory.
    """
    half = -(-len(rows) // 2)
    found = tuned(score, arm, rows[:half], expected[:half], dtype)
    weighed = weigh(name, found["size"])
    apart = max(found["gap"], gap(weighed.scores, expected, dtype))
    return found | {"gap": apart, "extra_mib": weighed.extra_mib, "version": arm.version}


def run_case(
    dtype: str, loaded: Loaded, arms: Mapping[str, Arm], rows: Sequence[Row], expected: Sequence[float], rounds: int,
    weigh: Weigh,
) -> dict:  # fmt: skip
    """Return the record of one dtype: every arm with its times; `absent` and `refused` arms with the reason.

    `weigh` returns peak memory and scores of an arm, by its name and batch size.
    """
    absent = {name: arm.missing for name, arm in arms.items() if arm.missing is not None}
    found: dict[str, dict] = {}
    refused: dict[str, str] = {}
    calls: dict[str, Watched] = {}
    for name in (name for name in arms if name not in absent):
        score = arms[name].load(loaded)
        score(rows[:1], arms[name].sizes[0])  # what an arm does once only
        try:
            found[name] = checked(name, arms[name], score, rows, expected, dtype, weigh)
        except WrongNumbers as error:
            refused[name] = str(error)
            continue
        calls[name] = Watched(lambda score=score, size=found[name]["size"]: score(rows, size))
    times = timing.interleave(calls, rounds, Processor())
    tokens = sum(row.tokens for row in rows)
    for name, seconds in times.items():
        spread = timing.spread(seconds, times[OURS_WHOLE])
        found[name]["gap"] = max(found[name]["gap"], gap(calls[name].found, expected, dtype))
        found[name] |= spread | {
            "tokens_per_s": tokens / spread["median_s"],
            "tokens_per_s_low": tokens / spread["high_s"],
            "tokens_per_s_high": tokens / spread["low_s"],
            "wall": timing.spread(calls[name].walls, calls[OURS_WHOLE].walls),
        }
    return {
        "dtype": dtype, "rows": len(rows), "tokens": tokens, "scored": sum(len(row.completion) for row in rows),
        "distinct": distinct(rows), "rounds": rounds, "threads": torch.get_num_threads(),
        "arms": found, "absent": absent, "refused": refused,
    }  # fmt: skip


def distinct(rows: Sequence[Row]) -> int:
    """Return the number of distinct prefixes: the tokens that have to be read. A row's last token need not be."""
    return len({tuple(row.ids[:stop]) for row in rows for stop in range(1, row.tokens)})
