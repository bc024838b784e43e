r"""`python -m bench.paper.objectives`: train with ReVal, TBRM and GRPO at the same budget, and compare.

The embedded model answers sums, subtractions and counting questions of its held-out split, with a verifiable reward: 1
for the right answer, else 0. Three objectives train it:

    reval   endoreward_fast.losses.reval_loss (arXiv 2603.23355), rewards less the mean of their group, as in the
            paper's section 5.5.4. Without its replay buffer: every sample is used once
    tbrm    endoreward_fast.losses.tbrm_loss (arXiv 2505.15311), rewards of 0 and 1, as in the paper
    grpo    advantages of a group divided by their standard deviation, and the k3 estimate of KL times a penalty,
            averaged over the tokens of an answer (arXiv 2402.03300)

All see the same questions in the same order, with the same number of samples and optimiser steps: 24 steps of 8
questions with 4 answers, AdamW with a cosine schedule, gradients clipped at a norm of 1. Each objective has the same
number of tries: 4 learning rates times 3 penalties, one run each, on a seed that no other run has (`TUNING`). The
setting with the highest accuracy on the questions trained on is run with further seeds. A penalty is beta of ReVal and
TBRM, and the factor of GRPO's KL. The lowest rate and the lowest penalties were added to every grid after a first run,
in which TBRM's best setting was at the edge of its grid and lost accuracy. `--runs` keeps each finished run, so that a
stopped command goes on.

Measured: the exact probability of the right answer and its end token, on the questions trained on (`quiz`) and on
others, and of each step's answers the reward, KL to the initial policy, entropy and length.

Expected, written before the comparison was run: ReVal and GRPO alike. At the start, ReVal's residual is
-(r - mean) / beta, and V(s_1) is the same for a whole group, so its gradient cancels: what remains is a policy gradient
with the group's mean as baseline. TBRM behind: its residual starts at V(s_1) - r / beta, so its first steps move V and
not the answers. Seen: TBRM is far behind where V(s_1), 17 nats here, is above r / beta, because the residual of a right
answer is positive then and its probability falls. With beta = 0.02 it is ahead.
"""

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.paper import output
from bench.paper.objectives_report import draw, report, sentence, table_of
from bench.paper.policies import answers, generated, read, right
from bench.paper.rl import questions
from endoreward_fast import EndoRewardModel, TokenRewards, linear_token_rewards
from endoreward_fast.losses import reval_loss, tbrm_loss
from endoreward_fast.pocket.quiz import Problem

PROMPTS, GROUP, STEPS, WARMUP, QUIZ, OTHERS = 8, 4, 24, 3, 64, 100
RATES = (1e-5, 3e-5, 1e-4, 3e-4)
PENALTIES = {"reval": (0.02, 0.1, 0.5), "tbrm": (0.02, 0.1, 0.5), "grpo": (0.001, 0.01, 0.1)}
TUNING = 1000
"""the seed of the tuning runs, which no other run has"""
EVERY = 8
"""steps between two measurements of accuracy"""


@dataclass(frozen=True)
class Try:
    """One setting of an objective."""

    objective: str
    rate: float
    penalty: float


@dataclass(frozen=True)
class Batch:
    """Answers of the policy, (N, T) with the prompt padded on the left, and their rewards (N,)."""

    tokens: Tensor
    attention: Tensor
    scored: Tensor
    reward: Tensor


def centred(reward: Tensor) -> Tensor:
    """Return the rewards (N,) less the mean of their group."""
    groups = reward.view(-1, GROUP)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def reval(policy: TokenRewards, reference: TokenRewards, batch: Batch, penalty: float) -> Tensor:
    return reval_loss(policy, reference, batch.scored, centred(batch.reward), beta=penalty).loss


def tbrm(policy: TokenRewards, reference: TokenRewards, batch: Batch, penalty: float) -> Tensor:
    return tbrm_loss(policy, reference, batch.scored, batch.reward, beta=penalty).loss


def grpo(policy: TokenRewards, reference: TokenRewards, batch: Batch, penalty: float) -> Tensor:
    """Return GRPO's loss for answers of the policy itself, whose importance ratio is 1 and is not clipped."""
    spread = batch.reward.view(-1, GROUP).std(1).repeat_interleave(GROUP)
    advantage = centred(batch.reward) / (spread + 1e-4)
    ratio = torch.exp(policy.logprob - policy.logprob.detach())
    gap = reference.logprob - policy.logprob
    token = penalty * (torch.exp(gap) - gap - 1) - advantage[:, None] * ratio
    return (torch.where(batch.scored, token, 0.0).sum(1) / batch.scored.sum(1)).mean()


OBJECTIVES: dict[str, Callable[[TokenRewards, TokenRewards, Batch, float], Tensor]] = {
    "reval": reval, "tbrm": tbrm, "grpo": grpo,
}  # fmt: skip


def drawn(model: nn.Module, tokenizer, asked: list[Problem]) -> Batch:
    """Sample GROUP answers to each problem, and reward those that are right and have ended."""
    rows = [p for p in asked for _ in range(GROUP)]
    prompts, ids = generated(model, tokenizer, rows)
    said = [[read(tokenizer, row)] for row in ids.tolist()]
    lengths = torch.tensor([[a.tokens] for [a] in said])
    written = torch.arange(ids.shape[1]) < lengths
    before = prompts["attention_mask"].bool()
    return Batch(
        tokens=torch.cat([prompts["input_ids"], ids], 1), attention=torch.cat([before, written], 1),
        scored=torch.cat([torch.zeros_like(before), written], 1), reward=right(rows, said).flatten().float(),
    )  # fmt: skip


def rewards(model: nn.Module, batch: Batch) -> TokenRewards:
    """Return what one pass gives of the answers' tokens."""
    places = (batch.attention.long().cumsum(-1) - 1).clamp(min=0)
    hidden = model.base_model(
        batch.tokens, attention_mask=batch.attention.long(), position_ids=places
    ).last_hidden_state
    return linear_token_rewards(hidden, model.lm_head.weight, batch.tokens, mask=batch.scored, entropy=True)


def measure(model: nn.Module, tokenizer, rows: list[Problem], greedy: bool = False) -> dict[str, float]:
    """Return the mean probability of the right answer, and the share of greedy answers that are right."""
    scorer = EndoRewardModel(model.eval(), tokenizer)
    read = scorer.score([{"prompt": p.prompt(), "completion": p.answer} for p in rows])
    found = {"sampled": torch.tensor([row.logprob for row in read]).exp().mean().item()}
    if greedy:
        found["greedy"] = right(rows, answers(model, tokenizer, rows, greedy=True)).mean().item()
    return found


def run(one: Try, seed: int, steps: int = STEPS, quiz: int = QUIZ, others: int = OTHERS) -> dict:
    """Train once. Return the setting, the curves, {set: {"step", "sampled", "greedy": values}} and the seconds."""
    began = time.process_time()
    sets = dict(zip(("quiz", "others"), questions(seed, quiz, others), strict=True))
    scorer = EndoRewardModel.from_pretrained(output.POCKET)
    model, tokenizer = scorer.model, scorer.tokenizer
    reference = copy.deepcopy(model).requires_grad_(False)
    model.requires_grad_(True)
    torch.manual_seed(seed)
    order = torch.cat([torch.randperm(quiz) for _ in range(-(-steps * PROMPTS // quiz))])
    optimiser = torch.optim.AdamW(model.parameters(), lr=one.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: scale(step, steps))
    curves: dict[str, list[float]] = {name: [] for name in ("reward", "kl", "entropy", "length", "loss", "gradient")}
    accuracy: dict[str, dict[str, list[float]]] = {name: {"step": [], "sampled": [], "greedy": []} for name in sets}

    def look(step: int) -> None:
        ends = step in (0, steps)
        for name, rows in sets.items():
            accuracy[name]["step"].append(step)
            for key, value in measure(model, tokenizer, rows, greedy=ends).items():
                accuracy[name][key].append(value)

    look(0)
    for step in range(1, steps + 1):
        asked = [sets["quiz"][i] for i in order[(step - 1) * PROMPTS : step * PROMPTS].tolist()]
        batch = drawn(model, tokenizer, asked)
        with torch.no_grad():
            fixed = rewards(reference, batch)
        policy = rewards(model.train(), batch)
        loss = OBJECTIVES[one.objective](policy, fixed, batch, one.penalty)
        optimiser.zero_grad()
        loss.backward()
        gradient = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        seen = {
            "reward": batch.reward.mean(), "kl": (policy.logprob - fixed.logprob).sum(1).mean(), "loss": loss,
            "entropy": policy.entropy[batch.scored].mean(), "length": batch.scored.sum(1).float().mean(),
            "gradient": gradient,
        }  # fmt: skip
        for name, value in seen.items():
            curves[name].append(value.item())
        if step % EVERY == 0 or step == steps:
            look(step)
    seconds = time.process_time() - began
    return asdict(one) | {"seed": seed, "curves": curves, "accuracy": accuracy, "seconds": seconds}


def scale(step: int, steps: int) -> float:
    """Return the factor of the learning rate: it rises linearly for WARMUP steps, then falls as a cosine."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - WARMUP) / max(steps - WARMUP, 1)))))


def kept(one: Try, seed: int, folder: Path | None, **sizes: int) -> dict:
    """Return the run that is kept in `folder`, or run it and keep it there."""
    if folder is None:
        return run(one, seed, **sizes)
    path = folder / f"{one.objective}-{one.rate:g}-{one.penalty:g}-{seed}.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if found["sizes"] != sizes:
            raise ValueError(f"{path} was run with {found['sizes']}, not {sizes}: give another folder to --runs")
        return found["run"]
    made = run(one, seed, **sizes)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"sizes": sizes, "run": made}) + "\n")
    return made


def tune(objective: str, folder: Path | None, **sizes: int) -> tuple[Try, list[dict]]:
    """Run every setting of an objective once. Return the best on the questions trained on, and the runs."""
    tries = [Try(objective, *setting) for setting in product(RATES, PENALTIES[objective])]
    runs = [kept(one, TUNING, folder, **sizes) for one in tries]
    best = max(range(len(tries)), key=lambda i: runs[i]["accuracy"]["quiz"]["sampled"][-1])
    return tries[best], runs


def main(arguments: list[str]) -> None:
    parser = output.arguments(__doc__, seeds=5)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps, of {PROMPTS * GROUP} answers each")
    parser.add_argument("--quiz", type=int, default=QUIZ, help="number of questions to train on")
    parser.add_argument("--others", type=int, default=OTHERS, help="number of other questions")
    parser.add_argument("--runs", type=Path, help="folder that keeps each finished run, so that a stopped one goes on")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes = {"steps": args.steps, "quiz": args.quiz, "others": args.others}
    chosen, tuning = {}, []
    for objective in OBJECTIVES:
        chosen[objective], tried = tune(objective, args.runs, **sizes)
        tuning += tried
        print(output.table(
            ("tries", "learning rate", "penalty", "accuracy after, quiz"),
            [(objective, r["rate"], r["penalty"], f"{100 * r['accuracy']['quiz']['sampled'][-1]:.1f}") for r in tried],
        ), flush=True)  # fmt: skip
    seeds = range(args.seed, args.seed + args.seeds)
    runs = [kept(chosen[objective], seed, args.runs, **sizes) for seed in seeds for objective in OBJECTIVES]
    found = table_of(runs)
    said = sentence(found, args.seeds)
    print(report(found), said, sep="\n\n")
    settings = sizes | {
        "model": output.POCKET, "seed": args.seed, "seeds": args.seeds, "prompts": PROMPTS, "group": GROUP,
        "warmup": WARMUP, "rates": RATES, "penalties": PENALTIES, "tuning_seed": TUNING,
        "chosen": {name: asdict(one) for name, one in chosen.items()}, "threads": 1,
        "processor_minutes": sum(r["seconds"] for r in tuning + runs) / 60,
    }  # fmt: skip
    results = {"table": found, "sentence": said, "runs": runs, "tuning": tuning}
    print(output.write("objectives", settings, results, args.out))
    draw(runs, found, args.seeds, args.out / "paper-objectives")


if __name__ == "__main__":
    main(sys.argv[1:])
