"""A device that is not there: CPU tensors pass for tensors on a GPU, and launches are recorded, not run.

The package and Triton ask torch and Triton's driver which device they have. Here both name the stand-in, so every
public function takes the way that it takes on a GPU, up to the launch. Nothing in the package is replaced.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch

from .archs import ARCHS, Arch


@dataclass(frozen=True)
class Launch:
    """One compilation that a launch asks for, as Triton's binder specialised it from the arguments."""

    module: str
    function: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, object]

    def constant(self, name: str):
        """Return the value of a constexpr argument; None if the kernel has none of that name."""
        names = list(self.signature)
        return self.constants.get((names.index(name),)) if name in names else None


class _Device(str):
    """torch's C++ reads the string, "cpu", and Python code reads the type, "cuda"."""

    type, index = "cuda", 0


class _Driver:
    """What Triton asks a driver before a launch. The device is the target, so each target has its own kernels."""

    def __init__(self, arch: Arch) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("hip" if arch.hip else "cuda", arch.target, arch.lanes)

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)

    def get_current_stream(self, device) -> int:
        return 0


@contextlib.contextmanager
def on_device(name: str) -> Iterator[None]:
    """Make CPU tensors pass for tensors on a device of architecture `name`. Their matmuls are skipped."""
    arch = ARCHS[name]
    device = _Device("cpu")
    facts = SimpleNamespace(multi_processor_count=arch.processors, name=name)
    from triton.runtime.driver import driver

    before = driver._active
    driver.set_active(_Driver(arch))
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, driver, "_active", before)
        replace = [
            (torch.Tensor, "device", property(lambda tensor: device)),
            (torch.cuda, "device", lambda device: contextlib.nullcontext()),
            (torch.cuda, "get_device_properties", lambda device=None: facts),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.version, "hip", "6" if arch.hip else None),
            (torch, "mm", _mm),
            (torch, "addmm", _addmm),
        ]
        if not arch.hip:
            capability = divmod(arch.target, 10)
            replace.append((torch.cuda, "get_device_capability", lambda device=None: capability))
        for owner, attribute, value in replace:
            stack.enter_context(mock.patch.object(owner, attribute, value))
        yield


def _mm(a, b, out_dtype=None, *, out=None):
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype or a.dtype) if out is None else out


def _addmm(added, a, b, out_dtype=None, *, beta=1, alpha=1, out=None):
    return _mm(a, b, out_dtype, out=out)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches. Triton asks its cache hook before it compiles, and a hook that returns True ends the launch."""
    from triton import knobs

    launches: list[Launch] = []

    def hook(*, fn, compile, **_):
        options = json.loads(compile["specialization_data"])["options"]
        launches.append(
            Launch(
                fn.module, fn.name, compile["signature"], compile["constants"], compile["configs"][0],
                {k: _tuples(v) for k, v in options.items()},
            )
        )  # fmt: skip
        return True

    with mock.patch.object(knobs.runtime, "jit_cache_hook", hook):
        yield launches


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
