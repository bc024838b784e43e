"""Tile shapes, reused buffers and tiles of logits, shared by the chunked forward and backward.

A tile is (rows, vocab) float32. Its buffers fit the cores' caches, so that only `weight` (or stored logits) is read
from main memory. The sizes were chosen by measurement; bench/NOTES.md has the figures.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MIB = 1 << 20
EXP_IS_ZERO = -200.0  # exp(-200) is 0 in float32
LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Limits:
    """Limits on the buffers of one device, in rows or in float32 elements (4 bytes)."""

    tile: int  # one (rows, vocab) buffer; the forward holds two, the backward three
    native_tile: int  # the same for a forward with a native low-precision matmul, which runs faster on wider tiles
    rows: int  # rows of a linear tile
    copy: int  # one upcast copy: a chunk of weight, a tile of hidden or the accumulator of a gradient
    rows_per_sweep: int  # rows that share one sweep over the vocabulary; bounds the partials of the chunks


# For any N, all buffers together stay under 64 MiB on the CPU and under 256 MiB on a GPU.
CPU_LIMITS = Limits(tile=MIB // 2, native_tile=4 * MIB, rows=512, copy=2 * MIB, rows_per_sweep=2048)
GPU_LIMITS = Limits(tile=16 * MIB, native_tile=16 * MIB, rows=2048, copy=8 * MIB, rows_per_sweep=16384)
# Most columns that are reduced together. From 32K columns on, torch shares the sum of a single row among its threads,
# and the row's bits would depend on whether it is alone in the batch.
CHUNK = 8192
FEW_ROWS = 16  # up to this many rows a native bfloat16 matmul wins on any CPU: reading `weight` dominates


def limits_for(device: torch.device) -> Limits:
    return CPU_LIMITS if device.type == "cpu" else GPU_LIMITS


@dataclass(frozen=True)
class Tiles:
    rows: int
    vocab: int  # columns of a tile
    chunk: int  # columns that are reduced together; a tile holds whole chunks side by side


def logits_tiles(num_rows: int, vocab: int, device: torch.device) -> Tiles:
    """Return the tile shape of the logits path. With few rows, more chunks lie side by side to occupy every core."""
    chunk = min(CHUNK, vocab)
    # At most half of all logits: the system clears new memory first, which does not pay off for little work.
    tile = min(limits_for(device).tile, num_rows * vocab // 2)
    rows = even_share(num_rows, max(1, tile // chunk))
    return Tiles(rows, chunk * max(1, tile // (rows * chunk)), chunk)


def linear_tiles(hidden: Tensor, weight: Tensor, *, backward: bool = False) -> Tiles:
    """Return the tile shape of the linear path: as wide as the limits on tiles and on upcast copies allow."""
    limits = limits_for(hidden.device)
    num_rows, dim = hidden.shape
    most_rows, most_vocab, tile = limits.rows, min(CHUNK, weight.shape[0]), limits.tile
    in_float32 = hidden.dtype == weight.dtype == torch.float32
    if uses_native_matmul(hidden, weight) and not backward:
        tile = limits.native_tile
    elif not in_float32:  # operands are upcast, or accumulated in the backward
        most_rows = min(most_rows, max(1, limits.copy // dim))
        most_vocab = min(most_vocab, max(1, limits.copy // dim))
    rows = even_share(num_rows, most_rows)
    vocab = min(most_vocab, max(1, tile // rows))
    return Tiles(rows, vocab, vocab)


def even_share(total: int, most: int) -> int:
    """Cut `total` into the fewest even pieces of at most `most` and return the largest piece."""
    pieces = max(1, -(-total // most))
    return max(1, -(-total // pieces))


def spans(start: int, stop: int, step: int) -> Iterator[slice]:
    """Yield consecutive slices of at most `step` that cover [start, stop)."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def length(span: slice) -> int:
    return span.stop - span.start


class Buffer:
    """Memory that is allocated once and reused as contiguous (rows, columns) views."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype = torch.float32):
        self._flat = torch.empty(size, device=device, dtype=dtype)

    def view(self, rows: int, columns: int) -> Tensor:
        return self._flat[: rows * columns].view(rows, columns)


class LogitRows:
    """The rows of logits (B, T, V), any strides, that a mask (B T,) keeps. Tiles of them are read; no full copy."""

    def __init__(self, logits: Tensor, mask: Tensor | None):
        self._logits, self._count = logits, logits.shape[0] * logits.shape[1]
        pitch, inner = logits.stride(0), logits.shape[1] * logits.stride(1)
        one_pitch = logits.shape[0] == 1 or pitch == inner  # a slice [:, :-1] has gaps between its sequences
        self._flat = logits.view(self._count, logits.shape[2]) if one_pitch else None
        self._index = None if mask is None else mask.nonzero().squeeze(1)
        if self._index is None and self._flat is None:
            self._index = torch.arange(self._count, device=logits.device)

    def __len__(self) -> int:
        return self._count if self._index is None else len(self._index)

    def load(self, rows: slice, columns: slice) -> Tensor:
        """Return the tile (rows, columns) in the logits' dtype, as a view or a copy."""
        if self._index is None:
            return self._flat[rows, columns]
        index = self._index[rows]
        if self._flat is not None:
            return self._flat[index, columns]
        length = self._logits.shape[1]
        return self._logits[index // length, index % length, columns]

    def pick(self, targets: Tensor) -> Tensor:
        """Return z[i, targets[i]] of each kept row; 0 if the target is no column."""
        column = targets.clamp(0, self._logits.shape[2] - 1)
        if self._index is None:
            picked = self._flat.gather(1, column.unsqueeze(1)).squeeze(1)
        elif self._flat is not None:
            picked = self._flat[self._index, column]
        else:
            length = self._logits.shape[1]
            picked = self._logits[self._index // length, self._index % length, column]
        return torch.where(column == targets, picked.float(), 0.0)

    def keep(self, field: Tensor) -> Tensor:
        """Return the kept rows of a field (B T,)."""
        return field if self._index is None else field[self._index]

    def spread(self, field: Tensor) -> Tensor:
        """Return a field of the kept rows as (B T,), with 0 for the other rows."""
        return field if self._index is None else field.new_zeros(self._count).index_copy_(0, self._index, field)

    def store(self, out: Tensor, rows: slice, columns: slice, tile: Tensor) -> None:
        """Write the tile to the kept rows `rows` of out (B T, V)."""
        out[rows if self._index is None else self._index[rows], columns] = tile.to(out.dtype)


def uses_native_matmul(hidden: Tensor, weight: Tensor) -> bool:
    """Return whether low-precision inputs use the device's own matmul. Otherwise they are upcast to float32 first.

    On a GPU they always do: tensor cores accumulate and return float32. On a CPU float16 is always upcast. bfloat16
    uses the native matmul if the chip has units for it (AMX or AVX512-BF16) or if there are at most FEW_ROWS rows;
    otherwise upcasting is 2 to 4 times as fast. The CPU's native product is rounded to bfloat16 (+-0.125 at |z| >= 32).
    """
    if hidden.dtype != weight.dtype or hidden.dtype not in LOW_PRECISION:
        return False
    if hidden.device.type != "cpu":
        return hidden.device.type in ("cuda", "xpu")  # on other devices mm has no out_dtype
    if hidden.dtype != torch.bfloat16:
        return False
    return has_bf16_units() or hidden.shape[0] <= FEW_ROWS


def has_bf16_units() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


class LinearTile:
    """Makes float32 tiles of z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap).

    `load_weight` and then `load_hidden` select the operands; `logits` fills a (rows, vocab) buffer. Float32 operands
    are views of the inputs, others are copies in reused buffers.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias, logit_scale: float, softcap, tiles: Tiles):
        self._inputs = (hidden, weight, bias)
        self._scale, self._softcap = logit_scale, softcap
        self._native = uses_native_matmul(hidden, weight)
        self._on_cpu = hidden.device.type == "cpu"
        dim, device = hidden.shape[1], hidden.device
        self._weight_copy = None if self._keeps(weight) else Buffer(tiles.vocab * dim, device)
        self._hidden_copy = None if self._keeps(hidden) else Buffer(tiles.rows * dim, device)
        rounded = self._native and self._on_cpu
        self._rounded = Buffer(tiles.rows * tiles.vocab, device, hidden.dtype) if rounded else None
        self.weight = self.hidden = self._bias = None

    def _keeps(self, operand: Tensor) -> bool:
        return self._native or operand.dtype == torch.float32

    def load_weight(self, columns: slice) -> None:
        _, weight, bias = self._inputs
        self.weight = _loaded(weight[columns], self._weight_copy)
        self._bias = None if bias is None else bias[columns]

    def load_hidden(self, rows: slice) -> None:
        self.hidden = _loaded(self._inputs[0][rows], self._hidden_copy)

    def native_logits(self) -> Tensor | None:
        """Return the tile in the inputs' low precision if it is just the CPU's native product; otherwise None."""
        if self._rounded is None or self._bias is not None or self._softcap is not None or self._scale != 1.0:
            return None
        out = self._rounded.view(self.hidden.shape[0], self.weight.shape[0])
        return torch.mm(self.hidden, self.weight.T, out=out)

    def logits(self, out: Tensor) -> Tensor:
        """Write the final logits of the loaded operands to out (rows, vocab) and return it."""
        scale = self._scale if self._softcap is None else self._scale / self._softcap
        if self._native:
            self._native_product(out)
            if self._bias is not None:
                out.add_(self._bias)
            if scale != 1.0:
                out.mul_(scale)
        elif self._bias is not None:
            out.copy_(self._bias.expand_as(out))
            out.addmm_(self.hidden, self.weight.T, beta=scale, alpha=scale)
        else:
            out.addmm_(self.hidden, self.weight.T, beta=0, alpha=scale)
        return out if self._softcap is None else out.tanh_().mul_(self._softcap)

    def _native_product(self, out: Tensor) -> None:
        if self._on_cpu:  # the CPU's bfloat16 matmul has no float32 output
            out.copy_(torch.mm(self.hidden, self.weight.T, out=self._rounded.view(*out.shape)))
        else:
            torch.mm(self.hidden, self.weight.T, out_dtype=torch.float32, out=out)


def _loaded(operand: Tensor, copy: Buffer | None) -> Tensor:
    return operand if copy is None else copy.view(*operand.shape).copy_(operand)
