"""The options of scoring: what each means, and which values it takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from ..errors import EndoRewardError
from ..signals import ALL, NEEDS, SIGNALS, names_in, select
from ..text.encoding import Truncate
from ..text.messages import check_text
from ..text.template import Extras, as_date
from .arguments import refuse_unknown
from .scorer import Scorer

LARGEST = 3.4e38
"""the largest number that float32 holds, rounded down"""
SWITCHES = ("append_eos", "per_token", "texts", "entropy")
"""fields of ScoreOptions that are True or False"""


@dataclass(frozen=True)
class ScoreOptions:
    """How rows are encoded, batched and reduced. Raises EndoRewardError for a wrong value, and names the option."""

    alpha: float = 1.0
    """soft-RL temperature, > 0"""
    reduction: Literal["sum", "mean"] = "sum"
    """how token rewards become a score"""
    gamma: float = 1.0
    """discount per token, in (0, 1]"""
    floor: float = 0.0
    """lower bound of a token's weight gamma^(h - 1)"""
    system: str | None = None
    """a system prompt; it comes before the row's own"""
    chat: bool | None = None
    """None: use the chat template if there is one; False: plain text; True: require the template"""
    max_length: int | None = None
    """most tokens of prompt and completion; None: the model's limit (`EndoRewardModel.max_positions`). If the model has
    a table of positions, the size of the table is always a limit"""
    truncate: Truncate = None
    """a longer row: None makes it an error; "prompt" or "completion" is cut (see `encode_row`)"""
    append_eos: bool = True
    """end completions of text with an end-of-sequence or end-of-turn token"""
    max_tokens_per_batch: int | None = None
    """including padding, and the states that are held of shared prefixes; a longer row runs alone. None: 8192 tokens,
    of which a CPU computes 2048 at a time, because larger passes are slower there. It is halved if memory runs out,
    also for later calls (`EndoRewardModel.room`)"""
    per_token: bool = False
    """fill RowScore.tokens"""
    texts: bool = True
    """fill RowScore.tokens.texts, which takes longer than all its other fields"""
    entropy: bool = False
    """fill RowScore.tokens.entropies"""
    signals: str | Sequence[str] = ()
    """fill RowScore.signals, in the same pass, with these of `signals.SIGNALS`: names, or "all". "all" stands for those
    whose needs are met: by `reference`, and by the keys of each row. A row that lacks what a named signal needs gets an
    entry in RowScore.signal_errors. `reduction`, `gamma` and `floor` do not apply to signals"""
    reference: Scorer | None = None
    """a second model with the same tokenizer, for signals that compare two models; it costs one more forward pass"""
    tools: Sequence[Any] | None = None
    """JSON schemas (or functions) of tools, for the chat template; a row's own `tools` replace them"""
    documents: Sequence[Mapping[str, str]] | None = None
    """documents for the chat template; a row's own `documents` replace them"""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """further variables of the chat template, such as enable_thinking; a row's own values take precedence"""
    date: str | None = None
    """the date that a chat template writes, as "YYYY-MM-DD"; None: today"""

    @property
    def named(self) -> frozenset[str]:
        """The signals that were asked for by name. "all" is no name."""
        found: frozenset[str] = self.__dict__["_named"]
        return found

    @property
    def row_needs(self) -> dict[str, bool]:
        """The needs of these signals that rows meet: {name in NEEDS: whether a named signal has it}."""
        found: dict[str, bool] = {}
        for signal in self.signals:
            for need in SIGNALS[signal].needs:
                if NEEDS[need].of_row:
                    found[need] = found.get(need, False) or signal in self.named
        return found

    @property
    def extras(self) -> Extras:
        """The tools, documents and arguments for the chat template. Raises EndoRewardError if their types are wrong."""
        names = ("tools", "documents", "chat_template_kwargs")
        return Extras.of({name: getattr(self, name) for name in names}, Extras())

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "ScoreOptions":
        """Create from keyword arguments (`arguments.ScoreKwargs`). Raises EndoRewardError for an unknown option."""
        refuse_unknown(given, cls.__dataclass_fields__)
        return cls(**given)

    def __post_init__(self) -> None:
        _ = self.extras, self.date is None or as_date(self.date)  # raises before any row is read
        if isinstance(self.system, str):
            check_text(self.system, "system")
        given = () if self.reference is None else ("reference",)
        object.__setattr__(self, "_named", frozenset(names_in(self.signals)) - {ALL})
        object.__setattr__(self, "signals", select(self.signals, given=given))
        for name, fine, wanted in (
            ("alpha", isinstance(self.alpha, Real) and 0 < self.alpha <= LARGEST, "a number above 0"),
            ("reduction", self.reduction in ("sum", "mean"), "'sum' or 'mean'"),
            ("gamma", isinstance(self.gamma, Real) and 0 < self.gamma <= 1, "a number above 0, at most 1"),
            ("floor", isinstance(self.floor, Real) and 0 <= self.floor <= LARGEST, "a number, 0 or more"),
            ("system", isinstance(self.system, str | None), "text, or None"),
            ("chat", self.chat in (None, True, False), "True, False or None"),
            ("truncate", self.truncate in (None, "prompt", "completion"), "None, 'prompt' or 'completion'"),
            ("max_length", self.max_length is None or _is_count(self.max_length), "a whole number, 1 or more, or None"),
            (
                "max_tokens_per_batch",
                self.max_tokens_per_batch is None or _is_count(self.max_tokens_per_batch),
                "a whole number, 1 or more, or None",
            ),
            ("reference", self.reference is None or hasattr(self.reference, "rewards_of_padded"), "an EndoRewardModel"),
            *((name, getattr(self, name) in (True, False), "True or False") for name in SWITCHES),
        ):
            if not fine:
                raise EndoRewardError(f"{name}={getattr(self, name)!r}: expected {wanted}")
        for name in ("alpha", "gamma", "floor"):  # torch takes no integer above 64 bits
            object.__setattr__(self, name, float(getattr(self, name)))


def _is_count(x: Any) -> bool:
    return isinstance(x, Integral) and int(x) >= 1
