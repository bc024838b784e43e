"""The choices that are stored on this machine, and whether `auto` uses them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..vocab.machine import Machine, machine_of
from ..vocab.tuned import SWITCH, Entry, entries, in_use, tuned_folder


@dataclass(frozen=True)
class Stored:
    """A file of the folder: what it holds, and why `auto` does not use it. Without an entry it cannot be read."""

    path: Path
    entry: Entry | None
    unused: str | None

    @property
    def ratio(self) -> float | None:
        """Time of the choice as a ratio to torch.mm."""
        found = self.entry and self.entry.measured.get("score")
        return float(found) if isinstance(found, int | float) else None


def stored() -> Iterator[Stored]:
    """Yield every file in the folder of stored choices."""
    ignored = None if in_use() else f"{SWITCH}=0 ignores it"
    place = tuned_folder()
    if place is None:
        return
    here = {machine_of(device): device for device in _devices()}
    for path, found in entries(place):
        if isinstance(found, str):
            yield Stored(path, None, found)
        else:
            yield Stored(path, found, ignored or _unused(found, here))


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _unused(entry: Entry, here: dict[Machine, torch.device]) -> str | None:
    device = here.get(entry.machine)
    if device is None:
        return _difference(entry.machine, list(here))
    try:
        entry.choice.arguments(device)
        return entry.choice.obstacle(device, getattr(torch, entry.head.dtype))
    except (TypeError, ValueError, AttributeError) as error:
        return str(error)


def _difference(made: Machine, here: list[Machine]) -> str:
    """Name the first thing in which the machine of a choice differs from this one."""
    same = next((machine for machine in here if machine.device == made.device), None)
    if same is None:
        return f"for another device, {made.device}"
    for name, value in asdict(made).items():
        if value != getattr(same, name):
            return {"source": "for another version of endoreward_fast's code"}.get(
                name, f"for {name} {value}, here {getattr(same, name)}"
            )
    raise AssertionError("the machines are equal")
