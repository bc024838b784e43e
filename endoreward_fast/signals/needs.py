"""What a signal needs besides the statistics of its row, and who gives it: the call, or each row."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .tokens import TokenStats

Given = Tensor | TokenStats
"""one input of a signal"""


@dataclass(frozen=True)
class Need:
    """One input of signals. `Signal.score` takes it under its name in NEEDS."""

    tensor: str
    """what `Signal.score` takes"""
    lacking: str
    """the end of the error of a call or row that lacks it"""
    of_row: bool = True
    """whether each row gives it; otherwise the call does"""
    kind: type = torch.Tensor
    dtype: torch.dtype | None = None
    """of a tensor; None: any floating-point dtype"""
    tokens: Callable[[TokenStats, Any], Tensor] = lambda stats, given: stats.mask
    """(statistics, this input) -> the tokens that the score is made of, bool"""

    def check(self, name: str, given: object, stats: TokenStats) -> None:
        """Raise ValueError if `given` is no such input for these statistics."""
        if not isinstance(given, self.kind):
            raise ValueError(f"{name} is {type(given).__name__}: expected {self.tensor}")
        if isinstance(given, TokenStats):
            if given.mask.ndim != 2 or len(given.mask) != len(stats.mask):
                raise ValueError(f"{name} {tuple(given.mask.shape)}: expected {len(stats.mask)} rows, one per row")
        elif isinstance(given, Tensor):
            self._check_tensor(name, given, stats.mask)

    def _check_tensor(self, name: str, given: Tensor, mask: Tensor) -> None:
        fits = given.is_floating_point() if self.dtype is None else given.dtype == self.dtype
        if given.shape != mask.shape or not fits or given.device != mask.device:
            raise ValueError(
                f"{name} is {tuple(given.shape)} {given.dtype} on {given.device}: expected {self.tensor}, with (B, T) "
                f"{tuple(mask.shape)} on {mask.device}"
            )
        if self.dtype == torch.bool and not given.is_cuda and bool((given & ~mask).any()):
            row = int((given & ~mask).any(1).nonzero()[0])
            raise ValueError(f"{name}, row {row}: the span is not in the completion: mark scored tokens only")


ANSWER = "the row's `answer_span`: the final answer's text in the completion, or [start, stop]"
REFERENCE_ANSWER = f"the row's `reference_answer`, and {ANSWER}"

NEEDS = MappingProxyType(
    {
        "reference": Need(
            "the second model's log-probabilities (B, T)", "compares two models: give a reference model", of_row=False
        ),
        "answer_span": Need(
            "the tokens of the final answer, bool (B, T)", f"needs {ANSWER}", dtype=torch.bool,
            tokens=lambda stats, span: stats.mask & span,
        ),
        "reference_answer": Need(
            "TokenStats of prompt, thought and reference answer", f"needs {REFERENCE_ANSWER}", kind=TokenStats,
            tokens=lambda stats, other: other.mask,
        ),
        "direct_answer": Need(
            "TokenStats of prompt and reference answer", f"needs {REFERENCE_ANSWER}", kind=TokenStats,
            tokens=lambda stats, other: other.mask,
        ),
        "privileged": Need(
            "the log-probabilities (B, T) behind the prompt with the privileged context",
            "needs the row's `privileged`: text or messages that are added to the prompt",
        ),
    }
)  # fmt: skip
"""every input by name"""
