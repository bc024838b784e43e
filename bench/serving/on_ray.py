"""Two replicas on a local Ray in place of the command, and what kills one of them.

As a script, it starts Ray and the application, and stays until SIGTERM.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.serving import server

REPLICAS = 2
ROLES = {"Model": "replica", "Ingress": "ingress", "ProxyActor": "proxy"}
"""{what Ray writes into a process's title: what it is called here}"""


@dataclass(frozen=True)
class OnRay(server.Server):
    """An application of Ray Serve. Its processes are grandchildren of the one that was started."""

    known: dict[int, str] = field(default_factory=dict)
    """{process id: name}; a replica that is started later gets the next number"""

    def processes(self) -> dict[str, psutil.Process]:
        """Return the replicas, the ingress and the proxy that run."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            name = self._name(process)
            if name is not None:
                found[name] = process
        return found

    def _name(self, process: psutil.Process) -> str | None:
        if process.pid not in self.known:
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:  # it has ended meanwhile
                return None
            role = next((role for part, role in ROLES.items() if title.startswith("ray::") and part in title), None)
            if role is None:
                return None
            alike = sum(name.startswith(role) for name in self.known.values())
            self.known[process.pid] = f"{role} {alike + 1}" if role == "replica" else role
        return self.known[process.pid]

    def kill(self) -> dict:
        """Kill a replica with SIGKILL. Return its name."""
        name, process = next((n, p) for n, p in sorted(self.processes().items()) if n.startswith("replica"))
        process.kill()
        return {"name": name, "signal": "SIGKILL"}


@contextmanager
def serving(arguments: Mapping[str, object], threads: int, folder: Path, token: str) -> Iterator[OnRay]:
    """Serve with REPLICAS replicas until the block ends. `arguments` are those of ray_serve.app."""
    given = {"num_replicas": REPLICAS, "ray_actor_options": {"num_cpus": 0.1}, **arguments}
    command = [sys.executable, "-m", "bench.serving.on_ray", json.dumps(given)]
    log = folder / "ray.log"
    with server.started(command, threads, log, ENDOREWARD_TOKEN=token) as process:
        found = OnRay(process, server.port_in(log, process), token)
        server.wait_until_ready(found, log)
        yield found


def main(arguments: Mapping[str, object]) -> None:
    import ray
    from ray import serve

    from endoreward_fast.integrations.ray_serve import app

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit())
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": dict(THREADS)})
        serve.start(http_options={"port": port})
        serve.run(app(dict(arguments)), name="rewards")
        print(f"serving on http://127.0.0.1:{port}", flush=True)
        while True:
            time.sleep(60)
    finally:
        serve.shutdown()
        ray.shutdown()


THREADS = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
"""Ray sets this to the processors of a worker, unless it is told otherwise"""

if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
