r"""`python -m bench.paper.rl`: train the embedded model with RL on its own endogenous reward, and measure its accuracy.

The claim (Li et al., arXiv 2506.23235): the model improves (Qwen2.5-Math-7B on MATH: from 33.0 to 38.8), because the
errors of imitation compound and those of the maximiser do not. Here, the embedded model is trained with TRL's
GRPOTrainer and EndoReward, with KL 0.01 towards the frozen initial policy, which is also the reward model. The reward
needs no answers, so the model is trained on questions that it has never seen (`quiz`: sums, subtractions, counting). It
is measured on them and on further questions (`others`). Other arms have the same budget:

    token level  EndoGRPOMixin: an advantage for each token, from its rewards-to-go
    random       a reward drawn from N(0, 1): the floor, with nothing to learn
    verifiable   1 for the right answer, else 0: the ceiling, which knows the answers

The accuracy of a sampled answer is computed exactly, as the probability of the right answer and its end token.

Expected: the reward is log pi of the initial policy plus a constant of the prompt, so the maximiser is that policy's
most likely answer. Sampling should become as good as greedy decoding was, and greedy decoding should not improve: the
policy is sharpened and learns nothing. Risks: log-probability falls with every token, so short answers may be
preferred, right or wrong; and the arithmetic of a policy with 3 million weights may break. Lengths, KL and entropy are
recorded.
"""

import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from bench.paper import output
from bench.paper.policies import answers, right
from endoreward_fast import EndoRewardModel
from endoreward_fast.model.checkpoint import pocket_path
from endoreward_fast.pocket.quiz import Problem, problems

TASKS = ("add", "subtract", "count")
BETA, RATE, PROMPTS, GROUP, STEPS, WARMUP = 0.01, 1e-4, 8, 8, 40, 4
QUIZ, OTHERS = 32, 300
ARMS = {
    "endogenous": "endogenous reward",
    "token level": "endogenous, token level",
    "random": "random reward",
    "verifiable": "verifiable reward",
}
COLOURS = {
    "endogenous": output.ENDOGENOUS,
    "token level": "#2a9d8f",
    "random": output.GUIDE,
    "verifiable": output.IMITATION,
}
CURVES = {
    "accuracy": "sampled answers that are right, training",
    "reward": "endogenous reward of an answer, nats",
    "kl": "KL to the initial policy, nats a token",
    "entropy": "entropy, nats a token",
    "length": "tokens of an answer",
}


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


def questions(seed: int, quiz: int = QUIZ, others: int = OTHERS) -> tuple[list[Problem], list[Problem]]:
    """Return different held-out problems: those to train on, and others."""
    found = {p.key: p for p in problems(20 * (quiz + others), seed, "heldout", TASKS)}
    rows = list(found.values())[: quiz + others]
    if len(rows) < quiz + others:
        raise ValueError(
            f"quiz + others = {quiz + others}: expected at most {len(found)}, the different problems found"
        )
    return rows[:quiz], rows[quiz:]


def train(arm: str, seed: int, quiz: list[Problem], steps: int) -> tuple[torch.nn.Module, dict[str, list[float]]]:
    """Train one arm. Return the policy and {curve: one number for each step}."""
    import trl
    from datasets import Dataset

    from endoreward_fast.integrations.grpo import EndoGRPOMixin
    from endoreward_fast.integrations.trl import EndoReward

    class TokenLevel(EndoGRPOMixin, trl.GRPOTrainer):
        """GRPO with token-level advantages."""

    # Every arm has the same three reward functions, so all log the same curves. The weights select one for training.
    functions: list[Callable] = [EndoReward(str(pocket_path())), Verifiable(), Coin(seed)]
    chosen = {"endogenous": 0, "token level": 0, "verifiable": 1, "random": 2}[arm]
    rows = [{"prompt": p.prompt(), "answer": p.answer} for p in quiz]
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            output_dir=folder, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
            max_completion_length=12, max_steps=steps, beta=BETA, learning_rate=RATE, warmup_steps=WARMUP,
            lr_scheduler_type="cosine", temperature=1.0, logging_steps=1, seed=seed, use_cpu=True, bf16=False,
            report_to=[], save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
            reward_weights=[float(i == chosen) for i in range(3)],
        )  # fmt: skip
        trainer = (TokenLevel if arm == "token level" else trl.GRPOTrainer)(
            str(pocket_path()), reward_funcs=functions, args=settings, train_dataset=Dataset.from_list(rows)
        )
        trainer.train()
    names = {
        "accuracy": "rewards/verifiable/mean", "reward": "rewards/endo_reward/mean", "kl": "kl", "entropy": "entropy",
        "length": "completions/mean_length",
    }  # fmt: skip
    log = [step for step in trainer.state.log_history if names["kl"] in step]
    return trainer.model, {curve: [float(step[name]) for step in log] for curve, name in names.items()}


@torch.no_grad()
def measure(scorer: EndoRewardModel, rows: list[Problem]) -> dict[str, float]:
    """Return the mean probability of the right answer, and the share of greedy answers that are right."""
    read = scorer.score([{"prompt": p.prompt(), "completion": p.answer} for p in rows])
    greedy = answers(scorer.model, scorer.tokenizer, rows, greedy=True)
    return {"sampled": float(np.exp([row.logprob for row in read]).mean()), "greedy": right(rows, greedy).mean().item()}


def run(arm: str, seed: int, steps: int, quiz: int, others: int) -> dict:
    """Train one arm and measure it: {"quiz", "others": {"before", "after": measures}, "curves"}."""
    torch.set_num_threads(1)  # two processes run in parallel
    sets = dict(zip(("quiz", "others"), questions(seed, quiz, others), strict=True))
    scorer = EndoRewardModel.from_pretrained("pocket")
    before = {name: measure(scorer, rows) for name, rows in sets.items()}
    model, curves = train(arm, seed, sets["quiz"], steps)
    trained = EndoRewardModel(model, scorer.tokenizer)
    after = {name: measure(trained, rows) for name, rows in sets.items()}
    measured = {name: {"before": before[name], "after": after[name]} for name in sets}
    return {"arm": arm, "seed": seed, "curves": curves} | measured


def table_of(runs: list[dict]) -> dict[str, dict]:
    """Return {arm: {"quiz", "others": {"before", "after", "gain": {measure: [mean, lowest, highest of seeds]}}}}."""

    def over_seeds(values: list[float]) -> list[float]:
        return [float(f(values)) for f in (np.mean, np.min, np.max)]

    found: dict[str, dict] = {}
    for arm in dict.fromkeys(r["arm"] for r in runs):
        mine, found[arm] = [r for r in runs if r["arm"] == arm], {}
        for name in ("quiz", "others"):
            cells = {
                when: {m: over_seeds([r[name][when][m] for r in mine]) for m in ("sampled", "greedy")}
                for when in ("before", "after")
            }
            gains = {
                m: over_seeds([r[name]["after"][m] - r[name]["before"][m] for r in mine]) for m in ("sampled", "greedy")
            }
            found[arm][name] = cells | {"gain": gains}
    return found


def percent(cell: list[float], sign: str = "") -> str:
    mean, low, high = (100 * x for x in cell)
    return f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def report(found: dict[str, dict], name: str) -> str:
    header = (
        f"{name}: accuracy, %, mean (range) over seeds",
        "sampled, before",
        "after",
        "gain",
        "greedy, before",
        "after",
    )
    rows = []
    for arm, cells in found.items():
        of = cells[name]
        rows.append(
            (ARMS[arm], percent(of["before"]["sampled"]), percent(of["after"]["sampled"]),
             percent(of["gain"]["sampled"], "+"), percent(of["before"]["greedy"]), percent(of["after"]["greedy"]))
        )  # fmt: skip
    return output.table(header, rows)


def draw(runs: list[dict], found: dict[str, dict], seeds: int, folder) -> None:
    figure, axes = output.panels(2, 3, width=4.4, height=2.9)
    for axis, (name, label) in zip(axes, CURVES.items(), strict=False):
        for arm in found:
            curves = np.array([smooth(r["curves"][name]) for r in runs if r["arm"] == arm])
            x = np.arange(1, curves.shape[1] + 1)
            axis.plot(x, curves.mean(0), color=COLOURS[arm], lw=1.8, label=ARMS[arm])
            axis.fill_between(x, curves.min(0), curves.max(0), color=COLOURS[arm], alpha=0.15, lw=0)
        output.title(axis, label)
        axis.set_xlabel("step")
    for axis in axes[1:-1]:  # one legend for all
        for line in axis.get_lines():
            line.set_label("_")
    last = axes[-1]
    for at, (arm, cells) in enumerate(found.items()):
        for offset, name in ((-0.2, "quiz"), (0.2, "others")):
            mean, low, high = (100 * x for x in cells[name]["gain"]["sampled"])
            shade = {"alpha": 0.45} if name == "others" else {}
            spread = [[mean - low], [high - mean]]
            last.bar(at + offset, mean, 0.36, color=COLOURS[arm], yerr=spread, ecolor=output.INK, **shade)
    last.axhline(0, color=output.INK, lw=0.8)
    last.set_xticks(range(len(found)), [name.replace(" ", "\n") for name in found], fontsize=8)
    output.title(last, "gain in accuracy, points (pale: other questions)")
    note = f"{seeds} seeds; lines: means of 5 steps; bands, whiskers: lowest and highest. KL {BETA}, groups of {GROUP}."
    print(output.picture(figure, axes, note, folder / "paper-rl"))


def smooth(curve: list[float], width: int = 5) -> np.ndarray:
    """Return the running mean over the last `width` steps."""
    c = np.asarray(curve, dtype=float)
    return np.array([c[max(0, i - width + 1) : i + 1].mean() for i in range(len(c))])


def sentence(found: dict[str, dict], runs: list[dict]) -> str:
    """Summarise the results."""
    parts = []
    for arm, cells in found.items():
        quiz = cells["quiz"]
        others, others_greedy = (percent(cells["others"]["gain"][m], "+") for m in ("sampled", "greedy"))
        sampled, greedy = ([percent(quiz[w][m]) for w in ("before", "after")] for m in ("sampled", "greedy"))
        parts.append(
            f"{ARMS[arm].capitalize()}: sampled answers to the training questions are right in {sampled[0]}% before "
            f"and {sampled[1]}% after training (greedy answers: {greedy[0]} and {greedy[1]}). On other questions, the "
            f"accuracy changes by {others} points (greedy: {others_greedy})."
        )
    lengths = [smooth(r["curves"]["length"]) for r in runs if r["arm"] == "endogenous"]
    if lengths:
        first, last = (np.mean([c[i] for c in lengths]) for i in (4 if len(lengths[0]) > 4 else 0, -1))
        parts.append(
            f"Answers under the endogenous reward have {first:.1f} tokens in the first steps, {last:.1f} in the last."
        )
    return output.paragraph(*parts)


def main(arguments: list[str]) -> None:
    parser = output.arguments(__doc__, seeds=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps, of 64 answers each")
    parser.add_argument("--quiz", type=int, default=QUIZ, help="number of questions to train on")
    parser.add_argument("--others", type=int, default=OTHERS, help="number of other questions")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args(arguments)
    budget = args.steps, args.quiz, args.others
    jobs = [(arm, seed, *budget) for seed in range(args.seed, args.seed + args.seeds) for arm in args.arms]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = list(pool.map(run, *zip(*jobs, strict=True)))
    found = table_of(runs)
    print(report(found, "quiz") + "\n\n" + report(found, "others") + "\n\n" + sentence(found, runs))
    settings = {
        "model": "pocket", "seed": args.seed, "seeds": args.seeds, "steps": args.steps, "tasks": TASKS, "kl": BETA,
        "learning_rate": RATE, "prompts": PROMPTS, "group": GROUP, "quiz": args.quiz, "others": args.others,
    }  # fmt: skip
    print(output.write("rl", settings, {"table": found, "runs": runs, "sentence": sentence(found, runs)}, args.out))
    draw(runs, found, args.seeds, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
