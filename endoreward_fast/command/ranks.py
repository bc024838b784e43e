"""Rows shared by the processes that torchrun or accelerate started (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT).

Every rank reads the same windows of rows and claims the next one that nobody has; what it finishes goes to rank 0, by
the launcher's own key-value store, and rank 0 writes it in the order of the input. A window is scored in the same
batches whoever has it, so that scores do not depend on how many ranks there are. A rank that dies ends the others
(the launcher sees to that); --resume goes on.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import EndoRewardError
from . import pipeline
from .board import PAUSE, Board, call, come, reached
from .jobs import Engine, Finished, Job, Windows, Write, note_idle, warnings_to
from .options import EngineFlags
from .output import Monitor
from .pipeline import Item
from .resume import rows_left

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
        _number("MASTER_PORT")
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


def _left(rank: int) -> str:
    return f"rank {rank} left"


def _window(index: int) -> str:
    return f"window {index}"


class _InOrder:
    """Finished windows on their way into the output."""

    def __init__(self, board: Board, size: int, write: Write, monitor: Monitor) -> None:
        self._board, self._write, self._monitor = board, write, monitor
        self._everybody_left = [_left(rank) for rank in range(1, size)]
        self.own: dict[int, Finished] = {}
        """rank 0's, by number"""
        self._due = 0

    def hand_on(self, until: int = 0) -> None:
        """Write what is there, up to the first that is missing; those before window `until` are waited for."""
        while self._due < until or self._due in self.own or self._board.has(_window(self._due)):
            found = self.own.pop(self._due, None) or self._others(_window(self._due))
            self._due += 1
            found.hand_on(self._write, self._monitor)

    def keep_own(self) -> None:
        """Write what rank 0 has finished, past what is missing: --resume fills holes."""
        for number in sorted(self.own):
            self.own.pop(number).hand_on(self._write, self._monitor)

    def _others(self, window: str) -> Finished:
        while not self._board.has(window):
            if self._board.has(*self._everybody_left) and not self._board.has(window):
                raise EndoRewardError(OTHER_INPUT)  # whoever claimed it found no such window
            time.sleep(PAUSE)
        return Finished.from_json(self._board.take(window))

    def see_off(self, windows: int) -> None:
        """Wait for all to go: a store may end with rank 0, and they still speak to it. They read as many `windows`?"""
        for left in self._everybody_left:
            while not self._board.has(left):
                time.sleep(PAUSE)
            if int(self._board.get(left)) != windows:
                raise EndoRewardError(OTHER_INPUT)


OTHER_INPUT = (
    "the ranks read different rows: the input was changed meanwhile, or is another on another machine; with one that "
    "stays as it is, --resume goes on"
)


def lead(job: Job, rank: Rank, file: str, done: Counter[str], *, idle: bool) -> Engine:
    """Rank 0's part: its share of the windows, and writing everybody's. `done`: rows of an earlier run."""
    with reached():
        board = call(Board.of_launch(), rank.size, {"done": done, "size": Path(file).stat().st_size})
    if idle:
        return lambda windows, write, monitor: _InOrder(board, rank.size, write, monitor).see_off(0)
    job = replace(job, flags=rank.flags(job.flags))
    scorer = job.load()

    def run(windows: Iterator[list[Item]], write: Write, monitor: Monitor) -> None:
        read, output = Windows(windows), _InOrder(board, rank.size, write, monitor)
        with reached():
            try:
                for index, items in _claimed(read, board):
                    output.own[index] = job.finish(items, scorer)
                    output.hand_on()
                output.hand_on(until=read.count)
            except KeyboardInterrupt:
                output.keep_own()
                raise
            output.see_off(read.count)
        note_idle(monitor, read.count, rank.size, "ranks")
        read.raise_error()

    return run


def _claimed(windows: Windows, board: Board) -> Iterator[tuple[int, list[Item]]]:
    """(number, window) of those that this rank gets."""
    mine = board.claim()
    for number, items in enumerate(windows):
        if number == mine:
            yield number, items
            mine = board.claim()


def help_out(job: Job, rank: Rank, file: str) -> None:
    """Every other rank's part. What is wrong with the input rank 0 says."""
    with reached():
        board, about = come(Board.of_launch(), rank.rank)
        source = rows_left(file, job.flags, Counter(about["done"]))
        if Path(file).stat().st_size != about["size"]:
            raise EndoRewardError(f"{file} is not the one that rank 0 reads, which has {about['size']:,} bytes")
        job = replace(job, flags=rank.flags(job.flags))
        first, windows = pipeline.peek(pipeline.windows(source, job.command, job.flags))
        read = Windows(windows)
        if first:
            with warnings_to(lambda warning: None):  # the same as rank 0's
                scorer = job.load()
            for number, items in _claimed(read, board):
                board.put(_window(number), job.finish(items, scorer).to_json())
        board.put(_left(rank.rank), str(read.count))
