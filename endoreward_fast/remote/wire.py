"""What the server and its clients agree on: paths, and results as JSON.

JSON has no NaN. A number that is not finite travels as null and becomes NaN again.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..scoring.results import RowScore, TokenTable

REWARDS, MODEL, VOCABULARY = "/v1/rewards", "/v1/model", "/v1/vocabulary"
SERVERS_OWN = ("max_tokens_per_batch", "reference")
"""options of scoring that no request may set"""


def to_json(found: RowScore) -> dict[str, Any]:
    """Return a result as the server writes it: what is absent is left out."""
    answer: dict[str, Any] = {"score": _number(found.score), "num_tokens": found.num_tokens}
    answer["logprob"] = _number(found.logprob)
    if found.flags:
        answer["flags"] = list(found.flags)
    if found.error:
        answer["error"] = found.error
    if found.signals is not None:
        answer["signals"] = {name: _number(value) for name, value in found.signals.items()}
    if found.signal_errors:
        answer["signal_errors"] = dict(found.signal_errors)
    if found.tokens is not None:
        answer["token_rewards"] = {
            name: _numbers(column) for name, column in vars(found.tokens).items() if column is not None
        }
    return answer


def of_json(answer: Mapping[str, Any]) -> RowScore:
    """Return the result that `to_json` wrote."""
    table = answer.get("token_rewards")
    signals = answer.get("signals")
    return RowScore(
        answer["score"], answer["num_tokens"], answer["logprob"], tuple(answer.get("flags", ())), answer.get("error"),
        None if table is None else _table(table),
        None if signals is None else {name: math.nan if v is None else v for name, v in signals.items()},
        answer.get("signal_errors"),
    )  # fmt: skip


def _table(columns: Mapping[str, Sequence[Any]]) -> TokenTable:
    found: dict[str, Any] = {n: tuple(math.nan if v is None else v for v in column) for n, column in columns.items()}
    return TokenTable(**found)


def _numbers(column: Sequence[Any]) -> list[Any]:
    return [_number(value) if isinstance(value, float) else value for value in column]


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
