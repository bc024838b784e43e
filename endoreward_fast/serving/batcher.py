"""Batches from what waits: the rows of many requests, scored together by one thread.

A round takes rows from the requests in line until it has enough tokens (line.py), and scores them as one list. So rows
of different requests share passes and prefixes.

Requests that are sent together do not arrive together, and clients that have an answer send the next request a little
later. So a round waits: for a short window, or a small share of the last round's time, but not once as many rows wait
as were unanswered when the last round began. Without that, 64 clients fall into two groups that take turns.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from ..scoring.batching import Budget
from ..scoring.options import ScoreOptions
from ..scoring.results import RowScore
from ..scoring.score import EncodedRows, encode_rows, score_rows
from ..scoring.scorer import Scorer
from ..text.encoding import Encoded
from ..text.rows import Row
from .encoders import Encoders
from .line import Asked, Line, Round, Waiting

ENCODERS = 3
"""threads that tokenize. One more does so for large requests, which hold up each other and nobody else"""
LONGEST_RETRY = 60
SHARE = 0.15
"""of the last round's time: how long the next one waits for clients to come back"""
REGROW = 600
"""seconds after which batches that were halved, because memory ran out, may have twice as many tokens again"""
LOG = logging.getLogger("endoreward")


class Full(Exception):
    """Raised if too many rows wait. `seconds` is the time in which half of them will have been scored."""

    def __init__(self, rows: int, seconds: int) -> None:
        super().__init__(f"{rows} rows wait, which is as many as may")
        self.seconds = seconds


class Closed(Exception):
    """Raised if no more rows are scored. The message says why."""


class Watch(Protocol):
    """What is told of every round: see metrics.py."""

    def on_round(self, rows: int, tokens: int, fill: float, seconds: float) -> None:
        """Note a round: its rows and tokens, tokens over the round's budget, and the time it took."""

    def on_wait(self, seconds: float) -> None:
        """Note the time that a request waited for its first round."""


class Batcher:
    """Score rows of many requests with one model.

    scorer          the model; no other thread may use it
    max_tokens      tokens of a round; None: what the device's memory is meant to hold (scoring/batching.py). A longer
                    row gets a round alone
    window          seconds that a round waits for more rows after the first, at least
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
        self._line = Line()
        self._open: dict[Future[list[RowScore]], Asked] = {}
        """requests that are not answered"""
        self._changed = threading.Condition()
        self._encoding = 0
        self._closed: str | None = None
        """why no more requests are taken"""
        self._expected = math.inf
        """rows that were unanswered when the last round began"""
        self._seconds = 0.0
        """of the last round"""
        self._rate = math.nan
        """rows a second, of the last rounds"""
        self._room = scorer.room.tokens
        self._room_since = time.monotonic()
        self._encoders = Encoders(scorer)
        self._threads = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")
        self._apart = ThreadPoolExecutor(1, thread_name_prefix="encode_large")
        self._thread = threading.Thread(target=self._score_what_waits, name="score", daemon=True)
        self._thread.start()

    def submit(
        self, rows: int, read: Callable[[], Sequence[Row]], options: ScoreOptions, most_tokens: int | None = None,
        too_many: Callable[[int], Exception] = ValueError, *, large: bool = False,
    ) -> Asked:  # fmt: skip
        """Put a request in line.

        read           gives its rows, so many as `rows` says; called in the thread that encodes them
        most_tokens    a request with more tokens fails with `too_many(tokens)`
        large          encode it apart from the others, because that takes long

        Raises Full or Closed. The request's future raises what `read` raises, and Closed if the thread that scores
        ends.
        """
        asked = Asked(rows, options)
        with self._changed:
            if self._closed is not None:
                raise Closed(self._closed)
            if self.rows and self.rows + rows > self.most_waiting:
                raise Full(self.rows, self._seconds_to_half())
            threads = self._apart if large else self._threads
            threads.submit(self._encode, asked, read, most_tokens, too_many)
            self.rows += rows
            self._encoding += 1
            self._open[asked.future] = asked
        asked.future.add_done_callback(self._forget)
        return asked

    def cancel(self, asked: Asked) -> None:
        """Drop what waits of a request. Rows of the round that runs are computed, and dropped then."""
        asked.future.cancel()

    @property
    def tokens(self) -> int:
        """The tokens that wait for a round."""
        return self._line.tokens

    def alive(self) -> bool:
        """Return whether the thread that scores still runs."""
        return self._thread.is_alive()

    def close(self, *, drop: bool = False) -> None:
        """Take no more requests, and return when those in line are answered.

        drop    fail them with Closed instead, and return after the round that runs
        """
        with self._changed:
            self._closed = self._closed or "the server is about to end"
            self._changed.notify_all()
            if drop:
                self._fail_all(self._closed)
        self._thread.join()
        self._threads.shutdown()
        self._apart.shutdown()

    def _seconds_to_half(self) -> int:
        known = self._rate > 0
        return min(LONGEST_RETRY, max(1, math.ceil(self.rows / 2 / self._rate))) if known else 1

    def _forget(self, future: "Future[list[RowScore]]") -> None:
        """Take a request that is over, for whatever reason, out of the line."""
        with self._changed:
            asked = self._open.pop(future)
            self.rows -= asked.rows
            self._line.drop(asked)

    def _encode(
        self, asked: Asked, read: Callable[[], Sequence[Row]], most: int | None, too_many: Callable[[int], Exception]
    ) -> None:  # fmt: skip
        try:
            if asked.over:
                return
            found: EncodedRows = []
            encoder = self._encoders.of(asked.options)
            for row in read():
                if asked.over:
                    return
                found += encode_rows(self.scorer, [row], asked.options, encoder)
            waiting = [Waiting.of(i, row) for i, row in enumerate(found) if isinstance(row, Encoded)]
            asked.tokens = sum(len(one.row.input_ids) for one in waiting)
            if most is not None and asked.tokens > most:
                raise too_many(asked.tokens)
            if not found:
                asked.future.set_result([])
            for position, one in enumerate(found):
                if isinstance(one, RowScore):
                    asked.add(position, one)
            with self._changed:
                if not asked.over:
                    self._line.add(asked, waiting)
        except BaseException as error:  # raised again by whoever waits for the future
            asked.fail(error)
        finally:
            with self._changed:
                self._encoding -= 1
                self._changed.notify_all()

    def _score_what_waits(self) -> None:
        try:
            while taken := self._wait():
                self._run(taken)
        except BaseException:
            LOG.critical("the thread that scores has ended: start the server again", exc_info=True)
            with self._changed:
                self._closed = "the server scores no more"
                self._fail_all(self._closed)

    def _fail_all(self, why: str) -> None:
        for asked in list(self._open.values()):
            asked.fail(Closed(why))

    def _wait(self) -> Round:
        """Return the rows of the next round once there are some; none if there will be none."""
        taken: Round = []
        with self._changed:
            while not taken:  # a request may be cancelled within the window
                self._changed.wait_for(lambda: self._line or (self._closed is not None and not self._encoding))
                if not self._line:
                    break
                self._changed.wait_for(self._enough, max(self.window, SHARE * self._seconds))
                taken = self._line.take(self.budget)
            self._expected = self.rows
        return taken

    def _enough(self) -> bool:
        """Return whether a round need not wait for more rows."""
        return self.tokens >= self.budget or self._line.rows >= self._expected or self._closed is not None

    def _run(self, taken: Round) -> None:
        started = time.monotonic()
        self._regrow(started)
        for asked in {id(asked): asked for asked, _ in taken}.values():
            if not asked.begun and self.watch is not None:
                self.watch.on_wait(started - asked.since)
            asked.begun = True
        self._score(taken)
        self._seconds = seconds = max(time.monotonic() - started, 1e-9)
        rate = len(taken) / seconds
        self._rate = rate if math.isnan(self._rate) else 0.8 * self._rate + 0.2 * rate
        if self.watch is not None:
            tokens = sum(len(waiting.row.input_ids) for _, waiting in taken)
            self.watch.on_round(len(taken), tokens, tokens / self.budget, seconds)

    def _regrow(self, now: float) -> None:
        """Let batches grow again some time after memory ran out: what took it may have ended."""
        room = self.scorer.room
        if room.tokens is not None and room.tokens == self._room and now - self._room_since >= REGROW:
            room.tokens = 2 * room.tokens if 2 * room.tokens < self.budget else None
        if room.tokens != self._room:
            self._room, self._room_since = room.tokens, now

    def _score(self, taken: Round) -> None:
        """Score rows and hand out their results. If that fails, do the same for each half of the requests."""
        left = dict(enumerate(taken))
        try:
            rows: list[Any] = [waiting.row for _, waiting in taken]
            for place, found in score_rows(self.scorer, rows, taken[0][0].options, None):
                asked, waiting = left.pop(place)
                asked.add(waiting.position, found)
            return
        except BaseException as error:  # tokenizers' panics are no Exception
            requests = list({id(asked): asked for asked, _ in left.values()}.values())
            if len(requests) <= 1:
                LOG.exception("a request could not be scored")
                for asked in requests:
                    asked.fail(error)
        # Outside the handler, because the error keeps the tensors of every frame alive.
        if len(requests) <= 1:
            self._check()
            return
        half = set(requests[: len(requests) // 2])
        for first in (True, False):
            if rest := [place for place in left.values() if (place[0] in half) == first and not place[0].over]:
                self._score(rest)

    def _check(self) -> None:
        """Raise what the model raises for a row that it can score: after some errors, a GPU does nothing more."""
        for _ in score_rows(self.scorer, [Encoded([0, 0], 1, terminal=False)], ScoreOptions(), None):
            pass
