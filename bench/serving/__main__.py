"""`python -m bench.serving`: the server's speed beside scoring in-process, and 10,000 requests of which some go wrong.

The server, the clients and the scoring in-process are three processes on this machine; they never compute at the same
time, except server and clients. Writes bench/results/serving.json after each case, and serving.png. The exit code is 1
if a check fails.
"""

import argparse
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.harness import timing
from bench.serving import chaos, on_ray, rows, shown, speed
from bench.serving.load import Generator, generator
from bench.serving.results import Expected, WrongScore, dtype_of
from bench.serving.server import facts, serving
from endoreward_fast import EndoRewardModel

RM_BENCH = Path(__file__).parents[3] / "shared" / "data" / "rm-bench" / "safety-response_filtered.json"
STEPS = ("quiz", "groups", "rm-bench", "smollm2", "chaos", "chaos-ray")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument(
        "--data", type=Path, default=RM_BENCH, help="a file of RM-Bench; without it that step is left out"
    )
    parser.add_argument("--rows", type=int, default=512, help="short rows of a round; longer rows are fewer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=10_000, help="of the run in which some go wrong")
    parser.add_argument("--threads", type=int, default=1, help="for scoring, in-process and in the server")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="the rest: flags for `endoreward serve`")
    parser.add_argument("--out", type=Path, default=timing.RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    environment, cases = timing.environment(), others(args.out / "serving.json", args.steps)
    with tempfile.TemporaryDirectory() as folder, generator(Path(folder)) as clients:
        for step in args.steps:
            if step == "rm-bench" and not args.data.is_file():
                print(f"{args.data} is not there: the step rm-bench is left out")
                continue
            about = {"step": step, "threads": args.threads, "flags": args.flags, "date": timing.environment()["date"]}
            about["load"] = round(os.getloadavg()[0], 2)
            try:
                found = (storm if step.startswith("chaos") else race)(step, args, clients, Path(folder))
            except WrongScore as error:
                raise SystemExit(f"bench.serving: {step}: {error}: nothing of this step is kept") from None
            about["load_after"] = round(os.getloadavg()[0], 2)
            cases = sorted([*cases, about | found], key=lambda case: STEPS.index(case["step"]))
            print((shown.sentence if found["kind"] == "chaos" else shown.table)(about | found), flush=True)
            timing.write("serving", environment, cases, args.out)
    print(shown.draw(args.out))
    return int(any(case.get("wrong") for case in cases))


def others(file: Path, steps: Sequence[str]) -> list[dict]:
    """Return the cases of an earlier record whose steps this run does not repeat. Each has its date and load."""
    found = json.loads(file.read_text())["cases"] if file.is_file() else []
    return [case for case in found if case["step"] not in steps]


def race(step: str, args: argparse.Namespace, clients: Generator, folder: Path) -> dict:
    """Measure speed with one model and one kind of rows."""
    model, dtype = ("smollm2", "fastest") if step == "smollm2" else ("pocket", None)
    fewer = args.rows // 4
    listed = {
        "quiz": lambda: rows.quiz(args.rows), "groups": lambda: rows.groups(fewer),
        "rm-bench": lambda: rows.rm_bench(args.data, fewer), "smollm2": lambda: rows.quiz(fewer),
    }[step]()  # fmt: skip
    scorer = EndoRewardModel.from_pretrained(model, dtype=dtype)
    expected, name = Expected.of(scorer, listed), dtype_of(scorer)
    flags = ["--model", model, *(["--dtype", dtype] if dtype else []), *args.flags]
    with serving(flags, args.threads, folder) as server:
        served = facts(server)["dtype"]
        if served != name:
            raise SystemExit(f"bench.serving: the server computes in {served}, this process in {name}")
        arms = speed.ARMS + speed.FOR_MANY_ROWS * (len(listed) >= speed.MANY_ROWS)
        found = speed.run_case(scorer, server, clients, listed, expected, args.rounds, step == "groups", arms)
    found["noise_in_process"] = expected.noise
    workload = "quiz" if step == "smollm2" else step
    return {"kind": "speed", "model": model, "workload": workload, "dtype": name} | found


def storm(step: str, args: argparse.Namespace, clients: Generator, folder: Path) -> dict:
    """Send the mix to the embedded model, which needs a token here."""
    listed = rows.quiz(args.rows)
    expected = Expected.of(EndoRewardModel.from_pretrained("pocket"), listed)
    token, named = secrets.token_hex(16), {"kind": "chaos", "model": "pocket", "workload": "quiz", "dtype": "float32"}
    if step == "chaos":
        flags = ["--model", "pocket", *chaos.FLAGS, *args.flags]
        with serving(flags, args.threads, folder, token) as server:
            found = chaos.run(server, clients, listed, expected, args.requests)
        return named | {"server": "endoreward serve"} | found
    with on_ray.serving({"model": "pocket"} | chaos.ARGUMENTS, args.threads, folder, token) as server:
        found = chaos.run(server, clients, listed, expected, args.requests, kill=server.kill)
    return named | {"server": f"Ray Serve, {on_ray.REPLICAS} replicas"} | found


if __name__ == "__main__":
    sys.exit(main())
