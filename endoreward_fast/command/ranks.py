"""Rows shared by the processes that torchrun or accelerate started (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT).

Every rank reads the same windows of rows and claims the next one that nobody has; what it finishes goes to rank 0, by
the launcher's own key-value store, and rank 0 writes it in the order of the input. A window is scored in the same
batches whoever has it, so that scores do not depend on how many ranks there are. A rank that dies ends the others
(the launcher sees to that); --resume goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import EndoRewardError
from . import pipeline
from .data import open_source
from .jobs import Engine, Finished, Job, Windows, Write, note_idle
from .options import RowFlags
from .output import Monitor
from .pipeline import Item
from .resume import without_done

LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PART = 4 << 20
"""bytes: torch's store takes messages of up to 8 MiB"""
PAUSE = 0.02
"""seconds between two looks into the store"""


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
        return cls(*(_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))

    @property
    def alone(self) -> bool:
        """Whether there is nobody to share with."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this one reads the command, writes and speaks."""
        return self.rank == 0

    def flags(self, flags: RowFlags) -> RowFlags:
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


class Board:
    """The launch's key-value store, with messages of any size."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @classmethod
    def of_launch(cls) -> Board:
        """The one that the launcher's environment names."""
        from torch.distributed import PrefixStore, rendezvous

        # The launcher keeps its store when it starts ranks anew; what earlier ones left there is not for them.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(PrefixStore(f"endoreward {attempt}", next(rendezvous("env://"))[0]))

    def put(self, key: str, text: str) -> None:
        """Leave a message; its number of parts last, as that is what is waited for."""
        data = text.encode()
        parts = [data[start : start + PART] for start in range(0, len(data), PART)]
        for n, part in enumerate(parts):
            self._store.set(f"{key} part {n}", part)
        self._store.set(key, str(len(parts)))

    def has(self, key: str) -> bool:
        """Whether the message is there."""
        return bool(self._store.check([key]))

    def get(self, key: str) -> str:
        """The message, as soon as it is there."""
        while not self.has(key):
            time.sleep(PAUSE)
        return b"".join(self._store.get(part) for part in self._parts(key)).decode()

    def take(self, key: str) -> str:
        """The message, which nobody else wants."""
        text = self.get(key)
        for name in (*self._parts(key), key):
            self._store.delete_key(name)
        return text

    def _parts(self, key: str) -> list[str]:
        return [f"{key} part {n}" for n in range(int(self._store.get(key)))]

    def claim(self) -> int:
        """The number of the next window that nobody has."""
        return int(self._store.add("claimed", 1)) - 1


START = "start"


def _window(index: int) -> str:
    return f"window {index}"


def _left(rank: int) -> str:
    return f"rank {rank} left"


class _InOrder:
    """Finished windows on their way into the output."""

    def __init__(self, board: Board, write: Write, monitor: Monitor) -> None:
        self._board, self._write, self._monitor = board, write, monitor
        self.own: dict[int, Finished] = {}
        """rank 0's, by number"""
        self._due = 0

    def hand_on(self, until: int = 0) -> None:
        """Write what is there, up to the first that is missing; those before window `until` are waited for."""
        while self._due < until or self._due in self.own or self._board.has(_window(self._due)):
            found = self.own.pop(self._due, None) or Finished.from_json(self._board.take(_window(self._due)))
            self._due += 1
            found.hand_on(self._write, self._monitor)


def lead(job: Job, rank: Rank, done: Counter[str]) -> Engine:
    """Rank 0's part: its share of the windows, and writing everybody's. `done`: rows of an earlier run."""
    board = Board.of_launch()
    board.put(START, json.dumps(done))
    job = replace(job, flags=rank.flags(job.flags))
    scorer = job.load()

    def run(windows: Iterator[list[Item]], write: Write, monitor: Monitor) -> None:
        read, output = Windows(windows), _InOrder(board, write, monitor)
        for index, items in _claimed(read, board):
            output.own[index] = job.finish(items, scorer)
            output.hand_on()
        output.hand_on(until=read.count)
        for other in range(1, rank.size):
            board.get(_left(other))  # a store may end with rank 0, and they still speak to it
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
    board = Board.of_launch()
    done = Counter(json.loads(board.get(START)))
    job = replace(job, flags=rank.flags(job.flags))
    source = open_source(file, job.flags.limit)
    if done:
        source = without_done(source, done)
    scorer = job.load()
    for number, items in _claimed(Windows(pipeline.windows(source, job.command, job.flags)), board):
        board.put(_window(number), job.finish(items, scorer).to_json())
    board.put(_left(rank.rank), "")
