"""Tile sizes, by architecture and dtype. Static: no autotuning unless asked for, so that a shape never seen before
starts at once and a row's bits never depend on what else ran.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LogitsConfig:
    """One program reads block_v logits of one row into registers: 32 a thread at the default."""

    block_v: int = 8192
    num_warps: int = 8


@dataclass(frozen=True)
class LinearConfig:
    """One program owns block_n tokens and `split` vocabulary entries, block_v at a time, block_d of the sum at a time.

    `split` is in units of the vocabulary and the same for every N, which makes results batch invariant; it bounds the
    partials at 8 bytes * N * V / split (31 MB for N = 32768, V = 151936), and 119 programs for one tile of tokens are
    enough to read the weight with most of a large chip.
    """

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group: int = 8  # token tiles that sweep a split together, so that the weight is read from L2
    split: int = 1280
    persistent: int = 0  # programs on each processor that share all the work; 0: a program for each piece


# Chosen, as long as no device has had a say, by what the compiler shows (bench/results/kernel-report.md): the largest
# tile without a spill on that chip, whatever D's alignment. The pointer kernel needs registers for addresses: at
# 128x256x64 it spilled 32 to 1016 bytes on sm_90. On sm_100 the 128x256 tile spilled up to 224 bytes.
WIDE = LinearConfig(block_n=128, block_v=256, block_d=64, num_warps=8, num_stages=4)
SQUARE = LinearConfig(block_n=128, block_v=128, block_d=64, num_warps=8, num_stages=4)
NARROW = LinearConfig(block_n=128, block_v=128, block_d=32, num_warps=8, num_stages=4)
EXACT = LinearConfig(block_n=64, block_v=64, block_d=16, num_warps=16, num_stages=3)  # fp32, on the plain cores
LINEAR_CONFIGS = {
    # (compute capability's major number or "hip", bytes per element, loads through the bulk copy engine): config
    (8, 2, False): replace(NARROW, num_stages=3),
    (8, 4, False): EXACT,
    (9, 2, False): NARROW,
    (9, 2, True): WIDE,
    (9, 4, False): EXACT,
    (10, 2, False): NARROW,
    (10, 2, True): SQUARE,
    (10, 4, False): EXACT,
    (12, 2, False): NARROW,  # 99 KiB of shared memory, and no wgmma or tcgen05 that would want wider tiles
    (12, 4, False): EXACT,
    ("hip", 2, False): replace(NARROW, num_stages=2),
    ("hip", 4, False): LinearConfig(block_n=64, block_v=64, block_d=32, num_warps=4, num_stages=2),
}
# What a device is to be asked beside the table's choice, on chips with wgmma: two programs on one processor, say, hide
# one's epilogue under the other's matmul, if that is worth the smaller tiles. None of it has been timed.
LINEAR_SEARCH = (
    WIDE,
    replace(WIDE, persistent=1),
    replace(WIDE, num_stages=3),
    replace(WIDE, group=16),
    SQUARE,
    replace(SQUARE, num_warps=4, num_stages=3),
    replace(SQUARE, num_warps=4, num_stages=3, persistent=2),
)
# The interpreter simulates one program after another: small tiles, so that tests see many of them.
INTERPRETER_CONFIG = LinearConfig(block_n=16, block_v=32, block_d=16, num_warps=1, num_stages=1, group=2, split=64)


def interpreter_logits_config(vocab: int) -> LogitsConfig:
    """Many pieces of small vocabularies; of real ones as many as a device would make."""
    return LogitsConfig(block_v=64 if vocab < 2048 else LogitsConfig().block_v, num_warps=1)


def linear_config(arch: int | str, itemsize: int, tma: bool) -> LinearConfig:
    """The config for a compute capability's major number (or "hip"), an element size and a way to load."""
    return LINEAR_CONFIGS[_family(arch), itemsize, tma]


def tma_pays(arch: int | str, itemsize: int) -> bool:
    """Whether the linear kernel loads through the bulk copy engine: Hopper and data-centre Blackwell, 16-bit inputs.

    In fp32 the matmul runs on the plain cores, and descriptors only cost it registers (it spilled 432 bytes with them).
    """
    return (_family(arch), itemsize, True) in LINEAR_CONFIGS


def _family(arch: int | str) -> int | str:
    """The key of the table for a major number: 11 is a data-centre Blackwell's cousin, newer than 12 as 12."""
    return arch if isinstance(arch, str) else {11: 10}.get(arch, min(arch, 12))
