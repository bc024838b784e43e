"""What --signals asks for, and what it leaves out."""

from __future__ import annotations

from collections.abc import Iterable

from ...data.signal_columns import NEEDS, OF_TWO_MODELS, SIGNALS
from ...errors import EndoRewardError
from .values import ALL, names


def asked(text: str | None, *, reference: bool) -> tuple[str, ...]:
    """Return the signals that --signals names. "all" leaves out those of two models without a reference model."""
    wanted = names("--signals", text, SIGNALS)
    return wanted if reference or text != ALL else tuple(name for name in wanted if name not in OF_TWO_MODELS)


def refuse_one_model(text: str | None, *, where: str) -> None:
    """Raise EndoRewardError if --signals names a signal of two models. `where` says how to give the second."""
    for name in asked(text, reference=False):
        if name in OF_TWO_MODELS:
            raise EndoRewardError(f"--signals {name} compares two models: {where}")


def left_out(*, one_model: bool, unused: Iterable[str]) -> str | None:
    """Return why --signals all leaves out signals, or None. `unused` are those whose columns no row has."""
    said = []
    if one_model:
        said.append(f"{' and '.join(OF_TWO_MODELS)} are left out: they need a second model (--reference-model)")
    for columns in dict.fromkeys(NEEDS[name] for name in unused):
        mine = [name for name in unused if NEEDS[name] == columns]
        verb, need = ("is", "it needs") if len(mine) == 1 else ("are", "they need")
        plural = "columns" if len(columns) > 1 else "column"
        said.append(f"{', '.join(mine)} {verb} left out: {need} the {plural} {' and '.join(columns)}")
    return ".\n".join(said) or None
