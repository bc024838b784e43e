"""`python -m bench.paper.gsm8k`: rank right solutions of GSM8K against wrong ones by every signal and reduction.

DATA/gsm8k/example_model_solutions.jsonl holds four solutions to each of 1,319 problems, written by four models, and
whether each is right. A problem counts if it has both right and wrong ones. Solutions are scored as plain text, without
the calculator marks <<2+3=5>> that the four models wrote, because no chat model writes them; `--form marks` keeps them.

    accuracy                      share of a problem's (right, wrong) pairs won, averaged over problems
    minus sum                     the accuracy less that of the plain sum of rewards, paired by problem
    within 10%, at equal length   as in preferences.py; b1 < 0 says that a shorter solution scores higher
    best of 4                     how often the solution that scores highest is right (ties share)
    of all                        the same with the problems where all solutions are right, or all wrong

Beside the methods stand a pick at random, an oracle, and the author: the score of a solution is how often its author is
right on all problems. It knows who wrote a solution and nothing else. Intervals are 95%: Wilson's with one trial a
problem, the normal one for differences, bootstrap over problems for fits. What was read is kept in PARTS.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.paper import output, preferences
from bench.paper.preferences import NO_END, Pairs, best_of, expit, interval, percent, signed
from bench.paper.record import record
from endoreward_fast.command.evaluate.evaluation import wilson

FILE = Path("gsm8k", "example_model_solutions.jsonl")
MARKS = re.compile(r"<<[^<>]*>>")
FORMS = {"plain": lambda solution: MARKS.sub("", solution), "marks": lambda solution: solution}
AUTHOR = "author of the solution"


class Solved(NamedTuple):
    """A problem with its solutions."""

    question: str
    solutions: tuple[str, ...]
    right: tuple[bool, ...]

    @property
    def mixed(self) -> bool:
        """Whether some solution is right and some wrong."""
        return any(self.right) and not all(self.right)


def read_file(path: Path) -> tuple[list[Solved], tuple[str, ...]]:
    """Return the problems, and the names of the models that wrote their solutions."""
    if not path.exists():
        raise SystemExit(f"{path} does not exist: name the folder above gsm8k with --data")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    authors = tuple(name for name, found in rows[0].items() if isinstance(found, dict))
    found = []
    for row in rows:
        by = [row[author] for author in authors]
        right = tuple(one["is_correct"] for one in by)
        found.append(Solved(row["question"], tuple(one["solution"] for one in by), right))
    return found, authors


class Problems:
    """The problems that have a right and a wrong solution, beside the number of all."""

    def __init__(self, solved: list[Solved], right: np.ndarray, lengths: np.ndarray) -> None:
        self.right, self.pairs, self.total = right, Pairs.of(right, lengths), len(solved)
        self.all_right = sum(all(one.right) for one in solved)

    def picked(self, shares: np.ndarray) -> dict[str, Any]:
        of_all = (shares.sum() + self.all_right) / self.total
        return {
            "best_of_4": wilson(float(shares.mean()), len(shares)),
            "best_of_4_of_all": wilson(float(of_all), self.total),
        }

    def numbers(self, scores: np.ndarray, plain: np.ndarray, seed: int) -> dict[str, Any]:
        """Return every figure of one method. `plain` are the sums of rewards."""
        fit, count = self.pairs.length_fit(scores, seed=seed), len(self.right)
        return {
            "accuracy": self.pairs.accuracy(scores),
            "minus_sum": preferences.difference([self.pairs.shares(scores) - self.pairs.shares(plain)]),
            "within_10": self.pairs.taken(self.pairs.near).accuracy(scores),
            "at_equal_length": interval(expit(fit[:, 0]), count),
            "b1": interval(fit[:, 1], count),
        } | self.picked(best_of(scores, self.right))


def table(found: dict[str, dict[str, Any]], picks: dict[str, dict[str, Any]]) -> str:
    header = (
        "%", "accuracy [95%]", "minus sum", "within 10%", "at equal length", "b1", "best of 4", "of all"
    )  # fmt: skip
    rows = [
        (
            name, percent(row["accuracy"]), signed(row["minus_sum"]), percent(row["within_10"]),
            percent(row["at_equal_length"]), f"{row['b1'].value:+.2f}", *_picked(row),
        )
        for name, row in found.items()
    ]  # fmt: skip
    return output.table(header, [*rows, *((name, *[""] * 5, *_picked(row)) for name, row in picks.items())])


def _picked(row: dict[str, Any]) -> tuple[str, str]:
    return percent(row["best_of_4"]), f"{100 * row['best_of_4_of_all'].value:.1f}"


def sentence(found: dict[str, dict[str, Any]], picks: dict[str, dict[str, Any]], model: str) -> str:
    plain, brief, author = (found[name] for name in ("endogenous", preferences.SHORTER, AUTHOR))
    best = max((name for name in found if name != AUTHOR), key=lambda name: found[name]["accuracy"].value)
    near = percent(plain["within_10"])
    return output.paragraph(
        f"By the plain sum of rewards, {model} ranks a right solution above a wrong one in",
        f"{percent(plain['accuracy'])}% of a problem's pairs, and in {near}% of those within 10% in length.",
        f"The shorter solution is the right one in {percent(brief['accuracy'])}%; the one by the author who is right",
        f"more often in {percent(author['accuracy'])}%. The highest of {len(found) - 1} methods is {best} with",
        f"{percent(found[best]['accuracy'])}%, chosen after the fact. The best of four by the sum is right in",
        f"{percent(plain['best_of_4'])}%, one at random in {percent(picks['random pick']['best_of_4'])}%.",
    )


def draw(found: dict[str, dict[str, Any]], picks: dict[str, dict[str, Any]], note: str, path: Path) -> None:
    shown = {name: row for name, row in found.items() if NO_END not in name}
    figure, axes = output.panels(1, 3, width=4.6, height=5.2)
    columns = (
        ("accuracy", "right above wrong", "% of a problem's pairs (chance: 50)"),
        ("within_10", "pairs within 10% in length", "% of a problem's pairs (chance: 50)"),
        ("best_of_4", "best of four", "% of picked solutions that are right (line: at random)"),
    )
    for axis, (column, heading, label) in zip(axes, columns, strict=True):
        chance = 100 * picks["random pick"][column].value if column == "best_of_4" else 50
        values = {name: row[column] for name, row in shown.items()}
        preferences.dots(axis, values, names=axis is axes[0], label=label, heading=heading, chance=chance)
    print(output.picture(figure, axes, note, path))


def main(arguments: list[str]) -> None:
    parser = preferences.arguments(__doc__)
    parser.add_argument("--form", choices=FORMS, default="plain", help="whether solutions keep their calculator marks")
    args = parser.parse_args(arguments)
    solved, authors = read_file(args.data / FILE)
    scorer, parts = preferences.opened(args)
    mixed = [one for one in solved if one.mixed]
    form = FORMS[args.form]
    asked = [[{"prompt": one.question, "completion": form(text)} for text in one.solutions] for one in mixed]
    folder = parts / f"gsm8k-{args.form}"
    groups = list(record(scorer, asked, folder, size=32, **preferences.OPTIONS))
    lengths, right = preferences.lengths_of(groups), np.array([one.right for one in mixed])
    skill = np.mean([one.right for one in solved], 0)
    scores = preferences.scores_of(groups) | {AUTHOR: np.tile(skill, (len(mixed), 1))}
    problems = Problems(solved, right, lengths)
    found = {name: problems.numbers(each, scores["endogenous"], args.seed) for name, each in scores.items()}
    picks = {"random pick": problems.picked(right.mean(1)), "oracle": problems.picked(right.any(1).astype(float))}
    print(f"{table(found, picks)}\n\n{sentence(found, picks, args.model)}\n")
    settings = {
        "model": args.model, "dtype": args.dtype, "form": args.form, "seed": args.seed, "draws": preferences.DRAWS,
        **preferences.OPTIONS, "problems": len(solved), "pairs": len(problems.pairs.prompt),
        "pairs_within_10": int(problems.pairs.near.sum()), "authors": dict(zip(authors, skill.tolist(), strict=True)),
        **preferences.costs(groups), "judges": {},
    }  # fmt: skip
    beside = {}
    for judge, verdicts in preferences.judged(args, scorer, asked, folder):
        at = verdicts.prompts
        some = Problems([mixed[i] for i in at], right[at], lengths[at])
        methods = {judge: verdicts.scores} | {name: scores[name][at] for name in preferences.BESIDE_JUDGES}
        beside[judge] = {n: some.numbers(each, scores["endogenous"][at], args.seed) for n, each in methods.items()}
        settings["judges"][judge] = {"prompts": len(at), "processor_seconds": round(verdicts.seconds, 1)}
        print(f"{len(at)} problems of {len(mixed)}, in random order\n{table(beside[judge], {})}\n", flush=True)
    claim = "gsm8k" if args.form == "plain" else f"gsm8k-{args.form}"
    results = {
        "methods": found, "picks": picks, "judges": beside, "sentence": sentence(found, picks, args.model)
    }  # fmt: skip
    print(output.write(claim, settings, results, args.out, module="gsm8k"))
    note = f"{args.model}, {args.dtype}, {len(mixed)} problems, four solutions each ({args.form}); 95% intervals."
    draw(found, picks, note, args.out / f"paper-{output.named(claim, args.model)}")


if __name__ == "__main__":
    main(sys.argv[1:])
