"""The clerk of rank 0: it deals windows out, writes what comes back, and hears which ranks are alive.

Ranks and clerk share a board, whose keys are here.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

from ...errors import EndoRewardError
from .board import PAUSE, Board, reached
from .jobs import Finished, InOrder, Windows

AHEAD = 4
"""windows for each rank that may be dealt out before the first of them is written: what a kill loses"""
BEAT = 10.0
"""seconds between two signs of life"""
LOST = 600.0
"""seconds without one"""


# ---------------------------------------------------------------- the board's keys
CLAIMED, HANDED_IN, END = "claimed", "handed in", "end"


def window_key(number: int) -> str:
    return f"window {number}"


def result_key(number: int) -> str:
    return f"result {number}"


def beats_key(rank: int) -> str:
    return f"rank {rank} beats"


def left_key(rank: int) -> str:
    return f"rank {rank} left"


@contextmanager
def heard(board: Board, rank: int) -> Iterator[None]:
    """Signs of life meanwhile, from a thread of their own: a window may take long, and so may loading a model."""
    from torch.distributed import DistError

    done = Event()

    def beat() -> None:
        with suppress(DistError):  # a store that is gone: the main thread meets it too, and says so
            while not done.wait(BEAT):
                board.count(beats_key(rank))

    board.count(beats_key(rank))
    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Clerk(Thread):
    """Rank 0's second hand: deals windows out, writes what comes back, and hears whether the others are still there."""

    def __init__(self, board: Board, size: int, read: Windows, output: InOrder) -> None:
        super().__init__(daemon=True)
        self._board, self._output, self._windows = board, output, iter(read)
        self._ahead = AHEAD * size
        self._dealt = self._received = 0
        self._all_dealt = False
        self._signs = {rank: (0, time.monotonic()) for rank in range(1, size)}
        """signs of life, and when there was a new one"""
        self._next_look = time.monotonic() + BEAT
        self._leave = Event()
        self._error: Exception | None = None

    def leave(self) -> None:
        """Take in what has been handed in, and end."""
        self._leave.set()
        self.join()

    def raise_error(self) -> None:
        """Raise what ended it, if that was an error."""
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        """Until all is written and everybody has left."""
        try:
            with reached():
                self._work()
        except Exception as error:
            self._error = error

    def _work(self) -> None:
        try:
            while not (self._all_dealt and self._output.due == self._dealt):
                self._deal()
                if self._receive():
                    continue
                if self._leave.is_set():
                    return self._receive_past_gaps()
                if (lost := self._lost()) is not None:
                    self._receive_past_gaps()
                    raise EndoRewardError(
                        f"rank {lost} has not been heard of for {LOST / 60:.0f} minutes: what the others finished is "
                        "kept; --resume goes on"
                    )
                self._leave.wait(PAUSE)
            # A store may end with rank 0, and they still speak to it.
            everybody = [left_key(rank) for rank in self._signs]
            while not self._board.has(*everybody) and self._lost() is None and not self._leave.wait(PAUSE):
                pass
        finally:
            self._board.put(END, b"0")  # nobody waits for what does not come

    def _deal(self) -> None:
        while not self._all_dealt and self._dealt < self._output.due + self._ahead:
            items = next(self._windows, None)
            if items is None:
                self._all_dealt = True
                self._board.put(END, str(self._dealt).encode())
            else:
                self._board.put(window_key(self._dealt), pickle.dumps(items))
                self._dealt += 1

    def _receive(self) -> bool:
        """Whether the next was handed in; it is written where all before it are."""
        key = result_key(self._received + 1)
        if not self._board.has(key):
            return False
        self._received += 1
        self._output.add(Finished.from_json(self._board.take(key)))
        return True

    def _receive_past_gaps(self) -> None:
        """A rank that died while it handed in left a gap."""
        while self._received < self._board.count(HANDED_IN, 0):
            if not self._receive():
                self._received += 1

    def _lost(self) -> int | None:
        """A rank that has not been heard of for too long, and has not left."""
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + BEAT
        for rank, (before, since) in self._signs.items():
            beats = self._board.count(beats_key(rank), 0)
            if beats != before:
                self._signs[rank] = (beats, now)
            elif now - since > LOST and not self._board.has(left_key(rank)):
                return rank
        return None
