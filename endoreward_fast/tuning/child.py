"""Send requests to a process of their own, so that a hang, a crash or a fault costs these requests alone."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from subprocess import PIPE
from typing import Any

MEASURE = (sys.executable, "-m", f"{__package__}.measure")
GRACE = 10  # seconds after the limit in which the parent, if it still lives, ends the process

Request = Mapping[str, Any]
Answer = Mapping[str, Any]
"""what the process found, or {"problem": why it found nothing}"""


def ask(
    requests: Sequence[Request], limit: float, *, command: Sequence[str] = MEASURE, env: Mapping[str, str] | None = None
) -> list[Answer]:
    """Send requests as JSON to a new process and return the answers: a list, in the last line that it prints.

    limit  seconds, after which the process and all that it started are killed. The process gets a longer limit as its
           argument, and ends itself if this process has been killed meanwhile
    env    environment variables to set
    """
    found = _answers(requests, limit, command, env or {})
    return [{"problem": found}] * len(requests) if isinstance(found, str) else found


def _answers(
    requests: Sequence[Request], limit: float, command: Sequence[str], env: Mapping[str, str]
) -> list[Answer] | str:
    """Return the answers, or why there are none."""
    process = subprocess.Popen(
        [*command, str(math.ceil(limit) + GRACE)], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, errors="replace",
        env={**os.environ, **env}, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(json.dumps(requests), timeout=limit)
    except subprocess.TimeoutExpired:
        return f"no answer within {limit:g} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also compilers that it started, and if Ctrl-C came here
        process.wait()
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}"
    if process.returncode:
        return f"exit code {process.returncode}: {_last_line(err)}"
    try:
        found = json.loads(_last_line(out))
    except ValueError:
        found = None
    if not isinstance(found, list) or len(found) != len(requests):
        return f"it printed no answer: {_last_line(out)[:80]!r}"
    return found


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()
