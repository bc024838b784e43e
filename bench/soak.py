"""`python -m bench.soak`: score 100,000 short rows with the real command, and check that memory and output stay right.

`endoreward score` runs in a separate process with the embedded model. Once a second, this script reads its resident
memory and counts the rows written. Afterwards it checks that every row is there once and in order, that a sample of
rows gets the same scores in this process, and that memory is flat over the second half of the run. Writes
bench/results/soak.json, with the throughput of each tenth, and soak.png. The exit code is 1 if a check fails.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import psutil

from bench.harness import timing
from bench.harness.environment import environment
from endoreward_fast.pocket.quiz import problems

ROWS, SAMPLE, TENTHS = 100_000, 500, 10
UNUSABLE = 100  # one row in so many has no completion
GROWTH = 0.01  # largest relative growth of resident memory over the second half that counts as flat
BATCH = 1024  # tokens. Memory rises and falls with each batch; small batches make that small beside a leak
TOLERANCE = 1e-4  # float noise of scores between different batches
MIB = 1 << 20


@dataclass(frozen=True)
class Reading:
    """One reading of the process."""

    seconds: float
    """seconds since its start"""
    rows: int
    """rows written so far"""
    mib: float
    """resident memory"""


def rows_of(count: int) -> list[dict]:
    """Return `count` problems with their answers and ids, the same in every run."""
    found = enumerate(problems(count, tasks=("add", "subtract", "sequence", "fact")))
    rows = [{"id": i, "prompt": p.prompt("plain"), "completion": str(p.answer)} for i, p in found]
    for row in rows[UNUSABLE - 1 :: UNUSABLE]:
        del row["completion"]
    return rows


def watched(command: list[str], output: Path, every: float) -> tuple[int, list[Reading], str]:
    """Run `command` and read its memory and output every so many seconds. Return (exit code, readings, its stderr)."""
    started, readings, lines = time.perf_counter(), [], 0
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stderr=said) as process,
        open(output, "w+b") as written,
    ):
        memory = psutil.Process(process.pid).memory_info
        while process.poll() is None:
            time.sleep(every)
            lines += sum(chunk.count(b"\n") for chunk in iter(lambda: written.read(MIB), b""))
            try:
                readings.append(Reading(round(time.perf_counter() - started, 2), lines, round(memory().rss / MIB, 1)))
            except psutil.NoSuchProcess:
                break
        said.seek(0)
        text = said.read()
    # Drop readings from loading the model (no rows yet) and from after the end (no memory).
    return process.returncode, [r for r in readings if r.rows and r.mib], text


def growth(readings: list[Reading]) -> float:
    """Return the relative growth of memory over the second half of the rows.

    Memory rises and falls with each batch; a leak stays. The growth is therefore the Theil-Sen slope of the lowest
    readings of each tenth of that time: the median of all pairwise slopes, which one step of the allocator does not
    change.
    """
    late = [r for r in readings if r.rows >= readings[-1].rows / 2]
    if len(late) < TENTHS:
        raise SystemExit(
            f"{len(late)} readings in the second half, at least {TENTHS} needed: raise --rows or lower --every"
        )
    edges = np.linspace(0, len(late), TENTHS + 1).astype(int)
    floor = [min(r.mib for r in late[a:b]) for a, b in pairwise(edges)]
    slopes = [(floor[j] - floor[i]) / (j - i) for i, j in combinations(range(TENTHS), 2)]
    return float(np.median(slopes) * (TENTHS - 1) / np.mean(floor))


def by_tenths(readings: list[Reading]) -> list[float]:
    """Return the rows per second in each tenth of the run."""
    done: dict[int, float] = {}
    for reading in readings:  # rows arrive in batches: keep the first time at which each number was reached
        done.setdefault(reading.rows, reading.seconds)
    rows, seconds = list(done), list(done.values())
    edges = np.linspace(rows[0], rows[-1], TENTHS + 1)
    return (np.diff(edges) / np.diff(np.interp(edges, rows, seconds))).tolist()


def mistakes(rows: list[dict], output: Path) -> list[str]:
    """Return the mistakes in the output: rows missing, duplicated or out of order, or scores that differ here."""
    from endoreward_fast import EndoRewardModel

    with open(output, encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    if [row["id"] for row in found] != [row["id"] for row in rows]:
        return [f"{len(found)} rows were written for {len(rows)}, or in another order"]
    if [row["id"] for row in found if row["score"] is None] != [row["id"] for row in rows if "completion" not in row]:
        return ["rows other than those without a completion have no score"]
    usable = [i for i, row in enumerate(rows) if "completion" in row]
    sample = random.Random(0).sample(usable, min(SAMPLE, len(usable)))
    again = EndoRewardModel.from_pretrained("pocket").score([rows[i] for i in sample])
    gaps = [abs(found[i]["score"] - score.score) for i, score in zip(sample, again, strict=True)]
    return [f"scores differ by up to {max(gaps):.2g}"] * (max(gaps) > TOLERANCE)


def soak(count: int, flags: list[str], every: float) -> dict:
    """Run the command once. Return the record."""
    rows = rows_of(count)
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "rows.jsonl", Path(folder) / "scored.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [sys.executable, "-m", "endoreward_fast", "score", str(source), "-o", str(output), *flags]
        code, readings, said = watched(command, output, every)
        wrong = mistakes(rows, output)
    if code != 2:  # 2 because some rows cannot be scored
        wrong.append(f"exit code {code}, not 2")
    grown = growth(readings)
    if grown > GROWTH:
        wrong.append(f"memory grew by {grown:.1%} in the second half")
    return {
        "flags": flags, "rows": count, "growth_of_second_half": grown, "wrong": wrong,
        "mib": {"first": readings[0].mib, "last": readings[-1].mib, "highest": max(r.mib for r in readings)},
        "rows_per_s": by_tenths(readings), "tokens": _tokens(said), "readings": [asdict(r) for r in readings],
    }  # fmt: skip


def _tokens(said: str) -> int:
    """Return the number of tokens read by the model, prompts included, from the command's last line."""
    found = re.search(r"rows, ([\d,]+) tokens", said)
    if found is None:
        raise SystemExit(f"the command did not say how many tokens it scored: {said[-500:]!r}")
    return int(found[1].replace(",", ""))


def sentence(run: dict) -> str:
    """Summarise a run in one line."""
    pace, mib, wrong = run["rows_per_s"], run["mib"], "; ".join(run["wrong"])
    typical = np.median(pace)
    return (
        f"{run['rows']:,} rows{' '.join(['', *run['flags']])}: {mib['last']:.0f} MiB at the end (highest "
        f"{mib['highest']:.0f}), {run['growth_of_second_half']:+.2%} over the second half; {typical:,.0f} rows/s "
        f"(tenths from {min(pace):,.0f} to {max(pace):,.0f}), {typical * run['tokens'] / run['rows']:,.0f} tokens/s; "
        f"{wrong or 'all checks passed'}"
    )


def draw(runs: list[dict], path: Path) -> Path:
    """Draw memory and throughput against the number of rows written."""
    from bench.harness.charts import INK, plt, quiet

    figure, (of_memory, of_pace) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for run, colour in zip(runs, ("#d1495b", "#00798c"), strict=False):
        label = " ".join(["score", *run["flags"][2:]])
        seen = run["readings"]
        of_memory.plot([r["rows"] / 1000 for r in seen], [r["mib"] for r in seen], color=colour, lw=1, label=label)
        edges = np.linspace(seen[0]["rows"], seen[-1]["rows"], TENTHS + 1) / 1000
        of_pace.stairs(run["rows_per_s"], edges, color=colour, lw=1.8, label=label, baseline=None)
    for axis, title in ((of_memory, "resident memory, MiB"), (of_pace, "rows a second, by tenths of the run")):
        axis.set_title(title, loc="left", fontsize=10, color=INK)
        axis.set_xlabel("thousand rows written")
        axis.set_ylim(0, 1.3 * axis.get_ylim()[1])
        axis.legend(frameon=False, fontsize=9, loc="upper right")
        quiet(axis)
    figure.savefig(path, dpi=130)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two readings")
    parser.add_argument("--out", type=Path, default=timing.RESULTS)
    args = parser.parse_args(arguments)
    runs = []
    small = ["--max-tokens-per-batch", str(BATCH)]
    for count, flags in ((args.rows, small), (args.rows // 2, [*small, "--per-token"])):
        runs.append(soak(count, flags, args.every))
        print(sentence(runs[-1]), flush=True)
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}
    print(timing.write("soak", environment() | threads, runs, args.out))
    print(draw(runs, args.out / "soak.png"))
    return int(any(run["wrong"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
