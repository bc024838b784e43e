"""Which rows go through the model together."""

from collections.abc import Iterator, Sequence


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
