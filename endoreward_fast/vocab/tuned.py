"""Choices that `endoreward tune` measured on this machine, one for each head. impl="auto" looks them up.

A choice belongs to (device, dtype, D, V). It never depends on the number of rows, because a row's bits must not depend
on the batch around it. It covers the linear path; from stored logits, `auto` follows `choice.standard_impl`.

The cache folder holds one JSON file for each head and machine. A machine is a device with its driver, the versions of
torch and Triton, and the source of the implementations: after a change of any of them the choice is not found, and
`auto` follows the rule again. A file that cannot be used is named in a warning, once in a process, and ignored.
ENDOREWARD_TUNED=0 ignores all choices.
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import EndoRewardError
from .cache import cache_folder
from .chunked_tiles import CPU_LIMITS
from .fused import obstacle_to_kernels
from .machine import Machine, machine_of

SWITCH = "ENDOREWARD_TUNED"


@dataclass(frozen=True)
class Head:
    """A head: the dtype of hidden states and weight, D and V."""

    dtype: str
    dim: int
    vocab: int

    def __str__(self) -> str:
        return f"D={self.dim}, V={self.vocab}, {self.dtype}"


@dataclass(frozen=True)
class Choice:
    """An implementation and its setting; an empty setting is the implementation's own."""

    impl: str
    setting: Mapping[str, int] = field(default_factory=dict)

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """Return the setting as arguments of the backend's `linear_forward`.

        Raises TypeError for an unknown name, and ValueError for a number that cannot be.
        """
        if not self.setting:
            return {}
        if any(value < (name not in ("persistent", "lead")) for name, value in self.setting.items()):
            raise ValueError(f"a setting is below 1: {dict(self.setting)}")
        if self.impl == "fused":
            return {"config": kernel_config(self.setting)}
        if device.type == "cpu":
            return {"limits": replace(CPU_LIMITS, **self.setting)}
        if set(self.setting) != {"tile"}:
            raise TypeError(f"unknown setting of 'chunked' on a GPU: {', '.join(self.setting)}")
        return dict(self.setting)

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why this choice cannot run here, or None."""
        if self.impl == "compiled":
            from .compiled import find_compiler

            return None if device.type == "cpu" and find_compiler() else "there is no C++ compiler"
        if self.impl == "fused":
            return obstacle_to_kernels(device, dtype)
        return None if self.impl == "chunked" else f"there is no implementation {self.impl!r}"


def kernel_config(setting: Mapping[str, int]) -> Any:
    """Return the LinearConfig or HopperConfig of a setting of "fused"."""
    from ..kernels.config import LinearConfig
    from ..kernels.hopper_vocab_stats import HopperConfig

    return (HopperConfig if "lead" in setting else LinearConfig)(**setting)


@dataclass(frozen=True)
class Entry:
    """The contents of a file: a choice, for what it holds, and what was measured."""

    head: Head
    machine: Machine
    choice: Choice
    measured: Mapping[str, Any]


def stored_choice(device: torch.device, dtype: torch.dtype, dim: int, vocab: int) -> Choice | None:
    """Return the choice for a head on this machine, or None. A file that cannot be used is named in a warning."""
    if device.type not in ("cpu", "cuda"):
        return None
    place = tuned_folder() if in_use() else None
    if place is None or not place.is_dir():
        return None
    head, machine = Head(name_of(dtype), dim, vocab), machine_of(device)
    path = place / file_name(head, machine)
    try:
        if not path.exists():
            return None
        entry = read(path)
        if (entry.head, entry.machine) != (head, machine):
            raise ValueError("it holds the choice for another head or machine")
        if obstacle := entry.choice.obstacle(device, dtype):
            raise ValueError(f"{entry.choice.impl!r} cannot run: {obstacle}")
        entry.choice.arguments(device)
    except (OSError, ValueError, TypeError) as error:
        warnings.warn(
            f"{path} is ignored: {error}. impl='auto' follows its rule; `endoreward tune` measures again", stacklevel=2
        )
        return None
    return entry.choice


def in_use() -> bool:
    """Return whether `auto` looks choices up. Raises EndoRewardError if the variable is neither 0 nor 1."""
    asked = os.environ.get(SWITCH) or "1"
    if asked not in ("0", "1"):
        raise EndoRewardError(f"{SWITCH}={asked!r}: expected 0 (ignore what `endoreward tune` found) or 1")
    return asked == "1"


def tuned_folder() -> Path | None:
    """Return the folder of stored choices; None if there is no home folder, so that nothing was ever stored."""
    try:
        return cache_folder() / "tuned"
    except RuntimeError:
        return None


# ---------------------------------------------------------------------------------------------------------- files


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def file_name(head: Head, machine: Machine) -> str:
    digest = hashlib.sha256(json.dumps([asdict(head), asdict(machine)]).encode()).hexdigest()[:16]
    return f"D{head.dim}-V{head.vocab}-{head.dtype}-{digest}.json"


def write(entry: Entry, folder: Path) -> Path:
    """Write a choice in place of an older one for the same head and machine. Atomic. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(entry.head, entry.machine)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unfinished = Path(scratch) / path.name
        unfinished.write_text(json.dumps(asdict(entry), indent=1) + "\n", "utf-8")
        os.replace(unfinished, path)
    return path


def read(path: Path) -> Entry:
    """Read a choice. Raises OSError, or ValueError for a file that `write` did not write."""
    try:
        found = json.loads(path.read_text("utf-8"))
        setting = {str(name): int(value) for name, value in found["choice"]["setting"].items()}
        head = found["head"]
        return Entry(
            Head(str(head["dtype"]), int(head["dim"]), int(head["vocab"])), Machine(**found["machine"]),
            Choice(str(found["choice"]["impl"]), setting), dict(found["measured"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`endoreward tune` did not write it ({type(error).__name__}: {error})") from None


def entries(folder: Path) -> Iterator[tuple[Path, Entry | str]]:
    """Yield each file of the folder with its contents, or with why it cannot be read."""
    for path in sorted(folder.glob("*.json")):
        try:
            yield path, read(path)
        except (OSError, ValueError) as error:
            yield path, str(error)
