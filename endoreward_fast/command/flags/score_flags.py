"""The flags of `endoreward score`: those of a run over rows, and the signals that are written beside the score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from .engine_flags import EngineFlags
from .options import Text
from .panels import of_scoring
from .signal_names import refuse_one_model


@dataclass(frozen=True)
class ScoreFlags(EngineFlags):
    """Further flags: what is written beside the score."""

    signals: Annotated[
        Text,
        of_scoring(
            help="Add `signals`, intrinsic rewards from the same forward pass: all, or some of those that `endoreward "
            "eval --help` lists."
        ),
    ] = None

    def check(self) -> None:
        super().check()
        refuse_one_model(self.signals, where="`endoreward eval` takes the second with --reference-model")

    def scoring(self) -> dict[str, Any]:
        return super().scoring() | ({"signals": self.signals} if self.signals else {})

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_json().items() if name != "signals" or value is not None}
