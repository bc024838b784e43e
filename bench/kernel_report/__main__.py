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

from .archs import ARCHS, RESULTS, sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for kernel-report.json and .md")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--archs", nargs="+", choices=ARCHS, default=list(ARCHS), help="architectures to compile for")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing: unset it")
    import torch
    import triton

    from .calls import calls, plan
    from .compile import compile_row
    from .gates import gates
    from .host import costs
    from .page import markdown

    torch.set_num_threads(1)
    with ProcessPoolExecutor(args.workers) as pool:
        rows = list(pool.map(compile_row, plan(calls(args.archs))))
    spent = costs()
    failures = gates(rows, spent)
    args.output.mkdir(parents=True, exist_ok=True)
    record = {
        "sources": sources(), "triton": triton.__version__, "torch": torch.__version__,
        "kernels": [asdict(r) for r in rows],
        "calls": [asdict(c) | {"launches": c.launches} for c in spent], "failures": failures,
    }  # fmt: skip
    (args.output / "kernel-report.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.output / "kernel-report.md").write_text(markdown(rows, spent))
    print(f"{len(rows)} kernels compiled; {sum(r.spill_bytes > 0 for r in rows)} spill", file=sys.stderr)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
