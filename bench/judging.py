"""`python -m bench.judging`: time judges whose replies are one token each, before and after the replies are named.

The rows are the six answers to each of some prompts of RM-Bench. Three arms run interleaved:

    apart     each reply is a row of its own. The question of several replies is read once, the vocabulary once a reply
    again     the same once more: what two equal arms differ by on this machine
    named     the question alone is read, and its last state gives the log-probabilities of all replies

Seconds are those of the processor, on one thread. Writes bench/results/judging.json.
"""

import argparse
import json
from pathlib import Path

import torch

from bench.harness import timing
from bench.prefixes import RM_BENCH, Processor
from endoreward_fast import EndoRewardModel
from endoreward_fast.rivals.judges import JUDGES

NAMES = ("pointwise", "pairwise")


class Apart(EndoRewardModel):
    """Reads every reply as a row of its own."""

    def names_tokens(self) -> bool:
        return False


def rows_of(file: Path, prompts: int) -> list[dict]:
    asked = json.loads(file.read_text())[:prompts]
    return [{"prompt": r["prompt"], "completion": a} for r in asked for a in r["chosen"] + r["rejected"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=timing.RESULTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=RM_BENCH)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=["pocket"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, cases = rows_of(args.data, args.prompts), []
    for model in args.models:
        scorer = EndoRewardModel.from_pretrained(model)
        apart = Apart(scorer.model, scorer.tokenizer)
        for name in NAMES:
            judges = {"apart": JUDGES[name](apart), "again": JUDGES[name](apart), "named": JUDGES[name](scorer)}
            before, after = ([r.score for r in judges[arm].score(rows)] for arm in ("apart", "named"))
            gap = max(abs(a - b) for a, b in zip(before, after, strict=True) if a is not None)
            calls = {arm: (lambda judge=judge: judge.score(rows)) for arm, judge in judges.items()}
            times = timing.interleave(calls, args.rounds, Processor())
            arms = {arm: timing.spread(t, times["apart"]) for arm, t in times.items()}
            cases.append({"model": model, "judge": name, "rows": len(rows), "score_gap": gap, "arms": arms})
            ratios = ", ".join(f"{arm} {found['ratio']:.3f}" for arm, found in arms.items())
            print(f"{model}, {name}, {len(rows)} rows: {ratios}; scores differ by {gap:.1e}", flush=True)
    timing.write("judging", timing.environment(), cases, args.out)


if __name__ == "__main__":
    main()
