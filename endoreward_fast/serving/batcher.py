"""Batches from what waits: the rows of many requests, scored together by one thread.

A round takes rows from the requests in line until it has enough tokens, and scores them as one list. So rows of
different requests share passes and prefixes. Requests get their turn by deficit round robin (Shreedhar and Varghese,
1996): in each turn a request may spend 1/TURNS of a round's tokens more, and it keeps what it has not spent. A request
with many rows or a huge row therefore waits for its own tokens, and the requests behind it do not. A model that has
nothing to do waits for a short window after the first row, because requests that are sent together do not arrive
together.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from ..scoring.batching import Budget
from ..scoring.options import ScoreOptions
from ..scoring.results import RowScore
from ..scoring.score import encode_rows, score_rows
from ..scoring.scorer import Scorer
from ..text.encoding import Encoded
from ..text.rows import Row
from .encoders import Encoders

TURNS = 16
"""Turns that a round has room for. With the usual 8192 tokens, a turn has 512: one or two usual rows"""
ENCODERS = 4
"""threads that tokenize, so that one huge text does not hold up the others"""
OF_PASS = ("alpha", "reduction", "gamma", "floor", "per_token", "texts", "entropy", "signals", "named")
"""options that rows of one round have in common; the others matter to the tokens of a row alone"""
LONGEST_RETRY = 60
LOG = logging.getLogger("endoreward")


class Full(Exception):
    """Raised if too many rows wait. `seconds` is the time in which half of them will have been scored."""

    def __init__(self, rows: int, seconds: int) -> None:
        super().__init__(f"{rows} rows wait, which is as many as may")
        self.seconds = seconds


class Closed(Exception):
    """Raised if the server takes no more rows, because it is about to end."""


class Watch(Protocol):
    """What is told of every round: see metrics.py."""

    def on_round(self, rows: int, tokens: int, fill: float, seconds: float) -> None:
        """Note a round: its rows and tokens, tokens over the round's budget, and the time it took."""

    def on_wait(self, seconds: float) -> None:
        """Note the time that a request waited for its first round."""


class _Waiting(NamedTuple):
    position: int
    """in the request"""
    row: Encoded


class Asked:
    """The rows of one request. `future` gets the results, in their order."""

    def __init__(self, rows: int, options: ScoreOptions) -> None:
        self.rows, self.options = rows, options
        self.kind = tuple(getattr(options, name) for name in OF_PASS)
        self.future: Future[list[RowScore]] = Future()
        self.since = time.monotonic()
        self.tokens = 0
        """of all rows, once they are encoded"""
        self.waiting: deque[_Waiting] = deque()
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
        """End the request with an error."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


Round = list[tuple[Asked, _Waiting]]


class Batcher:
    """Score rows of many requests with one model.

    scorer          the model; no other thread may use it
    max_tokens      tokens of a round; None: what the device's memory is meant to hold (scoring/batching.py). A longer
                    row gets a round alone
    window          seconds that an idle model waits for more rows after the first
    most_waiting    rows that may wait; more are refused with Full
    """

    def __init__(
        self, scorer: Scorer, *, max_tokens: int | None = None, window: float = 0.005, most_waiting: int = 8192,
        watch: Watch | None = None,
    ) -> None:  # fmt: skip
        self.scorer, self.window, self.most_waiting, self.watch = scorer, window, most_waiting, watch
        self.budget = Budget.of(max_tokens, scorer.device).held
        self.rows = 0
        """rows of requests that are not answered"""
        self.tokens = 0
        """tokens that wait for a round"""
        self._line: deque[Asked] = deque()
        self._changed = threading.Condition()
        self._encoding = 0
        self._closing = False
        self._rate = math.nan
        """rows a second, of the last rounds"""
        self._encoders = Encoders(scorer)
        self._threads = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")
        self._thread = threading.Thread(target=self._score_what_waits, name="score", daemon=True)
        self._thread.start()

    def submit(
        self, rows: int, read: Callable[[], Sequence[Row]], options: ScoreOptions, most_tokens: int | None = None,
        too_many: Callable[[int], Exception] = ValueError,
    ) -> Asked:  # fmt: skip
        """Put a request in line.

        read           gives its rows, so many as `rows` says; called in the thread that encodes them
        most_tokens    a request with more tokens fails with `too_many(tokens)`

        Raises Full or Closed. Anything that `read` raises is raised by the request's future.
        """
        with self._changed:
            if self._closing:
                raise Closed
            if self.rows and self.rows + rows > self.most_waiting:
                raise Full(self.rows, self._seconds_to_half())
            self.rows += rows
            self._encoding += 1
        asked = Asked(rows, options)
        asked.future.add_done_callback(lambda _: self._forget(asked))
        self._threads.submit(self._encode, asked, read, most_tokens, too_many)
        return asked

    def cancel(self, asked: Asked) -> None:
        """Drop what waits of a request. Rows of the round that runs are computed, and dropped then."""
        asked.future.cancel()

    def alive(self) -> bool:
        """Return whether the thread that scores still runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Take no more requests, and return when those in line are answered."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._threads.shutdown()

    def _seconds_to_half(self) -> int:
        known = self._rate > 0
        return min(LONGEST_RETRY, max(1, math.ceil(self.rows / 2 / self._rate))) if known else 1

    def _forget(self, asked: Asked) -> None:
        """Take a request that is over, for whatever reason, out of the line."""
        with self._changed:
            self.rows -= asked.rows
            if asked in self._line:
                self._line.remove(asked)
            self.tokens -= sum(len(waiting.row.input_ids) for waiting in asked.waiting)
            asked.waiting.clear()

    def _encode(
        self, asked: Asked, read: Callable[[], Sequence[Row]], most: int | None, too_many: Callable[[int], Exception]
    ) -> None:  # fmt: skip
        try:
            if asked.over:
                return
            found = encode_rows(self.scorer, read(), asked.options, self._encoders.of(asked.options))
            asked.tokens = sum(len(row.input_ids) for row in found if isinstance(row, Encoded))
            if most is not None and asked.tokens > most:
                raise too_many(asked.tokens)
            if not found:
                asked.future.set_result([])
            for position, row in enumerate(found):
                if isinstance(row, RowScore):
                    asked.add(position, row)
            with self._changed:
                if not asked.over:
                    asked.waiting.extend(_Waiting(i, row) for i, row in enumerate(found) if isinstance(row, Encoded))
                    self.tokens += asked.tokens
                    self._line.append(asked)
        except Exception as error:  # raised again by whoever waits for the future
            asked.fail(error)
        finally:
            with self._changed:
                self._encoding -= 1
                self._changed.notify_all()

    def _score_what_waits(self) -> None:
        while True:
            with self._changed:
                idle = not self._line
                self._changed.wait_for(lambda: self._line or (self._closing and not self._encoding))
                if not self._line:
                    return
                if idle and not self._closing:
                    self._changed.wait_for(lambda: self.tokens >= self.budget, self.window)
                taken = self._take()
            if taken:  # a request may have been cancelled within the window
                self._run(taken)

    def _take(self) -> Round:
        """Take the rows of a round out of the line: those of the same kind as the first request's, by turns."""
        taken: Round = []
        prompts: set[tuple[int, ...]] = set()
        others: list[Asked] = []
        tokens, full = 0, False
        while self._line and not full:
            asked = self._line.popleft()
            if taken and asked.kind != taken[0][0].kind:
                others.append(asked)
                continue
            if not asked.has_turn:
                asked.credit += max(1, self.budget // TURNS)
            while asked.waiting:
                row = asked.waiting[0].row
                prompt = tuple(row.input_ids[: row.prompt_length])
                cost = len(row.input_ids) - (row.prompt_length if prompt in prompts else 0)
                if cost > asked.credit and (taken or self._line):
                    break
                full = bool(taken) and tokens + cost > self.budget
                if full:
                    break
                taken.append((asked, asked.waiting.popleft()))
                prompts.add(prompt)
                tokens, asked.credit = tokens + cost, max(0, asked.credit - cost)
            asked.has_turn = full
            if asked.waiting:
                (self._line.appendleft if full else self._line.append)(asked)
        self._line.extendleft(reversed(others))
        self.tokens -= sum(len(waiting.row.input_ids) for _, waiting in taken)
        return taken

    def _run(self, taken: Round) -> None:
        started = time.monotonic()
        for asked in {id(asked): asked for asked, _ in taken}.values():
            if not asked.begun and self.watch is not None:
                self.watch.on_wait(started - asked.since)
            asked.begun = True
        self._score(taken)
        seconds = max(time.monotonic() - started, 1e-9)
        rate = len(taken) / seconds
        self._rate = rate if math.isnan(self._rate) else 0.8 * self._rate + 0.2 * rate
        if self.watch is not None:
            tokens = sum(len(waiting.row.input_ids) for _, waiting in taken)
            self.watch.on_round(len(taken), tokens, tokens / self.budget, seconds)

    def _score(self, taken: Round) -> None:
        """Score rows and hand out their results. If that fails, try each request alone: one row may be at fault."""
        left = dict(enumerate(taken))
        try:
            rows: list[Any] = [waiting.row for _, waiting in taken]
            for place, found in score_rows(self.scorer, rows, taken[0][0].options, None):
                asked, waiting = left.pop(place)
                asked.add(waiting.position, found)
        except Exception as error:
            alone = list({id(asked): asked for asked, _ in left.values()}.values())
            if len(alone) == 1:
                LOG.exception("a request could not be scored")
                alone[0].fail(error)
                return
            for one in alone:
                self._score([(asked, waiting) for asked, waiting in left.values() if asked is one])
