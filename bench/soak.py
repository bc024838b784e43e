"""`python -m bench.soak`: does a long run stay as it began? 100,000 short rows through the real command.

`endoreward score` runs in a process of its own, on the embedded model; once a second its resident memory is read and
the rows are counted that it has written. Afterwards: every row once and in order, a sample of them scored again in this
process, memory flat from the middle of the run to its end, throughput by tenths. Writes bench/results/soak.json and
soak.png; exit code 1 if a row is missing, twice, out of order or scored otherwise, or if memory is not flat.
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
UNUSABLE = 100  # every so many rows one has no completion
GROWTH = 0.01  # of resident memory over the second half: more is no longer flat
BATCH = 1024  # tokens: small windows, so that memory's up and down with each is small and often beside what a leak adds
TOLERANCE = 1e-4  # scores in another batch: float noise
MIB = 1 << 20


@dataclass(frozen=True)
class Reading:
    """One look at the process."""

    seconds: float
    """since it started"""
    rows: int
    """written so far"""
    mib: float
    """resident"""


def rows_of(count: int) -> list[dict]:
    """Problems and their answers, with ids; the same in every run."""
    # Facts repeat from 40 on; sums do not.
    found = enumerate(problems(count, tasks=("add", "subtract", "sequence", "fact")))
    rows = [{"id": i, "prompt": p.prompt("plain"), "completion": str(p.answer)} for i, p in found]
    for row in rows[UNUSABLE - 1 :: UNUSABLE]:
        del row["completion"]
    return rows


def watched(command: list[str], output: Path, every: float) -> tuple[int, list[Reading], str]:
    """Run `command` to its end; (exit code, what was seen of it every so many seconds, what it said)."""
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
    # Before the first row it loads the model; one that has ended, and was not asked how, has no memory.
    return process.returncode, [r for r in readings if r.rows and r.mib], text


def growth(readings: list[Reading]) -> float:
    """By how much of itself memory grows over the second half of the rows.

    While a window is scored memory goes up, and down again behind it; what leaks stays. So: the lowest reading of each
    tenth of that time, and the median of the slopes between any two of these (Theil and Sen), which a single step of
    the allocator does not move.
    """
    late = [r for r in readings if r.rows >= readings[-1].rows / 2]
    if len(late) < TENTHS:
        raise SystemExit(f"{len(late)} readings of the second half: too few; more rows, or read more often")
    edges = np.linspace(0, len(late), TENTHS + 1).astype(int)
    floor = [min(r.mib for r in late[a:b]) for a, b in pairwise(edges)]
    slopes = [(floor[j] - floor[i]) / (j - i) for i, j in combinations(range(TENTHS), 2)]
    return float(np.median(slopes) * (TENTHS - 1) / np.mean(floor))


def by_tenths(readings: list[Reading]) -> list[float]:
    """Rows a second in each tenth of the run."""
    done: dict[int, float] = {}
    for reading in readings:  # rows come by the window: what counts is when so many were there for the first time
        done.setdefault(reading.rows, reading.seconds)
    rows, seconds = list(done), list(done.values())
    edges = np.linspace(rows[0], rows[-1], TENTHS + 1)
    return (np.diff(edges) / np.diff(np.interp(edges, rows, seconds))).tolist()


def mistakes(rows: list[dict], output: Path) -> list[str]:
    """What is wrong with the output: rows missing, twice, out of order, or scored otherwise than by themselves."""
    from endoreward_fast import EndoRewardModel

    with open(output, encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    if [row["id"] for row in found] != [row["id"] for row in rows]:
        return [f"{len(found)} rows came back for {len(rows)}, or not in their order"]
    if [row["id"] for row in found if row["score"] is None] != [row["id"] for row in rows if "completion" not in row]:
        return ["other rows than expected have no score"]
    usable = [i for i, row in enumerate(rows) if "completion" in row]
    sample = random.Random(0).sample(usable, min(SAMPLE, len(usable)))
    again = EndoRewardModel.from_pretrained("pocket").score([rows[i] for i in sample])
    gaps = [abs(found[i]["score"] - score.score) for i, score in zip(sample, again, strict=True)]
    return [f"scores differ by up to {max(gaps):.2g}"] * (max(gaps) > TOLERANCE)


def soak(count: int, flags: list[str], every: float) -> dict:
    """One run; what was seen of it."""
    rows = rows_of(count)
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "rows.jsonl", Path(folder) / "scored.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [sys.executable, "-m", "endoreward_fast", "score", str(source), "-o", str(output), *flags]
        code, readings, said = watched(command, output, every)
        wrong = mistakes(rows, output)
    if code != 2:  # rows that cannot be scored are among them
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
    """Through the model, prompts included, as the command says at its end."""
    found = re.search(r"rows, ([\d,]+) tokens", said)
    if found is None:
        raise SystemExit(f"the command did not say how many tokens it scored: {said[-500:]!r}")
    return int(found[1].replace(",", ""))


def sentence(run: dict) -> str:
    """One line for people."""
    pace, mib, wrong = run["rows_per_s"], run["mib"], "; ".join(run["wrong"])
    typical = np.median(pace)
    return (
        f"{run['rows']:,} rows{' '.join(['', *run['flags']])}: {mib['last']:.0f} MiB at the end (highest "
        f"{mib['highest']:.0f}), {run['growth_of_second_half']:+.2%} over the second half; {typical:,.0f} rows/s "
        f"(tenths from {min(pace):,.0f} to {max(pace):,.0f}), {typical * run['tokens'] / run['rows']:,.0f} tokens/s; "
        f"{wrong or 'every row there, as it should be'}"
    )


def draw(runs: list[dict], path: Path) -> Path:
    """Memory and throughput against rows done."""
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
