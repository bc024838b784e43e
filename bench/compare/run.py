"""`make compare`: run every arm in a process of its own, and write compare.json, compare.md and compare.svg.

An arm that cannot be imported, fails, crashes or hangs costs its own row, which holds the reason. On a CPU, time is the
processor's, of one thread; Triton kernels run in Triton's interpreter there, without a time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.compare import arms, measure, page
from bench.harness.clock import Device, Processor
from bench.harness.environment import environment

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results"
SECONDS = 1200  # time limit of one arm


def run_arm(name: str, path: Path) -> None:
    """Measure one arm in this process, and write what was found to `path`."""
    gpu = torch.cuda.is_available()
    if not gpu:
        torch.set_num_threads(1)
    clock, timed = (Device(), measure.ON_GPU) if gpu else (Processor(), measure.ON_CPU)
    found = measure.measure(arms.arm(name, gpu), clock, timed)
    path.write_text(json.dumps(found))


def in_a_process(name: str, arm: arms.Arm, seconds: float) -> dict:
    """Return what a fresh process finds out about an arm, or {"failed": why}."""
    settings = dict(os.environ) | ({"TRITON_INTERPRET": "1"} if arm.interpreted else {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arm.json"
        command = [sys.executable, "-m", "bench.compare", "--arm", name, "--out", str(path)]
        try:
            done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"no result after {seconds:.0f} s"}
        if path.exists():
            return json.loads(path.read_text())
        last = (done.stderr.strip().splitlines() or ["-"])[-1]
        return {"failed": f"exit code {done.returncode}: {last[:200]}"}


def run(only: list[str], seconds: float, out: Path) -> list[Path]:
    """Measure all arms, or those whose name contains one of `only` again, and write the record after each."""
    gpu, path = torch.cuda.is_available(), out / "compare.json"
    record = {"environment": environment(gpu=True), "settings": page.settings(gpu), "arms": {}}
    if only and path.exists():
        record["arms"] = json.loads(path.read_text())["arms"]
    for name, arm in arms.arms(gpu).items():
        if only and not any(part in name for part in only):
            continue
        obstacles = [measure.obstacle(arm, dtype, arms.device()) for dtype in measure.DTYPES.values()]
        why = obstacles[-1] if all(obstacles) else arm.peer.missing
        found = {"failed": why} if why else in_a_process(name, arm, seconds)
        record["arms"][name] = {"takes": arm.takes, "interpreted": arm.interpreted} | found
        print(f"{name}: {found.get('failed') or 'measured'}", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    return page.write(out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for compare.json, compare.md and compare.svg")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of one arm (default: %(default)g)")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="TEXT", help="measure only arms with this in their name"
    )
    parser.add_argument("--page", action="store_true", help="write the table and the pictures again, from compare.json")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.arm:
        run_arm(args.arm, args.out)
        return 0
    for path in page.write(args.out) if args.page else run(args.only, args.seconds, args.out):
        print(path)
    return 0
