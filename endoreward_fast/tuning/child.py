"""Run a request in a process of its own, so that a hang, a crash or a fault costs that request alone."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

MEASURE = (sys.executable, "-m", f"{__package__}.measure")

Answer = Mapping[str, Any]
"""what a process found, or {"problem": why it found nothing}"""


def ask(
    request: Mapping[str, Any], limit: float, *, command: Sequence[str] = MEASURE, env: Mapping[str, str] | None = None
) -> Answer:
    """Send a request as JSON to a new process and return its answer, the last line that it prints.

    limit  seconds, after which the process and all that it started are killed
    env    environment variables to set
    """
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        env={**os.environ, **(env or {})}, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(json.dumps(request), timeout=limit)
    except subprocess.TimeoutExpired:
        return {"problem": f"no answer within {limit:g} s"}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also compilers that it started, and if Ctrl-C came here
        process.wait()
    if process.returncode < 0:
        return {"problem": f"ended by {signal.Signals(-process.returncode).name}"}
    if process.returncode:
        return {"problem": f"exit code {process.returncode}: {_last_line(err)}"}
    try:
        answer = json.loads(_last_line(out))
        return answer if isinstance(answer, dict) else {"problem": "an answer that is no object"}
    except ValueError:
        return {"problem": f"an answer that is no JSON: {_last_line(out)[:80]!r}"}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()
