"""Group rows into batches, and halve the batches when memory runs out."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result")
OUT_OF_MEMORY = ("DefaultCPUAllocator", "error: out of memory", "Triton Error [CUDA]: out of memory", "_ALLOC_FAILED")
"""parts of RuntimeError messages that mean out of memory: the CPU allocator, the CUDA driver, Triton, cuBLAS, cuDNN"""

EVEN, ENOUGH = 0.8, 256
"""Rows behind others differ more in length. From ENOUGH tokens on, a batch takes no row below EVEN of its longest: four
prompts of RM-Bench were padded by 29% without this."""


def batches(
    lengths: Sequence[int],
    max_tokens: int,
    kind: Callable[[int], object] = lambda length: None,
    behind: Sequence[int] | None = None,
) -> Iterator[list[int]]:
    """Yield batches as lists of positions in `lengths`. Rows of similar length share a batch.

    A batch, padded to its longest row, holds at most `max_tokens` tokens. A longer row gets a batch of its own. The
    longest rows come first, so that a lack of memory shows at once. All rows of a batch have the same `kind(length)`.
    `behind` is the number of tokens that are held before each row. They count like the row's own.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: expected at least 1")
    held = [0] * len(lengths) if behind is None else behind
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], -held[i]))
    batch: list[int] = []
    most = 0
    for i in order:
        widest = max(most, held[i])
        if batch and (
            (len(batch) + 1) * max(1, lengths[batch[0]] + widest) > max_tokens
            or kind(lengths[i]) != kind(lengths[batch[0]])
            or (behind and len(batch) * lengths[batch[0]] >= ENOUGH and lengths[i] < EVEN * lengths[batch[0]])
        ):
            yield batch
            batch, widest = [], held[i]
        batch.append(i)
        most = widest
    if batch:
        yield batch


class Room:
    """The number of tokens that a batch may hold: it shrinks when memory runs out.

    Each model has one, so that later calls do not run out of memory again.
    """

    def __init__(self) -> None:
        self.tokens: int | None = None
        """including padding; None: memory has not run out yet"""

    def within(self, max_tokens: int) -> int:
        """Return the number of tokens that a batch may hold, at most `max_tokens`."""
        return max_tokens if self.tokens is None else min(self.tokens, max_tokens)

    def ran_out(self, tokens: int, max_tokens: int) -> None:
        """Limit later batches to half of `tokens`, which did not fit. Warns the first time."""
        if self.tokens is None:
            said = f"out of memory with max_tokens_per_batch={max_tokens}: batches are halved until they fit"
            warnings.warn(said, stacklevel=3)
        self.tokens = max(1, tokens // 2)


def in_batches(
    run: Callable[[list[int]], Result],
    lengths: Sequence[int],
    max_tokens: int,
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
        for batch in batches([lengths[i] for i in left], room.within(max_tokens), kind, held):
            places = [left[i] for i in batch]
            result = _if_it_fits(run, places)
            if result is None and len(places) > 1:
                width = lengths[places[0]] + (0 if behind is None else max(behind[i] for i in places))
                room.ran_out(len(places) * width, max_tokens)
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
