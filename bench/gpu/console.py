"""What a run prints, on the terminal and in a file, and commands under a time limit, whose output goes there too."""

import os
import signal
import subprocess
import threading
from pathlib import Path


class Console:
    """Print lines, and append them to a file at once, so that the file is whole when the run is killed."""

    def __init__(self, path: Path):
        self._file = path.open("w")

    def say(self, line: str) -> None:
        print(line, flush=True)
        print(line, file=self._file, flush=True)


def run_limited(
    command: list[str], seconds: float, console: Console | None = None, environment: dict | None = None, folder=None
) -> int | None:
    """Run a command. Return its exit code, or None if it was killed with its children at the time limit.

    Its output goes to the console if there is one. If this process is told to stop, the command is killed too.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if console else {}
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)
    reader = threading.Thread(target=_copy, args=(process.stdout, console), daemon=True)
    if console:
        reader.start()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if console:
            reader.join(5)  # a grandchild that left the session may hold the pipe open


def _copy(lines, console: Console) -> None:
    for line in lines:
        console.say(line.rstrip("\n"))
