"""Exchange messages between ranks over the key-value store of their launch.

A launcher may restart ranks and keep its store, with the messages of earlier attempts. Its count of restarts differs
from machine to machine. Therefore rank 0 names each attempt, and starts when all ranks have joined it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from ...errors import EndoRewardError

PART = 4 << 20
"""bytes per part of a message; torch's store accepts up to 8 MiB"""
PAUSE = 0.02
"""seconds between two polls of the store"""
PATIENCE = 1800.0
"""seconds that ranks wait for each other to join, as in a process group of torch"""


class Board:
    """The key-value store of the launch, for messages of any size."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @classmethod
    def of_launch(cls) -> Board:
        """Connect to the store that the launcher's environment names."""
        from torch.distributed import PrefixStore, rendezvous

        with reached():
            return cls(PrefixStore("endoreward", next(rendezvous("env://"))[0]))

    def part(self, name: str) -> Board:
        """Return a board whose keys are separate from this one's."""
        from torch.distributed import PrefixStore

        return Board(PrefixStore(name, self._store))

    def put(self, key: str, data: bytes) -> None:
        """Store a message. The number of parts is stored last, because readers wait for it."""
        parts = [data[start : start + PART] for start in range(0, len(data), PART)]
        for n, part in enumerate(parts):
            self._store.set(f"{key} part {n}", part)
        self._store.set(key, str(len(parts)))

    def has(self, *keys: str) -> bool:
        """Return whether all these messages are stored."""
        return bool(self._store.check(list(keys)))

    def get(self, key: str) -> bytes:
        """Return a message, which must be stored."""
        return b"".join(self._store.get(part) for part in self._parts(key))

    def take(self, key: str) -> bytes:
        """Return a message, which must be stored, and delete it."""
        data = self.get(key)
        for name in (*self._parts(key), key):
            self._store.delete_key(name)
        return data

    def _parts(self, key: str) -> list[str]:
        return [f"{key} part {n}" for n in range(int(self._store.get(key)))]

    def count(self, key: str, more: int = 1) -> int:
        """Add `more` to a counter that all ranks share, and return its value."""
        return int(self._store.add(f"{key} count", more))


@contextmanager
def reached() -> Iterator[None]:
    """Turn the error of an unreachable store into a one-line EndoRewardError."""
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).partition("\n")[0]
        raise EndoRewardError(f"the store that the ranks share, at {where}, cannot be reached: {reason}") from error


def _wait_until(true: Callable[[], bool], who: str) -> None:
    """Wait until `true()`. Raises EndoRewardError that names the rank waited for."""
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            raise EndoRewardError(
                f"{who} did not join within {PATIENCE / 60:.0f} minutes: check that all ranks started"
            )
        time.sleep(PAUSE)


ATTEMPT, START = "attempt", "start"


def _joined_key(rank: int) -> str:
    return f"rank {rank} joined"


def call(board: Board, size: int, about: dict[str, Any]) -> Board:
    """On rank 0: start an attempt, wait for all ranks, and return its board. They receive `about`."""
    attempt = uuid4().hex
    board.put(ATTEMPT, attempt.encode())
    here = board.part(attempt)
    names = [_name_of(other, here) for other in range(1, size)]
    here.put(START, json.dumps(about | {"ranks": names}).encode())
    return here


def _name_of(rank: int, board: Board) -> str:
    _wait_until(lambda: board.has(_joined_key(rank)), f"rank {rank}")
    return board.get(_joined_key(rank)).decode()


def come(board: Board, rank: int) -> tuple[Board, dict[str, Any]]:
    """On another rank: join the attempt. Returns its board and rank 0's `about`."""
    name, attempt = uuid4().hex, ""
    while True:
        attempt = _next_attempt(board, attempt)
        here = board.part(attempt)
        here.put(_joined_key(rank), name.encode())
        about = _about(board, attempt)
        if name in about["ranks"]:
            return here, about
        # Otherwise this attempt is an earlier one, and rank 0 will start the next.


def _next_attempt(board: Board, before: str) -> str:
    _wait_until(lambda: board.has(ATTEMPT) and board.get(ATTEMPT).decode() != before, "rank 0")
    return board.get(ATTEMPT).decode()


def _about(board: Board, attempt: str) -> dict[str, Any]:
    """Return rank 0's message at the start of the attempt, or one without ranks if another attempt follows."""
    here = board.part(attempt)
    _wait_until(lambda: here.has(START) or board.get(ATTEMPT).decode() != attempt, "another rank")
    found: dict[str, Any] = json.loads(here.get(START)) if here.has(START) else {"ranks": []}
    return found
