r"""`python -m bench.paper.rl`: train a model with RL on its own endogenous reward, and measure its accuracy.

The claim (Li et al., arXiv 2506.23235): the model improves (Qwen2.5-Math-7B on MATH: from 33.0 to 38.8), because the
errors of imitation compound and those of the maximiser do not. Here, a model is trained with TRL's GRPOTrainer and
EndoReward, with KL 0.01 towards the frozen initial policy, which is also the reward model. The reward needs no answers,
so the model is trained on questions without them (`quiz`). It is measured on them and on further questions (`others`).
Other arms have the same budget:

    token level  EndoGRPOMixin: an advantage for each token, from its rewards-to-go
    random       a reward drawn from N(0, 1): the floor, with nothing to learn
    verifiable   1 for the right answer, else 0: the ceiling, which knows the answers

`--model` chooses the model and its Setup:

    pocket       the embedded model: sums, subtractions and counting from its held-out split; all weights are trained
    smollm2      a real model, or any other name: sums of numbers below 20 after one example. The last 10 layers are
                 trained in fp32, the others stay frozen in bf16, so that a step of 16 answers takes one core 12
                 seconds. The token level is left out unless `--arms` names it.

The accuracy of a sampled answer is computed exactly, as the probability of the right answer and its end token. An
answer has to equal the right one in form too. `number` is the share of greedy answers whose last word is right,
whatever comes before: it does not count what a model gains by learning the form.

Expected: the reward is log pi of the initial policy plus a constant of the prompt, so the maximiser is that policy's
most likely answer. Sampling should become as good as greedy decoding was, and greedy decoding should not improve: the
policy is sharpened and learns nothing. Risks: log-probability falls with every token, so short answers may be
preferred, right or wrong; and the arithmetic of a small policy may break. Lengths, KL and entropy are recorded, and
`curves.collapse` names the step at which the policy collapses.
"""

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from bench.paper import output
from bench.paper.curves import smooth
from bench.paper.policies import LONGEST, answers, last_word_right, right
from bench.paper.questions import sums
from bench.paper.rl_report import ARMS, CURVES, draw, report, report_collapse, sentence, table_of
from endoreward_fast import EndoRewardModel
from endoreward_fast.model.checkpoint import place_of
from endoreward_fast.pocket.quiz import Problem, problems

__all__ = ["ARMS", "CURVES", "smooth"]  # imported for tests and other commands

TASKS = ("add", "subtract", "count")
BETA, RATE, PROMPTS, GROUP, STEPS, WARMUP = 0.01, 1e-4, 8, 8, 40, 4
QUIZ, OTHERS = 32, 300


@dataclass(frozen=True)
class Setup:
    """How a model is trained."""

    model: str
    arms: tuple[str, ...] = tuple(ARMS)
    steps: int = STEPS
    quiz: int = QUIZ
    """questions to train on"""
    others: int = OTHERS
    prompts: int = PROMPTS
    """in a step"""
    group: int = GROUP
    rate: float = RATE
    schedule: str = "cosine"
    warmup: int = WARMUP
    layers: int | None = None
    """the last layers, which alone are trained, in fp32 beside frozen ones in bf16; None: all weights, in fp32"""
    workers: int = 2
    """runs in parallel, with one thread each"""

    @property
    def mixed(self) -> bool:
        return self.layers is not None


TOY = Setup(output.POCKET)
REAL = Setup(
    "smollm2", arms=("endogenous", "random", "verifiable"), steps=20, quiz=16, others=48, prompts=4, group=4,
    schedule="constant_with_warmup", warmup=2, layers=10, workers=1,
)  # fmt: skip


def setup_of(model: str) -> Setup:
    return TOY if model == output.POCKET else replace(REAL, model=model)


class Verifiable:
    """Reward 1 for an answer that equals the right one exactly, else 0."""

    __name__ = "verifiable"

    def __call__(self, completions, answer, **columns) -> list[float]:
        return [float(c[0]["content"].strip() == a) for c, a in zip(completions, answer, strict=True)]


class Coin:
    """A random reward, independent of the answer."""

    __name__ = "random"

    def __init__(self, seed: int) -> None:
        self.draws = np.random.default_rng(seed)

    def __call__(self, completions, **columns) -> list[float]:
        return self.draws.normal(size=len(completions)).tolist()


def questions(
    seed: int, quiz: int = QUIZ, others: int = OTHERS, model: str = output.POCKET
) -> tuple[list[Problem], list[Problem]]:
    """Return different problems: those to train on, and others. pocket's are from its held-out split."""
    if model != output.POCKET:
        rows = sums(quiz + others, seed)
        return rows[:quiz], rows[quiz:]
    found = {p.key: p for p in problems(20 * (quiz + others), seed, "heldout", TASKS)}
    rows = list(found.values())[: quiz + others]
    if len(rows) < quiz + others:
        raise ValueError(
            f"quiz + others = {quiz + others}: expected at most {len(found)}, the different problems found"
        )
    return rows[:quiz], rows[quiz:]


def trainer_of(arm: str, seed: int, quiz: list[Problem], setup: Setup, folder: str):
    """Build a GRPOTrainer for one arm."""
    import trl
    from datasets import Dataset

    from endoreward_fast.integrations.grpo import EndoGRPOMixin
    from endoreward_fast.integrations.trl import EndoReward

    class OneForward(EndoGRPOMixin, trl.GRPOTrainer):
        """GRPO in which the reference model is the reward model too, or with token-level advantages."""

    # Every arm has the same three reward functions, so all log the same curves. The weights select one for training.
    place = place_of(setup.model)
    functions: list[Callable] = [EndoReward() if setup.mixed else EndoReward(place), Verifiable(), Coin(seed)]
    chosen = {"endogenous": 0, "token level": 0, "verifiable": 1, "random": 2}[arm]
    rows = [{"prompt": p.prompt(), "answer": p.answer} for p in quiz]
    settings = trl.GRPOConfig(
        output_dir=folder, per_device_train_batch_size=setup.prompts * setup.group, num_generations=setup.group,
        max_completion_length=LONGEST, max_steps=setup.steps, beta=BETA, learning_rate=setup.rate,
        warmup_steps=setup.warmup, lr_scheduler_type=setup.schedule, temperature=1.0, logging_steps=1, seed=seed,
        use_cpu=True, bf16=setup.mixed, report_to=[], save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, reward_weights=[float(i == chosen) for i in range(3)],
        model_init_kwargs={"dtype": "bfloat16"} if setup.mixed else None,
    )  # fmt: skip
    common = {"reward_funcs": functions, "args": settings, "train_dataset": Dataset.from_list(rows)}
    if setup.mixed or arm == "token level":
        trainer = OneForward(place, **common, token_level=arm == "token level")
    else:
        trainer = trl.GRPOTrainer(place, **common)
    if setup.mixed:
        trainer.model.requires_grad_(False)
        for layer in trainer.model.model.layers[-setup.layers :]:
            layer.float().requires_grad_(True)
    return trainer


def train(
    arm: str, seed: int, quiz: list[Problem], setup: Setup = TOY
) -> tuple[torch.nn.Module, dict[str, list[float]]]:
    """Train one arm. Return the policy and {curve: one number for each step}."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(arm, seed, quiz, setup, folder)
        trainer.train()
    names = {
        "accuracy": "rewards/verifiable/mean", "reward": "rewards/endo_reward/mean", "kl": "kl", "entropy": "entropy",
        "length": "completions/mean_length",
    }  # fmt: skip
    log = [step for step in trainer.state.log_history if names["kl"] in step]
    return trainer.model, {curve: [float(step[name]) for step in log] for curve, name in names.items()}


@torch.no_grad()
def measure(scorer: EndoRewardModel, rows: list[Problem], mixed: bool = False) -> dict:
    """Return the mean probability of the right answer, the shares of greedy answers that are right, and the answers."""
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        read = scorer.score([{"prompt": p.prompt(), "completion": p.answer} for p in rows])
        greedy = answers(scorer.model, scorer.tokenizer, rows, greedy=True)
    return {
        "sampled": float(np.exp([row.logprob for row in read]).mean()),
        "greedy": right(rows, greedy).mean().item(),
        "number": last_word_right(rows, greedy).mean().item(),
        "replies": [row[0].text for row in greedy],
    }


def run(arm: str, seed: int, setup: Setup) -> dict:
    """Train one arm and measure it: {"quiz", "others": {"before", "after": measures}, "curves"}."""
    torch.set_num_threads(1)  # the processes run in parallel
    sets = dict(zip(("quiz", "others"), questions(seed, setup.quiz, setup.others, setup.model), strict=True))
    scorer = output.load(setup.model)
    before = {name: measure(scorer, rows, setup.mixed) for name, rows in sets.items()}
    model, curves = train(arm, seed, sets["quiz"], setup)
    trained = EndoRewardModel(model.eval(), scorer.tokenizer)
    after = {name: measure(trained, rows, setup.mixed) for name, rows in sets.items()}
    measured = {name: {"before": before[name], "after": after[name]} for name in sets}
    return {"arm": arm, "seed": seed, "curves": curves} | measured


def kept(arm: str, seed: int, setup: Setup, folder: Path | None) -> dict:
    """Return the run that is kept in `folder`, or run it and keep it there.

    Raises ValueError if the kept run had another Setup.
    """
    if folder is None:
        return run(arm, seed, setup)
    path = folder / f"{arm.replace(' ', '-')}-{seed}.json"
    settings = {name: value for name, value in asdict(setup).items() if name not in ("arms", "workers")}
    if path.is_file():
        found = json.loads(path.read_text())
        if found["setup"] != settings:
            raise ValueError(f"{path} was run with {found['setup']}, not {settings}: give another folder to --runs")
        return found["run"]
    made = run(arm, seed, setup)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"setup": settings, "run": made}) + "\n")
    return made


def main(arguments: list[str]) -> None:
    parser = output.with_model(output.arguments(__doc__, seeds=3))
    parser.add_argument("--steps", type=int, help="optimiser steps (pocket: 40 of 64 answers; else 20 of 16)")
    parser.add_argument("--quiz", type=int, help="number of questions to train on (pocket: 32; else 16)")
    parser.add_argument("--others", type=int, help="number of other questions (pocket: 300; else 48)")
    parser.add_argument("--rate", type=float, help=f"learning rate ({RATE:g})")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="pocket: all; else all but the token level")
    parser.add_argument("--runs", type=Path, help="folder that keeps each finished run, so that a stopped one goes on")
    args = parser.parse_args(arguments)
    given = {name: getattr(args, name) for name in ("steps", "quiz", "others", "rate", "arms")}
    setup = replace(setup_of(args.model), **{name: value for name, value in given.items() if value is not None})
    jobs = [(arm, seed) for seed in range(args.seed, args.seed + args.seeds) for arm in setup.arms]
    with ProcessPoolExecutor(setup.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = list(pool.map(kept, *zip(*jobs, strict=True), repeat(setup), repeat(args.runs)))
    summarise(runs, setup, args.out)


def summarise(runs: list[dict], setup: Setup, folder: Path) -> None:
    """Print the tables, and write the record and the picture. Arms may have different numbers of seeds."""
    found = table_of(runs)
    parts = report(found, "quiz"), report(found, "others"), report_collapse(found), sentence(found, runs)
    print("\n\n".join(parts))
    tasks = TASKS if setup.model == output.POCKET else ("add",)
    seeds = {arm: sum(r["arm"] == arm for r in runs) for arm in found}
    fewest, most = min(seeds.values()), max(seeds.values())
    settings = asdict(setup) | {"tasks": tasks, "seed": min(r["seed"] for r in runs), "seeds": most, "kl": BETA}
    print(output.write("rl", settings, {"table": found, "runs": runs, "sentence": parts[-1]}, folder))
    shown = f"{most} seeds" if fewest == most else "; ".join(f"{arm}: {n} seeds" for arm, n in seeds.items())
    note = f"{shown}; lines: means of 5 steps; bands, whiskers: lowest and highest. KL {BETA}, groups of {setup.group}."
    draw(runs, found, note, folder / f"paper-{output.named('rl', setup.model)}")


if __name__ == "__main__":
    main(sys.argv[1:])
