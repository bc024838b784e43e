"""Tile sizes, by architecture and dtype. Static: no autotuning unless asked for, so that a shape never seen before
starts at once and a row's bits never depend on what else ran.
"""

from dataclasses import dataclass


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


# Registers and shared memory of each are in bench/results/kernel-report.md; a test holds them to no spill.
LINEAR_CONFIGS = {
    # (compute capability's major number or "hip", bytes per element): config
    (8, 2): LinearConfig(block_n=128, block_v=128, block_d=32, num_warps=8, num_stages=3),
    (8, 4): LinearConfig(block_n=64, block_v=64, block_d=16, num_warps=8, num_stages=3),
    (9, 2): LinearConfig(block_n=128, block_v=256, block_d=64, num_warps=8, num_stages=4),
    (9, 4): LinearConfig(block_n=64, block_v=64, block_d=16, num_warps=8, num_stages=3),
    (10, 2): LinearConfig(block_n=128, block_v=256, block_d=64, num_warps=8, num_stages=4),
    (10, 4): LinearConfig(block_n=64, block_v=64, block_d=16, num_warps=8, num_stages=3),
    ("hip", 2): LinearConfig(block_n=128, block_v=128, block_d=32, num_warps=8, num_stages=2),
    ("hip", 4): LinearConfig(block_n=64, block_v=64, block_d=32, num_warps=4, num_stages=2),
}
# The interpreter simulates one program after another: small tiles, so that tests see many of them.
INTERPRETER_CONFIG = LinearConfig(block_n=16, block_v=32, block_d=16, num_warps=1, num_stages=1, group=2, split=64)


def interpreter_logits_config(vocab: int) -> LogitsConfig:
    """Many pieces of small vocabularies; of real ones as many as a device would make."""
    return LogitsConfig(block_v=64 if vocab < 2048 else LogitsConfig().block_v, num_warps=1)


def linear_config(arch: int | str, itemsize: int) -> LinearConfig:
    """The config for a compute capability's major number (or "hip") and an element size; newer chips: the newest."""
    if isinstance(arch, int):
        arch = min(max(arch, 8), 10)
    return LINEAR_CONFIGS[arch, itemsize]


def tma_pays(arch: int | str, itemsize: int) -> bool:
    """Whether the linear kernel loads through the bulk copy engine: Hopper and later, 16-bit inputs. In fp32 the matmul
    runs on the plain cores, and descriptors only cost it registers (it spilled 432 bytes with them)."""
    return isinstance(arch, int) and arch >= 9 and itemsize == 2
