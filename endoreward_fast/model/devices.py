"""Which device a model goes to: the one asked for, and among several of its kind this process's own."""

import os

import torch

from ..errors import EndoRewardError, first_line

ALIASES = {"gpu": "cuda"}  # AMD's GPUs are "cuda" to torch, too


def device_of(device: torch.device | str | None) -> torch.device:
    """The device that `device` names, ready for use: None and "auto" are a GPU if there is one.

    A kind without an index ("cuda", "gpu", "xpu") is the local rank's device under a launcher, which sets LOCAL_RANK:
    before a trainer has chosen the process's device, torch would take the first for every rank. A process that has
    chosen another than the first keeps it. Raises EndoRewardError: no such device, a LOCAL_RANK that is no number.
    """
    try:
        found = _own(_named(device))
        _touch(found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EndoRewardError(f"device {str(device)!r} cannot be used: {first_line(error)}") from error
    return found


def _touch(device: torch.device) -> None:
    """Raises RuntimeError and the like: the device cannot be used."""
    torch.empty(0, device=device)


def _named(device: torch.device | str | None) -> torch.device:
    if not isinstance(device, torch.device | str | int | None):
        raise EndoRewardError(f"device is a {type(device).__name__}: expected a name such as 'cuda:1', or one of torch")
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(ALIASES.get(device, device) if isinstance(device, str) else device)


def _own(device: torch.device) -> torch.device:
    """With the index of this process's device, where several processes share a machine's."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or device.index is not None or device.type in ("cpu", "meta", "mps"):
        return device
    if not rank.isdecimal():
        raise EndoRewardError(f"LOCAL_RANK is {rank!r}: expected a number, as torchrun sets it")
    devices = torch.get_device_module(device)
    count = devices.device_count()
    if not count:
        return device  # its first use says why
    # A process that never touched a device has chosen none, and to ask would make a context on the first.
    chosen = devices.current_device() if devices.is_initialized() else 0
    return torch.device(device.type, chosen or int(rank) % count)
