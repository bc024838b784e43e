"""Choose the device of a model: the one that was asked for, or this process's among several of that type."""

import os

import torch

from ..errors import EndoRewardError, first_line
from ..vocab.chunked_tiles import has_bf16_units

ALIASES = {"gpu": "cuda"}  # torch calls AMD's GPUs "cuda", too


def device_of(device: torch.device | str | None) -> torch.device:
    """Return the device that `device` names. None and "auto" are a GPU if there is one, else the CPU.

    Under a launcher that sets LOCAL_RANK, a type without an index ("cuda", "gpu", "xpu") is the local rank's device,
    because torch would use the first device for every rank until the trainer chooses one. If the process has already
    chosen a device other than the first, that one is returned.

    Raises EndoRewardError if the device cannot be used, or if LOCAL_RANK is not a number.
    """
    try:
        found = _own(_named(device))
        _touch(found)
    except (NotImplementedError, ImportError) as error:  # with a list of all backends, or "No module named 'torch.hpu'"
        raise EndoRewardError(
            f"device {str(device)!r} cannot be used: torch {torch.__version__} has no backend for it here"
        ) from error
    except (RuntimeError, AssertionError) as error:
        raise EndoRewardError(f"device {str(device)!r} cannot be used: {first_line(error)}") from error
    return found


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device computes in it, else float32.

    Without units for it, a CPU takes several times as long in bfloat16 as in float32.
    """
    if device.type == "cpu":
        return torch.bfloat16 if has_bf16_units() else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16


def _touch(device: torch.device) -> None:
    """Raise RuntimeError or a similar error if the device cannot be used."""
    torch.empty(0, device=device)


def _named(device: torch.device | str | None) -> torch.device:
    if not isinstance(device, torch.device | str | int | None):
        raise EndoRewardError(f"device is a {type(device).__name__}: expected a torch.device or a name ('cuda:1')")
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(ALIASES.get(device, device) if isinstance(device, str) else device)


def _own(device: torch.device) -> torch.device:
    """Return the device with the index for this process, if several processes share a machine."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or device.index is not None or device.type in ("cpu", "meta", "mps"):
        return device
    if not rank.isdecimal():
        raise EndoRewardError(f"LOCAL_RANK is {rank!r}: expected a number, as torchrun sets it")
    devices = torch.get_device_module(device)
    count = devices.device_count()
    if not count:
        return device  # its first use raises an error that says why
    # Ask for the current device only if one was used before: the question itself would create a context on the first.
    chosen = devices.current_device() if devices.is_initialized() else 0
    return torch.device(device.type, chosen or int(rank) % count)
