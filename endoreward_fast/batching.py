"""Which rows go through the model together, and what happens where memory has no room for them."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result")


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Positions of `lengths` in lists, longest rows first, so that rows of like length share a batch.

    A batch padded to its longest row holds at most `max_tokens` tokens, except that a row longer than that still
    runs, alone. Longest first: if memory is short, it is so at once.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: expected at least 1")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        count = max(1, max_tokens // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


def in_batches(
    run: Callable[[list[int]], Result], lengths: Sequence[int], max_tokens: int
) -> Iterator[tuple[list[int], Result | None]]:
    """(positions, run(positions)) of `batches`, every position once.

    Where memory runs out, the batch is halved, and so is what a batch may hold from then on, with one warning; a row
    that does not fit by itself comes with None.
    """
    left, budget = list(range(len(lengths))), max_tokens
    while left:
        done: set[int] = set()
        for batch in batches([lengths[i] for i in left], budget):
            places = [left[i] for i in batch]
            result = _if_it_fits(run, places)
            if result is None and len(places) > 1:
                if budget == max_tokens:
                    said = f"out of memory with max_tokens_per_batch={max_tokens}: it is halved, again if need be"
                    warnings.warn(said, stacklevel=2)
                budget = max(1, len(places) * lengths[places[0]] // 2)
                break
            done.update(places)
            yield places, result
        left = [i for i in left if i not in done]


def does_not_fit(tokens: int) -> str:
    """What is said of a row that comes with None."""
    return f"out of memory: {tokens} tokens do not fit by themselves"


def _if_it_fits(run: Callable[[list[int]], Result], places: list[int]) -> Result | None:
    """run(places), or None where memory ran out, with what the device's allocator had cached given back."""
    try:
        return run(places)
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:  # the CPU's allocator has no exception of its own
        if "DefaultCPUAllocator" not in str(error):
            raise
    # Not in the handler: the exception holds on to the tensors of every frame that it came through.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
