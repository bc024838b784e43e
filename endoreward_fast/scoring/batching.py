"""Which rows go through the model together, and what happens where memory has no room for them."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result")
OUT_OF_MEMORY = ("DefaultCPUAllocator", "error: out of memory", "Triton Error [CUDA]: out of memory", "_ALLOC_FAILED")
"""said by what has no exception of its own for it: the CPU's allocator, the driver, a kernel's launch, cuBLAS, cuDNN"""

EVEN, ENOUGH = 0.8, 256
"""Rows behind others differ more in length. From ENOUGH tokens on, a batch takes no row below EVEN of its longest: four
prompts of RM-Bench were padded by 29% without this."""


def batches(
    lengths: Sequence[int],
    max_tokens: int,
    kind: Callable[[int], object] = lambda length: None,
    behind: Sequence[int] | None = None,
) -> Iterator[list[int]]:
    """Positions of `lengths` in lists, longest rows first, so that rows of like length share a batch.

    A batch padded to its longest row holds at most `max_tokens` tokens, except that a row longer than that still
    runs, alone. Longest first: if memory is short, it is so at once. Rows of a batch have one `kind(length)`.
    `behind` is how many tokens are held before each row; they count as the row's own do, at the batch's most.
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
    """What a model's batches may hold, as memory has shown: where it ran out once, all later ones are smaller.

    It belongs to the model and the device it is on: without it every call would run out of memory anew.
    """

    def __init__(self) -> None:
        self.tokens: int | None = None
        """padding included; None: it has not run out yet"""

    def within(self, max_tokens: int) -> int:
        """What a batch may hold, of the `max_tokens` that are asked for."""
        return max_tokens if self.tokens is None else min(self.tokens, max_tokens)

    def ran_out(self, tokens: int, max_tokens: int) -> None:
        """A batch of `tokens` did not fit: later ones hold half of it. One warning, the first time."""
        if self.tokens is None:
            said = f"out of memory with max_tokens_per_batch={max_tokens}: it is halved, again if need be"
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
    """(positions, run(positions)) of `batches`, every position once.

    Where memory runs out, the batch is halved, and `room` keeps what a batch may hold from then on; a row that does not
    fit by itself comes with None.
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
    """What is said of a row that comes with None."""
    return (
        f"out of memory: {tokens} tokens do not fit by themselves; max_length with truncate (--max-length, --truncate) "
        "would cut them"
    )


def _if_it_fits(run: Callable[[list[int]], Result], places: list[int]) -> Result | None:
    """run(places), or None where memory ran out, with what the device's allocator had cached given back."""
    try:
        return run(places)
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if not any(said in str(error) for said in OUT_OF_MEMORY):
            raise
    # Not in the handler: the exception holds on to the tensors of every frame that it came through.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
