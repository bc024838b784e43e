"""compare.md and the pictures, from compare.json alone."""

import importlib.util
import json
from pathlib import Path

from bench.compare import cases, measure

APART = "offset 1e4"  # has a column of its own, and is left out of the largest errors of the other columns
BITS = {
    "run to run": ("statistics, run to run", "gradients, run to run"),
    "alone": ("rows alone",),
    "half": ("half of the batch",),
}
HEAD = """# Accuracy, repeatability and speed

Written by `make compare`. {machine}

- Errors are against float64. Those of nll (negative log-likelihood) and entropy are the largest over the rows, in nats.
  Those of gradients are |error| / |gradient|, for an upstream gradient that differs from row to row.
- {inputs}
- "Entropy", "dhidden" and "dweight" are the largest over all cases but the offset of 1e4.
- Same bits: of statistics and gradients from run to run; of rows alone and in a batch of {rows}; of half of the batch.
- {time}
- "takes logits": the logits come from `hidden @ weight.T`, which is part of the error and of the time.
"""


def settings(gpu: bool) -> dict:
    timed = measure.ON_GPU if gpu else measure.ON_CPU
    return {
        "gpu": gpu,
        "hidden": cases.HIDDEN,
        "rows": cases.ROWS,
        "interpreted_rows": cases.INTERPRETED_ROWS,
        "cases": {
            case.name: {"vocab": case.vocab, "spread": case.spread, "offset": case.offset} for case in cases.CASES
        },
        "repeated": measure.REPEATED,
        "timed": {"hidden": timed.shape.hidden, "vocab": timed.shape.vocab, "rows": timed.rows, "rounds": timed.rounds},
    }


def write(folder: Path) -> list[Path]:
    record = json.loads((folder / "compare.json").read_text())
    path = folder / "compare.md"
    path.write_text(markdown(record))
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture, because matplotlib is not installed")
        return [path]
    from bench.compare import picture

    return [path, *picture.draw(record, folder)]


def markdown(record: dict) -> str:
    arms = {name: arm for name, arm in record["arms"].items() if "failed" not in arm}
    parts = [_head(record)]
    for dtype in measure.DTYPES:
        ran = {name: arm for name, arm in arms.items() if measured(arm[dtype])}
        rows = [(_name(name, arm), row(record["settings"], arm, arm[dtype])) for name, arm in ran.items()]
        parts.append(f"## {dtype}\n\n{table(record, rows)}\n")
    failed = [f"- {name}: {arm['failed']}" for name, arm in record["arms"].items() if "failed" in arm]
    failed += [
        f"- {name}, {dtype}: {why}"
        for dtype in measure.DTYPES
        for name, arm in arms.items()
        for why in reasons(arm[dtype])
    ]
    parts.append("## Not measured\n\n" + ("\n".join(failed) or "Everything was measured.") + "\n")
    return "\n".join(parts)


def measured(found: dict) -> bool:
    """Return whether an arm gave statistics of any case."""
    return "failed" not in found and any("nll" in case["statistics"] for case in found["accuracy"].values())


def _name(name: str, arm: dict) -> str:
    return f"{name} (takes logits)" if arm["takes"] == "logits" else name


def table(record: dict, rows: list[tuple[str, list[str]]]) -> str:
    head = ["", *(f"nll, {case}" for case in record["settings"]["cases"]), "entropy", "dhidden", "dweight"]
    head += [f"same bits, {name}" for name in BITS] + ["forward", "forward + backward"]
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(about: dict, arm: dict, found: dict) -> list[str]:
    """Return the cells of one arm."""
    nll = [_nll(about["cases"][name]["vocab"], case) for name, case in found["accuracy"].items()]
    largest = [_error(worst(found, *where)) for where in LARGEST]
    bits = [_bits(found["repeatability"], names) for names in BITS.values()]
    times = found["times"] or {}
    spans = [
        "interpreted" if arm["interpreted"] else _time(times.get(way)) for way in ("forward", "forward + backward")
    ]
    return nll + largest + bits + spans


PARTS = ("statistics", "gradients")
LARGEST = (("statistics", "entropy"), ("gradients", "dhidden"), ("gradients", "dweight"))


def worst(found: dict, part: str, field: str) -> float | None:
    """Return the largest error over the cases but the offset's; None if no case has the field."""
    values = [case[part].get(field) for name, case in found["accuracy"].items() if name != APART]
    return max((value if value == value else float("inf") for value in values if value is not None), default=None)


def reasons(found: dict) -> list[str]:
    """Return why cells of an arm are missing, each reason once."""
    if "failed" in found:
        return [found["failed"]]
    parts = [(f"{part}, {name}", case[part]) for name, case in found["accuracy"].items() for part in PARTS]
    parts += [("repeatability", found["repeatability"])]
    parts += [(way, value) for way, value in (found["times"] or {}).items() if isinstance(value, dict)]
    said: dict[str, str] = {}
    for where, value in parts:
        if "failed" in value:
            said.setdefault(value["failed"], where)
    return [f"{where}: {why}" for why, where in said.items()]


def _error(value: float | None, none: str = "") -> str:
    return none if value is None else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def _nll(vocab: int, case: dict) -> str:
    error = _error(case["statistics"].get("nll"), "failed")
    return error if case["vocab"] == vocab else f"{error} (V = {case['vocab']})"


def _bits(found: dict, names: tuple[str, ...]) -> str:
    values = [found[name] for name in names if name in found]
    return "failed" if not values else "yes" if all(values) else "no"


def _time(found: dict | None) -> str:
    if not found or "failed" in found:
        return "failed"
    return f"{found['ratio']:.2f} ({found['ratio_low']:.2f}-{found['ratio_high']:.2f})"


def _head(record: dict) -> str:
    about, where, timed = record["settings"], record["environment"], record["settings"]["timed"]
    machine = where.get("gpu") or f"{where['cpu']}, one thread"
    machine = f"{machine}; torch {where['torch']}; {where['date'][:10]}."
    packages = ", ".join(f"{name} {version}" for name, version in where["packages"].items() if version)
    inputs = (
        f"Inputs: {about['rows']} rows, hidden size {about['hidden']}; V = 4096 where no vocabulary is named; logits "
        f"with a standard deviation of 3, or 30 (peaked, where every other target is the likeliest token)."
    )
    if not about["gpu"]:
        inputs += (
            f" Triton kernels run in Triton's interpreter, on {about['interpreted_rows']} rows and without a time."
        )
    clock = "device time" if about["gpu"] else "processor time"
    time = (
        f"Time: {clock} of {timed['rows']} rows, hidden size {timed['hidden']}, vocabulary {timed['vocab']:,}, against "
        "the bare matmul (forward) and the three matmuls of a training step, in the same rounds: median (quartiles)."
    )
    return HEAD.format(machine=f"{machine} {packages}.", inputs=inputs, rows=about["rows"], time=time)
