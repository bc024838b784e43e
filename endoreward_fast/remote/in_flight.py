"""Work on several things at once, in threads."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_flight(work: Callable[[T, threading.Event], R], things: Sequence[T], threads: int) -> Iterator[R]:
    """Yield `work(thing, stop)` of each thing as they finish, in any order. At most `threads` of them run at a time.

    If one raises, no other begins. The results of those that run are yielded, and then the error is raised. If the
    caller leaves, `stop` is set, and nobody waits for those that run.
    """
    stop = threading.Event()
    if len(things) == 1 or threads == 1:
        for thing in things:
            yield work(thing, stop)
        return
    left, lock = iter(things), threading.Lock()
    done: queue.SimpleQueue[tuple[list[R], BaseException | None, bool]] = queue.SimpleQueue()

    def run() -> None:
        try:
            while not stop.is_set():
                with lock:
                    mine = list(islice(left, 1))
                if not mine:
                    break
                done.put(([work(mine[0], stop)], None, False))
        except BaseException as error:  # raised again in the caller's thread
            done.put(([], error, False))
            stop.set()
        done.put(([], None, True))

    running = min(threads, len(things))
    # As daemons, because a request cannot be interrupted: Ctrl-C must not wait for the answer.
    for number in range(running):
        threading.Thread(target=run, name=f"endoreward_{number}", daemon=True).start()
    first: BaseException | None = None
    try:
        while running:
            results, error, ended = done.get()
            running -= ended
            first = first or error
            yield from results
    finally:
        stop.set()
    if first is not None:
        raise first
