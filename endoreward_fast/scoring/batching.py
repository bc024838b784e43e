"""Group rows into batches, and halve the batches when memory runs out."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch

Result = TypeVar("Result")
OUT_OF_MEMORY = ("DefaultCPUAllocator", "error: out of memory", "Triton Error [CUDA]: out of memory", "_ALLOC_FAILED")
"""parts of RuntimeError messages that mean out of memory: the CPU allocator, the CUDA driver, Triton, cuBLAS, cuDNN"""


class Budget(NamedTuple):
    """How many tokens a batch may have, padding included."""

    held: int
    """in memory: those that a pass computes, and those of shared prefixes behind which it computes them"""
    computed: int
    """by one pass"""
    fixed: int = 48
    """What a pass costs whatever its tokens, in tokens: more padding than that is not worth one pass fewer. With
    48, RM-Bench has 2.6% of padding"""

    @classmethod
    def of(cls, asked: int | None, device: torch.device) -> "Budget":
        """Return the budget for the option max_tokens_per_batch. None: what suits the device.

        On a CPU, larger passes are slower: the allocator returns their memory and must fetch it anew.
        """
        usual = ON_CPU if device.type == "cpu" else ELSEWHERE
        return usual if asked is None else cls(asked, asked)

    def within(self, tokens: int | None) -> "Budget":
        """Return this budget with at most `tokens` tokens; None leaves it as it is."""
        return self if tokens is None else Budget(min(tokens, self.held), min(tokens, self.computed), self.fixed)


ON_CPU, ELSEWHERE = Budget(8192, 2048), Budget(8192, 8192)


def batches(
    lengths: Sequence[int],
    budget: Budget,
    kind: Callable[[int], object] = lambda length: None,
    behind: Sequence[int] | None = None,
) -> Iterator[list[int]]:
    """Yield batches as lists of positions in `lengths`. Rows of similar length share a batch.

    A batch, padded to its longest row, computes at most `budget.computed` tokens. A longer row gets a batch of its own.
    Of all ways to cut the rows, sorted by length, into batches, this one has the fewest tokens, padding and
    `budget.fixed` for each batch included. The longest rows come first, so that a lack of memory shows at once. All
    rows of a batch have the same `kind(length)`. `behind` is the number of tokens that are held before each row. They
    count in `budget.held`, like the row's own.
    """
    if min(budget.held, budget.computed) < 1:
        raise ValueError(f"{budget}: expected at least 1 token")
    held = [0] * len(lengths) if behind is None else behind
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], -held[i]))
    for _, alike in groupby(order, key=lambda i: kind(lengths[i])):
        yield from _cheapest(list(alike), lengths, held, budget)


def _cheapest(order: list[int], lengths: Sequence[int], held: Sequence[int], budget: Budget) -> Iterator[list[int]]:
    """Cut rows, the longest first, into batches: least[n] is the least cost of the first n rows, start[n] the place
    where the last of their batches begins."""
    before = np.array([held[i] for i in order])
    least = np.full(len(order) + 1, np.inf)
    least[0] = 0
    start = np.zeros(len(order) + 1, dtype=int)
    for place, row in enumerate(order):
        longest = max(1, lengths[row])
        count = np.arange(1, max(1, min(budget.computed, budget.held) // longest) + 1)[: len(order) - place]
        widest = np.maximum.accumulate(before[place : place + len(count)])
        count = count[(count == 1) | (count * (longest + widest) <= budget.held)]
        cost = least[place] + count * longest + budget.fixed
        stops = place + count
        better = cost <= least[stops]  # of equal costs, the one whose first batches are full
        least[stops[better]], start[stops[better]] = cost[better], place
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(int(start[cuts[-1]]))
    for one, other in pairwise(reversed(cuts)):
        yield order[one:other]


class Room:
    """The number of tokens that a batch may hold: it shrinks when memory runs out.

    Each model has one, so that later calls do not run out of memory again.
    """

    def __init__(self) -> None:
        self.tokens: int | None = None
        """including padding; None: memory has not run out yet"""

    def ran_out(self, tokens: int, budget: Budget) -> None:
        """Limit later batches to half of `tokens`, which did not fit. Warns the first time."""
        if self.tokens is None:
            said = f"out of memory with max_tokens_per_batch={budget.held}: batches are halved until they fit"
            warnings.warn(said, stacklevel=3)
        self.tokens = max(1, tokens // 2)


def in_batches(
    run: Callable[[list[int]], Result],
    lengths: Sequence[int],
    budget: Budget,
    room: Room,
    kind: Callable[[int], object] = lambda length: None,
    behind: Sequence[int] | None = None,
) -> Iterator[tuple[list[int], Result | None]]:
    """Run every batch, and yield (positions, run(positions)). Each position occurs once.

    If memory runs out, the batch is halved, and `room` limits all later batches. A row that does not fit alone is
    yielded with None.
    """
    left = list(range(len(lengths)))
    while left:
        done: set[int] = set()
        held = None if behind is None else [behind[i] for i in left]
        for batch in batches([lengths[i] for i in left], budget.within(room.tokens), kind, held):
            places = [left[i] for i in batch]
            result = _if_it_fits(run, places)
            if result is None and len(places) > 1:
                width = lengths[places[0]] + (0 if behind is None else max(behind[i] for i in places))
                room.ran_out(len(places) * width, budget)
                break
            done.update(places)
            yield places, result
            result = None  # it may hold memory that the next batch needs
        left = [i for i in left if i not in done]


def does_not_fit(tokens: int) -> str:
    """Return the error of a row for which `in_batches` yields None."""
    return (
        f"out of memory: {tokens} tokens do not fit even alone; set max_length and truncate (--max-length, --truncate) "
        "to cut the row"
    )


def _if_it_fits(run: Callable[[list[int]], Result], places: list[int]) -> Result | None:
    """Return run(places), or None if memory ran out. In that case the cache of CUDA's allocator is emptied."""
    try:
        return run(places)
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if not any(said in str(error) for said in OUT_OF_MEMORY):
            raise
    # Outside the handler, because the exception keeps the tensors of every frame in its traceback alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
