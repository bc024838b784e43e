"""`python -m bench.gpu.sanitize`: run tests of small shapes under compute-sanitizer's memcheck and racecheck.

torch's caching allocator is turned off, so a read past the end of a tensor is past the end of an allocation. Each tool
has a time limit. The exit code is 2 without a GPU or without the tool, 1 if a tool found an error, a test failed or the
time ran out, else 0.
"""

import argparse
import os
import shutil
import sys
import time

from bench.gpu.console import run_limited
from bench.gpu.run import why_no_gpu

TOOLS = {"memcheck": ("--leak-check", "no"), "racecheck": ("--racecheck-report", "all")}
FILES = ("tests/test_functional.py", "tests/vocab/test_workspace.py")
# Statistics, rewards and gradients of every impl. `make gpu` runs the tests that compile or capture graphs.
SELECTION = "statistics or low_precision or token_rewards or packed_rows or gradients or mask or nothing_to_do"
LIMIT = 260  # seconds for each tool


def commands() -> dict[str, list[str]]:
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *FILES, "-k", f"({SELECTION}) and not reference"]
    head = ["compute-sanitizer", "--target-processes", "all", "--error-exitcode", "99", "--print-limit", "20"]
    return {tool: [*head, "--tool", tool, *options, *test] for tool, options in TOOLS.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for each tool")
    args = parser.parse_args(arguments)
    obstacle = why_no_gpu()
    if obstacle is None and shutil.which("compute-sanitizer") is None:
        obstacle = "compute-sanitizer is not on the PATH: add the CUDA toolkit's bin folder"
    if obstacle:
        print(obstacle, file=sys.stderr)
        return 2
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    good = True
    for tool, command in commands().items():
        start = time.monotonic()
        code = run_limited(command, args.limit)
        said = {None: "did not finish", 0: "found nothing", 99: "FOUND ERRORS"}.get(code, f"failed (exit code {code})")
        print(f"{tool}: {said}, {time.monotonic() - start:.0f} s (limit {args.limit:.0f} s)", flush=True)
        good = good and code == 0
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
