"""Write results as whole lines, without overwriting an input, another run's output or earlier results."""

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

from ...data.files import STDIN
from ...errors import EndoRewardError

UNICODE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


STDIN_OPEN, STDOUT, STDERR = 0, 1, 2  # file descriptors
PART = ".part"
"""suffix of a file that is not complete"""


def to_line(row: dict[str, Any]) -> str:
    """Return JSON in one line, also for readers that break lines at Unicode's line separators.

    NaN and infinities become null, and dates become text, because JSON has neither.
    """
    try:
        text = json.dumps(row, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(plain(row), ensure_ascii=False)
    return text.translate(UNICODE_BREAKS) + "\n"


def plain(value: Any) -> Any:
    """Return `value` as a reader gets it from the file."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)


class Sink:
    """Writes to a path, or to standard output if the path is None or "-".

    Opening checks that the path can be written and locks it against other runs, but changes nothing. The first write
    empties the file, within the context `emptying()`. After `append`, it adds to the file instead. Devices, pipes and
    the files behind standard output and error are never emptied.

    Raises EndoRewardError if the path cannot be written, if it or a file `beside` it is one of `inputs`, if another run
    is writing it, or if it is not empty and neither `overwrite` nor `resume` is set. `resume` is None for commands
    without --resume.
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
                raise EndoRewardError("standard output goes to the input, which would grow forever: use another file")
            self.name, self._file = "standard output", sys.stdout.buffer
            return
        self.name = path
        self._file: BinaryIO
        for made in (path, f"{os.path.realpath(path)}{PART}", *beside):
            if any(_same(made, i) for i in inputs):
                also = "" if made == path else f", and would be written beside {path}"
                raise EndoRewardError(f"{made} is the input{also}: name another output")
        self._created = not os.path.lexists(path)
        try:
            self._file = open(path, "ab")  # noqa: SIM115  closed by __exit__
        except OSError as error:
            raise EndoRewardError(f"cannot write {path}: {error.strerror}") from None
        if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode) and not _is_open_as(path, STDERR):
            self._before_first, self._regular = self._empty, True
            if not (_lock(self._file) and _is_at(self._file, path)):
                self._file.close()
                raise EndoRewardError(f"another run is writing {path}: wait until it ends, or stop it")
            if not (overwrite or resume) and os.fstat(self._file.fileno()).st_size:
                self._file.close()
                ways = "--overwrite replaces it, or name another --output"
                ways = ways if resume is None else f"--resume continues it, {ways}"
                raise EndoRewardError(f"{path} exists and is not empty: {ways}")

    def append(self, kept: Iterable[bytes] | None = None) -> None:
        """Add to the file instead of emptying it. With `kept`, the first write reduces it to those lines."""
        self._before_first = None if kept is None else partial(self.rewrite, kept)

    def _empty(self) -> None:
        with self._emptying():
            self._file.truncate(0)

    def rewrite(self, lines: Iterable[bytes]) -> None:
        """Replace the contents by `lines`, atomically. Raises EndoRewardError if they cannot be written."""
        path = os.path.realpath(self.name)  # keeps a symbolic link
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
            with suppress(OSError):  # it may not have been created
                os.unlink(part)
            if isinstance(error, OSError):
                raise EndoRewardError(f"cannot write {self.name}: {error.strerror}") from None
            raise
        self._file.close()
        self._file = file

    def write(self, text: str | bytes) -> None:
        """Write `text` and flush it to the operating system."""
        try:
            if self._before_first:
                self._before_first()
                self._before_first = None
            # A lone surrogate cannot be encoded in UTF-8. Its backslash escape is valid JSON.
            self._file.write(text if isinstance(text, bytes) else text.encode("utf-8", "backslashreplace"))
            self._file.flush()
        except BrokenPipeError:
            # The reader of the pipe has left. Python's flush at exit must not write there either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())
            raise
        except OSError as error:
            raise EndoRewardError(f"cannot write {self.name}: {error.strerror}") from None

    @property
    def begun(self) -> bool:
        """Whether this run has written to the path, so that --resume can continue it."""
        return self._regular and self._before_first is None

    @property
    def is_stdout(self) -> bool:
        """Whether results go to standard output."""
        return self._file is getattr(sys.stdout, "buffer", None)

    @property
    def on_terminal(self) -> bool:
        """Whether results may appear on the screen of the progress bar. The reader of a pipe may print there."""
        return self.is_stdout and (sys.stdout.isatty() or stat.S_ISFIFO(os.fstat(STDOUT).st_mode))

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is getattr(sys.stdout, "buffer", None):
            return
        unused = self.name if kind and self._created and self._before_first else None
        if unused and sys.platform != "win32":
            os.unlink(unused)  # before the lock is released: afterwards the next run may own the file
        try:
            self._file.close()  # may raise: after a full disk, it writes what is still buffered
        except OSError as error:
            if kind is None:
                raise EndoRewardError(f"cannot write {self.name}: {error.strerror}") from None
        if unused and sys.platform == "win32":
            os.unlink(unused)


def _is_open_as(path: str, descriptor: int) -> bool:
    """Return whether `path` is the file behind a descriptor of this process, such as /dev/stdout."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False  # one of the two does not exist


def _lock(file: BinaryIO) -> bool:
    """Lock `file` and return whether that worked. The operating system releases the lock when the process ends.

    Without a lock, ranks that survive their killed launcher would write into the output of the next launch.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # the file system has no locks
    return True


def _is_at(file: BinaryIO, path: str) -> bool:
    """Return whether `path` is still `file`. A run that held the lock may have removed it."""
    return os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno()))


def _same(output: str, input: str) -> bool:
    there, read = _stat(output), _stat(STDIN_OPEN if input == STDIN else input)
    if there is None or read is None or (input == STDIN and not stat.S_ISREG(read.st_mode)):
        return False
    return os.path.samestat(there, read)


def _is_read_and_written(input: str) -> bool:
    """Return whether an input is the file that standard output is redirected to."""
    written, read = _stat(STDOUT), _stat(STDIN_OPEN if input == STDIN else input)
    both = written is not None and read is not None and stat.S_ISREG(written.st_mode)
    return both and os.path.samestat(written, read)


def _stat(place: str | int) -> os.stat_result | None:
    try:
        return os.stat(place)
    except (OSError, ValueError):
        return None  # it does not exist, or is not a valid path
