"""What could compute the statistics of a head here: one setting of an implementation each."""

from dataclasses import asdict, dataclass, replace

import torch

from ..kernels.config import LINEAR_SEARCH, LinearConfig, linear_config, tma_pays
from ..kernels.hopper_vocab_stats import BLOCK_N, BLOCK_V, HOPPER_SEARCH, HopperConfig
from ..vocab.choice import standard_impl
from ..vocab.chunked_tiles import MIB, has_bf16_units
from ..vocab.compiled import find_compiler
from ..vocab.fused import obstacle_to_kernels
from ..vocab.tuned import Choice, Head, kernel_config

# Every setting keeps the documented bounds of extra memory: 64 MiB on a CPU, 256 MiB on a GPU. In float32 elements.
CPU_TILES = (MIB // 4, MIB, 2 * MIB)
CPU_NATIVE_TILES = (MIB, 8 * MIB)
CPU_PRODUCTS = (512, 2048)
GPU_TILES = (4 * MIB, 16 * MIB, 32 * MIB, 48 * MIB)
WGMMA = (9, 10)
"""major compute capabilities that LINEAR_SEARCH is made for"""


@dataclass(frozen=True)
class Candidate:
    """A choice, and its name in the tuner's table."""

    name: str
    choice: Choice


def candidates(head: Head, device: torch.device) -> list[Candidate]:
    """Return what to measure for a head. The first is what `auto` runs without a tuning.

    Implementations with their own settings come before other settings: of equals, the first is taken.
    """
    dtype = getattr(torch, head.dtype)
    found = [Choice(standard_impl(device, dtype, dtype, linear=True))]
    for choice in _on_gpu(head, device, dtype) if device.type == "cuda" else _on_cpu(dtype):
        if choice not in found:
            found.append(choice)
    return [Candidate(described(choice, device), choice) for choice in found]


def _on_cpu(dtype: torch.dtype) -> list[Choice]:
    """Return tiles of `chunked` and, with a compiler, `compiled`. The user asked, so `auto` may then take it."""
    if dtype == torch.bfloat16 and has_bf16_units():  # the CPU multiplies it: see chunked_tiles.uses_native_matmul
        settings = [{"native_tile": size} for size in CPU_NATIVE_TILES] + [{"tile": size} for size in CPU_TILES]
    else:
        settings = [{"tile": size} for size in CPU_TILES] + [{"product": columns} for columns in CPU_PRODUCTS]
    compiled = [Choice("compiled"), *(Choice("compiled", setting) for setting in settings[:2])]
    found = [Choice("chunked", setting) for setting in settings]
    return [*compiled[:1], *found, *compiled[1:]] if find_compiler() else found


def _on_gpu(head: Head, device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """Return tiles of `fused` and workspaces of `chunked`."""
    fused = []
    if obstacle_to_kernels(device, dtype) is None:
        fused = [Choice("fused"), *(Choice("fused", asdict(config)) for config in _tiles(head, device, dtype))]
    return [*fused[:1], Choice("chunked"), *fused[1:], *(Choice("chunked", {"tile": size}) for size in GPU_TILES)]


def _tiles(head: Head, device: torch.device, dtype: torch.dtype) -> list[LinearConfig | HopperConfig]:
    """Return configs to try beside the table's: LINEAR_SEARCH with wgmma, elsewhere neighbours of the table's.

    On Hopper also those of the kernel in Gluon. Where Triton has no Gluon, they fail and cost themselves alone.
    """
    arch = "hip" if torch.version.hip else torch.cuda.get_device_capability(device)[0]
    bulk_copies = tma_pays(arch, dtype.itemsize) and head.dim * dtype.itemsize % 16 == 0
    table = linear_config(arch, dtype.itemsize, bulk_copies)
    if bulk_copies and arch in WGMMA:
        found = [*LINEAR_SEARCH, *(HOPPER_SEARCH if arch == 9 else ())]
    else:
        found = [replace(table, persistent=programs) for programs in (1, 2)]
        found += [replace(table, num_stages=table.num_stages + 1), replace(table, group=2 * table.group)]
    return [config for config in found if config != table]


def described(choice: Choice, device: torch.device) -> str:
    """Return a choice in a few words."""
    if choice.impl == "fused" and choice.setting:
        c = kernel_config(choice.setting)
        if isinstance(c, HopperConfig):
            lead = f", lead {c.lead}" if c.lead else ""
            return f"fused (Gluon) {BLOCK_N}x{BLOCK_V}x{c.block_d}, {c.num_stages} stages, group {c.group}{lead}"
        grid = f", {c.persistent} program{'s' * (c.persistent > 1)} a processor" if c.persistent else ""
        tile = f"{c.block_n}x{c.block_v}x{c.block_d}"
        return f"fused {tile}, {c.num_warps} warps, {c.num_stages} stages, group {c.group}{grid}"
    words = {
        "tile": "tiles of {:g} MiB" if device.type == "cpu" else "workspace of {:g} MiB",
        "native_tile": "bfloat16 tiles of {:g} MiB",
        "product": "products of {} columns",
    }
    parts = []
    for name, value in choice.setting.items():
        size = value if name == "product" else value * (2 if name == "native_tile" else 4) / MIB
        parts.append(words[name].format(size))
    return ", ".join((choice.impl, *parts))
