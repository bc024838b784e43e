r"""`python -m bench.paper.ranking`: rank right answers against wrong ones by every reward that needs no verifier.

The claim (Li et al., arXiv 2506.23235, Tables 1 and 5): the endogenous reward ranks at least as well as trained reward
models and as the same model asked to judge. Here, a model ranks answers. Each right answer is compared with three wrong
ones of similar length. The methods are every signal of one pass, the model as verifier and as judge,
and a reward model trained from the same weights with a scalar head and the Bradley-Terry loss on the training split.
The reference of the log-ratio is a model with random weights, because there is no second model.

    --model pocket     the embedded model, on its held-out problems
    --model smollm2    a real model, or any other name: facts that any model knows and generated arithmetic
                       (`questions.known`). No reward model is trained from it: two cores would take hours

    accuracy     share of a problem's wrong answers that score below the right one, averaged over problems, with
                 Wilson's 95% interval (one problem is one trial)
    shorter, equal, longer      the same for wrong answers with fewer, as many or more tokens than the right one
    tasks        the accuracy for the problems of each task alone
    length bias  for two wrong answers of different length to one problem, how often the shorter scores higher: 50%
                 without a bias. The plain sum falls with every token, so more than 50% is expected.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from bench.paper import output
from bench.paper.questions import known
from endoreward_fast import EndoRewardModel
from endoreward_fast.command.evaluate.evaluation import Accuracy, wilson
from endoreward_fast.model.checkpoint import pocket_path
from endoreward_fast.pocket.quiz import TASKS, Problem, problems
from endoreward_fast.rivals.judges import JUDGES
from endoreward_fast.rivals.reward_model import RewardModel
from endoreward_fast.signals import SIGNALS

PER_TASK, PER_TASK_OF_REAL, STEPS, PAIRS, RATE = 20, 12, 120, 16, 1e-4
LENGTHS = ("shorter", "equal", "longer")
BIAS = "shorter of two wrong"
TRAINED = "trained reward model"


def samples(rows: Sequence[Problem]) -> list[dict]:
    """Return the rows to score: for each problem the right answer, then the three wrong ones."""
    return [
        {"prompt": p.prompt(), "completion": completion, "group": n}
        for n, p in enumerate(rows)
        for completion in p.completions()
    ]


def untrained(scorer: EndoRewardModel, seed: int) -> EndoRewardModel:
    """Return a model of the same shape with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = type(scorer.model)(scorer.model.config).to(scorer.model.dtype)
        return EndoRewardModel(made.eval(), scorer.tokenizer)


def trained(rows: Sequence[Problem], seed: int, steps: int = STEPS) -> RewardModel:
    """Train a reward model from the embedded one on `rows`, with the loss -log sigmoid(r(right) - r(wrong))."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(pocket_path()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            str(pocket_path()), num_labels=1, dtype=torch.float32
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    nn.init.zeros_(model.score.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10) * (1 - step / steps)
        batch = [rows[(step * PAIRS + i) % len(rows)] for i in range(PAIRS)]
        texts = [
            [*p.prompt(), {"role": "assistant", "content": completion}]
            for wrong in (False, True)
            for p in batch
            for completion in (p.wrong[step % 3] if wrong else p.answer,)
        ]
        asked = tokenizer.apply_chat_template(texts, return_tensors="pt", return_dict=True, padding=True)
        right, wrong = model(**asked).logits[:, 0].view(2, -1)
        loss = -F.logsigmoid(right - wrong).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return RewardModel(model.eval(), tokenizer)


def asked_of(model: str, per_task: int, seed: int) -> list[Problem]:
    """Return the problems that a model can be asked."""
    return problems(per_task * len(TASKS), seed) if model == output.POCKET else known(per_task, seed)


def every_score(
    rows: Sequence[Problem], seed: int, steps: int = STEPS, model: str = output.POCKET
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return {method: scores (problems, 4), right answer first} and the answers' lengths in tokens (problems, 4)."""
    scorer, asked = output.load(model), samples(rows)
    read = scorer.score(asked, signals="all", reference=untrained(scorer, seed))
    found = {name: [row.signals[name] for row in read] for name in read[0].signals}
    for name, judge in JUDGES.items():
        found[f"judge, {name}"] = [row.score for row in judge(scorer).score(asked)]
    if model == output.POCKET:
        school = problems(PAIRS * steps, seed, "train")
        found[TRAINED] = [row.score for row in trained(school, seed, steps).score(asked)]
    table = {name: torch.tensor(scores, dtype=torch.float64).view(len(rows), -1) for name, scores in found.items()}
    return table, torch.tensor([row.num_tokens for row in read]).view(len(rows), -1)


def accuracies(scores: torch.Tensor, lengths: torch.Tensor) -> dict[str, Accuracy]:
    """Return {"all" or one of LENGTHS: accuracy over wrong answers of that length}. Both inputs are (problems, 4)."""
    won = scores[:, :1] > scores[:, 1:]
    right, wrong = lengths[:, :1], lengths[:, 1:]
    of = {"all": torch.ones_like(won), "shorter": wrong < right, "equal": wrong == right, "longer": wrong > right}
    out = {}
    for name, taken in of.items():
        some = taken.any(1)
        share = ((won & taken).sum(1) / taken.sum(1).clamp(min=1))[some].double()
        out[name] = wilson(share.mean().item() if some.any() else float("nan"), int(some.sum()))
    return out


def by_task(rows: Sequence[Problem], scores: dict[str, torch.Tensor]) -> dict[str, dict[str, Accuracy]]:
    """Return {task: {method: accuracy over its problems}}."""
    found: dict[str, dict[str, Accuracy]] = {}
    for task in dict.fromkeys(p.task for p in rows):
        mine = torch.tensor([p.task == task for p in rows])
        won = {name: (t[mine, :1] > t[mine, 1:]).double().mean().item() for name, t in scores.items()}
        found[task] = {name: wilson(share, int(mine.sum())) for name, share in won.items()}
    return found


def shorter_wins(scores: torch.Tensor, lengths: torch.Tensor) -> Accuracy:
    """Return how often the shorter of two wrong answers scores higher, averaged over problems where lengths differ."""
    shares = []
    for s, n in zip(scores[:, 1:].tolist(), lengths[:, 1:].tolist(), strict=True):
        pairs = [(i, j) for i in range(len(n)) for j in range(len(n)) if n[i] < n[j]]
        shares += [sum(s[i] > s[j] for i, j in pairs) / len(pairs)] if pairs else []
    return wilson(sum(shares) / len(shares) if shares else float("nan"), len(shares))


def percent(share: Accuracy) -> str:
    return f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def report(found: dict[str, dict[str, Accuracy]]) -> str:
    header = ("accuracy, % [95%]", "all", *(f"wrong is {name}" for name in LENGTHS), "of two wrong, the shorter")
    columns = ("all", *LENGTHS, BIAS)
    return output.table(header, [(name, *(percent(row[k]) for k in columns)) for name, row in found.items()])


def report_tasks(tasks: dict[str, dict[str, Accuracy]]) -> str:
    sizes = {task: next(iter(row.values())).rows for task, row in tasks.items()}
    header = ("accuracy, %, by task (problems)", *(f"{task} ({n})" for task, n in sizes.items()))
    methods = next(iter(tasks.values()))
    rows = [(name, *(f"{100 * row[name].value:.1f}" for row in tasks.values())) for name in methods]
    return output.table(header, rows)


def sentence_of_real(found: dict[str, dict[str, Accuracy]], tasks: dict[str, dict[str, Accuracy]]) -> str:
    """Summarise the results of a real model."""
    judges = {name: found[f"judge, {name}"]["all"] for name in JUDGES}
    best = max(judges, key=lambda name: judges[name].value)
    signals = {name: row["all"] for name, row in found.items() if name in SIGNALS and not SIGNALS[name].needs}
    top = max(signals, key=lambda name: signals[name].value)
    each = ", ".join(f"{task} {100 * row['endogenous'].value:.1f}" for task, row in tasks.items())
    return output.paragraph(
        f"The endogenous reward ranks a wrong answer below the right one in {percent(found['endogenous']['all'])}% of",
        f"comparisons, and the summed log-probability in {percent(found['logprob']['all'])}%. By task: {each}.",
        f"The best signal is {top} with {percent(signals[top])}%. Self-certainty reaches",
        f"{percent(found['self-certainty']['all'])}%. The model as its own judge ({best}) reaches",
        f"{percent(judges[best])}% at best. Length bias: of two wrong answers, the shorter has the higher sum in",
        f"{percent(found['endogenous'][BIAS])}% and the higher mean log-probability in",
        f"{percent(found['mean-logprob'][BIAS])}%. No reward model was trained.",
    )


def sentence(found: dict[str, dict[str, Accuracy]], pairs: int) -> str:
    """Summarise the results of the embedded model."""
    best = max((found[f"judge, {name}"]["all"] for name in JUDGES), key=lambda share: share.value)
    shown = {name: percent(found[name]["all"]) for name in found}
    overall = json.loads((output.RESULTS / "rm-bench-pocket.json").read_text())["rm_bench"]["overall"]
    rm_bench = {level: f"{100 * overall[level]['accuracy']:.1f}" for level in ("easy", "hard")}
    return output.paragraph(
        f"The endogenous reward ranks a wrong answer below the right one in {shown['endogenous']}% of comparisons.",
        f"The summed log-probability does so in {shown['logprob']}%: within a prompt, the two differ by a constant.",
        f"Self-certainty reaches {shown['self-certainty']}%. The model as its own judge reaches {percent(best)}% at",
        f"best, near chance, because it was never trained to judge. A reward model trained on {pairs} pairs reaches",
        f"{shown[TRAINED]}%. Length bias: of two wrong answers, the shorter has the higher sum in",
        f"{percent(found['endogenous'][BIAS])}% and the higher mean log-probability in",
        f"{percent(found['mean-logprob'][BIAS])}%, so there is no visible bias where lengths differ by a token or two.",
        "Where lengths differ by hundreds of tokens, the bias decides: in RM-Bench, short right answers win against",
        f"long wrong ones in {rm_bench['hard']}%, and long right answers against short wrong ones in",
        f"{rm_bench['easy']}% (rm-bench-pocket.json).",
    )


def _colour(name: str) -> str:
    if name.startswith("judge") or name == TRAINED:
        return output.OTHER
    return output.ENDOGENOUS if name in ("endogenous", "centred") else output.IMITATION


def draw(found: dict[str, dict[str, Accuracy]], note: str, path: Path) -> None:
    figure, (left, right) = output.panels(1, 2, width=5.4, height=4.2)
    names = list(reversed(found))
    for y, name in enumerate(names):
        share = found[name]["all"]
        left.plot([100 * share.low, 100 * share.high], [y, y], color=_colour(name), lw=2)
        left.plot(100 * share.value, y, "o", color=_colour(name), ms=6)
    left.axvline(50, color=output.GUIDE, ls="--", lw=1)
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("% of wrong answers below the right one (chance: 50)")
    output.title(left, "accuracy")
    for y, name in enumerate(names):
        share = found[name][BIAS]
        right.plot([100 * share.low, 100 * share.high], [y, y], color=_colour(name), lw=2)
        right.plot(100 * share.value, y, "o", color=_colour(name), ms=6)
    right.axvline(50, color=output.GUIDE, ls="--", lw=1)
    right.set_yticks(range(len(names)), [])
    right.set_xlabel("% of pairs of wrong answers (no bias: 50)")
    output.title(right, "length bias: the shorter of two wrong answers wins")
    print(output.picture(figure, [left, right], note, path, legend="lower right"))


def main(arguments: list[str]) -> None:
    parser = output.with_model(output.arguments(__doc__, seeds=1))
    parser.add_argument("--per-task", type=int, help="problems of each generated task (pocket: 20 of 11; else 12 of 4)")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the trained reward model's training")
    args = parser.parse_args(arguments)
    toy = args.model == output.POCKET
    rows = asked_of(args.model, args.per_task or (PER_TASK if toy else PER_TASK_OF_REAL), args.seed)
    scores, lengths = every_score(rows, args.seed, args.steps, args.model)
    found = {name: accuracies(t, lengths) | {BIAS: shorter_wins(t, lengths)} for name, t in scores.items()}
    tasks = by_task(rows, scores)
    said = sentence(found, args.steps * PAIRS) if toy else sentence_of_real(found, tasks)
    print("\n\n".join((report(found), report_tasks(tasks), said)))
    settings = {
        "model": args.model, "seed": args.seed, "problems": len(rows), "tasks": tuple(tasks),
        "reward_model_pairs": args.steps * PAIRS if toy else 0,
    }  # fmt: skip
    print(output.write("ranking", settings, {"methods": found, "tasks": tasks, "sentence": said}, args.out))
    kind = "held-out problems" if toy else "problems"
    note = f"{args.model}, {len(rows)} {kind} of {len(tasks)} tasks, three wrong answers each, seed {args.seed}; "
    note += "95% intervals."
    draw(found, note, args.out / f"paper-{output.named('ranking', args.model)}")


if __name__ == "__main__":
    main(sys.argv[1:])
