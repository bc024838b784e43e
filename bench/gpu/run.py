"""`python -m bench.gpu --out FOLDER`: every test on the GPU, then every GPU benchmark, within a number of seconds.

Each group of benchmarks runs in a process of its own, so that one that breaks the device's context, or hangs, leaves
the others; its JSON is written after every case. Pictures follow from the JSON. No network is needed. Exit code: 2
without a GPU, 1 where a test or one of our benchmarks failed or tests did not finish, else 0.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 480  # of `make gpu` altogether
TESTS_SHARE = 0.5  # of the seconds, at most
# Benchmarks by file, with the share of the time that is left for it and those below.
SHARES = {
    "gpu-linear": 0.4, "gpu-training": 0.35, "gpu-logits": 0.35, "gpu-overheads": 0.35, "gpu-search": 0.4,
    "gpu-sweep": 0.9,
}  # fmt: skip
EXPENSIVE = ("torch.compile",)  # compiled anew for each shape
STARTUP, LEAST = 8.0, 10.0  # seconds: to import torch and start the device; for a group however late it is


def cases(group: str):
    from bench.harness.cases import Case

    def case(subject, shape, rows, rounds=20, without=EXPENSIVE, memory=False):
        return Case(subject, shape, rows, "bf16", rounds, without, memory, gpu=True)

    def compiled(model, rows):
        return () if (model, rows) == (models[0], 8192) else EXPENSIVE

    models = ("qwen3-8b", "qwen3-1.7b", "qwen3-0.6b")  # hidden size 4096, 2048, 1024
    if group == "gpu-linear":
        return [
            case("linear", model, rows, 10 if rows > 8192 else 20, compiled(model, rows), memory=True)
            for rows in (8192, 512, 64, 32768)
            for model in models
        ]
    if group == "gpu-training":
        return [case("linear forward+backward", models[0], 8192, 10, without=(), memory=True)]
    if group == "gpu-logits":
        subjects = ("logits", "logits entropy", "logits backward")
        return [case(subject, models[2], 8192, without=(), memory=True) for subject in subjects]
    if group == "gpu-overheads":
        linear = [case(subject, models[0], 8192, 30) for subject in ("linear masked", "linear rewards")]
        return [*linear, case("logits rewards", models[2], 8192, 30)]
    if group == "gpu-search":
        return [case("linear search", model, 8192, 10) for model in models]
    slow = (*EXPENSIVE, "liger-kernel", "quack-kernels", "F.linear_cross_entropy", "F.linear_cross_entropy, chunked")
    vocabularies = (16384, 32768, 65536, 131072, 262144)
    return [
        *(case("linear", f"D2048-V{v}", 8192, 7, slow, memory=True) for v in vocabularies),
        *(case("logits", f"D2048-V{v}", 4096, 7, EXPENSIVE, memory=True) for v in vocabularies),
        *(case("logits", models[2], rows, 7, EXPENSIVE, memory=True) for rows in (64, 512, 2048)),
    ]


def tiny(case):
    """The same case where nothing is fast: for a dry run in Triton's interpreter."""
    return replace(case, shape="D32-V300", rows=20, rounds=1, memory=False)


# ------------------------------------------------------------------------------------------------ one group, in here


def run_group(group: str, seconds: float, out: Path, dry: bool) -> int:
    """Its cases in this process; the number that failed."""
    import torch

    from bench.harness import timing
    from bench.harness.clock import Device, Host

    clock = Host() if dry else Device()
    todo = list(dict.fromkeys(tiny(case) for case in cases(group))) if dry else cases(group)
    budget = timing.Budget(seconds, len(todo))
    record, done, failed = timing.environment(gpu=True), [], 0
    for case in todo:
        if budget.left() <= 0:
            result = {"name": case.name, "failed": "not measured: the time budget was spent"}
        else:
            try:
                result = timing.run_case(case, clock, budget.next_case())
            except Exception as error:
                failed += 1
                result = {"name": case.name, "failed": f"failed: {type(error).__name__}: {str(error)[:2000]}"}
        done.append(result)
        timing.write(group, record, done, out)
        print(timing.table(result), flush=True)
        torch._dynamo.reset()  # else each new shape counts against torch.compile's limit of recompilations
    return failed


# ------------------------------------------------------------------------------------------------ all of it


def why_no_gpu() -> str | None:
    """One line for people, or None where there is one."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; name a Python that has it, with CUDA: make gpu GPU_PYTHON=..."
    import torch

    if not torch.cuda.is_available():
        return f"a CUDA or ROCm GPU is needed, and torch {torch.__version__} sees none"
    return None


def run_limited(command: list[str], seconds: float, output=None) -> int | None:
    """The command's exit code; None where it was stopped, with all it had started, for want of time."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def run_tests(seconds: float, out: Path) -> bool:
    """Whether the whole suite passed on the device in the time given."""
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={out / 'tests.xml'}"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    log, start = out / "tests.txt", time.monotonic()
    with log.open("w") as output:
        code = run_limited(command, seconds, output)
    print("\n".join(log.read_text().splitlines()[-12:]))
    said = (
        f"did not finish in {seconds:.0f} s"
        if code is None
        else "passed"
        if code == 0
        else f"failed (exit code {code})"
    )
    print(f"tests: {said}, {time.monotonic() - start:.0f} s; {log}", flush=True)
    return code == 0


def run_all(seconds: float, out: Path, dry: bool, tests: bool) -> int:
    end = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    good = run_tests(seconds * TESTS_SHARE, out) if tests else True
    for group, share in SHARES.items():
        mine = max((end - time.monotonic()) * share - STARTUP, LEAST)
        command = [sys.executable, "-m", "bench.gpu", "--group", group, "--seconds", f"{mine:.0f}", "--out", str(out)]
        code = run_limited(command + ["--dry-run"] * dry, 1.3 * mine + 2 * STARTUP)
        if code != 0:
            print(
                f"{group}: {'stopped, it took too long' if code is None else f'failed (exit code {code})'}", flush=True
            )
            good = False
    draw(out)
    print(f"{'all good' if good else 'NOT all good'}, {seconds - (end - time.monotonic()):.0f} s; results in {out}")
    return 0 if good else 1


def draw(out: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "no pictures: matplotlib is not installed (python -m bench.harness.charts FOLDER makes them from the JSON)"
        )
        return
    from bench.harness import charts

    charts.draw(out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/gpu", help="folder for JSON and pictures")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--no-tests", action="store_true", help="benchmarks only")
    parser.add_argument("--group", choices=SHARES, help="only this one, in this process")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter, on the CPU")
    args = parser.parse_args(arguments)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    elif obstacle := why_no_gpu():
        print(obstacle, file=sys.stderr)
        return 2
    out = args.out.resolve()
    if args.group:
        return 1 if run_group(args.group, args.seconds, out, args.dry_run) else 0
    return run_all(args.seconds, out, args.dry_run, tests=not (args.no_tests or args.dry_run))
