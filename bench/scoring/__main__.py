"""`python -m bench.scoring`: score the same rows with ours and with what a person would pick instead.

The rows are answers of RM-Bench as token ids, with the chat template applied once. Every arm returns, for each row, the
summed log-probability of the completion. Arms, with the same weights and threads, in float32 and in bfloat16:

    transformers + log_softmax   right-padded batches sorted by length
    lm-eval                      HFLM, loglikelihood of requests
    minicons                     IncrementalLMScorer, conditional scores
    TRL                          the fused head with which GRPOTrainer scores completions
    llama.cpp                    llama-cpp-python: float32 copies of the file's weights; and the file itself (4 bits)
    endoreward_fast              EndoRewardModel.score, with prefixes shared and not shared

For each arm, a batch size is chosen among three on half of the rows. A separate process measures its memory and checks
its scores. Then all arms are timed in interleaved rounds, in processor seconds; wall times are recorded too. Writes
bench/results/scoring.json, .svg and .png.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench.harness import timing
from bench.scoring import llama, measure, shown
from bench.scoring.arms import LLAMA_CPP, OURS_WHOLE
from bench.scoring.weigh import Job, in_a_process
from endoreward_fast.model.packaged import PACKAGED, source_of

RM_BENCH = Path(__file__).parents[3] / "shared" / "data" / "rm-bench" / "safety-response_filtered.json"
DTYPES = ("float32", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a name or folder; llama.cpp runs only with smollm2")
    parser.add_argument("--data", type=Path, default=RM_BENCH, help="a file of RM-Bench")
    parser.add_argument("--prompts", type=int, default=2, help="how many of its prompts: six rows each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", type=Path, default=timing.RESULTS)
    args = parser.parse_args(arguments)
    if not args.data.is_file():
        raise SystemExit(f"bench.scoring: there is no file {args.data}: name one of RM-Bench's with --data")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))
    print(*shown.draw(args.out), sep="\n")


def run(args: argparse.Namespace, folder: Path) -> None:
    """Measure each dtype and write the record after it. `folder` takes llama.cpp's float32 file."""
    environment, cases = timing.environment(), []
    gguf = source_of(args.model) if args.model in PACKAGED else None
    job = Job(args.model, "float32", str(args.data), args.prompts, args.threads, gguf and str(gguf))
    loaded, rows = job.load()
    # Before any arm sees the model: an arm that changed it would be found out by its own numbers.
    expected = measure.expected_scores(loaded, rows, job.arms()[OURS_WHOLE], 2048)
    for dtype in args.dtypes:
        case_job = replace(job, dtype=dtype)
        if gguf and dtype == "float32" and case_job.arms()[LLAMA_CPP].missing is None:
            case_job = replace(case_job, gguf=str(folder / "float32.gguf"))
            llama.in_float32(gguf, Path(case_job.gguf))
        loaded, rows = case_job.load()
        weigh = partial(in_a_process, case_job)
        case = measure.run_case(dtype, loaded, case_job.arms(), rows, expected, args.rounds, weigh)
        cases.append({"model": args.model, "data": args.data.name, "prompts": args.prompts} | case)
        timing.write("scoring", environment, cases, args.out)
        print(shown.table(case), flush=True)


if __name__ == "__main__":
    main()
