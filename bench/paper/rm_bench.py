"""`python -m bench.paper.rm_bench`: RM-Bench by every signal, reduction and judge, overall and at equal length.

The claim (Li et al., arXiv 2506.23235, Table 1): the endogenous reward of Qwen2.5-7B-Instruct reaches 70.2 on RM-Bench.
Here, a smaller model reads the same benchmark. The files are those in DATA/rm-bench; the paper's figure is the mean
over chat, code, math and safety.

    easy, normal, hard, average   as RM-Bench defines them, the mean over domains; a tie is lost
    minus sum                     the average less that of the plain sum of rewards, paired by prompt
    within 10%, at equal length   as in preferences.py, the mean over domains
    b1                            of the logistic fit; below 0, a shorter answer scores higher

Intervals are 95%: Wilson's with one trial a prompt, the normal one for differences, bootstrap over prompts for fits.
What was read is kept in PARTS, so a stopped run goes on. Judges read a random sample of the prompts (--judges,
--pairwise); their table repeats some methods on the same prompts.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.paper import output, preferences
from bench.paper.preferences import Pairs, expit, interval, percent, signed
from bench.paper.record import record
from endoreward_fast.command.evaluate.evaluation import Accuracy, Judged, mean_of, rm_bench, rm_bench_part

PAPER = 70.2
LEVELS = ("easy", "normal", "hard")


class Row(NamedTuple):
    """One prompt of RM-Bench with its answers: three right ones, then three wrong ones."""

    file: str
    id: Any
    part: str
    prompt: str
    answers: tuple[str, ...]


def rows_of(folder: Path) -> dict[str, list[Row]]:
    """Return {part of RM-Bench: its rows} of the files in a folder."""
    found: dict[str, list[Row]] = {}
    for path in sorted(folder.glob("*_filtered.json")):
        for row in json.loads(path.read_text()):
            part = rm_bench_part(row, path.name)
            answers = (*row["chosen"], *row["rejected"])
            if part is None or len(answers) != 6:
                raise SystemExit(f"{path}: row {row.get('id')!r} is no row of RM-Bench")
            found.setdefault(path.name.removesuffix("_filtered.json"), []).append(
                Row(path.name, row.get("id"), part, row["prompt"], answers)
            )
    if not found:
        raise SystemExit(f"{folder} has no RM-Bench file (*_filtered.json): name the folder above it with --data")
    return found


def rows_to_score(rows: list[Row]) -> list[list[dict[str, str]]]:
    return [[{"prompt": row.prompt, "completion": answer} for answer in row.answers] for row in rows]


class Domains:
    """The prompts of each domain, and their pairs."""

    def __init__(self, rows: list[Row], lengths: np.ndarray) -> None:
        self.rows = rows
        domain = np.array([row.part.split("-")[0] for row in rows])
        self.prompts = {str(name): np.flatnonzero(domain == name) for name in dict.fromkeys(domain)}
        right = np.array([True] * 3 + [False] * 3)
        self.pairs = {name: Pairs.of(np.tile(right, (len(at), 1)), lengths[at]) for name, at in self.prompts.items()}

    def numbers(self, scores: np.ndarray, plain: np.ndarray, seed: int) -> dict[str, Any]:
        """Return every figure of one method. Both inputs are (prompts, answers); `plain` is the sum of rewards."""
        judged = [
            Judged(row.file, None, row.part, row.id, tuple(found[:3]), tuple(found[3:]))
            for row, found in zip(self.rows, scores.tolist(), strict=True)
        ]
        parts = [(self.pairs[name], scores[at], plain[at]) for name, at in self.prompts.items()]
        near = [pairs.taken(pairs.near).accuracy(here) for pairs, here, _ in parts]
        fits = [pairs.length_fit(here, seed=seed + n) for n, (pairs, here, _) in enumerate(parts)]
        return {
            "rm_bench": rm_bench(judged),
            "minus_sum": preferences.difference([pairs.shares(a) - pairs.shares(b) for pairs, a, b in parts]),
            "within_10": dict(zip(self.pairs, near, strict=True)) | {"mean": mean_of(near)},
            "at_equal_length": self._intervals([expit(fit[:, 0]) for fit in fits]),
            "b1": self._intervals([fit[:, 1] for fit in fits]),
        }

    def _intervals(self, values: list[np.ndarray]) -> dict[str, Accuracy]:
        """Return the interval of each domain, and of the mean over domains, from values of resampled prompts."""
        found = {n: interval(some, len(at)) for (n, at), some in zip(self.prompts.items(), values, strict=True)}
        return found | {"mean": interval(np.mean(values, 0), len(self.rows))}


def plain(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: row | {"rm_bench": row["rm_bench"].to_json()} for name, row in found.items()}


def table(found: dict[str, dict[str, Any]]) -> str:
    header = ("mean of domains, %", *LEVELS, "average [95%]", "minus sum", "within 10%", "at equal length", "b1")
    rows = [
        (
            name,
            *(f"{100 * row['rm_bench'].overall[level].value:.1f}" for level in LEVELS),
            percent(row["rm_bench"].overall["average"]),
            signed(row["minus_sum"]),
            percent(row["within_10"]["mean"]),
            percent(row["at_equal_length"]["mean"]),
            f"{row['b1']['mean'].value:+.2f}",
        )
        for name, row in found.items()
    ]
    return output.table(header, rows)


def table_of_domains(found: dict[str, dict[str, Any]]) -> str:
    bench = next(iter(found.values()))["rm_bench"]
    header = ("average (within 10%), %", *bench.domains, *bench.parts)
    rows = []
    for name, row in found.items():
        bench, near = row["rm_bench"], row["within_10"]
        cells = [f"{percent(block.average)} ({100 * near[n].value:.1f})" for n, block in bench.domains.items()]
        rows.append((name, *cells, *(percent(block.average) for block in bench.parts.values())))
    return output.table(header, rows)


def sentence(found: dict[str, dict[str, Any]], model: str) -> str:
    plain, discounted = found["endogenous"], found["reward, gamma 0.93"]
    bench = plain["rm_bench"]
    easy, hard = (f"{100 * bench.overall[level].value:.1f}" for level in ("easy", "hard"))
    brief = found[preferences.SHORTER]["rm_bench"].overall
    return output.paragraph(
        f"By the plain sum of rewards, the paper's score, {model} reaches {percent(bench.overall['average'])} over",
        f"{', '.join(bench.domains)}; the paper reports {PAPER} for Qwen2.5-7B-Instruct over four domains, and chance",
        f"is 50. Easy is {easy} and hard {hard}; preferring the shorter answer alone gives",
        f"{100 * brief['easy'].value:.1f} and {100 * brief['hard'].value:.1f}. Among pairs within 10% of each other's",
        f"length, the sum wins {percent(plain['within_10']['mean'])}. Discounted by 0.93, the average is",
        f"{percent(discounted['rm_bench'].overall['average'])}, {signed(discounted['minus_sum'])} points against the",
        f"sum, and {percent(discounted['within_10']['mean'])} within 10%.",
        f"Not in these files: {', '.join(bench.absent) or 'nothing'}.",
    )


def draw(found: dict[str, dict[str, Any]], note: str, path: Path) -> None:
    shown = {name: row for name, row in found.items() if preferences.NO_END not in name}
    figure, axes = output.panels(1, 3, width=4.6, height=5.2)
    levels = {name: row["rm_bench"].overall for name, row in shown.items()}
    average = {name: level["average"] for name, level in levels.items()}
    preferences.dots(axes[0], average, names=True, label="% (chance: 50)", heading="RM-Bench, average")
    for y, level in enumerate(reversed(levels.values())):
        axes[1].plot([100 * level[n].value for n in LEVELS], [y] * 3, color=output.GUIDE, lw=1.2, zorder=1)
        for name, marker in zip(LEVELS, ("o", "|", "s"), strict=True):
            axes[1].plot(
                100 * level[name].value,
                y,
                marker,
                color=output.IMITATION,
                ms=6,
                mew=1.5,
                label=None if y else name,
                ls="none",
            )
    axes[1].axvline(50, color=output.GUIDE, ls="--", lw=1)
    axes[1].set_yticks(range(len(levels)), [])
    axes[1].set_xlabel("% (no bias towards a length: the marks fall together)")
    output.title(axes[1], "by level: easy has longer right answers")
    near = {name: row["within_10"]["mean"] for name, row in shown.items()}
    preferences.dots(axes[2], near, names=False, label="% (chance: 50)", heading="pairs within 10% in length")
    print(output.picture(figure, axes, note, path))


def main(arguments: list[str]) -> None:
    args = preferences.arguments(__doc__).parse_args(arguments)
    files = rows_of(args.data / "rm-bench")
    scorer, parts = preferences.opened(args)
    groups = [
        group for name, rows in files.items()
        for group in record(scorer, rows_to_score(rows), parts / "rm-bench" / name, **preferences.OPTIONS)
    ]  # fmt: skip
    rows = [row for some in files.values() for row in some]
    lengths, scores = preferences.lengths_of(groups), preferences.scores_of(groups)
    domains = Domains(rows, lengths)
    found = {name: domains.numbers(each, scores["endogenous"], args.seed) for name, each in scores.items()}
    print(f"{table(found)}\n\n{table_of_domains(found)}\n\n{sentence(found, args.model)}\n")
    settings = {
        "model": args.model, "dtype": args.dtype, "seed": args.seed, "draws": preferences.DRAWS, **preferences.OPTIONS,
        "files": {name: len(some) for name, some in files.items()}, **preferences.costs(groups), "judges": {},
    }  # fmt: skip
    beside = {}
    for judge, verdicts in preferences.judged(args, scorer, rows_to_score(rows), parts / "rm-bench"):
        at = verdicts.prompts
        some = Domains([rows[i] for i in at], lengths[at])
        methods = {judge: verdicts.scores} | {name: scores[name][at] for name in preferences.BESIDE_JUDGES}
        beside[judge] = {n: some.numbers(each, scores["endogenous"][at], args.seed) for n, each in methods.items()}
        settings["judges"][judge] = {"prompts": len(at), "processor_seconds": round(verdicts.seconds, 1)}
        print(f"{len(at)} prompts of {len(rows)}, in random order\n{table(beside[judge])}\n", flush=True)
    results = {
        "methods": plain(found), "judges": {judge: plain(some) for judge, some in beside.items()}, "paper": PAPER,
        "sentence": sentence(found, args.model),
    }  # fmt: skip
    print(output.write("rm-bench", settings, results, args.out, module="rm_bench"))
    note = f"{args.model}, {args.dtype}, {len(rows)} prompts with three right and three wrong answers; 95% intervals."
    draw(found, note, args.out / f"paper-{output.named('rm-bench', args.model)}")


if __name__ == "__main__":
    main(sys.argv[1:])
