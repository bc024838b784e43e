"""Score rows once and keep what every table needs: signals, and each token's reward, logprob, value and entropy.

A run of hours is kept in parts of a few prompts, and goes on behind the last part if it was stopped. A part is used
again only if it holds the same rows, read by the same model (or judge) with the same options.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from endoreward_fast import EndoRewardModel
from endoreward_fast.rivals.judges import Judge

FIELDS = ("rewards", "logprobs", "values", "entropies")

Groups = Sequence[Sequence[dict[str, Any]]]
"""for each prompt, the rows of its answers"""


class Recorded(NamedTuple):
    """What was read of one completion. Arrays are float32 (T,), one entry for each scored token."""

    rewards: np.ndarray
    logprobs: np.ndarray
    values: np.ndarray
    entropies: np.ndarray
    signals: dict[str, float]
    seconds: float
    """of the processor, this row's share of its part; NaN if the part does not say"""


def record(
    scorer: EndoRewardModel, groups: Groups, folder: Path, *, size: int = 16, **options: Any
) -> Iterator[list[Recorded]]:
    """Yield, for each group of rows, what was read of each row. Parts of `size` groups are kept in `folder`."""
    for path, part, rows in _parts(groups, folder, size):
        told = json.dumps(_settings(scorer, rows, options), sort_keys=True)
        found = _kept(path, told)
        if found is None:
            found = _read(scorer, rows, options)
            _keep(path, told, found)
        yield from _grouped(found, part)


def record_judge(
    judge: Judge, groups: Groups, folder: Path, *, size: int = 8, **options: Any
) -> Iterator[list[tuple[float, float]]]:
    """Yield, for each group of rows, the judge's score of each row and its seconds. Parts are kept in `folder`.

    Only the rows of one group are rivals of each other.
    """
    for path, part, rows in _parts(groups, folder, size):
        asked = [row | {"group": n} for n, group in enumerate(part) for row in group]
        told = _settings(judge.scorer, asked, options) | {"judge": judge.method, "instruction": judge.instruction}
        path = path.with_suffix(".json")
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("told") != told:
            start = time.process_time()
            scores = [_whole(row, read).score for row, read in zip(rows, judge.score(asked, **options), strict=True)]
            kept = {"told": told, "scores": scores, "seconds": time.process_time() - start}
            _replace(path, lambda writing, kept=kept: writing.write_text(json.dumps(kept)))
        yield from _grouped([(score, kept["seconds"] / len(rows)) for score in kept["scores"]], part)


def _parts(groups: Groups, folder: Path, size: int) -> Iterator[tuple[Path, list, list]]:
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(groups), size):
        part = [list(group) for group in groups[start : start + size]]
        yield folder / f"{start:05d}.npz", part, [row for group in part for row in group]


def _grouped(found: list, part: list) -> Iterator[list]:
    each = iter(found)
    for group in part:
        yield [next(each) for _ in group]


def _settings(scorer: EndoRewardModel, rows: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
    name = getattr(scorer.model.config, "_name_or_path", "")
    return {"model": name, "dtype": str(scorer.dtype), "options": options, "rows": rows}


def _whole(row: dict[str, Any], read: Any) -> Any:
    if read.error is not None:
        raise SystemExit(f"{row['prompt'][:60]!r}: {read.error}")
    return read


def _read(scorer: EndoRewardModel, rows: list[dict[str, Any]], options: dict[str, Any]) -> list[Recorded]:
    start = time.process_time()
    read = scorer.score(rows, per_token=True, texts=False, entropy=True, signals="all", **options)
    seconds = (time.process_time() - start) / len(rows)
    return [
        Recorded(
            *(np.asarray(getattr(_whole(row, score).tokens, f), dtype=np.float32) for f in FIELDS),
            dict(score.signals),
            seconds,
        )
        for row, score in zip(rows, read, strict=True)
    ]


def _keep(path: Path, told: str, found: list[Recorded]) -> None:
    names = list(found[0].signals)
    arrays = {field: np.concatenate([getattr(one, field) for one in found]) for field in FIELDS}
    values = {
        "told": np.array(told), "names": np.array(names), "lengths": np.array([len(one.rewards) for one in found]),
        "signals": np.array([[one.signals[name] for name in names] for one in found]),
        "seconds": np.array(sum(one.seconds for one in found)),
    }  # fmt: skip
    _replace(path, lambda writing: np.savez_compressed(writing, **values, **arrays))


def _replace(path: Path, write: Any) -> None:
    """Write the file under another name first: a run that is stopped leaves no half of a part."""
    writing = path.with_suffix(f".part{path.suffix}")
    write(writing)
    writing.replace(path)


def _kept(path: Path, told: str) -> list[Recorded] | None:
    if not path.exists():
        return None
    with np.load(path) as file:
        if str(file["told"]) != told:
            return None
        stops = np.cumsum(file["lengths"])[:-1]
        columns = [np.split(file[field], stops) for field in FIELDS]
        names = file["names"].tolist()
        seconds = float(file["seconds"]) / len(file["lengths"]) if "seconds" in file.files else math.nan
        return [
            Recorded(*arrays, dict(zip(names, map(float, signals), strict=True)), seconds)
            for *arrays, signals in zip(*columns, file["signals"], strict=True)
        ]
