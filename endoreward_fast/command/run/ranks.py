"""Rows shared by the processes that torchrun or accelerate started (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT).

Rank 0 alone reads the input and writes the output. It deals windows of rows out by the launcher's own key-value store,
a few for each rank ahead of what is written; every rank, itself among them, claims the next one, scores it and hands it
in. A window is scored in the same batches whoever has it, so that scores do not depend on how many ranks there are. A
rank that dies ends the others (the launcher sees to that, or that it is not heard of any more does); what was handed in
until then is written, and --resume goes on.
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

from ...errors import EndoRewardError
from ...model.checkpoint import weights_of
from ..flags.options import EngineFlags
from .board import PAUSE, Board, call, come, reached
from .clerk import CLAIMED, END, HANDED_IN, Clerk, heard, left_key, result_key, window_key
from .jobs import Engine, InOrder, Job, Windows, Write, note_idle, warnings_to
from .monitor import Monitor
from .pipeline import Item, Scorer, before_loading

LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Rank:
    """This process among those of its launch."""

    rank: int
    size: int
    local: int
    """among those of its machine"""

    @classmethod
    def from_environment(cls) -> Rank:
        """Rank 0 of 1 where nothing was launched. EndoRewardError for half a launch."""
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls(0, 1, 0)
        absent = next((name for name in LAUNCHED if name not in os.environ), None)
        if absent:
            raise EndoRewardError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {absent} is not set: start it by torchrun or "
                "accelerate launch, or unset WORLD_SIZE"
            )
        found = cls(*(_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        if not found.rank < found.size:
            raise EndoRewardError(f"RANK is {found.rank} where WORLD_SIZE is {found.size}: they count from 0")
        if not 0 < _number("MASTER_PORT") < 1 << 16:
            raise EndoRewardError(f"MASTER_PORT is {os.environ['MASTER_PORT']}: ports end at 65535")
        return found

    @property
    def alone(self) -> bool:
        """Whether there is nobody to share with."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this one reads the command, writes and speaks."""
        return self.rank == 0

    def flags(self, flags: EngineFlags) -> EngineFlags:
        """`flags` for this rank: a device of its own, and a word only from the first."""
        import torch

        device = flags.device
        if torch.cuda.is_available() and device in (None, "auto", "cuda"):
            # Where the launcher shows each rank its own device alone, that is device 0.
            device = f"cuda:{self.local % torch.cuda.device_count()}"
        return replace(flags, device=device, quiet=flags.quiet or not self.first)


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise EndoRewardError(f"{name} is {text!r}: expected a number, as torchrun sets it")
    return int(text)


# ---------------------------------------------------------------- every rank
def _score(board: Board, job: Job, scorer: Scorer) -> None:
    """Window after window, until there are no more for this rank."""
    while (window := _claimed(board)) is not None:
        finished = job.finish(*window, scorer)
        board.put(result_key(board.count(HANDED_IN)), finished.to_json().encode())


def _claimed(board: Board) -> tuple[int, list[Item]] | None:
    """(number, rows) of the next window that nobody has, once it is dealt out; None where there is none."""
    number = board.count(CLAIMED) - 1
    while not (board.has(END) and int(board.get(END)) <= number):
        if board.has(window_key(number)):
            # Pickled: a row of Parquet holds what JSON has no spelling for. torch's object collectives do the same.
            return number, pickle.loads(board.take(window_key(number)))
        time.sleep(PAUSE)
    return None


# ---------------------------------------------------------------- every rank but the first
def help_out(job: Job, rank: Rank) -> None:
    """Score what rank 0 deals out. Raises EndoRewardError: its store, or the model here, is not what it should be."""
    with reached():
        board, about = come(Board.of_launch(), rank.rank)
        with heard(board, rank.rank):
            if weights_of(job.flags.model, **job.flags.source) != about["weights"]:
                raise EndoRewardError(
                    f"model {job.flags.model!r} is not what rank 0 has by that name: scores would differ"
                )
            if not about["idle"]:
                job = replace(job, flags=replace(rank.flags(job.flags), date=about["date"]))
                with warnings_to(lambda warning: None):  # the same as rank 0's
                    scorer = job.load()
                _score(board, job, scorer)
        board.put(left_key(rank.rank), b"")


# ---------------------------------------------------------------- rank 0
def lead(job: Job, rank: Rank, weights: str, *, idle: bool) -> Engine:
    """Rank 0's part. `weights`: of its model; `idle`: nothing is left to score."""
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
            with _signals(signal.SIG_IGN, signal.SIGINT):  # a launcher sends another while this one ends
                clerk.leave()
                output.keep()
        clerk.raise_error()
        if not idle:
            note_idle(monitor, read.count, rank.size, "ranks")
        read.raise_error()

    return run


def _leave(number: int, frame: Any) -> None:
    """What was handed in is written when a launcher ends the ranks, as it does when one has died."""
    raise SystemExit(128 + number)


@contextmanager
def _signals(handler: Any, *more: signal.Signals) -> Iterator[None]:
    """SIGTERM, and `more`, go to `handler` meanwhile."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, *more)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
