"""Peak memory of one call on the CPU, measured in a separate process for each peer."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from bench.harness import peers as registry
from bench.harness import shapes

RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""environment in which the allocator gets every block over 64 KiB from the system, and returns it when it is freed"""


def weigh(case, names) -> dict[str, float]:
    return {name: in_a_process(case, weigh=name)["extra_mib"] for name in names}


def extra_mib(case, name: str) -> float:
    """Return by how many MiB resident memory rises at its peak during one call, after the inputs are made.

    It counts all memory, including the matmul library's buffers and the outputs. Call it in a fresh process
    (`in_a_process`), where the allocator returns freed memory to the system. A first call on a small shape starts
    threads and loads code.
    """
    shape = shapes.find(case.shape)
    peer = registry.peers(case.subject)[name]
    small = registry.make_inputs(case.subject, shapes.Shape("small", 64, 4096, shape.softcap), 8, case.torch_dtype)
    peer.run(case.for_peer(name, small))
    inputs = case.for_peer(name, registry.make_inputs(case.subject, shape, case.rows, case.torch_dtype))
    if name == "torch.compile":  # exclude the compiler's memory
        peer.run(inputs)
    return risen_mib(lambda: peer.run(inputs))


def risen_mib(call: Callable[[], object]) -> float:
    """Return by how many MiB resident memory rises at its peak during the call."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def in_a_process(case, env: dict[str, str] | None = None, weigh: str | None = None) -> dict:
    """Run the case in a fresh interpreter, which prints its result as the last line. Return the result."""
    settings = dict(os.environ) | (env or {}) | (RETURNING if weigh else {})
    command = [sys.executable, "-m", "bench.harness.one", json.dumps(asdict(case)), *([weigh] if weigh else [])]
    run = subprocess.run(command, env=settings, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if run.returncode:
        raise RuntimeError(f"{case.name}: {' '.join(command)} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])
