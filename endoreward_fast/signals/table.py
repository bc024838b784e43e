"""`SIGNALS`: every intrinsic reward by name, and what each needs."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from ..errors import EndoRewardError
from ..returns import sequence_score
from . import tokens as of
from .needs import NEEDS, Given
from .tokens import TokenStats

ALL = "all"


@dataclass(frozen=True)
class Signal:
    """One intrinsic reward, as the documentation and the command line list it.

    `dataclasses.replace` makes one with another discount. Raises EndoRewardError for gamma outside (0, 1] and for a
    negative floor.
    """

    name: str
    method: str
    formula: str
    """of the score"""
    source: str
    per_token: Callable[..., Tensor]
    """(TokenStats, *what it `needs`) -> (B, T); for a reference answer (B, A), its tokens"""
    reduction: Literal["sum", "mean", "last"]
    """of tokens to a score, as in the source"""
    needs: tuple[str, ...] = ()
    """names in NEEDS"""
    gamma: float = 1.0
    """discount per token, in (0, 1]"""
    floor: float = 0.0
    """lower bound of a token's weight gamma^(h - 1)"""
    bounds: tuple[float, float] | None = None
    """limits to which the score is clipped"""

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise EndoRewardError(f"signal {self.name!r}: gamma={self.gamma}: expected a number above 0, at most 1")
        if not 0 <= self.floor < torch.inf:
            raise EndoRewardError(f"signal {self.name!r}: floor={self.floor}: expected a number, 0 or more")

    @property
    def needs_reference(self) -> bool:
        """Whether it compares the model with a second one."""
        return "reference" in self.needs

    def score(self, stats: TokenStats, reference: Tensor | None = None, **given: Given | None) -> Tensor:
        """Return the score of each row, float32 (B,); larger is better.

        A row without a scored token scores 0. A row with a token of -inf scores -inf.

        reference  (B, T) log-probability of each token under the second model, for signals that need it
        given      other inputs by their names in NEEDS. A signal ignores those that it does not need

        Raises EndoRewardError if an input is missing, and ValueError if one has the wrong type, shape or dtype, or if a
        span marks tokens that are not scored (on the CPU; on a GPU, where a check would stall the stream, they do not
        count).
        """
        unknown = next((name for name in given if name not in NEEDS), None)
        if unknown is not None:
            raise EndoRewardError(f"no input {unknown!r} of signals: expected one of {', '.join(NEEDS)}")
        inputs: list[Given] = []
        mask = stats.mask
        for name in self.needs:
            value = reference if name == "reference" else given.get(name)
            if value is None:
                raise EndoRewardError(f"signal {self.name!r} needs `{name}`, {NEEDS[name].tensor}")
            NEEDS[name].check(name, value, stats)
            # The first input says which tokens count. Others, such as the answer without the thought, are baselines.
            mask = mask if inputs else NEEDS[name].tokens(stats, value)
            inputs.append(value)
        tokens = self.per_token(stats, *inputs)
        if self.reduction == "last":
            mask = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
        reduction: Literal["sum", "mean"] = "mean" if self.reduction == "mean" else "sum"
        score = sequence_score(tokens, mask, reduction=reduction, gamma=self.gamma, floor=self.floor)
        # Next to a token of +inf, the sum would be NaN.
        score = torch.where((tokens == -torch.inf).any(1), -torch.inf, score)
        return score if self.bounds is None else score.clamp(*self.bounds)


SIGNALS = MappingProxyType(
    {
        signal.name: signal
        for signal in (
            Signal(
                "endogenous", "Endogenous reward", "sum Q(s, a) - V(s')", "EndoRM, 2506.23235", of.endogenous_reward,
                "sum",
            ),
            Signal(
                "centred", "Centred endogenous reward", "sum Q(s, a) - mean(s) - (V(s') - mean(s'))",
                "EndoRM, with mean-free logits", of.centred_reward, "sum",
            ),
            Signal(
                "discounted-reward", "Discounted endogenous reward", "sum_h 0.93^(h - 1) (Q(s, a) - V(s'))",
                "EndoRM, 2506.23235, with the discount of RMGAP, 2605.01831", of.endogenous_reward, "sum", gamma=0.93,
            ),
            Signal("logprob", "Log-probability of the answer", "sum log pi(a|s)", "likelihood", of.logprob, "sum"),
            Signal(
                "discounted-logprob", "Discounted log-probability", "sum_h max(0.93^(h - 1), 0) log pi(a|s)",
                "RMGAP, 2605.01831: the EndoRM of its public code", of.logprob, "sum", gamma=0.93,
            ),
            Signal("mean-logprob", "Log-probability of a token", "mean log pi(a|s)", "perplexity", of.logprob, "mean"),
            Signal("entropy", "Negative entropy", "mean -H(pi(.|s))", "RENT, 2505.22660", of.negative_entropy, "mean"),
            Signal(
                "self-certainty", "Self-certainty", "mean KL(uniform || pi) = mean lse - mean(s) / alpha - ln V",
                "Intuitor, 2505.19590", of.self_certainty, "mean",
            ),
            Signal(
                "probability", "Probability of a token", "mean pi(a|s)", "the mean of RLPR, of the model's own answer",
                of.token_probability, "mean",
            ),
            Signal(
                "log-ratio", "Log-ratio of two models", "sum beta (log pi(a|s) - log pi_ref(a|s))",
                "DPO, 2305.18290; implicit PRM, 2412.01981; PRIME, 2502.01456; of two checkpoints, 2510.02493",
                of.log_ratio, "sum", ("reference",),
            ),
            Signal(
                "prefix-value", "Value of the whole prefix", "V_T / T, V_t = sum_{i <= t} beta log(pi / pi_ref)",
                "IPVRM, 2604.13197; progress advantage, 2606.26080", of.prefix_value, "last", ("reference",),
            ),
            Signal(
                "answer-logprob", "Log-probability of the final answer", "sum over the answer span of log pi(a|s)",
                "CRew-DPO, 2510.13501", of.answer_logprob, "sum", ("answer_span",),
            ),
            Signal(
                "answer-probability", "Confidence in the final answer", "mean over the answer span of pi(a|s)",
                "CRew, 2510.13501", of.answer_probability, "mean", ("answer_span",),
            ),
            Signal(
                "reference-logprob", "Log-probability of a reference answer", "sum log pi(a*|x, thought)",
                "2602.03979; VeriFree, 2505.21493, rewards by its exp, which underflows and ranks alike",
                of.reference_logprob, "sum", ("reference_answer",),
            ),
            Signal(
                "reference-probability", "Probability of a reference answer", "mean pi(a*|x, thought)",
                "RLPR, 2506.18254", of.reference_probability, "mean", ("reference_answer",),
            ),
            Signal(
                "reference-gain", "Gain of a reference answer by the thought",
                "mean pi(a*|x, thought) - mean pi(a*|x), clipped to [0, 1]", "RLPR, 2506.18254, debiased",
                of.reference_gain, "mean", ("reference_answer", "direct_answer"), bounds=(0.0, 1.0),
            ),
            Signal(
                "privileged-log-ratio", "Log-ratio under privileged context",
                "sum log pi(a|s, privileged) - log pi(a|s)", "SDPO, 2601.20802", of.privileged_log_ratio, "sum",
                ("privileged",),
            ),
        )
    }
)  # fmt: skip


def names_in(wanted: str | Iterable[str]) -> list[str]:
    """Return the names in a comma-separated string or in several names, "all" among them.

    Raises EndoRewardError for an unknown name, and lists the known ones.
    """
    if not isinstance(wanted, Iterable):
        raise EndoRewardError(f"signals={wanted!r}: expected all, or some of {', '.join(SIGNALS)}")
    names = [n.strip() for n in wanted.split(",")] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if not isinstance(name, str) or (name != ALL and name not in SIGNALS):
            raise EndoRewardError(f"unknown signal {name!r}: expected all, or some of {', '.join(SIGNALS)}")
    return names


def select(wanted: str | Iterable[str], *, given: Collection[str] = ()) -> tuple[str, ...]:
    """Return names of signals from a comma-separated string or from several names.

    given   needs that the call meets, names in NEEDS. Needs of rows count as met: each row decides

    "all" stands for every signal whose needs are met.
    Raises EndoRewardError for an unknown name, and for a signal whose needs the call cannot meet.
    """
    lacking = {
        name: next((need for need in signal.needs if not NEEDS[need].of_row and need not in given), None)
        for name, signal in SIGNALS.items()
    }
    found: list[str] = []
    for name in names_in(wanted):
        need = None if name == ALL else lacking[name]
        if need is not None:
            raise EndoRewardError(f"signal {name!r} {NEEDS[need].lacking}")
        found += [name] if name != ALL else [n for n in SIGNALS if lacking[n] is None]
    return tuple(dict.fromkeys(found))
