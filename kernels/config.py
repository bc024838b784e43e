"""Tile sizes by architecture and dtype.

The table is static. Without autotuning, a new shape starts at once, and a row's bits do not depend on earlier calls.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LogitsConfig:
    """One program reads block_v logits of one row into registers: 32 per thread at the default."""

    block_v: int = 8192
    num_warps: int = 8


@dataclass(frozen=True)
class LinearConfig:
    """One program handles block_n tokens and one split of the vocabulary, in tiles of block_v by block_d of D."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group: int = 8  # token tiles that process a split together and read its weight from L2
    persistent: int = 0  # programs per multiprocessor in a persistent grid; 0: one program per piece of work


MOST_TILES = 31  # of a split: the linear kernel keeps one bit per tile in an int32

# Chosen from compiler output (bench/results/kernel-report.md), not yet from timings: the largest tile that does not
# spill on that architecture, for any alignment of D. The pointer kernel needs registers for addresses: at 128x256x64 it
# spilled 32 to 1016 bytes on sm_90. On sm_100 the 128x256 tile spilled up to 224 bytes.
WIDE = LinearConfig(block_n=128, block_v=256, block_d=64, num_warps=8, num_stages=4)
SQUARE = LinearConfig(block_n=128, block_v=128, block_d=64, num_warps=8, num_stages=4)
NARROW = LinearConfig(block_n=128, block_v=128, block_d=32, num_warps=8, num_stages=4)
EXACT = LinearConfig(block_n=64, block_v=64, block_d=16, num_warps=16, num_stages=3)  # fp32, without tensor cores
LINEAR_CONFIGS = {
    # (major compute capability or "hip", bytes per element, whether loads use TMA): config
    (8, 2, False): replace(NARROW, num_stages=3),
    (8, 4, False): EXACT,
    (9, 2, False): NARROW,
    (9, 2, True): WIDE,
    (9, 4, False): EXACT,
    (10, 2, False): NARROW,
    (10, 2, True): SQUARE,
    (10, 4, False): EXACT,
    (12, 2, False): NARROW,  # 99 KiB of shared memory; no wgmma or tcgen05, which profit from wider tiles
    (12, 4, False): EXACT,
    ("hip", 2, False): replace(NARROW, num_stages=2),
    ("hip", 4, False): LinearConfig(block_n=64, block_v=64, block_d=32, num_warps=4, num_stages=2),
}
# Candidates to time against the table's choice on GPUs with wgmma. Two programs per multiprocessor, say, can hide the
# epilogue of one under the matmul of the other, but need smaller tiles. None has been timed.
LINEAR_SEARCH = (
    WIDE,
    replace(WIDE, persistent=1),
    replace(WIDE, num_stages=3),
    replace(WIDE, group=16),
    SQUARE,
    replace(SQUARE, num_warps=4, num_stages=3),
    replace(SQUARE, num_warps=4, num_stages=3, persistent=2),
)
# The interpreter runs one program after another. Small tiles let a test cover many of them.
INTERPRETER_CONFIG = LinearConfig(block_n=16, block_v=32, block_d=16, num_warps=1, num_stages=1, group=2)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. triton.cdiv is for kernels: on the host it takes several microseconds."""
    return -(-a // b)


def vocab_split(vocab: int, block_v: int, processors: int) -> int:
    """Return the vocabulary entries of a split: whole tiles, and about one split per processor.

    A few tokens then read the weight with the whole device. The batch has no say, so results do not depend on it.
    Partials take 8 bytes per token and split: 31 MB for 32768 tokens and the 119 splits of V = 151936 on an H100.
    """
    return block_v * min(MOST_TILES, cdiv(cdiv(vocab, block_v), processors))


def interpreter_logits_config(vocab: int) -> LogitsConfig:
    """Return small blocks for small vocabularies (many pieces to test), and the device's block size for real ones."""
    return LogitsConfig(block_v=128 if vocab < 2048 else LogitsConfig().block_v, num_warps=1)


def linear_config(arch: int | str, itemsize: int, tma: bool) -> LinearConfig:
    """Return the config for a major compute capability (or "hip"), an element size and a way of loading."""
    return LINEAR_CONFIGS[_family(arch), itemsize, tma]


def tma_pays(arch: int | str, itemsize: int) -> bool:
    """Return whether the linear kernel should load through TMA: on Hopper and data-centre Blackwell, 16-bit inputs.

    The fp32 matmul does not use tensor cores, and descriptors only cost it registers: it spilled 432 bytes with them.
    """
    return (_family(arch), itemsize, True) in LINEAR_CONFIGS


def _family(arch: int | str) -> int | str:
    """Return the table's key for a major compute capability: 11 uses the row of 10; above 12, that of 12."""
    return arch if isinstance(arch, str) else {11: 10}.get(arch, min(arch, 12))
