"""`endoreward serve` in a process of its own, for a test file."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SERVING = re.compile(r"http://\S+:(\d+)")


class Served(NamedTuple):
    """A server that runs."""

    process: subprocess.Popen
    port: int
    said: list[str]
    """its lines on standard error so far"""


@contextlib.contextmanager
def served(*flags, seconds=120, **environment):
    """Start `endoreward serve` on a free port and stop it with SIGTERM. It has loaded its model when this yields."""
    command = [sys.executable, "-m", "endoreward_fast", "serve", "--port", "0", *map(str, flags)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ENDOREWARD_TUNED": "0", **environment}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said, found, port = [], threading.Event(), []

    def read():
        for line in process.stderr:
            said.append(line)
            if not port and (match := SERVING.search(line)):
                port.append(int(match[1]))
            if "ready after" in line:
                found.set()
        found.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert found.wait(seconds) and port and process.poll() is None, f"no server: {''.join(said)}"
        yield Served(process, port[0], said)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()
            reader.join(10)
            process.stderr.close()
