"""`python -m bench.cost`: compute the cost of scoring by formula and measure it. docs/scale.md shows the results.

Writes bench/results/cost.json.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from bench.cost import formulas, points, tables
from endoreward_fast.model.checkpoint import place_of


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name or folder: print only this model's line, from its config.json")
    parser.add_argument(
        "--markdown", action="store_true", help="print the page's tables from the record, without measuring"
    )
    parser.add_argument("--out", type=Path, help="folder for cost.json; default: bench/results")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(arguments)
    if args.model is None:
        points.run(args.out, args.rounds, tables_only=args.markdown)
        return
    try:
        model = formulas.of_config(AutoConfig.from_pretrained(place_of(args.model)), args.model)
    except (ValueError, OSError) as error:
        raise SystemExit(f"bench.cost: {args.model}: {' '.join(str(error).split())}") from None
    tables.show(tables.TYPICAL.described, tables.shapes_table((model,)))
