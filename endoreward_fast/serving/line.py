"""The requests whose rows wait, and whose turn it is.

Requests get their turn by deficit round robin (Shreedhar and Varghese, 1996): in each turn a request may spend 1/TURNS
of a round's tokens more, and it keeps what it has not spent. A request with many rows or a huge row therefore waits for
its own tokens, and the requests behind it do not.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from traceback import clear_frames
from typing import NamedTuple

from ..scoring.options import ScoreOptions
from ..scoring.results import RowScore
from ..text.encoding import Encoded

TURNS = 16
"""Turns that a round has room for. With the usual 8192 tokens, a turn has 512: one or two usual rows"""
OF_PASS = ("alpha", "reduction", "gamma", "floor", "per_token", "texts", "entropy", "signals", "named")
"""options that rows of one round have in common; the others matter to the tokens of a row alone"""


class Waiting(NamedTuple):
    """A row that waits for a round."""

    position: int
    """in the request"""
    row: Encoded
    prompt: int
    """a hash of the prompt's tokens: rows with the same prompt share it"""

    @classmethod
    def of(cls, position: int, row: Encoded) -> "Waiting":
        """Return the row at a position in its request."""
        return cls(position, row, hash(tuple(row.input_ids[: row.prompt_length])))


class Asked:
    """The rows of one request. `future` gets the results, in their order."""

    def __init__(self, rows: int, options: ScoreOptions) -> None:
        self.rows, self.options = rows, options
        self.kind = tuple(getattr(options, name) for name in OF_PASS)
        self.future: Future[list[RowScore]] = Future()
        self.since = time.monotonic()
        self.tokens = 0
        """of all rows, once they are encoded"""
        self.waiting: deque[Waiting] = deque()
        self.credit = 0
        """tokens that it may spend"""
        self.has_turn = False
        """whether its turn goes on in the next round"""
        self.begun = False
        self._found: dict[int, RowScore] = {}

    @property
    def over(self) -> bool:
        """Whether nobody waits for the results."""
        return self.future.done()

    def add(self, position: int, found: RowScore) -> None:
        """Take the result of a row. The last one completes the request."""
        self._found[position] = found
        if len(self._found) == self.rows:
            with suppress(InvalidStateError):  # it was cancelled meanwhile
                self.future.set_result([self._found[i] for i in range(self.rows)])

    def fail(self, error: BaseException) -> None:
        """End the request with an error: an Exception, because others would end the event loop that raises it."""
        # The traceback keeps the variables of every frame alive: tensors, and this request, which keeps the error.
        clear_frames(error.__traceback__)
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        raised = error
        if isinstance(error, StopIteration) or not isinstance(error, Exception):  # tokenizers' panics, say
            raised = RuntimeError(f"{type(error).__name__}: {error}")
            raised.__cause__ = error
        with suppress(InvalidStateError):
            self.future.set_exception(raised)


Round = list[tuple[Asked, Waiting]]


class Line:
    """Requests in the order of their turns. Whoever calls its methods holds a lock. Each takes a short time."""

    def __init__(self) -> None:
        self.tokens = 0
        """of all rows that wait"""
        self._requests: OrderedDict[Asked, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, asked: Asked, waiting: Sequence[Waiting]) -> None:
        """Put a request with its rows at the end."""
        asked.waiting.extend(waiting)
        self.tokens += _tokens(waiting)
        self._requests[asked] = None

    def drop(self, asked: Asked) -> None:
        """Take out a request, if it is in line."""
        self._requests.pop(asked, None)
        self.tokens -= _tokens(asked.waiting)
        asked.waiting.clear()

    def take(self, budget: int) -> Round:
        """Take the rows of a round of `budget` tokens out of the line, by turns. All have the kind of the first."""
        taken: Round = []
        prompts: set[int] = set()
        others: list[Asked] = []
        tokens, full = 0, False
        while self._requests and not full:
            asked, _ = self._requests.popitem(last=False)
            if taken and asked.kind != taken[0][0].kind:
                others.append(asked)
                continue
            if not asked.has_turn:
                asked.credit += max(1, budget // TURNS)
            while asked.waiting:
                _, row, prompt = asked.waiting[0]
                cost = len(row.input_ids) - (row.prompt_length if prompt in prompts else 0)
                if cost > asked.credit and (taken or self._requests):
                    break
                full = bool(taken) and tokens + cost > budget
                if full:
                    break
                taken.append((asked, asked.waiting.popleft()))
                prompts.add(prompt)
                tokens, asked.credit = tokens + cost, max(0, asked.credit - cost)
            asked.has_turn = full
            if asked.waiting:
                self._requests[asked] = None
                self._requests.move_to_end(asked, last=not full)
        for asked in reversed(others):
            self._requests[asked] = None
            self._requests.move_to_end(asked, last=False)
        self.tokens -= _tokens(waiting for _, waiting in taken)
        return taken


def _tokens(waiting: Iterable[Waiting]) -> int:
    return sum(len(one.row.input_ids) for one in waiting)
