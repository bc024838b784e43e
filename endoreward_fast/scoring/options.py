"""How rows are encoded, batched and reduced: every option, its check, and what it means."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from ..errors import EndoRewardError
from ..signals import select
from ..text.encoding import Truncate
from ..text.messages import check_text
from ..text.template import Extras, as_date
from .arguments import refuse_unknown
from .scorer import Scorer

SWITCHES = ("append_eos", "per_token", "texts", "entropy")
"""fields of ScoreOptions that are on or off"""


@dataclass(frozen=True)
class ScoreOptions:
    """How rows are encoded, batched and reduced. Raises EndoRewardError, naming the option, for what cannot work."""

    alpha: float = 1.0
    """soft-RL temperature, > 0"""
    reduction: Literal["sum", "mean"] = "sum"
    """of token rewards to a score"""
    gamma: float = 1.0
    """discount per token, in (0, 1]"""
    floor: float = 0.0
    """the least weight that the discount leaves a token"""
    system: str | None = None
    """a system prompt; a row's own follows it"""
    chat: bool | None = None
    """None: the chat template where there is one; False: plain text; True: insist on it"""
    max_length: int | None = None
    """most tokens of prompt and completion; None: the model's limit (`EndoRewardModel.max_positions`). A model with a
    table of positions reads no more than the table has"""
    truncate: Truncate = None
    """beyond that: None, an error for the row; "prompt" or "completion", cut there (see `encode_row`)"""
    append_eos: bool = True
    """end completions of text with an end-of-sequence or end-of-turn token"""
    max_tokens_per_batch: int = 8192
    """padding included, and what is held of a prefix that rows share; a longer row runs alone. Where memory runs out it
    is halved, for the scorer's later calls too (`EndoRewardModel.room`)"""
    per_token: bool = False
    """fill RowScore.tokens"""
    texts: bool = True
    """and its texts, which take longer to find than everything else in it"""
    entropy: bool = False
    """and its entropies"""
    signals: str | Sequence[str] = ()
    """fill RowScore.signals with these of `signals.SIGNALS`, from the same pass: names, or "all" that can be had. Each
    has its own reduction; `reduction`, `gamma` and `floor` are the score's alone"""
    reference: Scorer | None = None
    """a second model with the same tokenizer, for signals that compare two: one more forward pass"""
    tools: Sequence[Any] | None = None
    """JSON schemas (or functions) of tools, for the chat template; a row's own `tools` come in their place"""
    documents: Sequence[Mapping[str, str]] | None = None
    """documents for the chat template, likewise"""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """further variables of the chat template, such as enable_thinking; a row's own come before them"""
    date: str | None = None
    """ "YYYY-MM-DD": the day that a chat template is told which writes one; None: today"""

    @property
    def extras(self) -> Extras:
        """What every row gives its chat template. EndoRewardError: it is no tools, documents or arguments."""
        names = ("tools", "documents", "chat_template_kwargs")
        return Extras.of({name: getattr(self, name) for name in names}, Extras())

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "ScoreOptions":
        """From keyword arguments (`arguments.ScoreKwargs`). EndoRewardError names one that is no option."""
        refuse_unknown(given, cls.__dataclass_fields__)
        return cls(**given)

    def __post_init__(self) -> None:
        _ = self.extras, self.date is None or as_date(self.date)  # what is wrong with them is said before any row
        if isinstance(self.system, str):
            check_text(self.system, "system")
        object.__setattr__(self, "signals", select(self.signals, reference=self.reference is not None))
        for name, fine, wanted in (
            ("alpha", isinstance(self.alpha, Real) and 0 < self.alpha < math.inf, "a number above 0"),
            ("reduction", self.reduction in ("sum", "mean"), "'sum' or 'mean'"),
            ("gamma", isinstance(self.gamma, Real) and 0 < self.gamma <= 1, "a number above 0, at most 1"),
            ("floor", isinstance(self.floor, Real) and 0 <= self.floor < math.inf, "a number, 0 or more"),
            ("system", isinstance(self.system, str | None), "text, or None"),
            ("chat", self.chat in (None, True, False), "True, False or None"),
            ("truncate", self.truncate in (None, "prompt", "completion"), "None, 'prompt' or 'completion'"),
            ("max_length", self.max_length is None or _is_count(self.max_length), "a whole number, 1 or more, or None"),
            ("max_tokens_per_batch", _is_count(self.max_tokens_per_batch), "a whole number, 1 or more"),
            ("reference", self.reference is None or hasattr(self.reference, "rewards_of_padded"), "an EndoRewardModel"),
            *((name, getattr(self, name) in (True, False), "True or False") for name in SWITCHES),
        ):
            if not fine:
                raise EndoRewardError(f"{name}={getattr(self, name)!r}: expected {wanted}")


def _is_count(x: Any) -> bool:
    return isinstance(x, Integral) and int(x) >= 1
