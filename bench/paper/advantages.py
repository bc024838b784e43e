"""`python -m bench.paper.advantages`: train with two normalisations of token advantages, and compare.

EndoGRPOMixin used to divide a token's advantage by the standard deviation of its group's total rewards. If the totals
are nearly equal, such an advantage can be arbitrarily large. Now it divides by the largest spread at any position
(`token_advantages`), which keeps |advantage| below GRPO's bound, (G - 1) / sqrt(G). Both are trained here like the arms
of `rl`: the embedded model on its own endogenous reward, with equally many answers per step, in groups of 2 and of 8.

Expected. Before: advantages of 10 to 10^4 in groups of 2, where totals are nearly equal most often. The gradients are
as large, and TRL clips them at a norm of 1, so one token decides the direction of a step. Now: no advantage above the
bound, smaller steps, because the largest spread exceeds that of the totals, and a reward that rises at least as far.
"""

import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from bench.paper import output
from bench.paper.rl import BETA, RATE, WARMUP, Verifiable, questions, smooth
from endoreward_fast.model.checkpoint import pocket_path

ARMS = {"totals": "over the spread of the totals (before)", "largest": "over the largest spread (now)"}
COLOURS = {"totals": output.IMITATION, "largest": output.ENDOGENOUS}
CURVES = {
    "largest": "largest |advantage| of a step",
    "gradient": "norm of the gradient, before clipping",
    "reward": "endogenous reward of an answer, nats",
    "accuracy": "sampled answers that are right, training",
    "kl": "KL to the initial policy, nats a token",
}
ANSWERS, GROUPS, STEPS = 64, (2, 8), 40


def train(arm: str, group: int, seed: int, steps: int) -> dict[str, list[float]]:
    """Train once. Return {curve: one number for each step}."""
    import trl
    from datasets import Dataset

    from endoreward_fast.integrations.grpo import EndoGRPOMixin
    from endoreward_fast.integrations.trl import EndoReward

    largest: list[float] = []

    class Trainer(EndoGRPOMixin, trl.GRPOTrainer):
        """GRPO with token-level advantages."""

        def _token_advantages(self, width: int) -> torch.Tensor:
            advantages = super()._token_advantages(width)
            if arm == "totals":  # with scale_rewards="none", these are the numerators
                totals = self._rewards_per_func[:, 0].view(-1, group)
                advantages = advantages / (totals.std(1).repeat_interleave(group)[:, None] + 1e-4)
            largest.append(advantages.abs().max().item())
            return advantages

    quiz, _ = questions(seed)
    rows = [{"prompt": p.prompt(), "answer": p.answer} for p in quiz]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            output_dir=folder, per_device_train_batch_size=ANSWERS, num_generations=group, max_completion_length=12,
            max_steps=steps, beta=BETA, learning_rate=RATE, warmup_steps=WARMUP, lr_scheduler_type="cosine",
            temperature=1.0, logging_steps=1, seed=seed, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
            disable_tqdm=True, gradient_checkpointing=False, reward_weights=[1.0, 0.0],
            scale_rewards="none" if arm == "totals" else "group",
        )  # fmt: skip
        trainer = Trainer(
            str(pocket_path()), reward_funcs=[EndoReward(), Verifiable()], args=settings,
            train_dataset=Dataset.from_list(rows),
        )  # fmt: skip
        trainer.train()
    names = {
        "gradient": "grad_norm",
        "reward": "rewards/endo_reward/mean",
        "accuracy": "rewards/verifiable/mean",
        "kl": "kl",
    }
    log = [step for step in trainer.state.log_history if "kl" in step]
    return {"largest": largest} | {curve: [float(s[name]) for s in log] for curve, name in names.items()}


def run(arm: str, group: int, seed: int, steps: int) -> dict:
    return {"arm": arm, "group": group, "seed": seed, "curves": train(arm, group, seed, steps)}


def table_of(runs: list[dict]) -> dict[str, dict[str, float]]:
    """Return {"arm, groups of n": figures over seeds and steps}."""
    found = {}
    for group in dict.fromkeys(r["group"] for r in runs):
        for arm in ARMS:
            curves = [r["curves"] for r in runs if (r["arm"], r["group"]) == (arm, group)]
            found[f"{arm}, groups of {group}"] = {
                "bound": (group - 1) / group**0.5,
                "largest advantage": max(max(c["largest"]) for c in curves),
                "median of a step's largest": float(np.median([c["largest"] for c in curves])),
                "largest gradient": max(max(c["gradient"]) for c in curves),
                "median gradient": float(np.median([c["gradient"] for c in curves])),
                "reward, first 5 steps": float(np.mean([c["reward"][:5] for c in curves])),
                "reward, last 5 steps": float(np.mean([c["reward"][-5:] for c in curves])),
                "accuracy, first 5 steps": float(np.mean([c["accuracy"][:5] for c in curves])),
                "accuracy, last 5 steps": float(np.mean([c["accuracy"][-5:] for c in curves])),
                "KL, last 5 steps": float(np.mean([c["kl"][-5:] for c in curves])),
            }
    return found


def draw(runs: list[dict], seeds: int, folder) -> None:
    groups = list(dict.fromkeys(r["group"] for r in runs))
    figure, axes = output.panels(len(groups), len(CURVES), width=3.6, height=2.8)
    for row, group in enumerate(groups):
        for axis, (name, label) in zip(axes[row * len(CURVES) :], CURVES.items(), strict=False):
            for arm in ARMS:
                mine = [r["curves"][name] for r in runs if (r["arm"], r["group"]) == (arm, group)]
                plain = name in ("largest", "gradient")
                curves = np.array([c if plain else smooth(c) for c in mine])
                x = np.arange(1, curves.shape[1] + 1)
                named = {"label": ARMS[arm]} if name == "largest" else {}
                axis.plot(x, np.median(curves, 0), color=COLOURS[arm], lw=1.6, **named)
                axis.fill_between(x, curves.min(0), curves.max(0), color=COLOURS[arm], alpha=0.15, lw=0)
            if name in ("largest", "gradient"):
                axis.set_yscale("log")
            if name == "largest":
                axis.axhline((group - 1) / group**0.5, color=output.GUIDE, lw=1, ls="--", label="GRPO's bound")
            output.title(axis, f"{label}\ngroups of {group}")
            axis.set_xlabel("step")
    note = f"{seeds} seeds: medians, lowest, highest; last 3: means of 5 steps. KL {BETA}, {ANSWERS} answers a step."
    print(output.picture(figure, axes, note, folder / "paper-advantages"))


def main(arguments: list[str]) -> None:
    parser = output.arguments(__doc__, seeds=3)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps, of {ANSWERS} answers each")
    parser.add_argument("--workers", type=int, default=2, help="number of parallel trainings, with one thread each")
    args = parser.parse_args(arguments)
    seeds = range(args.seed, args.seed + args.seeds)
    jobs = [(arm, group, seed, args.steps) for seed in seeds for group in GROUPS for arm in ARMS]
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = list(pool.map(run, *zip(*jobs, strict=True)))
    found = table_of(runs)
    columns = list(next(iter(found.values())))
    print(output.table(("", *found), [(c, *(f"{found[arm][c]:.3g}" for arm in found)) for c in columns]))
    settings = {
        "model": "pocket", "seed": args.seed, "seeds": args.seeds, "steps": args.steps, "groups": GROUPS,
        "answers": ANSWERS, "kl": BETA, "learning_rate": RATE,
    }  # fmt: skip
    print(output.write("advantages", settings, {"table": found, "runs": runs}, args.out))
    draw(runs, args.seeds, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
