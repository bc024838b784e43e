"""`python -m bench.sweep`: time the CPU paths against N and V, from hidden states and from logits, in three minutes.

Writes bench/results/cpu-sweep.json and its pictures. Use an idle machine: other load changes the times, though hardly
the ratios.
"""

import argparse
from pathlib import Path

from bench.harness import charts, timing
from bench.harness.cases import Case

SECONDS = 170
WITHOUT = ("torch.compile", "F.linear_cross_entropy, chunked")
CASES = (
    *(Case("linear", "qwen3-0.6b", rows, rounds=7, without=WITHOUT, memory=True) for rows in (8, 32, 128, 512)),
    *(Case("linear", f"D1024-V{v}", 128, rounds=7, without=WITHOUT) for v in (16384, 32768, 65536, 131072, 262144)),
    *(Case("logits", "qwen3-0.6b", rows, rounds=15, without=WITHOUT) for rows in (8, 32, 128, 512)),
    *(Case("logits", f"D1024-V{v}", 256, rounds=15, without=WITHOUT) for v in (16384, 32768, 65536, 131072, 262144)),
)


def run(cases, seconds: float, folder: Path) -> list[Path]:
    """Run the cases, write the record and the pictures. Return the pictures' paths."""
    budget, record, done = timing.Budget(seconds, len(cases)), timing.environment(), []
    for case in cases:
        done.append(timing.run_case(case, enough=budget.next_case()))
        print(timing.table(done[-1]), flush=True)
        timing.write("cpu-sweep", record, done, folder)
    return charts.draw(folder, "cpu-sweep.json", "cpu-")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder for cpu-sweep.json and its pictures")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    args = parser.parse_args()
    for path in run(CASES, args.seconds, args.out):
        print(path)
