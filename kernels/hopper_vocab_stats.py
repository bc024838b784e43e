"""The Hopper candidate for `linear_partials`: the same partials from a kernel written in Gluon.

It is for measurement by name: no rule chooses it. The kernel is imported when it is launched or compiled, because Gluon
is an experimental part of Triton.
"""

import importlib
from dataclasses import dataclass

import torch
import triton

from .combine import Partials
from .config import cdiv
from .linear_vocab_stats import tma_usable, with_aligned_rows
from .primitives import PLAIN_HEAD, Head, exp2_scale
from .rows import Kept, gather

BLOCK_N, BLOCK_V = 128, 256  # two consumers of 64 tokens; the widest wgmma


@dataclass(frozen=True)
class HopperConfig:
    """A ring of num_stages tiles of 128 x block_d hidden and 256 x block_d weight, and the order of the work.

    lead     stages by which the first consumer runs ahead of the second, so that the epilogue of one hides under the
             matmul of the other. The stages between them cannot be refilled: lead + 3 <= num_stages leaves one in
             flight. 0: the consumers run freely
    group    token tiles that process a split together and read its weight from L2
    split    vocabulary entries of a partial, the same for every N; at most 32 tiles of 256
    """

    block_d: int = 64
    num_stages: int = 4
    lead: int = 0
    group: int = 8
    split: int = 1280

    def __post_init__(self):
        tiles = self.split / BLOCK_V
        if tiles != int(tiles) or not 0 < tiles <= 32:
            raise ValueError(f"split is {self.split}: it must be a multiple of {BLOCK_V}, and at most {32 * BLOCK_V}")
        if not 0 <= self.lead < self.num_stages:
            raise ValueError(f"lead is {self.lead}: it must be at least 0 and less than num_stages, {self.num_stages}")


# The bits of a row depend on block_d and split alone.
HOPPER_SEARCH = (
    HopperConfig(),
    HopperConfig(lead=1),
    HopperConfig(block_d=32, num_stages=9),
    HopperConfig(block_d=32, num_stages=9, lead=5),
    HopperConfig(group=16),
)


def hopper_obstacle(hidden: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Return why `hopper_partials` cannot run on these tensors; None if it can."""
    if _capability(hidden.device) != (9, 0):
        return f"the tensors are on {hidden.device}, and the kernel needs a GPU of compute capability 9.0"
    try:
        importlib.import_module("triton.experimental.gluon.language.nvidia.hopper")
    except ImportError as error:
        return f"triton {triton.__version__} has no Gluon for Hopper: {error}"
    if weight.dtype not in (torch.bfloat16, torch.float16) or hidden.dtype != weight.dtype:
        return f"the kernel takes bfloat16 or float16, not {hidden.dtype} with {weight.dtype}"
    if not tma_usable(weight):
        return "the weight needs unit stride in D, and a base and a row pitch that are multiples of 16 bytes"
    return None


def _capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU; None for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and not torch.version.hip else None


def hopper_partials(
    hidden, weight, targets, *, alpha: float, entropy: bool, logit_mean: bool, config: HopperConfig = HOPPER_SEARCH[0],
    head: Head = PLAIN_HEAD, kept: Kept | None = None, programs: int | None = None,
) -> Partials:  # fmt: skip
    """Return partials (ceil(V / split), N) as `linear_partials` does, on tensors without a `hopper_obstacle`.

    kept      the rows to compute, as in `linear_partials`
    programs  size of the grid; None: one program per processor. A program takes pieces of work in turn, and the copies
              for the next piece begin during the last epilogue of the one before
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .hopper_kernel import hopper_partials_kernel

    (rows, dim), vocab = hidden.shape, weight.shape[0]
    splits = cdiv(vocab, config.split)
    partials, fields = stacked_partials(splits, rows, hidden.device, entropy=entropy, logit_mean=logit_mean)
    if not rows:
        return partials
    if programs is None:
        programs = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    if kept is not None:
        hidden = gather(hidden, kept, with_aligned_rows(hidden))
    elif not tma_usable(hidden):
        hidden = with_aligned_rows(hidden).copy_(hidden)
    absent = targets  # stands for a pointer that is not used
    layout = tile_layout(config.block_d)
    hidden = TensorDescriptor.from_tensor(hidden, [BLOCK_N, config.block_d], layout)
    weight = TensorDescriptor.from_tensor(weight, [BLOCK_V, config.block_d], layout)
    hopper_partials_kernel[(min(programs, cdiv(rows, BLOCK_N) * splits),)](
        hidden, weight, absent if head.bias is None else head.bias, targets, *(kept[:2] if kept else (absent, absent)),
        fields, partials.target_logit, rows, vocab, dim, *head.numbers(), exp2_scale(alpha),
        HAS_ROWS=kept is not None, **head.flags(), ENTROPY=entropy, LOGIT_MEAN=logit_mean,
        SPLIT=config.split, GROUP=config.group, STAGES=config.num_stages, LEAD=config.lead, num_warps=4,
    )  # fmt: skip
    return partials


def stacked_partials(splits: int, rows: int, device, *, entropy: bool, logit_mean: bool):
    """Return (partials, fields): m, s, t and u, as far as requested, are slices of fields (F, splits, rows)."""
    fields = torch.empty((2 + entropy + logit_mean, splits, rows), dtype=torch.float32, device=device)
    t = fields[2] if entropy else None
    u = fields[-1] if logit_mean else None
    target_logit = torch.empty(rows, dtype=torch.float32, device=device)
    return Partials(fields[0], fields[1], t, u, target_logit), fields


def tile_layout(block_d: int):
    """Return the layout of a tile in shared memory: swizzled over the bytes of a row, as TMA writes and wgmma reads."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle_byte_width=2 * block_d, element_bitwidth=16, rank=2)
