"""Ctrl-C and SIGTERM: what is scored is written, and the command that goes on is said."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .output import Monitor, Sink, one_line


def command_that_goes_on(arguments: Sequence[str]) -> str:
    """The command line of `arguments`, as a shell takes it, with --resume and without --overwrite."""
    given = [argument for argument in arguments if argument != "--overwrite"]
    if "--resume" not in given:
        given.insert(given.index("--") if "--" in given else len(given), "--resume")
    as_module = Path(sys.argv[0]).parts[-2:] == ("endoreward_fast", "__main__.py")
    program = "python -m endoreward_fast" if as_module else "endoreward"
    return " ".join((program, *map(_quoted, given)))


def _quoted(argument: str) -> str:
    """For a shell, and such that a message of one line keeps it."""
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
def going_on(arguments: Sequence[str], sink: Sink, monitor: Monitor) -> Iterator[None]:
    """Says how to go on with what `sink` holds, where what is inside is interrupted."""
    try:
        with _sigterm_ends():
            yield
    except (KeyboardInterrupt, SystemExit):
        if sink.begun:
            monitor.note(f"{sink.name} keeps what is scored; to go on: {command_that_goes_on(arguments)}")
        raise


@contextmanager
def _sigterm_ends() -> Iterator[None]:
    """SIGTERM ends this process by SystemExit meanwhile, so that what is scored is written."""
    if threading.current_thread() is not threading.main_thread():  # where Python takes no handler
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)
