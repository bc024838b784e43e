"""`python -m bench.gpu --out FOLDER`: test and measure on the GPU within a time limit. FOLDER gets two files.

gpu.tar.gz holds the records, pictures and logs. It is written after every step and when the run is stopped, so a run
that is cut short keeps what it has measured. console.txt holds what was printed.

The order: tests of what auto takes, its times, `endoreward tune` and the times after it, the peers, the rest. Each
step is a separate process, so a step that hangs or breaks the device's context does not stop the others. No network is
needed: --wheels (or GPU_WHEELS) names a folder of wheels of peers, which only this run uses.

The exit code is 2 without a GPU, 1 if a test, a benchmark of ours or the tuner failed, else 0. A step that ran out of
time is named, and is a failure only for the first tests.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.gpu import device_tests, targets, wheels
from bench.gpu.console import Console, run_limited
from bench.gpu.groups import GROUPS, run_group

ROOT = Path(__file__).parents[2]
SECONDS = 460  # `make gpu` ends within 8 minutes
RESERVE, LEAST = 12.0, 10.0  # seconds for pictures and the archive; least seconds for a step
STARTUP = 8.0  # seconds to import torch and start the device
ARCHIVE, CONSOLE, CACHE = "gpu.tar.gz", "console.txt", "cache"
FIRST_TESTS = "tests of what auto takes"


@dataclass(frozen=True)
class Step:
    name: str
    share: float  # of the time that is left when it starts


STEPS = (
    Step(FIRST_TESTS, 0.22), Step("gpu-auto", 0.22), Step("tune 4096,151936", 0.3), Step("gpu-peers", 0.6),
    Step("tune 2048,151936", 0.2), Step("tune 1024,151936", 0.25), Step("gpu-tuned", 0.2), Step("other tests", 0.4),
    Step("compare", 0.5),
    Step("gpu-logits", 0.3), Step("gpu-overheads", 0.3), Step("gpu-search", 0.4), Step("gpu-sweep", 0.9),
)  # fmt: skip


def why_no_gpu() -> str | None:
    """Return a message if there is no usable GPU, else None."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch: name a Python that has torch with CUDA, make gpu GPU_PYTHON=..."
    import torch

    if not torch.cuda.is_available():
        return f"a CUDA or ROCm GPU is needed, and torch {torch.__version__} finds none"
    return None


# ------------------------------------------------------------------------------------------------ one step


def command(step: str, seconds: float, work: Path, dry: bool) -> list[str]:
    """Return the command of a step, which writes to the folder `work`."""
    if step in (FIRST_TESTS, "other tests"):
        return tests(step, work, dry)
    if step.startswith("tune "):
        shape = "64,3000" if dry else step.partition(" ")[2]
        measuring = f"{seconds / 2:.0f}"  # the processes of the candidates start and compile in the other half
        tune = [sys.executable, "-m", "endoreward_fast", "tune", "--shape", shape]
        return [*tune, "--dtype", "bf16", "--seconds", "5" if dry else measuring]
    if step == "compare":
        few = ["--only", "F.cross_entropy", "chunked"] if dry else []
        return [sys.executable, "-m", "bench.compare", "--out", str(work), "--seconds", "60", *few]
    group = [sys.executable, "-m", "bench.gpu", "--group", step, "--seconds", f"{seconds:.0f}", "--out", str(work)]
    return group + ["--dry-run"] * dry


def tests(step: str, work: Path, dry: bool) -> list[str]:
    """Return the pytest command for tests that touch the device. A dry run only collects them."""
    found, absent = device_tests.files()
    for file, reason in absent.items():
        print(f"{file}: not run, it {reason}", flush=True)
    files = [file for file in found if (file in device_tests.FIRST) == (step == FIRST_TESTS)]
    log = work / f"{step.replace(' ', '-')}.xml"
    options = ["-qq" if dry else "-q", "-m", "device", "-p", "no:cacheprovider", f"--junitxml={log}"]
    if importlib.util.find_spec("xdist") and not dry:
        options += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout=60"]
    return [sys.executable, "-m", "pytest", *options, *["--collect-only"] * dry, *files]


# ------------------------------------------------------------------------------------------------ all steps


class Stopped(Exception):
    """The run was told to stop."""


def stop(number, frame) -> None:
    raise Stopped(signal.Signals(number).name)


def run_all(seconds: float, out: Path, dry: bool, carried: Path | None, steps=STEPS) -> int:
    """Run every step and write the archive after each. Return the exit code."""
    end = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    console, notes = Console(out / CONSOLE), {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary) / "gpu"
        work.mkdir()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        try:
            environment = dict(os.environ) | carry(carried, Path(temporary), console)
            environment["XDG_CACHE_HOME"] = str(work.parent / CACHE)  # the tuner's choices are this run's own
            for step in steps:
                notes[step.name] = run_step(step, end - RESERVE, work, dry, environment, console)
                write_archive(work, out)
        except Stopped as signalled:
            notes["the run"] = f"failed (stopped by {signalled})"
            write_archive(work, out)
        report(work, notes, console)
        write_archive(work, out)
    failed = [name for name, said in notes.items() if said.startswith("failed")]
    failed += [FIRST_TESTS] if notes.get(FIRST_TESTS, "").startswith("unfinished") else []
    console.say(f"{'FAILED: ' + ', '.join(failed) if failed else 'nothing failed'}; {out / ARCHIVE}")
    return 1 if failed else 0


def carry(carried: Path | None, where: Path, console: Console) -> dict[str, str]:
    """Install carried wheels; return the environment in which the steps find them."""
    if carried is None:
        return {}
    environment, failed = wheels.install(carried, where)
    for wheel, reason in failed.items():
        console.say(f"wheel {wheel}: not installed: {reason}")
    return environment


def run_step(step: Step, end: float, work: Path, dry: bool, environment: dict, console: Console) -> str:
    """Run one step. Return "passed", "failed (...)", "unfinished (...)" or "not run (...)"."""
    left = end - time.monotonic()
    if left < LEAST + STARTUP:
        return "not run (the time was spent)"
    share = max(left * step.share - STARTUP, LEAST)
    limit = min(1.3 * share + 2 * STARTUP, left)
    console.say(f"== {step.name}, at most {limit:.0f} s")
    start = time.monotonic()
    code = run_limited(command(step.name, share, work, dry), limit, console, environment, ROOT)
    took = f"{time.monotonic() - start:.0f} s"
    said = {0: f"passed ({took})", None: f"unfinished (stopped after {took})"}.get(
        code, f"failed (exit code {code}, {took})"
    )
    console.say(f"== {step.name}: {said}")
    return said


def report(work: Path, notes: dict[str, str], console: Console) -> None:
    """Print and keep what became of each step, the pictures and the table of targets."""
    if importlib.util.find_spec("matplotlib") is None:
        console.say("no pictures, because matplotlib is not installed: run python -m bench.harness.charts FOLDER later")
    elif list(targets.records(work)):
        from bench.harness import charts

        charts.draw(work)
    summary = "\n".join(f"{name}: {said}" for name, said in notes.items())
    table = targets.table(work)
    (work / "summary.md").write_text(f"{table}\n\n```text\n{summary}\n```\n")
    console.say(f"{summary}\n\n{table}")


def write_archive(work: Path, out: Path) -> None:
    """Replace the archive at once: a run that is killed here leaves the one of the step before.

    Of the cache, only the tuner's choices are kept: peers may have compiled code there.
    """
    shutil.copy(out / CONSOLE, work)
    tuned = work.parent / CACHE / "endoreward_fast" / "tuned"
    if tuned.exists():
        shutil.copytree(tuned, work / "tuned", dirs_exist_ok=True)
    part = out / f".{ARCHIVE}.part"
    with tarfile.open(part, "w:gz") as archive:
        archive.add(work, arcname="gpu")
    os.replace(part, out / ARCHIVE)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/gpu", help=f"folder for {ARCHIVE}, {CONSOLE}")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="time limit of the whole run (default: %(default)g)"
    )
    parser.add_argument(
        "--wheels", type=Path, default=os.environ.get("GPU_WHEELS") or None, help="folder of wheels of peers to install"
    )
    parser.add_argument("--group", choices=GROUPS, help="run only this group, in this process; --out gets its record")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes in Triton's interpreter; tests are collected"
    )
    args = parser.parse_args(arguments)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    elif obstacle := why_no_gpu():
        print(obstacle, file=sys.stderr)
        return 2
    out = args.out.resolve()
    if args.group:
        return 1 if run_group(args.group, args.seconds, out, args.dry_run) else 0
    return run_all(args.seconds, out, args.dry_run, args.wheels and args.wheels.resolve())
