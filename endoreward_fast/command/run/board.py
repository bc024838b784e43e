"""Where ranks meet and leave each other messages: the key-value store of their launch.

A launcher may start ranks anew and keep its store. What earlier ones left there is not for them, and the launcher's
count of starts differs from machine to machine; so rank 0 names each attempt, and begins when all have come to it.
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
"""bytes: torch's store takes messages of up to 8 MiB"""
PAUSE = 0.02
"""seconds between two looks into the store"""
PATIENCE = 1800.0
"""seconds that ranks wait for each other to come; torch's own for a process group"""


class Board:
    """The launch's key-value store, with messages of any size."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @classmethod
    def of_launch(cls) -> Board:
        """The one that the launcher's environment names."""
        from torch.distributed import PrefixStore, rendezvous

        with reached():
            return cls(PrefixStore("endoreward", next(rendezvous("env://"))[0]))

    def part(self, name: str) -> Board:
        """A board of its own within this one."""
        from torch.distributed import PrefixStore

        return Board(PrefixStore(name, self._store))

    def put(self, key: str, data: bytes) -> None:
        """Leave a message; its number of parts last, as that is what is waited for."""
        parts = [data[start : start + PART] for start in range(0, len(data), PART)]
        for n, part in enumerate(parts):
            self._store.set(f"{key} part {n}", part)
        self._store.set(key, str(len(parts)))

    def has(self, *keys: str) -> bool:
        """Whether the messages are there."""
        return bool(self._store.check(list(keys)))

    def get(self, key: str) -> bytes:
        """The message, which must be there."""
        return b"".join(self._store.get(part) for part in self._parts(key))

    def take(self, key: str) -> bytes:
        """The message, which must be there, and which nobody else wants."""
        data = self.get(key)
        for name in (*self._parts(key), key):
            self._store.delete_key(name)
        return data

    def _parts(self, key: str) -> list[str]:
        return [f"{key} part {n}" for n in range(int(self._store.get(key)))]

    def count(self, key: str, more: int = 1) -> int:
        """What all ranks together have counted there so far, once `more` is added."""
        return int(self._store.add(f"{key} count", more))


@contextmanager
def reached() -> Iterator[None]:
    """A store that is not there, or no longer, in one clear line."""
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).partition("\n")[0]
        raise EndoRewardError(f"the ranks' common store at {where} cannot be reached: {reason}") from error


def _until(seen: Callable[[], bool], who: str) -> None:
    """Wait until `seen`. Raises EndoRewardError, naming who has not come."""
    end = time.monotonic() + PATIENCE
    while not seen():
        if time.monotonic() > end:
            raise EndoRewardError(f"{who} has not come within {PATIENCE / 60:.0f} minutes: were all ranks started?")
        time.sleep(PAUSE)


ATTEMPT, START = "attempt", "start"


def _came(rank: int) -> str:
    return f"rank {rank} came"


def call(board: Board, size: int, about: dict[str, Any]) -> Board:
    """Rank 0: the board of an attempt, once all ranks have come to it; `about` is what they are told."""
    attempt = uuid4().hex
    board.put(ATTEMPT, attempt.encode())
    here = board.part(attempt)
    names = [_name_of(other, here) for other in range(1, size)]
    here.put(START, json.dumps(about | {"ranks": names}).encode())
    return here


def _name_of(rank: int, board: Board) -> str:
    _until(lambda: board.has(_came(rank)), f"rank {rank}")
    return board.get(_came(rank)).decode()


def come(board: Board, rank: int) -> tuple[Board, dict[str, Any]]:
    """Any other: that board, and what rank 0 tells."""
    name, attempt = uuid4().hex, ""
    while True:
        attempt = _next_attempt(board, attempt)
        here = board.part(attempt)
        here.put(_came(rank), name.encode())
        about = _about(board, attempt)
        if name in about["ranks"]:
            return here, about  # else it is an earlier attempt, and rank 0 is on its way


def _next_attempt(board: Board, before: str) -> str:
    _until(lambda: board.has(ATTEMPT) and board.get(ATTEMPT).decode() != before, "rank 0")
    return board.get(ATTEMPT).decode()


def _about(board: Board, attempt: str) -> dict[str, Any]:
    """What rank 0 tells at the start of the attempt; that nobody came to it, where another follows."""
    here = board.part(attempt)
    _until(lambda: here.has(START) or board.get(ATTEMPT).decode() != attempt, "another rank")
    found: dict[str, Any] = json.loads(here.get(START)) if here.has(START) else {"ranks": []}
    return found
