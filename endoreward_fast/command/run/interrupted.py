"""Handle Ctrl-C, SIGTERM and SIGHUP: write what is scored, and print the command that continues the run."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import EndoRewardError
from .monitor import Monitor, one_line
from .sink import Sink

ENDS = (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
"""signals of a closed terminal and of cluster schedulers"""


def resume_command(arguments: Sequence[str]) -> str:
    """Return the shell command of `arguments`, with --resume and without --overwrite."""
    given = [argument for argument in arguments if argument != "--overwrite"]
    if "--resume" not in given:
        given.insert(given.index("--") if "--" in given else len(given), "--resume")
    return " ".join((_program(), *map(_quoted, given)))


def _program() -> str:
    """Return the program and, if this is one of several processes, its launcher."""
    size, here = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if size != "1":
        launch = f"torchrun --nproc-per-node {here}" if here == size else "your launcher on each machine, as before,"
        return f"{launch} -m endoreward_fast"
    as_module = Path(sys.argv[0]).parts[-2:] == ("endoreward_fast", "__main__.py")
    return "python -m endoreward_fast" if as_module else "endoreward"


def _quoted(argument: str) -> str:
    """Quote for a shell, without line breaks or control characters."""
    if one_line(argument) == argument:
        return shlex.quote(argument)
    return f"$'{''.join(map(_escaped, argument))}'"


def _escaped(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable() and character != " ":
        return character
    return f"\\x{ord(character):02x}" if ord(character) < 128 else f"\\U{ord(character):08x}"


@contextmanager
def resume_hint(arguments: Sequence[str], sink: Sink, monitor: Monitor) -> Iterator[None]:
    """If the block is interrupted, print the command that continues the run."""
    try:
        with signals_end():
            yield
    except (KeyboardInterrupt, SystemExit):
        if sink.begun:
            monitor.say(f"{sink.name} keeps the rows scored so far. To continue: {resume_command(arguments)}")
        raise


@contextmanager
def signals_end() -> Iterator[None]:
    """Turn SIGTERM, and SIGHUP unless it is ignored (nohup), into SystemExit, so that what is scored is written."""
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread only
        yield
        return
    numbers = [number for number in ENDS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _end) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _end(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


@contextmanager
def kept_until_written() -> Iterator[list[BaseException]]:
    """Catch what ends the block (Ctrl-C, a signal, an EndoRewardError) and keep it in the list that is yielded.

    The caller writes what was computed, then calls `end`, which raises the exception again.
    """
    ended: list[BaseException] = []
    try:
        with signals_end():
            yield ended
    except (KeyboardInterrupt, SystemExit, EndoRewardError) as error:
        ended.append(error)


def end(ended: Sequence[BaseException]) -> None:
    """Raise the first exception that `kept_until_written` kept, if any."""
    for error in ended:
        raise error
