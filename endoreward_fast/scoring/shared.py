"""Run segments level by level: the prefixes of a level together in batches, then the segments behind each batch.

The tokens held (keys, values and states of the levels above) count in the token budget beside the tokens of a batch.
So does a copy of its prefix for each row, although not every model needs it (model/continuing.py). Prefixes take at
most half of the budget that is left, so that rows fit behind them. What a batch of prefixes holds is dropped before the
next one runs.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .batching import Budget, Room, does_not_fit, in_batches
from .evaluating import evaluating
from .past import Past
from .prefixes import LEAST_LENGTH, Segment, plan
from .scorer import Reader

Result = TypeVar("Result")
Found = TypeVar("Found")
Held = list[Past]
"""of each model, the rows that were read in one batch"""


class Shared:
    """Rows of tokens, which models read so that a prefix of several rows is read once.

    Rows whose length changes their rotary frequencies share nothing, and neither do rows under a budget that holds no
    prefix: max_tokens_per_batch=1 runs each row alone.

    tokens    of each row, as far as their states are needed
    lengths   of each row, as it is read whole
    """

    def __init__(
        self, models: Sequence[Reader], tokens: list[list[int]], lengths: Sequence[int], budget: Budget, room: Room
    ) -> None:  # fmt: skip
        self.models, self.tokens, self.lengths = models, tokens, lengths
        self.budget, self.room = budget, room
        self.roots = self._plan()

    def results(
        self, run: Callable[[list[int]], list[Result]], finish: Callable[[Sequence[Segment], Held], list[Result]]
    ) -> Iterator[tuple[list[int], list[Result] | None]]:
        """(rows, their results), every row once; None in place of results where memory has no room for a row.

        run       rows -> their results, read whole
        finish    (segments, what they hold) -> results of the rows that end in them, in the order of `Segment.rows`
        """
        sharing = {row for segment in self.roots for row in segment.rows()}
        alone = [i for i in range(len(self.lengths)) if i not in sharing]
        for places, results in self._levels(finish, self.roots, None, [0] * len(self.roots)):
            if results is None:
                alone += places  # it may fit where no cache is held
            else:
                yield places, results
        for places, results in in_batches(
            lambda batch: run([alone[i] for i in batch]), [self.lengths[i] for i in alone], self.budget, self.room,
            self._frequencies,
        ):  # fmt: skip
            yield [alone[i] for i in places], results

    def states(self) -> Tensor | None:
        """Return the first model's states of all rows, padded on the right: (B, longest, D). None: nothing is shared.

        Raises torch.OutOfMemoryError if memory has no room for a row.
        """
        if not self.roots:
            return None

        def ends(segments: Sequence[Segment], held: Held) -> list[Tensor]:
            first = held[0].first
            return [
                held[0].hidden[n, first[n] : first[n] + self.lengths[row]]
                for n, segment in enumerate(segments) for row in segment.rows()
            ]  # fmt: skip

        def whole(rows: list[int]) -> list[Tensor]:
            segments = [Segment(row, 0, self.lengths[row]) for row in rows]
            return ends(segments, self._read(segments, None, [], keep=False))

        found: dict[int, Tensor] = {}
        for rows, states in self.results(whole, ends):
            if states is None:
                raise torch.OutOfMemoryError(does_not_fit(self.lengths[rows[0]]))
            found.update(zip(rows, states, strict=True))
        return pad_sequence([found[row] for row in range(len(self.lengths))], batch_first=True)

    def _frequencies(self, length: int) -> list[tuple[int, ...]]:
        return [model.positions.frequencies(length) for model in self.models]

    def _plan(self) -> list[Segment]:
        """Return the roots of what rows share."""
        usual = self._frequencies(1)
        alike = [i for i, length in enumerate(self.lengths) if self._frequencies(length) == usual]
        if len(alike) < 2 or self.budget.held < LEAST_LENGTH:
            return []
        shared = [segment for segment in plan(self.tokens, alike) if not segment.alone]
        if shared and any(model.obstacle_to_sharing() is not None for model in self.models):
            # A row that is a prefix of another, such as the next reply to a judge's question, needs no cache.
            apart = plan(self.tokens, alike, least=sys.maxsize) if all(m.states_last() for m in self.models) else []
            shared = [segment for segment in apart if not segment.alone]
        return shared

    def _read(self, segments: Sequence[Segment], above: Held | None, parents: list[int], keep: bool) -> Held:
        """Read segments behind the rows `parents` of what is held above, with every model."""
        lengths = [segment.stop - segment.start for segment in segments]
        tokens = [self.tokens[s.row][s.start : s.stop] for s in segments]
        fill = self.tokens[segments[0].row][:1]
        ids = torch.tensor([row + fill * (max(lengths) - len(row)) for row in tokens], dtype=torch.long)
        held = []
        for i, model in enumerate(self.models):
            given, real, chosen = (t.to(model.device) for t in (ids, torch.tensor(lengths), torch.tensor(parents)))
            with evaluating(model):
                held.append(model.read_on(given, real, None if above is None else above[i], chosen, keep=keep))
        return held

    def _levels(
        self, finish: Callable[[Sequence[Segment], Held], list[Result]], segments: Sequence[Segment],
        above: Held | None, parents: Sequence[int],
    ) -> Iterator[tuple[list[int], list[Result] | None]]:  # fmt: skip
        """(rows, their results) of the rows that end in segments; None where memory has no room for a segment."""
        left = max(1, self.budget.held - sum(past.size for past in above or ()))
        prefixes = [i for i, segment in enumerate(segments) if segment.behind]
        ends = [i for i, segment in enumerate(segments) if not segment.behind]

        def read(places: list[int], keep: bool = True) -> Held:
            return self._read([segments[i] for i in places], above, [parents[i] for i in places], keep)

        def finished(places: list[int]) -> list[Result]:
            return finish([segments[i] for i in places], read(places, keep=False))

        for places, held in self._batches(read, segments, prefixes, max(1, left // 2)):
            here = [segments[i] for i in places]
            if held is None:
                yield [row for segment in here for row in segment.rows()], None
                continue
            behind = [(n, segment) for n, prefix in enumerate(here) for segment in prefix.behind]
            yield from self._levels(finish, [segment for _, segment in behind], held, [n for n, _ in behind])
            del held
        for places, found in self._batches(finished, segments, ends, left):
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
