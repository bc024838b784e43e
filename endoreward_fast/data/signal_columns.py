"""The signals by name, and the columns that they need: what each sample of a row gets of them.

| column             | each sample gets                                                                 |
| `answer_span`      | the text of its final answer, or [start, stop] in characters (tokens, with ids)  |
| `reference_answer` | the reference answer                                                             |
| `privileged`       | the privileged context of the prompt                                             |

A column may have the shape of the scores: a list for several completions, {"chosen": ..., "rejected": ...} for a pair.
Any other value belongs to every sample. Values are checked where a signal needs them (text/readings.py), because other
data has such columns too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .records import is_number

# The names and needs repeat `signals.SIGNALS` (a test compares them): importing that would make --help wait for torch.
REFERENCE = "reference"
"""the need that the call meets, with a second model"""
_ANSWERED = ("answer_span", "reference_answer")
SIGNALS = (
    *("endogenous", "centred", "discounted-reward", "logprob", "discounted-logprob", "mean-logprob", "entropy"),
    *("self-certainty", "probability", "log-ratio", "prefix-value", "answer-logprob", "answer-probability"),
    *("reference-logprob", "reference-probability", "reference-gain", "privileged-log-ratio"),
)
NEEDS = {
    **dict.fromkeys(("log-ratio", "prefix-value"), (REFERENCE,)),
    **dict.fromkeys(("answer-logprob", "answer-probability"), ("answer_span",)),
    **dict.fromkeys(("reference-logprob", "reference-probability", "reference-gain"), _ANSWERED),
    "privileged-log-ratio": ("privileged",),
}
"""{signal: a second model, or the columns of a row that it needs}"""
OF_TWO_MODELS = tuple(name for name in SIGNALS if REFERENCE in NEEDS.get(name, ()))
OF_ROWS = tuple(name for name in NEEDS if name not in OF_TWO_MODELS)

OF_SIGNALS = ("answer_span", "reference_answer", "privileged")


def of_signals(row: Mapping[str, Any], layout: Any, samples: int) -> list[dict[str, Any]]:
    """Return the columns of signals for each sample. `layout` has positions of samples in the shape of the scores."""
    found: list[dict[str, Any]] = [{} for _ in range(samples)]
    for name in OF_SIGNALS:
        if row.get(name) not in (None, ""):  # "" is an empty cell of a CSV file
            _place(found, name, layout, row[name])
    return found


def _place(found: list[dict[str, Any]], name: str, layout: Any, value: Any) -> None:
    if isinstance(layout, dict):
        alike = isinstance(value, Mapping) and value.keys() == layout.keys()
        for side, part in layout.items():
            _place(found, name, part, value[side] if alike else value)
    elif isinstance(layout, list):
        whole = _messages(value) or (name == "answer_span" and _one_span(value)) if isinstance(value, list) else True
        alike = not whole and len(value) == len(layout)
        for i, part in enumerate(layout):
            _place(found, name, part, value[i] if alike else value)
    else:
        found[layout][name] = str(value) if is_number(value) else value  # JSON files have numeric answers


def _one_span(value: list[Any]) -> bool:
    return len(value) == 2 and all(type(end) is int for end in value)


def _messages(value: list[Any]) -> bool:
    return all(isinstance(one, Mapping) for one in value)
