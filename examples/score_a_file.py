"""Score a file of JSON Lines from Python.

    python examples/score_a_file.py answers.jsonl --output scored.jsonl --model Qwen/Qwen2.5-0.5B-Instruct

A row has `prompt` and `completion` (text or chat messages), or `messages`. Every column is kept; `score` is added, and
`error` where a row cannot be scored. The file is read at once: for one that does not fit in memory, or for a run that
can be interrupted and resumed, use the command `endoreward score`.
"""

import argparse
import json
import sys
from pathlib import Path

from endoreward_fast import EndoRewardModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", type=Path, default=Path(__file__).with_name("answers.jsonl"))
    parser.add_argument("--output", type=Path, help="a new file; default: standard output")
    parser.add_argument("--model", default="pocket", help="a causal language model's name or folder")
    parser.add_argument("--reduction", choices=("sum", "mean"), default="sum", help="of token rewards to a score")
    args = parser.parse_args()

    scorer = EndoRewardModel.from_pretrained(args.model)
    rows = [json.loads(line) for line in args.input.read_text(encoding="utf-8").splitlines() if line.strip()]
    results = scorer.score(rows, reduction=args.reduction)
    output = args.output.open("x", encoding="utf-8") if args.output else sys.stdout  # "x" never overwrites a file
    for row, result in zip(rows, results, strict=True):
        found = {"score": result.score} if result.error is None else {"score": None, "error": result.error}
        print(json.dumps(row | found, ensure_ascii=False), file=output)
    if args.output:
        output.close()


if __name__ == "__main__":
    main()
