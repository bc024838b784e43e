"""`endoreward demo`: score texts whose better version is known, and measure how often it scores higher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import EndoRewardError
from ..model.checkpoint import POCKET
from ..pocket.quiz import CORRUPTIONS, Passage, Problem, corrupted, passages, problems, steered
from .evaluate.evaluation import Accuracy, wilson
from .facts import facts
from .flags.options import ModelFlags
from .run import pipeline
from .run.monitor import Monitor

PASSAGES, PROBLEMS, STEERED = 40, 220, 60
OF_REAL_MODEL = 6  # passages and steered pairs; thousands of completions would take minutes on a CPU
SHOWN = 3  # printed examples of each kind
REAL_MODEL = "smollm2"

Sample = dict[str, Any]


def show(flags: ModelFlags) -> None:
    """Load the model, score the three parts of the demonstration and print the results."""
    form, toy = "plain", flags.model == POCKET
    print("endoreward demo: a demonstration of the reward inside a language model.")
    pipeline.before_loading(replace(flags, model_by_default=False))  # the model is printed below
    scorer = pipeline.load_scorer(flags)
    if flags.chat is not False and getattr(getattr(scorer, "tokenizer", None), "chat_template", None):
        form = "chat"
    # The toy knows what it was trained on, and a real model what everybody knows.
    texts = passages(PASSAGES if toy else OF_REAL_MODEL)
    quiz = problems(PROBLEMS) if toy else facts()
    pairs = steered(STEERED if toy else OF_REAL_MODEL)
    parts = [
        [s for i, p in enumerate(texts) for s in _passage_samples(p, i)],
        [s for p in quiz for s in _problem_samples(p, form)],
        [s for pair in pairs for s in _steered_samples(pair, form)],
    ]
    with Monitor(sum(map(len, parts)), quiet=flags.quiet, model=flags.model) as monitor:
        scores = _scores(scorer, [s for part in parts for s in part], flags, monitor)
    ends = [len(parts[0]), len(parts[0]) + len(parts[1])]
    print(f"Model: {flags.model}.  Score: {flags.reduction} of token rewards, alpha {flags.alpha:g}.")
    if not toy:
        _show_tokens(scorer, quiz[0], form, flags)
    _show_passages(texts, _rows(scores[: ends[0]], 1 + len(CORRUPTIONS)))
    _show_problems(quiz, _rows(scores[ends[0] : ends[1]], 4))
    _show_steered(pairs, _rows(scores[ends[1] :], 4))
    if toy:
        print(f"\nMeasured on {len(scores)} completions, held out from the built-in model's training.")
        print("`pocket` is a toy of a few MB. It shows how the method behaves, not how good it can be.")
        print(f"To use a real model:\n\n  endoreward demo --model {REAL_MODEL}")
    else:
        print(f"\nMeasured on {len(scores)} completions.")


def _scores(scorer: pipeline.Scorer, samples: list[Sample], flags: ModelFlags, monitor: Monitor) -> list[float]:
    scores = [0.0] * len(samples)
    for i, result in scorer.iter_scores(samples, on_tokens=monitor.on_tokens, **flags.scoring()):
        if result.score is None:
            raise EndoRewardError(f"text {i + 1} of the demonstration could not be scored: {result.error}")
        scores[i] = result.score
        monitor.advance(1)
        monitor.on_row(str(i), None)
    return scores


def _show_tokens(scorer: pipeline.Scorer, problem: Problem, form: str, flags: ModelFlags) -> None:
    """Print each token of the right answer and of a wrong one."""
    _title("Rewards of tokens, in nats")
    print(f"\n  {problem.question}")
    samples = _problem_samples(problem, form)[:2]
    results = dict(scorer.iter_scores(samples, per_token=True, **flags.scoring()))
    for i, answer in enumerate((problem.answer, problem.wrong[0])):
        table = results[i].tokens
        if table is None:
            raise EndoRewardError(f"the demonstration's answer {answer!r} could not be scored: {results[i].error}")
        print(f"    {'token':<20}{'reward':>9}{'log-prob':>10}{'V before':>10}")
        for text, *numbers in zip(table.texts, table.rewards, table.logprobs, table.values, strict=True):
            print("    {!r:<20}{:>9.2f}{:>10.2f}{:>10.2f}".format(text, *numbers))
        print(f"    {'score':<20}{results[i].score:>9.2f}\n")


def _rows(scores: list[float], width: int) -> list[list[float]]:
    return [scores[i : i + width] for i in range(0, len(scores), width)]


def _passage_samples(passage: Passage, number: int) -> list[Sample]:
    spoiled = [corrupted(passage.completion, seed=number, kind=kind) for kind in CORRUPTIONS]
    texts = (passage.completion, *spoiled)
    return [{"prompt": passage.prompt, "completion": text, "chat": False} for text in texts]


def _problem_samples(problem: Problem, form: str) -> list[Sample]:
    prompt = problem.prompt(form)
    return [{"prompt": prompt, "completion": text, "chat": form == "chat"} for text in problem.completions(form)]


def _steered_samples(pair: tuple[Problem, Problem], form: str) -> list[Sample]:
    """Return each instruction with each answer: (a, a), (a, b), (b, a), (b, b)."""
    answers = [problem.completions(form)[0] for problem in pair]
    return [
        {"prompt": problem.prompt(form), "completion": answer, "chat": form == "chat"}
        for problem in pair
        for answer in answers
    ]


def _show_passages(texts: Sequence[Passage], scores: Sequence[Sequence[float]]) -> None:
    _title("Real text against the same text corrupted")
    for i, passage in enumerate(texts[:SHOWN]):
        spoiled = corrupted(passage.completion, seed=i, kind=CORRUPTIONS[0])
        print(f"\n  {_clip(passage.completion):<60} {scores[i][0]:>9.1f}")
        print(f"  {_clip(spoiled):<60} {scores[i][1]:>9.1f}")
    print()
    for k, kind in enumerate(CORRUPTIONS, start=1):
        _measured(kind.replace("_", " "), [row[0] > row[k] for row in scores], 1 / 2)


def _show_problems(quiz: Sequence[Problem], scores: Sequence[Sequence[float]]) -> None:
    _title("Right answers against wrong ones of similar length")
    for problem, row in zip(quiz[:SHOWN], scores, strict=False):
        print(f"\n  {' '.join(filter(None, (problem.system, problem.question)))}")
        answers = (problem.answer, *problem.wrong)
        for rank, i in enumerate(sorted(range(4), key=lambda i: -row[i]), start=1):
            print(f"    {rank}. {answers[i]:<40} {row[i]:>9.2f}{'   (right)' if i == 0 else ''}")
    print()
    _measured("right answer first of four", [row[0] > max(row[1:]) for row in scores], 1 / 4)
    tasks = sorted({problem.task for problem in quiz})
    for task in tasks:
        here = [row for problem, row in zip(quiz, scores, strict=True) if problem.task == task]
        _measured(f"  {task}", [row[0] > max(row[1:]) for row in here], 1 / 4)


def _show_steered(pairs: Sequence[tuple[Problem, Problem]], scores: Sequence[Sequence[float]]) -> None:
    _title("A system prompt steers the reward")
    first = pairs[0]
    print(f"\n  {first[0].question}")
    print(f"    {'':<28}" + "".join(f"{problem.answer!r:>22}" for problem in first))
    for k, problem in enumerate(first):
        print(f"    {problem.system or '':<28}" + "".join(f"{s:>22.2f}" for s in scores[0][2 * k : 2 * k + 2]))
    print()
    _measured("requested answer first", [hit for r in scores for hit in (r[0] > r[1], r[3] > r[2])], 1 / 2)


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def _measured(what: str, hits: Sequence[bool], chance: float) -> None:
    a: Accuracy = wilson(sum(hits) / len(hits), len(hits))
    interval = f"[{100 * a.low:.0f}, {100 * a.high:.0f}]"
    print(f"  {what:<28}{100 * a.value:5.1f}% {interval:>11}   chance {100 * chance:.0f}%  {len(hits)} trials")


def _clip(text: str, width: int = 58) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
