"""The server in a process of its own, started by its command, and what can be read of it from outside."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
START = 180.0
"""seconds for a server to start"""
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{[^}]*\})? (\S+)", re.M)
URL = re.compile(r"\bon http://[\w.]+:(\d+)")


@dataclass(frozen=True)
class Server:
    """A server that runs on this machine."""

    process: subprocess.Popen
    port: int
    token: str = ""
    """what it was started with"""

    def processes(self) -> dict[str, psutil.Process]:
        """Return the processes whose memory is watched, by name."""
        return {"server": psutil.Process(self.process.pid)}

    def cpu_s(self) -> float:
        """Return the processor seconds that the server has used so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def metrics(self) -> dict[str, float]:
        """Return the server's metrics by name: sums over labels, without the buckets of histograms."""
        return sums(self.get("/metrics"))

    def headers(self) -> dict[str, str]:
        """Return the headers that a request to it needs."""
        return {"authorization": f"Bearer {self.token}"} if self.token else {}

    def get(self, path: str) -> str:
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=self.headers())
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.read().decode()


def sums(text: str) -> dict[str, float]:
    """Return {name: sum of its samples} of metrics in Prometheus' text format, without buckets of histograms."""
    found: dict[str, float] = {}
    for name, value in SAMPLE.findall(text):
        if not name.endswith("_bucket"):
            found[name] = found.get(name, 0.0) + float(value)
    return found


@contextmanager
def serving(flags: Sequence[str], threads: int, folder: Path, token: str = "") -> Iterator[Server]:
    """Run `endoreward serve` on a free port until the block ends. `folder` takes what it says, and the token's file."""
    if token:
        file = folder / "token"
        file.write_text(token)
        file.chmod(0o600)
        flags = [*flags, "--token-file", str(file)]
    command = [sys.executable, "-m", "endoreward_fast", "serve", "--port", "0", *flags]
    with started(command, threads, folder / "server.log") as process:
        server = Server(process, port_in(folder / "server.log", process), token)
        wait_until_ready(server, folder / "server.log")
        yield server


@contextmanager
def started(command: Sequence[str], threads: int, log: Path, **variables: str) -> Iterator[subprocess.Popen]:
    """Run a command, with further variables of the environment, until the block ends; then it gets SIGTERM."""
    settings = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)} | variables
    with open(log, "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=settings)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(done, process: subprocess.Popen, log: Path):
    """Return what `done` gives as soon as it is true. Raises RuntimeError, with what the process said, if it ends."""
    end = time.monotonic() + START
    while time.monotonic() < end:
        found = done()
        if found:
            return found
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}: {log.read_text()[-2000:]}")
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start within {START:.0f} s: {log.read_text()[-2000:]}")


def port_in(log: Path, process: subprocess.Popen) -> int:
    """Return the port that a server names in its log."""
    return int(wait_for(lambda: URL.search(log.read_text()), process, log)[1])


def wait_until_ready(server: Server, log: Path) -> None:
    """Return when the server answers requests."""
    wait_for(lambda: _is_ready(server), server.process, log)


def _is_ready(server: Server) -> bool:
    try:
        server.get("/ready")
    except (urllib.error.URLError, ConnectionError):  # 503 while it loads
        return False
    return True


def facts(server: Server) -> dict:
    """Return what the server says of its model."""
    return json.loads(server.get("/v1/model"))
