"""The clerk, a thread of rank 0: it hands out windows, writes results, and watches which ranks are alive.

The ranks and the clerk share a board. Its keys are defined here.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

from ...errors import EndoRewardError
from .jobs import Finished, InOrder, Windows
from .ranks_board import PAUSE, Board, reached

AHEAD = 4
"""windows per rank that are handed out before the first is written; a kill loses at most these"""
BEAT = 10.0
"""seconds between two heartbeats"""
LOST = 600.0
"""seconds without a heartbeat after which a rank counts as lost"""


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
    """Send heartbeats from a thread, because a window or loading a model may take long."""
    from torch.distributed import DistError

    done = Event()

    def beat() -> None:
        with suppress(DistError):  # the store is gone: the main thread gets this error too and reports it
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
    """The thread of rank 0 that hands out windows, writes results, and watches which ranks are alive."""

    def __init__(self, board: Board, size: int, read: Windows, output: InOrder) -> None:
        super().__init__(daemon=True)
        self._board, self._output, self._windows = board, output, iter(read)
        self._ahead = AHEAD * size
        self._dealt = self._received = 0
        self._all_dealt = False
        self._heartbeats = {rank: (0, time.monotonic()) for rank in range(1, size)}
        """by rank: heartbeats counted, and the time of the last change"""
        self._next_look = time.monotonic() + BEAT
        self._leave = Event()
        self._error: Exception | None = None

    def leave(self) -> None:
        """Receive the results that ranks have handed in, then end."""
        self._leave.set()
        self.join()

    def raise_error(self) -> None:
        """Raise the error that ended the thread, if there was one."""
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        """Work until everything is written and all ranks have left."""
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
                        f"rank {lost} has sent no heartbeat for {LOST / 60:.0f} minutes. The output keeps what the "
                        "others finished: continue with --resume"
                    )
                self._leave.wait(PAUSE)
            # The store may end with rank 0, and the other ranks still use it.
            everybody = [left_key(rank) for rank in self._heartbeats]
            while not self._board.has(*everybody) and self._lost() is None and not self._leave.wait(PAUSE):
                pass
        finally:
            self._board.put(END, b"0")  # so that no rank waits for another window

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
        """Return whether the next result was handed in. It is written once all before it are."""
        key = result_key(self._received + 1)
        if not self._board.has(key):
            return False
        self._received += 1
        self._output.add(Finished.from_json(self._board.take(key)))
        return True

    def _receive_past_gaps(self) -> None:
        """Receive all results. A rank that died while it handed one in left a gap."""
        while self._received < self._board.count(HANDED_IN, 0):
            if not self._receive():
                self._received += 1

    def _lost(self) -> int | None:
        """Return a rank that has sent no heartbeat for LOST seconds and has not left, or None."""
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + BEAT
        for rank, (before, since) in self._heartbeats.items():
            beats = self._board.count(beats_key(rank), 0)
            if beats != before:
                self._heartbeats[rank] = (beats, now)
            elif now - since > LOST and not self._board.has(left_key(rank)):
                return rank
        return None
