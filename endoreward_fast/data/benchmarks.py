"""Recognise the rows of benchmarks by their columns, for `endoreward eval` and `plot`.

| benchmark     | columns it is taken for       | columns it needs                                               |
| RewardBench   | chosen_model, rejected_model  | prompt, chosen, rejected                                       |
| RM-Bench      | three chosen or rejected      | prompt, chosen, rejected                                       |
| RewardBench 2 | num_correct                   | prompt, chosen and rejected (lists), num_correct               |
| JudgeBench    | response_A, response_B        | question, response_A, response_B, label ("A>B" or "B>A")       |
| RMGAP         | prompt_groups                 | domain, responses (key, text), prompt_groups (winner, prompts) |
| ProcessBench  | steps                         | problem, steps, label (index of the first wrong step, or -1)   |

Formats are those of the published files: allenai/reward-bench-2 (arXiv 2506.01937), github.com/ScalerLab/JudgeBench
(arXiv 2410.12784), github.com/nanzhi84/RMGAP (arXiv 2605.01831) and github.com/QwenLM/ProcessBench (arXiv 2412.06559).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..errors import EndoRewardError
from .columns import MissingColumns, Task, as_text, completed, plan
from .csv_rows import value_in
from .records import is_messages, kind_of, record

REWARD_BENCH_2, JUDGE_BENCH, RMGAP, PROCESS_BENCH = "RewardBench 2", "JudgeBench", "RMGAP", "ProcessBench"
RMGAP_DOMAINS = ("Chat", "Writing", "Reasoning", "Safety")
RM_BENCH_STARTS = ("chat", "code", "math", "safety")
"""how domain or id of a row of RM-Bench begins"""
RMGAP_RESPONSES, RMGAP_GROUPS, RMGAP_PROMPTS = 4, 4, 3
RESPONSES = ("response_A", "response_B")
LABELS = {"A>B": RESPONSES, "B>A": RESPONSES[::-1]}
"""JudgeBench's labels: (the better response, the worse one)"""
SEPARATOR = "\n\n"
"""between two steps: ProcessBench split its solutions at double line breaks (its section 3.2)"""
PAIR = ("chosen", "rejected")

Row = Mapping[str, Any]


class Benchmark(NamedTuple):
    """A benchmark whose rows are not plain preferences."""

    name: str
    marks: tuple[str, ...]
    """columns that no other kind of row has"""
    needs: tuple[str, ...]
    plan: Callable[[Row], Task]
    signals: bool = True
    """whether signals of the completions count"""


def plan_eval(row: Row) -> Task:
    """Return what `eval` scores in `row`: a preference, or a row of a benchmark.

    Raises MissingColumns if a column is missing, and EndoRewardError if the columns fit two benchmarks or their
    contents cannot be scored.
    """
    row = _with_lists(row)
    marked = [b for b in BENCHMARKS if any(mark in row for mark in b.marks)]
    complete = [b.name for b in marked if not _missing(row, b.needs)]
    if "num_correct" in row and any(_listed(row, side) for side in PAIR):
        return _reward_bench_2(row)
    if all(side in row for side in PAIR):
        complete.append("a preference")
    if len(complete) > 1:
        raise EndoRewardError(f"the columns fit {' and '.join(complete)}: remove those of one of them")
    if complete == ["a preference"] or not marked:
        return _preference(row)
    if not complete:
        nearest = min(len(_missing(row, b.needs)) for b in marked)
        closest = [b for b in marked if len(_missing(row, b.needs)) == nearest]
        raise MissingColumns("; or ".join(_lacks(row, b.name, _first(row, b.marks), b.needs) for b in closest))
    [found] = [b for b in marked if b.name == complete[0]]
    try:
        return completed(found.plan(row), row, signals=found.signals)
    except EndoRewardError as error:
        raise EndoRewardError(f"taken for {found.name}: {error}") from error


def plan_plot(row: Row) -> Task:
    """Return what `plot` scores in `row`: what `score` does, or else a row of a benchmark."""
    row = _with_lists(row)
    try:
        return plan(row, "score")
    except MissingColumns:
        if not any(mark in row for b in BENCHMARKS for mark in b.marks):
            raise
        return plan_eval(row)


def _with_lists(row: Row) -> Row:
    """Return the row with the lists that a CSV file holds as text. Where a completion may be text, text stays."""
    read = {name: value_in(row[name]) for name in ("steps", "prompt_groups") if isinstance(row.get(name), str)}
    if all(isinstance(row.get(side), str) and row[side].lstrip()[:1] == "[" for side in PAIR):
        sides = {side: value_in(row[side]) for side in PAIR}
        bad = next((side for side in PAIR if not isinstance(sides[side], list)), None)
        if "num_correct" in row and bad:
            raise EndoRewardError(
                f"taken for {REWARD_BENCH_2}: {bad} looks like a list, but is neither JSON nor a Python literal"
            )
        named = any(str(row.get(name)).startswith(RM_BENCH_STARTS) for name in ("domain", "id"))
        three = all(isinstance(s, list) and len(s) == 3 and all(isinstance(t, str) for t in s) for s in sides.values())
        read |= sides if "num_correct" in row or (named and three) else {}
    if not read:
        return row
    found = {**row, **{name: value for name, value in read.items() if value is not None}}
    if error := record("", found).error:
        raise EndoRewardError(error)
    return found


def _missing(row: Row, needs: tuple[str, ...]) -> list[str]:
    return [name for name in needs if name not in row and not (name == "prompt" and "question" in row)]


def _lacks(row: Row, name: str, mark: str, needs: tuple[str, ...]) -> str:
    missing = _missing(row, needs)
    columns = f"column{'s' * (len(missing) > 1)} {', '.join(missing)}"
    return f"taken for {name} because of its column {mark}, but it has no {columns}: {name} needs {', '.join(needs)}"


def _first(row: Row, names: tuple[str, ...]) -> str:
    return next(name for name in names if name in row)


# ------------------------------------------------------------------------------------------------------- preferences


def _preference(row: Row) -> Task:
    needs = ("prompt", *PAIR)
    lists = [side for side in PAIR if _listed(row, side)]
    if any(len(row[side]) == 3 for side in lists) and _missing(row, needs):
        raise MissingColumns(_lacks(row, "RM-Bench", f"{lists[0]} with {len(row[lists[0]])} completions", needs))
    models = tuple(f"{side}_model" for side in PAIR)
    if any(name in row for name in models) and any(side not in row for side in PAIR):
        raise MissingColumns(_lacks(row, "RewardBench", _first(row, models), needs))
    return plan(row, "eval")


def _listed(row: Row, side: str) -> bool:
    """Return whether `side` is a list of completions, as opposed to a text or one list of messages."""
    return isinstance(row.get(side), list) and not is_messages(row[side])


def _reward_bench_2(row: Row) -> Task:
    needs = ("prompt", *PAIR, "num_correct")
    if _missing(row, needs):
        raise MissingColumns(_lacks(row, REWARD_BENCH_2, "num_correct", needs))
    task = plan(row, "eval")
    counts = [len(part) if isinstance(part := task.layout[side], list) else 1 for side in PAIR]
    named = {"num_correct": counts[0], "num_incorrect": counts[1], "total_completions": sum(counts)}
    for name, count in named.items():
        if row.get(name) is None and name != "num_correct":
            continue
        if (said := _whole(row[name])) != count:
            whose = {"num_correct": "chosen has", "num_incorrect": "rejected has"}.get(name, "chosen and rejected have")
            found = kind_of(row[name]) if said is None else _short(said)
            raise EndoRewardError(f"taken for {REWARD_BENCH_2}: {name} is {found}, but {whose} {count}")
    return replace(task, benchmark=REWARD_BENCH_2)


def _short(value: Any) -> str:
    """Return `value` as written in Python, cut to fit a message: a shifted column may hold a whole response."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _text(value: Any, name: str) -> str:
    return as_text(value, name, "text")


def _whole(value: Any) -> int | None:
    """Return a whole number that may be written as text (CSV) or with a decimal point (a table with gaps), or None."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+(\.0*)?\s*", value):
        return int(value.partition(".")[0])
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1:
        return int(value)
    return None


# -------------------------------------------------------------------------------------------------------- JudgeBench


def _judge_bench(row: Row) -> Task:
    label = row["label"]
    if not isinstance(label, str) or label not in LABELS:
        found = _short(label) if isinstance(label, str) else kind_of(label)
        raise EndoRewardError(f'label: wanted "A>B" or "B>A", found {found}')
    question = _text(row["question"], "question")
    samples = tuple({"prompt": question, "completion": _text(row[name], name)} for name in LABELS[label])
    facts = {"subset": row.get("source"), "id": row.get("pair_id"), "place": int(label == "B>A")}
    return Task(samples, {"chosen": 0, "rejected": 1}, benchmark=JUDGE_BENCH, facts=facts)


# ------------------------------------------------------------------------------------------------------------- RMGAP


def _rmgap(row: Row) -> Task:
    if row["domain"] not in RMGAP_DOMAINS:
        raise EndoRewardError(f"domain: wanted one of {', '.join(RMGAP_DOMAINS)}, found {_short(row['domain'])}")
    texts: dict[str, str] = {}
    for i, response in enumerate(_entries(row["responses"], "responses", RMGAP_RESPONSES, ("key", "text"))):
        if (key := str(response["key"])) in texts:
            raise EndoRewardError(f"responses[{i}].key: {_short(key)} occurs twice")
        texts[key] = _text(response["text"], f"responses[{i}].text")
        if not texts[key].strip():
            raise EndoRewardError(f"responses[{i}].text is empty")
    keys = sorted(texts)
    samples: list[dict[str, Any]] = []
    layout: list[dict[str, Any]] = []
    prompts: list[dict[str, Any]] = []
    names: list[Any] = []
    for g, group in enumerate(_entries(row["prompt_groups"], "prompt_groups", RMGAP_GROUPS, ("winner", "prompts"))):
        where, winner = f"prompt_groups[{g}]", str(group["winner"])
        names.append(g if group.get("group") is None else group["group"])
        if names[-1] in names[:g]:
            raise EndoRewardError(f"{where}.group: {_short(names[-1])} occurs twice")
        if winner not in texts:
            raise EndoRewardError(
                f"{where}.winner: {_short(winner)} is no key of responses ({', '.join(map(_short, keys))})"
            )
        for p, prompt in enumerate(_entries(group["prompts"], f"{where}.prompts", RMGAP_PROMPTS, ("text",))):
            text, at = _text(prompt["text"], f"{where}.prompts[{p}].text"), len(samples)
            samples += ({"prompt": text, "completion": texts[key], "group": len(prompts)} for key in keys)
            best = at + keys.index(winner)
            layout.append({"chosen": best, "rejected": [i for i in range(at, len(samples)) if i != best]})
            prompts.append({"at": g, "group": names[g], "prompt": p + 1, "place": best - at})
    return Task(tuple(samples), layout, benchmark=RMGAP, facts={"subset": row["domain"], "prompts": prompts})


def _entries(value: Any, name: str, count: int, needs: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return `value`, checked: a list of `count` objects with the fields `needs`."""
    if not isinstance(value, list):
        raise EndoRewardError(f"{name}: wanted an array of {count} objects, found {kind_of(value)}")
    if len(value) != count:
        raise EndoRewardError(f"{name}: wanted {count} entries, found {len(value)}")
    for i, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise EndoRewardError(f"{name}[{i}]: wanted an object, found {kind_of(entry)}")
        if lacking := [field for field in needs if field not in entry]:
            raise EndoRewardError(f"{name}[{i}] has no {lacking[0]}")
    return value


# ------------------------------------------------------------------------------------------------------ ProcessBench


def _process_bench(row: Row) -> Task:
    steps = row["steps"]
    if not isinstance(steps, list) or not steps:
        raise EndoRewardError(f"steps: wanted an array of texts, found {kind_of(steps)}")
    steps = [_text(step, f"steps[{i}]") for i, step in enumerate(steps)]
    if (empty := next((i for i, step in enumerate(steps) if not step.strip()), None)) is not None:
        raise EndoRewardError(f"steps[{empty}] is empty: a step without a token has no reward")
    label = _whole(row["label"])
    if label is None or not -1 <= label < len(steps):
        found = kind_of(row["label"]) if label is None else _short(label)
        raise EndoRewardError(f"label: wanted -1 (no wrong step) or 0 to {len(steps) - 1} (steps), found {found}")
    sample = {"prompt": _text(row["problem"], "problem"), "completion": SEPARATOR.join(steps)}
    return Task((sample,), 0, benchmark=PROCESS_BENCH, facts={"label": label, "steps": steps, "id": row.get("id")})


BENCHMARKS = (
    Benchmark(JUDGE_BENCH, RESPONSES, ("question", *RESPONSES, "label"), _judge_bench),
    Benchmark(RMGAP, ("prompt_groups",), ("domain", "responses", "prompt_groups"), _rmgap),
    Benchmark(PROCESS_BENCH, ("steps",), ("problem", "steps", "label"), _process_bench, signals=False),
)
