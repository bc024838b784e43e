"""A driver for Triton whose device is the emulator: `kernel[grid](...)` compiles as usual, and runs on CPU tensors.

Triton asks its active driver for the target, for a way to load a binary, and for a launcher. Here the binary of a
kernel is its PTX: ptxas, the last stage of the compiler, is left out.
"""

import functools
import os
from collections.abc import Callable

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as drivers

from .launch import launch
from .parse import Program, parse

# Not with the others: Triton 3.6 does not ask the hook below for a key, and their binaries are none of PTX.
CACHE = os.path.join(knobs.cache.dir, "emulated")
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have


class EmulatedDriver(DriverBase):
    """A device of compute capability `arch` (80 or 90).

    order    order in which warps run, see schedule.py
    rewrite  function from PTX to PTX, applied before a kernel runs; tests plant mistakes with it
    """

    def __init__(self, arch: int, order: str = "lockstep", rewrite: Callable[[str], str] | None = None):
        self.arch, self.order, self.rewrite = arch, order, rewrite
        self.launcher_cls = functools.partial(_Launcher, self)
        self.launches: list[Program] = []
        self.utils = self

    @classmethod
    def is_active(cls) -> bool:
        return False  # only where it is set

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a kernel keeps its binaries by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.arch]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Return (module, function, registers, spills, most threads): the function is the PTX."""
        return binary, binary.decode(), 0, 0, 1024

    def unload_module(self, module) -> None:
        """Triton 3.9 calls this when a kernel is collected. There is nothing to free."""

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("no C++ is compiled for the emulator")

    def get_benchmarker(self):
        raise NotImplementedError("the emulator has no clock")


class _Launcher:
    """What Triton calls for each launch of one compiled kernel."""

    def __init__(self, driver: EmulatedDriver, source, metadata):
        self.source, self.metadata = source, metadata

    def __call__(self, grid_x, grid_y, grid_z, stream, ptx, packed, launch_metadata, enter_hook, exit_hook, *arguments):
        active = drivers.active  # Triton keeps this launcher with the kernel; the order and the rewriting may change
        program = load(ptx if active.rewrite is None else active.rewrite(ptx))
        active.launches.append(program)
        launch(
            program, (grid_x, grid_y, grid_z), dict(zip(self.source.fn.arg_names, arguments, strict=True)),
            self.source.signature, self.metadata, active.order,
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def load(ptx: str) -> Program:
    return parse(ptx)


def ptx_is_the_binary(*stage_arguments):
    """Replace ptxas by a stage that hands the PTX on. Triton calls this hook without arguments for its cache's key."""
    if not stage_arguments:
        return "ptx is the binary", "ptx is the binary"
    _, stages, *_ = stage_arguments
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


def use(monkeypatch, driver: EmulatedDriver) -> EmulatedDriver:
    """Make `driver` the one that Triton asks, until the monkeypatch is undone."""
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", ptx_is_the_binary)
    monkeypatch.setattr(knobs.cache, "dir", CACHE)
    monkeypatch.setattr(drivers, "_active", driver)
    return driver
