"""The readings of a row: the row itself, and what signals need besides, encoded and put together again.

A reading is a row of tokens of its own. It is scored in the same batches as the rows, behind the same shared prefixes,
and may finish before or after its row. Signals of one reading are computed in its batch. Signals of several readings
are computed here, from the statistics of their scored tokens, when the last reading of the row is done.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import EndoRewardError
from ..signals import NEEDS, SIGNALS, TokenStats, logprob
from ..text import readings as text
from ..text.encoding import Encoded, Encoder
from ..text.rows import Row
from .batching import does_not_fit
from .options import ScoreOptions
from .results import RowScore

ANSWER_SPAN = "answer_span"
_ANSWERED = (text.REFERENCE, ANSWER_SPAN)
KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        ANSWER_SPAN: (ANSWER_SPAN,),
        "reference_answer": _ANSWERED,
        "direct_answer": _ANSWERED,
        "privileged": (text.PRIVILEGED,),
    }
)
"""{need of signals: the keys of a row that meet it}"""
READ: Mapping[str, Callable[[Encoder, Row, Encoded], Encoded]] = MappingProxyType(
    {
        "reference_answer": lambda encoder, row, encoded: text.after_thought(encoder, row),
        "direct_answer": lambda encoder, row, encoded: text.without_thought(encoder, row),
        "privileged": text.privileged,
    }
)
"""{need of signals: how its reading is encoded}"""


def prepare(encoder: Encoder, row: Row, encoded: Encoded, options: ScoreOptions, vocab_size: int) -> Encoded:
    """Return the row with the span and the readings that its signals need, or why it lacks them."""
    others: dict[str, Encoded] = {}
    unmet: dict[str, str] = {}
    answer: tuple[int, int] | None = None
    for need, named in options.row_needs.items():
        if any(row.get(key) is None for key in KEYS[need]):
            if named:
                unmet[need] = NEEDS[need].lacking
            continue
        try:
            if need == ANSWER_SPAN:
                answer = text.answer_span(encoder, row, encoded)
            else:
                others[need] = READ[need](encoder, row, encoded)
                refuse_unknown_ids(others[need], vocab_size)
        except EndoRewardError as error:
            unmet[need] = str(error)
            others.pop(need, None)
    return replace(encoded, answer=answer, others=others, unmet=unmet)


def refuse_unknown_ids(encoded: Encoded, vocab_size: int) -> None:
    """Raise EndoRewardError if a token is not in a vocabulary of this size."""
    odd = next((i for i in encoded.input_ids if not 0 <= i < vocab_size), None)
    if odd is not None:
        raise EndoRewardError(f"token id {odd} is not in the model's vocabulary of {vocab_size}")


def answer_mask(batch: Sequence[Encoded], offsets: Sequence[int], scored: Tensor) -> Tensor | None:
    """Return the scored tokens of each row's final answer, bool like `scored` (B, T); None if no row has a span."""
    if all(encoded.answer is None for encoded in batch):
        return None
    marked = torch.zeros_like(scored)
    for i, (encoded, offset) in enumerate(zip(batch, offsets, strict=True)):
        if encoded.answer is not None:
            start, stop = encoded.answer
            marked[i, offset + start : offset + stop] = True
    return marked & scored


def kept_stats(
    batch: Sequence[Encoded], offsets: Sequence[int], own: Sequence[bool], stats: TokenStats | None,
    given: Mapping[str, Tensor],
) -> list[tuple[TokenStats | None, Mapping[str, Tensor]]]:  # fmt: skip
    """Return (statistics, inputs of signals) of each reading's scored tokens, (1, T) on the CPU.

    own   whether the reading is the row itself. Of a row without other readings, nothing is kept
    """
    keep = [not mine or bool(encoded.others) for encoded, mine in zip(batch, own, strict=True)]
    if stats is None or not any(keep):
        return [(None, {})] * len(batch)
    fields = [field.cpu() for field in stats if isinstance(field, Tensor)]
    inputs = {name: value.cpu() for name, value in given.items()}
    found: list[tuple[TokenStats | None, Mapping[str, Tensor]]] = []
    for i, (encoded, offset) in enumerate(zip(batch, offsets, strict=True)):
        part = slice(offset + encoded.prompt_length, offset + len(encoded.input_ids))
        kept = TokenStats._make([*(x[i : i + 1, part] for x in fields), *stats[-2:]]) if keep[i] else None
        found.append((kept, {name: value[i : i + 1, part] for name, value in inputs.items()} if keep[i] else {}))
    return found


class Read(NamedTuple):
    """What a batch gives for one reading."""

    score: RowScore | None
    """of the row itself; None for its other readings"""
    stats: TokenStats | None
    """(1, T), on the CPU, of the tokens from prompt_length on; None for a row without other readings"""
    given: Mapping[str, Tensor] = MappingProxyType({})
    """inputs of signals that the batch knows, (1, T), on the CPU"""


class Readings:
    """All readings of rows: first the rows, in their order, then the others."""

    def __init__(self, rows: Sequence[Encoded], options: ScoreOptions) -> None:
        self.options = options
        self.all: list[Encoded] = list(rows)
        self._of: list[tuple[int, str | None]] = [(i, None) for i in range(len(rows))]
        """(row, need) of each reading"""
        for i, row in enumerate(rows):
            self.all += row.others.values()
            self._of += [(i, need) for need in row.others]
        self._left = [1 + len(row.others) for row in rows]
        self._found: dict[int, dict[str | None, Read | None]] = {}

    def is_row(self, place: int) -> bool:
        """Return whether this reading is the row itself."""
        return self._of[place][1] is None

    def add(self, places: Sequence[int], found: Sequence[Read | None]) -> Iterator[tuple[int, RowScore]]:
        """Yield (row, its score) of each row whose last reading is among these. None: no memory for a reading."""
        for place, read in zip(places, found, strict=True):
            row, need = self._of[place]
            self._found.setdefault(row, {})[need] = read
            self._left[row] -= 1
            if not self._left[row]:
                yield row, self._joined(self.all[row], self._found.pop(row))

    def now(self) -> tuple[str, ...]:
        """Return the signals that need no other reading of the row."""
        return tuple(name for name in self.options.signals if not READ.keys() & set(SIGNALS[name].needs))

    def met(self, place: int, values: Mapping[str, float]) -> dict[str, float]:
        """Return those of the signals whose needs the row at `place` meets."""
        lacking = set() if self.all[place].answer is not None else {ANSWER_SPAN}
        return {name: value for name, value in values.items() if not lacking & set(SIGNALS[name].needs)}

    def _joined(self, encoded: Encoded, found: dict[str | None, Read | None]) -> RowScore:
        read = found.pop(None)
        if read is None or read.score is None:
            fits = does_not_fit(len(encoded.input_ids))
            return RowScore(None, encoded.num_scored, None, encoded.flags, fits)
        score = read.score
        if score.error is not None or not (found or encoded.unmet):
            return score
        unmet = dict(encoded.unmet)
        unmet |= {
            need: does_not_fit(len(encoded.others[need].input_ids))
            for need, other in found.items()
            if need is not None and other is None
        }
        values = dict(score.signals or {})
        if read.stats is not None:
            given = {need: other.stats for need, other in found.items() if need is not None and other is not None}
            values |= self._of_several(read.stats, read.given, given)
        errors = {
            name: unmet[need]
            for name in self.options.signals
            if (need := next((need for need in SIGNALS[name].needs if need in unmet), None)) is not None
        }
        named = {name: values[name] for name in self.options.signals if name in values}
        return replace(score, signals=named, signal_errors=errors or None)

    def _of_several(
        self, stats: TokenStats, known: Mapping[str, Tensor], others: Mapping[str, TokenStats | None]
    ) -> dict[str, float]:
        """Return the signals of several readings."""
        given: dict[str, Tensor | TokenStats] = dict(known)
        for need, other in others.items():
            if other is not None:
                given[need] = logprob(other) if NEEDS[need].kind is Tensor else other
        reference = known.get("reference")
        rest = {need: value for need, value in given.items() if need != "reference"}
        return {
            name: SIGNALS[name].score(stats, reference, **rest).item()
            for name in self.options.signals
            if READ.keys() & set(SIGNALS[name].needs) and set(SIGNALS[name].needs) <= given.keys()
        }
