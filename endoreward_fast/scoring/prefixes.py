"""Which tokens rows have in common, and which of them are worth one pass of their own.

Rows form a trie: a path from its root is a prefix, and a branch is where rows part. A prefix that saves enough tokens
becomes a `Segment`. It runs once, and the rest of its rows runs behind its keys and values (see shared.py). Prefixes
nest: a system prompt, a question behind it, an answer behind that. A row that is a prefix of another row (an equal row,
a judge's second reply) needs no pass: in a causal model, its states are among the other row's states.

Segments run level by level, and those of one level run together in batches, because one prompt at a time is slower than
no sharing if prompts are short (RM-Bench: 0.88). Each level costs a pass, and copies its prefix for each row.
A prefix therefore has to save LEAST_SAVED tokens and to be LEAST_LENGTH long, and there are at most DEPTH levels.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

LEAST_LENGTH, LEAST_SAVED, DEPTH = 8, 24, 4


class Segment(NamedTuple):
    """Tokens start ... stop of a row, which run behind the tokens before them."""

    row: int
    """the row that the tokens are taken from: any row with this prefix"""
    start: int
    stop: int
    behind: tuple["Segment", ...] = ()
    """the segments that go on from here; none: the row ends here"""
    riders: tuple[int, ...] = ()
    """rows that are a prefix of this one, where it ends"""

    @property
    def alone(self) -> bool:
        """Whether the row shares nothing."""
        return not (self.start or self.behind or self.riders)

    def rows(self) -> list[int]:
        """All rows that end here or behind."""
        below = [i for segment in self.behind for i in segment.rows()]
        return below if self.behind else [self.row, *self.riders]


Leaf = tuple[int, tuple[int, ...]]
"""a row that is no prefix of another, and its riders"""
Part = tuple[list[Leaf], list[int]]
"""leaves in sorted order, and what each of them but the first has in common with the one before it"""


def plan(rows: Sequence[list[int]], chosen: Iterable[int] | None = None, least: int = LEAST_LENGTH) -> list[Segment]:
    """The roots of the trie of rows (the `chosen` ones). Each row ends in one segment, or rides on it."""
    order = sorted(range(len(rows)) if chosen is None else chosen, key=rows.__getitem__)
    common = [_common(rows[one], rows[other]) for one, other in pairwise(order)]
    leaves: list[Leaf] = []
    shared: list[int] = []
    riders: list[int] = []
    for place, row in enumerate(order):
        if place < len(common) and common[place] == len(rows[row]):
            riders.append(row)  # sorting puts a prefix right before the rows that begin with it
            continue
        first = place - len(riders)
        leaves.append((row, tuple(riders)))
        shared.append(common[first - 1] if first else 0)
        riders = []
    return [segment for part in _parts(leaves, shared, 0) for segment in _segments(part, rows, 0, least, DEPTH)]


def _segments(part: Part, rows: Sequence[list[int]], start: int, least: int, depth: int) -> list[Segment]:
    """The segments of rows that have `start` tokens behind them."""
    found, left = [], [part]
    while left:
        leaves, shared = left.pop()
        length = min(shared[1:], default=0)
        if len(leaves) == 1 or depth == 1:
            found += [Segment(row, start, len(rows[row]), (), riders) for row, riders in leaves]
        elif length - start >= least and (length - start) * (len(leaves) - 1) >= LEAST_SAVED:
            behind = [s for p in _parts(leaves, shared, length) for s in _segments(p, rows, length, least, depth - 1)]
            found.append(Segment(leaves[0][0], start, length, tuple(behind)))
        else:
            left += reversed(_parts(leaves, shared, length))
    return found


def _parts(leaves: list[Leaf], shared: list[int], length: int) -> list[Part]:
    """Rows apart wherever neighbours have no more than `length` tokens in common."""
    cuts = [i for i in range(1, len(leaves)) if shared[i] <= length]
    return [(leaves[a:b], shared[a:b]) for a, b in pairwise([0, *cuts, len(leaves)])] if leaves else []


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix, by halving: slices compare much faster than tokens."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
