"""Share rows between the processes that torchrun or accelerate started (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

Only rank 0 reads the input and writes the output. It hands out windows of rows over the launcher's key-value store, a
few per rank ahead of what is written. Every rank, including rank 0, claims the next window, scores it and hands it in.
A window is scored in the same batches on every rank, so that scores do not depend on the number of ranks. If a rank
dies, the launcher ends the others, or rank 0 does when its heartbeats stop. Results handed in by then are written, and
--resume continues.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ...data.items import Item
from ...errors import EndoRewardError
from ...model.checkpoint import weights_of
from ..flags.engine_flags import EngineFlags
from .jobs import Engine, InOrder, Job, Windows, Write, note_idle, warnings_to
from .monitor import Monitor
from .pipeline import Scorer, before_loading
from .ranks_board import PAUSE, Board, call, come, reached
from .ranks_clerk import CLAIMED, END, HANDED_IN, Clerk, heard, left_key, result_key, window_key

LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Rank:
    """The rank of this process in its launch."""

    rank: int
    size: int
    local: int
    """rank on this machine"""

    @classmethod
    def from_environment(cls) -> Rank:
        """Read the launcher's variables; rank 0 of 1 without them. Raises EndoRewardError if they are incomplete."""
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls(0, 1, 0)
        absent = next((name for name in LAUNCHED if name not in os.environ), None)
        if absent:
            raise EndoRewardError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {absent} is not set: start with torchrun or "
                "accelerate launch, or unset WORLD_SIZE"
            )
        found = cls(*(_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        if not found.rank < found.size:
            raise EndoRewardError(f"RANK is {found.rank}, but WORLD_SIZE is {found.size}: ranks count from 0")
        if not 0 < _number("MASTER_PORT") < 1 << 16:
            raise EndoRewardError(f"MASTER_PORT is {os.environ['MASTER_PORT']}: use a port from 1 to 65535")
        return found

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which reads, writes and prints."""
        return self.rank == 0

    def flags(self, flags: EngineFlags) -> EngineFlags:
        """Return `flags` for this rank: its own GPU, and quiet unless it is rank 0."""
        import torch

        device = flags.device
        if torch.cuda.is_available() and device in (None, "auto", "cuda"):
            # If the launcher makes only one device visible to each rank, that device is 0.
            device = f"cuda:{self.local % torch.cuda.device_count()}"
        return replace(flags, device=device, quiet=flags.quiet or not self.first)


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise EndoRewardError(f"{name} is {text!r}: expected a number, as torchrun sets it")
    return int(text)


# ---------------------------------------------------------------- every rank
def _score(board: Board, job: Job, scorer: Scorer) -> None:
    """Claim and score windows until none is left."""
    while (window := _claimed(board)) is not None:
        finished = job.finish(*window, scorer)
        board.put(result_key(board.count(HANDED_IN)), finished.to_json().encode())


def _claimed(board: Board) -> tuple[int, list[Item]] | None:
    """Claim the next window and wait for it. Returns (number, rows), or None if none is left."""
    number = board.count(CLAIMED) - 1
    while not (board.has(END) and int(board.get(END)) <= number):
        if board.has(window_key(number)):
            # Pickled, because rows of Parquet may hold values that JSON lacks. torch's object collectives pickle too.
            return number, pickle.loads(board.take(window_key(number)))
        time.sleep(PAUSE)
    return None


# ---------------------------------------------------------------- every rank but the first
def help_out(job: Job, rank: Rank) -> None:
    """Score the windows that rank 0 hands out. Raises EndoRewardError if the store or the model is not rank 0's."""
    with reached():
        board, about = come(Board.of_launch(), rank.rank)
        with heard(board, rank.rank):
            if weights_of(job.flags.model, **job.flags.source) != about["weights"]:
                raise EndoRewardError(
                    f"model {job.flags.model!r} has other weights here than on rank 0: use the same on every machine"
                )
            if not about["idle"]:
                job = replace(job, flags=replace(rank.flags(job.flags), date=about["date"]))
                with warnings_to(lambda warning: None):  # rank 0 prints the same warnings
                    scorer = job.load()
                _score(board, job, scorer)
        board.put(left_key(rank.rank), b"")


# ---------------------------------------------------------------- rank 0
def lead(job: Job, rank: Rank, weights: str, *, idle: bool) -> Engine:
    """Start the attempt on rank 0 and return its Engine. `weights`: hash of the model's; `idle`: no rows are left."""
    with reached():
        board = call(Board.of_launch(), rank.size, {"weights": weights, "idle": idle, "date": job.flags.date})
    job = replace(job, flags=rank.flags(job.flags))
    if not idle:
        before_loading(job.flags)
    scorer = None if idle else job.load()

    def run(windows: Iterator[list[Item]], write: Write, monitor: Monitor) -> None:
        read, output = Windows(windows), InOrder(write, monitor)
        clerk = Clerk(board, rank.size, read, output)
        clerk.start()
        try:
            with _signals(_leave), reached():
                if scorer is not None:
                    _score(board, job, scorer)
                clerk.join()
        finally:
            with _signals(signal.SIG_IGN, signal.SIGINT):  # a launcher sends a second signal during the exit
                clerk.leave()
                output.keep()
        clerk.raise_error()
        if not idle:
            note_idle(monitor, read.count, rank.size, "ranks")
        read.raise_error()

    return run


def _leave(number: int, frame: Any) -> None:
    """Raise SystemExit, so that results are written when the launcher ends the ranks because one died."""
    raise SystemExit(128 + number)


@contextmanager
def _signals(handler: Any, *more: signal.Signals) -> Iterator[None]:
    """Let `handler` take SIGTERM and `more` during the block."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, *more)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
