"""Where results and messages go: JSON Lines by the whole line, and progress, on a terminal only."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from types import TracebackType
from typing import Any, BinaryIO

from ...errors import EndoRewardError
from ..input.files import STDIN

UNICODE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


STDIN_OPEN, STDOUT, STDERR = 0, 1, 2  # file descriptors


PART = ".part"
"""what the name of a file ends in until it is whole"""


def compact(value: float, digits: int = 9) -> float:
    """A float32 as its shortest decimal: 9 significant digits give back every float32 exactly."""
    return float(f"{value:.{digits}g}")


def to_line(row: dict[str, Any]) -> str:
    """JSON in one line: one to every reader, also to those that break lines where Unicode does.

    What JSON has no spelling for becomes null (NaN, infinities) or text (dates).
    """
    try:
        text = json.dumps(row, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(plain(row), ensure_ascii=False)
    return text.translate(UNICODE_BREAKS) + "\n"


def plain(value: Any) -> Any:
    """`value` as it is read again once it is written."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)


class Sink:
    """Output to a path, or to standard output where the path is None or "-".

    Opening checks that the path can be written, keeps other runs from it, and touches nothing there; the first write
    empties it, within `emptying()`, or after `append` goes on behind what is there. A device, a pipe or what standard
    output or error goes to is never emptied. Raises EndoRewardError if the path cannot be written, is one of `inputs`
    (as is what is written `beside` it), is being written by another run, or holds something, unless `overwrite` or
    `resume` says what is to become of that
    (`resume` None: the command has no --resume).
    """

    def __init__(
        self, path: str | None, inputs: tuple[str, ...] = (), *, overwrite: bool = False, resume: bool | None = None,
        beside: tuple[str, ...] = (), emptying: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        self._emptying = emptying
        self._before_first: Callable[[], None] | None = None
        self._created = self._regular = False
        if path is None or path == STDIN or _is_open_as(path, STDOUT):
            if any(_is_read_and_written(i) for i in inputs):
                raise EndoRewardError("standard output goes to the input, which would never end: name another file")
            self.name, self._file = "standard output", sys.stdout.buffer
            return
        self.name = path
        self._file: BinaryIO
        for made in (path, f"{os.path.realpath(path)}{PART}", *beside):
            if any(_same(made, i) for i in inputs):
                also = "" if made == path else f", and written beside {path}"
                raise EndoRewardError(f"{made} is the input{also}: writing there would lose it")
        self._created = not os.path.lexists(path)
        try:
            self._file = open(path, "ab")  # noqa: SIM115  closed by __exit__
        except OSError as error:
            raise EndoRewardError(f"cannot write {path}: {error.strerror}") from None
        if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode) and not _is_open_as(path, STDERR):
            self._before_first, self._regular = self._empty, True
            if not (_lock(self._file) and _is_at(self._file, path)):
                self._file.close()
                raise EndoRewardError(f"{path} is being written by another run: wait for its end, or end it")
            if not (overwrite or resume) and os.fstat(self._file.fileno()).st_size:
                self._file.close()
                ways = "--overwrite replaces it, or name another --output"
                ways = ways if resume is None else f"--resume goes on with it, {ways}"
                raise EndoRewardError(f"{path} exists and is not empty: {ways}")

    def append(self, kept: Iterable[bytes] | None = None) -> None:
        """Keep what is there; or of that, from the first write on, the lines `kept`."""
        self._before_first = None if kept is None else partial(self.rewrite, kept)

    def _empty(self) -> None:
        with self._emptying():
            self._file.truncate(0)

    def rewrite(self, lines: Iterable[bytes]) -> None:
        """`lines` in the place of what is there, which stays whole until they are. EndoRewardError: they cannot be."""
        path = os.path.realpath(self.name)  # a link stays one
        part = f"{path}{PART}"
        try:
            file = open(part, "wb")  # noqa: SIM115  it becomes the output
            shutil.copymode(path, part)
            _lock(file)
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException as error:
            with suppress(OSError):  # it could not even be begun
                os.unlink(part)
            if isinstance(error, OSError):
                raise EndoRewardError(f"cannot write {self.name}: {error.strerror}") from None
            raise
        self._file.close()
        self._file = file

    def write(self, text: str | bytes) -> None:
        """Write `text` and push it through to the operating system."""
        try:
            if self._before_first:
                self._before_first()
                self._before_first = None
            # Half a surrogate pair has no UTF-8; its backslash escape is what JSON spells it with.
            self._file.write(text if isinstance(text, bytes) else text.encode("utf-8", "backslashreplace"))
            self._file.flush()
        except BrokenPipeError:
            # Whoever read us has left. Nothing more can be said there, not even by the flush at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())
            raise
        except OSError as error:
            raise EndoRewardError(f"cannot write {self.name}: {error.strerror}") from None

    @property
    def begun(self) -> bool:
        """Whether the path holds what this run has written so far: --resume goes on there."""
        return self._regular and self._before_first is None

    @property
    def is_stdout(self) -> bool:
        """Whether results go to standard output."""
        return self._file is getattr(sys.stdout, "buffer", None)

    @property
    def on_terminal(self) -> bool:
        """Whether results scroll over the same screen as a progress bar would: whoever reads a pipe may write there."""
        return self.is_stdout and (sys.stdout.isatty() or stat.S_ISFIFO(os.fstat(STDOUT).st_mode))

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is getattr(sys.stdout, "buffer", None):
            return
        made_for_nothing = self.name if kind and self._created and self._before_first else None
        if made_for_nothing and sys.platform != "win32":
            os.unlink(made_for_nothing)  # while it is locked: afterwards it may be the next run's
        try:
            self._file.close()  # which writes what could not be written before, on a full disk
        except OSError as error:
            if kind is None:
                raise EndoRewardError(f"cannot write {self.name}: {error.strerror}") from None
        if made_for_nothing and sys.platform == "win32":
            os.unlink(made_for_nothing)


def _is_open_as(path: str, descriptor: int) -> bool:
    """Whether `path` names what that descriptor of this process is open on, such as /dev/stdout."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False  # one of the two is not there


def _lock(file: BinaryIO) -> bool:
    """Whether nobody else has it. Whoever does lets go of it when its process ends, however that ends.

    What is left of a launch whose launcher was killed would otherwise write its rows beside those of the next.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system that has no locks
    return True


def _is_at(file: BinaryIO, path: str) -> bool:
    """Whether `path` still names it: whoever had the lock may have removed it."""
    return os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno()))


def _same(output: str, input: str) -> bool:
    there, read = _stat(output), _stat(STDIN_OPEN if input == STDIN else input)
    if there is None or read is None or (input == STDIN and not stat.S_ISREG(read.st_mode)):
        return False
    return os.path.samestat(there, read)


def _is_read_and_written(input: str) -> bool:
    """Whether an input is the file that standard output is added to."""
    written, read = _stat(STDOUT), _stat(STDIN_OPEN if input == STDIN else input)
    both = written is not None and read is not None and stat.S_ISREG(written.st_mode)
    return both and os.path.samestat(written, read)


def _stat(place: str | int) -> os.stat_result | None:
    try:
        return os.stat(place)
    except (OSError, ValueError):
        return None  # it is not there, or can be nowhere
