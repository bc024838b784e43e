"""Compare right answers with wrong ones to the same prompt, overall and at equal length.

Two figures say what is left of an accuracy if length cannot help:

    within 10%        share of the pairs won in which neither answer is more than 10% longer than the other, in tokens
    at equal length   sigmoid(b0) of the logistic fit P(the right answer scores higher) = sigmoid(b0 + b1 x), where
                      x is ln(tokens of the right answer / tokens of the wrong one) over its root mean square.
                      b1 < 0 says that a shorter answer scores higher.

A tie counts as half a win. A trial is a prompt, because the pairs of one prompt are not independent.
"""

import argparse
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.paper import output
from bench.paper.record import Groups, Recorded, record_judge
from endoreward_fast import EndoRewardModel
from endoreward_fast.command.evaluate.evaluation import Accuracy, wilson
from endoreward_fast.returns import sequence_score
from endoreward_fast.rivals.judges import JUDGES

REDUCTIONS = {
    "sum": {},
    "mean": {"reduction": "mean"},
    "gamma 0.95": {"gamma": 0.95},
    "gamma 0.93": {"gamma": 0.93},
    "gamma 0.93, floor 0.05": {"gamma": 0.93, "floor": 0.05},
    "gamma 0.9": {"gamma": 0.9},
}
SIGNAL_OF = {"reward, sum": "endogenous", "logprob, sum": "logprob", "logprob, mean": "mean-logprob"}
"""reductions that are signals already"""
REDUCED = ("discounted-reward", "discounted-logprob")
"""signals that are reductions here: gamma 0.93"""
NO_END = ", no end token"
SHORTER = "shorter answer"
RIDGE = 1.0
"""penalty on b0^2 + b1^2, halved: about the weight of four pairs. It keeps the fit finite where length decides all."""
DRAWS = 1000
BESIDE_JUDGES = ("endogenous", "reward, gamma 0.93", "mean-logprob", SHORTER)
"""methods shown again on the prompts that a judge was asked about"""
OPTIONS = {"max_tokens_per_batch": 2048}
"""of scoring. On CPUs, larger batches were slower (bench/NOTES.md)."""
ROOT = Path(__file__).parents[2]


def scores_of(groups: Sequence[Sequence[Recorded]]) -> dict[str, np.ndarray]:
    """Return {method: (prompts, answers) scores}: every signal, reductions of rewards and logprobs, and brevity.

    Reductions are computed with and without the token that ends the turn: no V(s') is subtracted from its reward.
    """
    signals = [name for name in groups[0][0].signals if name not in REDUCED]
    found = {name: np.array([[one.signals[name] for one in group] for group in groups]) for name in signals}
    for what, field in (("reward", "rewards"), ("logprob", "logprobs")):
        for cut, ending in ((0, ""), (1, NO_END)):
            padded = [_padded([getattr(one, field)[: len(one.rewards) - cut] for one in group]) for group in groups]
            for name, options in REDUCTIONS.items():
                method = f"{what}, {name}"
                if ending or method not in SIGNAL_OF:
                    found[method + ending] = np.array([sequence_score(*rows, **options).numpy() for rows in padded])
    return found | {SHORTER: -lengths_of(groups).astype(float)}


def lengths_of(groups: Sequence[Sequence[Recorded]]) -> np.ndarray:
    """Return the numbers of scored tokens, (prompts, answers)."""
    return np.array([[len(one.rewards) for one in group] for group in groups])


def _padded(rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    values = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
    return values, torch.arange(values.shape[1]) < lengths[:, None]


class Pairs(NamedTuple):
    """Every right answer with every wrong one to its prompt. Arrays are (pairs,)."""

    prompt: np.ndarray
    right: np.ndarray
    """index of the right answer among the prompt's answers"""
    wrong: np.ndarray
    tokens: np.ndarray
    """(pairs, 2) length of the right answer and of the wrong one"""

    @classmethod
    def of(cls, right: np.ndarray, lengths: np.ndarray) -> "Pairs":
        """Return the pairs of prompts. Both inputs are (prompts, answers); `right` is bool."""
        prompt, i, j = np.nonzero(right[:, :, None] & ~right[:, None, :])
        return cls(prompt, i, j, np.stack([lengths[prompt, i], lengths[prompt, j]], 1))

    def taken(self, which: np.ndarray) -> "Pairs":
        """Return some of the pairs."""
        return Pairs(*(field[which] for field in self))

    @property
    def near(self) -> np.ndarray:
        """Whether the longer answer is at most 10% longer than the shorter one."""
        return 10 * self.tokens.max(1) <= 11 * self.tokens.min(1)

    def won(self, scores: np.ndarray) -> np.ndarray:
        """Return 1 where the right answer scores higher, 0.5 for a tie, else 0. `scores` is (prompts, answers)."""
        right, wrong = scores[self.prompt, self.right], scores[self.prompt, self.wrong]
        return (right > wrong) + 0.5 * (right == wrong)

    def shares(self, scores: np.ndarray) -> np.ndarray:
        """Return the share of pairs won, for each prompt that has a pair."""
        _, prompt, pairs = np.unique(self.prompt, return_inverse=True, return_counts=True)
        return np.bincount(prompt, self.won(scores)) / pairs

    def accuracy(self, scores: np.ndarray) -> Accuracy:
        """Return the mean of `shares`, with Wilson's interval."""
        shares = self.shares(scores)
        return wilson(float(shares.mean()) if len(shares) else math.nan, len(shares))

    def length_fit(self, scores: np.ndarray, *, draws: int | None = None, seed: int = 0) -> np.ndarray:
        """Return b0 and b1 of the fit, (1 + draws, 2): to all pairs, then to as many prompts drawn with replacement."""
        won, x = self.won(scores), np.log(self.tokens[:, 0] / self.tokens[:, 1])
        x = x / max(math.sqrt(np.mean(x**2)), 1e-12)
        _, prompt = np.unique(self.prompt, return_inverse=True)
        first = logistic(x, won, np.ones(len(x)), np.zeros(2))
        rng, count = np.random.default_rng(seed), prompt.max() + 1
        fits = [first]
        for _ in range(DRAWS if draws is None else draws):
            times = np.bincount(rng.integers(count, size=count), minlength=count)
            fits.append(logistic(x, won, times[prompt], first))
        return np.array(fits)


def logistic(x: np.ndarray, y: np.ndarray, weight: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return (b0, b1) that maximise sum weight log-likelihood of y under sigmoid(b0 + b1 x), less RIDGE / 2 b^2."""
    b, columns = start, np.stack([np.ones_like(x), x])
    for _ in range(100):
        p = expit(b @ columns)
        gradient = columns @ (weight * (y - p)) - RIDGE * b
        step = np.linalg.solve((columns * (weight * p * (1 - p))) @ columns.T + RIDGE * np.eye(2), gradient)
        b = b + step
        if np.abs(step).max() < 1e-8:
            return b
    raise ArithmeticError("the logistic fit of length against outcome did not converge in 100 steps")


def expit(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * z))


def interval(values: np.ndarray, rows: int) -> Accuracy:
    """Return values[0] with the 95% interval of the others, which come from resampled prompts."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Accuracy(float(values[0]), float(low), float(high), rows)


def best_of(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the share of right ones among the highest-scoring answers, (problems,). Inputs are (problems, answers)."""
    top = scores == scores.max(1, keepdims=True)
    return (top & right).sum(1) / top.sum(1)


def difference(parts: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the mean over parts of each part's mean of paired differences, with its normal 95% interval."""
    value = sum(part.mean() for part in parts) / len(parts)
    half = 1.959964 * math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / len(parts)
    return {"value": float(value), "low": float(value - half), "high": float(value + half)}


# ------------------------------------------------------------------------------------------- what both commands share


def arguments(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="name or path")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the weights")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--parts", type=Path, help="folder that keeps what was read; build/record/MODEL-DTYPE")
    parser.add_argument("--judges", type=int, default=0, help="prompts for the verifier and the pointwise judge")
    parser.add_argument("--pairwise", type=int, default=0, help="prompts for the pairwise judge")
    parser.add_argument("--seed", type=int, default=0, help="draws the judges' prompts and resamples prompts")
    parser.add_argument("--out", type=Path, default=output.RESULTS, help="folder for the JSON and the picture")
    return parser


def opened(args: argparse.Namespace) -> tuple[EndoRewardModel, Path]:
    """Return the model and the folder of the parts."""
    name = f"{args.model.replace('/', '+')}-{args.dtype}"
    return EndoRewardModel.from_pretrained(args.model, dtype=args.dtype), args.parts or ROOT / "build" / "record" / name


class Verdicts(NamedTuple):
    """A judge's scores of the answers to some of the prompts."""

    prompts: np.ndarray
    scores: np.ndarray
    """(prompts, answers)"""
    seconds: float


def judged(args: argparse.Namespace, scorer: EndoRewardModel, groups: Groups, folder: Path) -> Iterator[Any]:
    """Yield (judge's name, Verdicts) on the first of the prompts in random order. A larger number adds prompts."""
    order = random.Random(args.seed).sample(range(len(groups)), len(groups))
    for name, count in {"verifier": args.judges, "pointwise": args.judges, "pairwise": args.pairwise}.items():
        if count:
            chosen = order[:count]
            found = list(record_judge(JUDGES[name](scorer), [groups[i] for i in chosen], folder / name, **OPTIONS))
            read = np.array(found)
            yield f"judge, {name}", Verdicts(np.array(chosen), read[:, :, 0], float(read[:, :, 1].sum()))


def costs(groups: Sequence[Sequence[Recorded]]) -> dict[str, Any]:
    """Return how much was read, and the processor's seconds for it (None if some part does not say)."""
    seconds = sum(one.seconds for group in groups for one in group)
    return {
        "prompts": len(groups),
        "answers": sum(map(len, groups)),
        "scored_tokens": int(lengths_of(groups).sum()),
        "processor_seconds": None if math.isnan(seconds) else round(seconds, 1),
    }


def percent(share: Accuracy) -> str:
    return f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def signed(found: Mapping[str, float]) -> str:
    return f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def dots(
    axis: Any, found: Mapping[str, Accuracy], *, names: bool, label: str, heading: str, chance: float = 50
) -> None:
    """Draw one interval for each method, the first on top."""
    for y, (name, share) in enumerate(reversed(found.items())):
        ours = name.startswith(("endogenous", "centred", "reward"))
        colour = output.OTHER if name.startswith("judge") or name == SHORTER else None
        colour = colour or (output.ENDOGENOUS if ours else output.IMITATION)
        axis.plot([100 * share.low, 100 * share.high], [y, y], color=colour, lw=2)
        axis.plot(100 * share.value, y, "o", color=colour, ms=5)
    axis.axvline(chance, color=output.GUIDE, ls="--", lw=1)
    axis.set_yticks(range(len(found)), list(reversed(found)) if names else [], fontsize=8)
    axis.set_xlabel(label)
    output.title(axis, heading)
