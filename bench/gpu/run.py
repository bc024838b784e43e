"""`python -m bench.gpu --out FOLDER`: run every test on the GPU, then every GPU benchmark, within a time limit.

Each group of benchmarks runs in a separate process, so a group that hangs or breaks the device's context does not stop
the others. The JSON of a group is written after every case; the pictures are drawn from it. No network is needed.
The exit code is 2 without a GPU, 1 if a test or one of our benchmarks failed or the tests did not finish, else 0.
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
SECONDS = 480  # time limit of `make gpu`
TESTS_SHARE = 0.5  # largest share of it for the tests
# {group of benchmarks: its share of the time left when it starts}. Each group writes one file.
SHARES = {
    "gpu-linear": 0.4, "gpu-training": 0.35, "gpu-logits": 0.35, "gpu-overheads": 0.35, "gpu-search": 0.4,
    "gpu-sweep": 0.9,
}  # fmt: skip
EXPENSIVE = ("torch.compile",)  # compiles again for each shape
STARTUP, LEAST = 8.0, 10.0  # seconds to import torch and start the device; least seconds for a group


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
    """Shrink a case for a dry run in Triton's interpreter."""
    return replace(case, shape="D32-V300", rows=20, rounds=1, memory=False)


# ------------------------------------------------------------------------------------------------ one group


def run_group(group: str, seconds: float, out: Path, dry: bool) -> int:
    """Run the cases of a group in this process. Return the number that failed."""
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
        torch._dynamo.reset()  # otherwise each new shape counts towards torch.compile's recompile limit
    return failed


# ------------------------------------------------------------------------------------------------ all groups


def why_no_gpu() -> str | None:
    """Return a message if there is no usable GPU, else None."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch: name a Python that has torch with CUDA, make gpu GPU_PYTHON=..."
    import torch

    if not torch.cuda.is_available():
        return f"a CUDA or ROCm GPU is needed, and torch {torch.__version__} finds none"
    return None


def run_limited(command: list[str], seconds: float, output=None) -> int | None:
    """Run a command. Return its exit code, or None if it and its children were killed at the time limit."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def run_tests(seconds: float, out: Path) -> bool:
    """Run the whole test suite on the device. Return whether it passed in time."""
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
                f"{group}: {'stopped at its time limit' if code is None else f'failed (exit code {code})'}", flush=True
            )
            good = False
    draw(out)
    print(f"{'all passed' if good else 'SOME FAILED'}, {seconds - (end - time.monotonic()):.0f} s; results in {out}")
    return 0 if good else 1


def draw(out: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "no pictures, because matplotlib is not installed: install it and run python -m bench.harness.charts FOLDER"
        )
        return
    from bench.harness import charts

    charts.draw(out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/gpu", help="folder for JSON and pictures")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of the whole run")
    parser.add_argument("--no-tests", action="store_true", help="benchmarks only")
    parser.add_argument("--group", choices=SHARES, help="run only this group, in this process")
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
