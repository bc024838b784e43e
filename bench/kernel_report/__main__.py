"""Write the report of every kernel on every architecture, and fail if a gate fails.

python -m bench.kernel_report                 # writes bench/results/kernel-report.md and .json
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from .archs import RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for kernel-report.json and .md")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing: unset it")
    import torch
    import triton

    from .calls import calls, launches
    from .compile import compile_launch
    from .gates import gates
    from .page import markdown

    with ProcessPoolExecutor(args.workers) as pool:
        rows = list(pool.map(compile_launch, *zip(*launches(calls()), strict=True)))
    failures = gates(rows)
    args.output.mkdir(parents=True, exist_ok=True)
    record = {
        "triton": triton.__version__, "torch": torch.__version__, "kernels": [asdict(r) for r in rows],
        "failures": failures,
    }  # fmt: skip
    (args.output / "kernel-report.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.output / "kernel-report.md").write_text(markdown(rows))
    print(f"{len(rows)} kernels compiled; {sum(r.spill_bytes > 0 for r in rows)} spill", file=sys.stderr)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
