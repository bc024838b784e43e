"""`endoreward tune`: measure what computes a head fastest on this machine, and store the choice for `auto`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import torch

from ..errors import EndoRewardError
from ..model.devices import device_of, fastest_dtype
from ..tuning import child, search, stored
from ..tuning.candidates import Candidate, candidates
from ..tuning.paths import shortened
from ..vocab.machine import machine_of
from ..vocab.tuned import SWITCH, Entry, Head, in_use, name_of, tuned_folder, write
from .flags.values import dtype_name
from .run.monitor import say_now

DTYPES = ("float32", "bfloat16", "float16")
RULE = " (auto's rule)"
SHAPE = "D,V, the width of the hidden states and the size of the vocabulary, such as 1024,151936"


def head_to_tune(model: str | None, shape: str | None, dtype: str, device: torch.device) -> Head:
    """Return the head that the flags name. Raises EndoRewardError if they name none, or one that cannot be tuned."""
    if model is not None and shape is not None:
        raise EndoRewardError("--model and --shape exclude each other: use one of them")
    if model is None and shape is None:
        raise EndoRewardError(f"no head to tune: name a model with --model, or its shape with --shape {SHAPE}")
    stated = None
    if shape is not None:
        dim, vocab = _shape(shape)
    else:
        from ..model.head_shape import head_shape

        dim, vocab, stated = head_shape(str(model))
    wanted = dtype_name(dtype)
    if wanted == "auto":
        wanted = stated or "fastest"
    if wanted == "fastest":
        wanted = name_of(fastest_dtype(device))
    if wanted not in DTYPES:
        raise EndoRewardError(f"--dtype must be one of auto, fastest, {', '.join(DTYPES)}, got {wanted!r}")
    if device.type == "cuda" and wanted == "bfloat16" and fastest_dtype(device) != torch.bfloat16:
        raise EndoRewardError(f"device {str(device)!r} does not compute in bfloat16: give --dtype float16")
    return Head(wanted, dim, vocab)


def _shape(text: str) -> tuple[int, int]:
    try:
        dim, vocab = (int(part) for part in text.split(","))
    except ValueError:
        raise EndoRewardError(f"--shape must be {SHAPE}, got {text!r}") from None
    if min(dim, vocab) < 1:
        raise EndoRewardError(f"--shape must be two numbers of 1 or more, got {text!r}")
    return dim, vocab


def tune(model: str | None, shape: str | None, dtype: str, device_name: str | None, seconds: float) -> None:
    """Measure every candidate, print a table and store the choice."""
    if not seconds > 0:
        raise EndoRewardError(f"--seconds must be above 0, got {seconds:g}")
    device = device_of(device_name)
    if device.type not in search.ROWS:
        raise EndoRewardError(f"device {str(device)!r} is not tuned: only CPUs, CUDA and ROCm devices are")
    head = head_to_tune(model, shape, dtype, device)
    folder, rows = _writable(tuned_folder()), search.rows_for(head, device)
    found, machine = candidates(head, device), machine_of(device)
    say_now(f"{model or 'head'}: {head}\n{machine.device}; torch {machine.torch}, Triton {machine.triton}\n\n")
    say_now(_about(device))
    width = 2 + max(len(candidate.name) for candidate in found) + len(RULE)
    say_now(_line(width, "", *(f"{n} rows" for n in rows), "both"))
    results = []
    for result in _with_status(found, search.measured_in_turn(head, device, found, seconds, child.ask)):
        results.append(result)
        say_now(_row(width, result, after=RULE if len(results) == 1 else ""))
    taken = search.chosen(results)
    if taken is None:
        raise EndoRewardError(
            "no candidate could be measured, so nothing is stored: `endoreward doctor` says what runs here"
        )
    say_now(_row(width, taken, "taken: "))
    why = search.reason(results, taken)
    measured = {"name": taken.candidate.name, "score": taken.score, "why": why, "date": date.today().isoformat()}
    measured |= {"rows": rows, "threads": torch.get_num_threads() if device.type == "cpu" else None}
    measured["candidates"] = [result.to_json() for result in results]
    path = _stored(Entry(head, machine, taken.candidate.choice, measured), folder)
    say_now(f"\nauto takes `{taken.candidate.name}` for this head from now on: {why}.\nStored in {shortened(path)}\n")
    if not in_use():
        say_now(f"{SWITCH}=0 is set here, and ignores it.\n")


def _about(device: torch.device) -> str:
    threads = torch.get_num_threads() if device.type == "cpu" else None
    unit = "Processor time" if threads == 1 else "Time"
    busy = f"Close other programs: they slow down calls on {threads} threads.\n" if threads and threads > 1 else ""
    return (
        "Statistics from hidden states. Each candidate runs in a separate process. It is first compared with float64.\n"
        f"{busy}{unit} as a ratio to torch.mm, which stores all logits: median (quartiles).\n"
        'The column "both" is the geometric mean of the medians, which decides.\n\n'
    )


def _with_status(found: Sequence[Candidate], results: Iterator[search.Measured]) -> Iterator[search.Measured]:
    """Show on a terminal which candidate is measured now, in a line that goes away."""
    for i, candidate in enumerate(found, start=1):
        _status(f"measuring {candidate.name} ({i} of {len(found)})")
        result = next(results)
        _status("")
        yield result


def _status(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _row(width: int, result: search.Measured, before: str = "", after: str = "") -> str:
    name = before + result.candidate.name + after
    if result.problem:
        return f"{name:<{width}}{result.problem}\n"
    cells = [f"{middle:.2f} ({low:.2f}-{high:.2f})" for low, middle, high in result.ratios.values()]
    return _line(width, name, *cells, f"{result.score:.2f}")


def _line(width: int, name: str, *cells: str) -> str:
    *wide, last = cells
    return f"{name:<{width}}{''.join(f'{cell:<19}' for cell in wide)}{last}\n"


def _writable(folder: Path | None) -> Path:
    """Return the folder, which then exists. Raises EndoRewardError if nothing can be written there."""
    if folder is None:
        raise EndoRewardError("there is no home folder to store the choice in: name a cache folder in XDG_CACHE_HOME")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise _cannot_store(folder, error) from None


def _stored(entry: Entry, folder: Path) -> Path:
    try:
        return write(entry, folder)
    except OSError as error:
        raise _cannot_store(folder, error) from None


def _cannot_store(folder: Path, error: OSError) -> EndoRewardError:
    return EndoRewardError(
        f"the choice cannot be stored in {folder} ({error.strerror or error}): name a cache folder that can be written "
        "in XDG_CACHE_HOME"
    )


def show() -> None:
    """Print every stored choice, whether `auto` uses it, and why it was taken."""
    found = list(stored.stored())
    if not found:
        say_now("nothing is tuned: auto follows its rule for every head\n")
    for item in found:
        say_now(described(item))


def described(item: stored.Stored) -> str:
    """Return a stored choice in two or three lines."""
    if item.entry is None:
        return f"{shortened(item.path)}\n  not read: {item.unused}\n"
    measured = item.entry.measured
    ratio = f", {item.ratio:.2f} times torch.mm" if item.ratio is not None else ""
    name = measured.get("name", item.entry.choice.impl)
    used = f"  {name}{ratio}: {measured.get('why', 'no reason is stored')}"
    when = f"  measured on {measured.get('date', 'an unknown day')}, {item.entry.machine.device}"
    count = measured.get("threads")
    threads = f", {count} thread{'s' * (count > 1)}" if isinstance(count, int) else ""
    unused = f"  NOT USED: {item.unused}\n" if item.unused else ""
    return f"{item.entry.head}\n{used}\n{when}{threads}\n{unused}"
