"""Run segments level by level: the prefixes of a level together in batches, then the segments behind each batch.

The tokens held (keys, values and states of the levels above) count in the token budget beside the tokens of a batch,
and so does a row's own copy of its prefix. Prefixes take at most half of the budget that is left, so that rows fit
behind them. What a batch of prefixes holds is dropped before the next one runs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from .batching import Budget, Room, in_batches
from .past import Past
from .prefixes import Segment

Result = TypeVar("Result")
Found = TypeVar("Found")
Held = list[Past]
"""of each model, the rows that were read in one batch"""


class Levels(Generic[Result]):
    """Results of the rows that end in segments.

    read      (segments, what is held above, the row of it that each segment follows) -> what they hold then
    finish    (segments, what they hold) -> results of the rows that end in them, in the order of `Segment.rows`
    """

    def __init__(
        self, read: Callable[[Sequence[Segment], Held | None, list[int]], Held],
        finish: Callable[[Sequence[Segment], Held], list[Result]], budget: Budget, room: Room,
    ) -> None:  # fmt: skip
        self.read, self.finish = read, finish
        self.budget, self.room = budget, room

    def results(
        self, segments: Sequence[Segment], above: Held | None = None, parents: Sequence[int] = ()
    ) -> Iterator[tuple[list[int], list[Result] | None]]:
        """(rows, their results), every row once; None in place of results where memory has no room for a segment."""
        left = max(1, self.budget.held - sum(past.size for past in above or ()))
        parents = parents or [0] * len(segments)
        prefixes = [i for i, segment in enumerate(segments) if segment.behind]
        ends = [i for i, segment in enumerate(segments) if not segment.behind]

        def read(places: list[int]) -> Held:
            return self.read([segments[i] for i in places], above, [parents[i] for i in places])

        def finish(places: list[int]) -> list[Result]:
            return self.finish([segments[i] for i in places], read(places))

        for places, held in self._batches(read, segments, prefixes, max(1, left // 2)):
            here = [segments[i] for i in places]
            if held is None:
                yield [row for segment in here for row in segment.rows()], None
                continue
            behind = [(n, segment) for n, prefix in enumerate(here) for segment in prefix.behind]
            yield from self.results([segment for _, segment in behind], held, [n for n, _ in behind])
            del held
        for places, found in self._batches(finish, segments, ends, left):
            yield [row for i in places for row in segments[i].rows()], found

    def _batches(
        self, run: Callable[[list[int]], Found], segments: Sequence[Segment], chosen: list[int], most: int
    ) -> Iterator[tuple[list[int], Found | None]]:
        lengths = [segments[i].stop - segments[i].start for i in chosen]
        starts = [segments[i].start for i in chosen]
        for places, found in in_batches(
            lambda batch: run([chosen[i] for i in batch]), lengths, self.budget.within(most), self.room, behind=starts
        ):
            yield [chosen[i] for i in places], found
            found = None
