"""What the chunked forward and backward share: tile shapes, reused buffers, and one tile of final logits.

A tile is (rows, vocab) float32. Its buffers fit the cores' caches, so that only the reads of `weight` (or of stored
logits) go to main memory. Sizes were chosen by measurement: bench/NOTES.md has the figures.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MIB = 1 << 20
EXP_IS_ZERO = -200.0  # exp of it is 0 in float32
LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Limits:
    """How much one device may hold at a time, in elements of float32 (4 bytes)."""

    tile: int  # one (rows, vocab) buffer; the forward holds two, the backward three
    native_tile: int  # the same for the forward of a native low-precision matmul, which likes wider ones
    rows: int  # rows of a linear tile
    copy: int  # one upcast copy: a chunk of weight, a tile of hidden, an accumulator of a gradient
    rows_per_sweep: int  # rows that share one sweep over the vocabulary: bounds the per-chunk partials


# On the CPU all of it together stays under 64 MiB whatever N is, on a GPU under 256 MiB.
CPU_LIMITS = Limits(tile=MIB // 2, native_tile=4 * MIB, rows=512, copy=2 * MIB, rows_per_sweep=2048)
GPU_LIMITS = Limits(tile=16 * MIB, native_tile=16 * MIB, rows=2048, copy=8 * MIB, rows_per_sweep=16384)
# Columns that are reduced together, at most. From 32K on torch shares the sum of a single row among its threads: that
# row's bits would then depend on whether it is alone.
CHUNK = 8192
FEW_ROWS = 16  # up to here a native bfloat16 matmul wins on any CPU: reading `weight` is what takes the time


def limits_for(device: torch.device) -> Limits:
    return CPU_LIMITS if device.type == "cpu" else GPU_LIMITS


@dataclass(frozen=True)
class Tiles:
    rows: int
    vocab: int  # columns of a tile
    chunk: int  # columns that are reduced together; a tile holds a whole number of chunks side by side


def logits_tiles(num_rows: int, vocab: int, device: torch.device) -> Tiles:
    """Tile shape of the logits path. Few rows: more chunks side by side, so that every core has work."""
    chunk = min(CHUNK, vocab)
    # At most half of it all: large buffers for little work are memory that the system has to clear first.
    tile = min(limits_for(device).tile, num_rows * vocab // 2)
    rows = even_share(num_rows, max(1, tile // chunk))
    return Tiles(rows, chunk * max(1, tile // (rows * chunk)), chunk)


def linear_tiles(hidden: Tensor, weight: Tensor, *, backward: bool = False) -> Tiles:
    """Tile shape of the linear path: as wide as the tile's budget, and that of its operands' float32 copies, allow."""
    limits = limits_for(hidden.device)
    num_rows, dim = hidden.shape
    most_rows, most_vocab, tile = limits.rows, min(CHUNK, weight.shape[0]), limits.tile
    in_float32 = hidden.dtype == weight.dtype == torch.float32
    if uses_native_matmul(hidden, weight) and not backward:
        tile = limits.native_tile
    elif not in_float32:  # upcast, or in the backward accumulated
        most_rows = min(most_rows, max(1, limits.copy // dim))
        most_vocab = min(most_vocab, max(1, limits.copy // dim))
    rows = even_share(num_rows, most_rows)
    vocab = min(most_vocab, max(1, tile // rows))
    return Tiles(rows, vocab, vocab)


def even_share(total: int, most: int) -> int:
    """The largest piece when `total` is cut into the fewest even pieces of at most `most`."""
    pieces = max(1, -(-total // most))
    return max(1, -(-total // pieces))


def spans(start: int, stop: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover [start, stop)."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def length(span: slice) -> int:
    return span.stop - span.start


class Buffer:
    """Memory that is taken once and handed out again as a contiguous (rows, columns) view."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype = torch.float32):
        self._flat = torch.empty(size, device=device, dtype=dtype)

    def view(self, rows: int, columns: int) -> Tensor:
        return self._flat[: rows * columns].view(rows, columns)


class LogitRows:
    """The rows of stored logits (B, T, V), any strides, that a mask (B T,) keeps: read by tiles, never copied whole."""

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
        """(rows, columns) in the logits' dtype: a view, or a copy of the tile's size."""
        if self._index is None:
            return self._flat[rows, columns]
        index = self._index[rows]
        if self._flat is not None:
            return self._flat[index, columns]
        length = self._logits.shape[1]
        return self._logits[index // length, index % length, columns]

    def pick(self, targets: Tensor) -> Tensor:
        """z[i, targets[i]] of each kept row, 0 where that is no column."""
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
        """The kept rows of a field (B T,)."""
        return field if self._index is None else field[self._index]

    def spread(self, field: Tensor) -> Tensor:
        """A field of the kept rows as (B T,), 0 elsewhere."""
        return field if self._index is None else field.new_zeros(self._count).index_copy_(0, self._index, field)

    def store(self, out: Tensor, rows: slice, columns: slice, tile: Tensor) -> None:
        """out (B T, V), of this class's row numbers <- tile."""
        out[rows if self._index is None else self._index[rows], columns] = tile.to(out.dtype)


def uses_native_matmul(hidden: Tensor, weight: Tensor) -> bool:
    """Whether low-precision inputs go to the device's own matmul, rather than being upcast to float32 first.

    GPU: always (tensor cores accumulate, and return, float32). CPU: bfloat16 where the chip has units for it (AMX or
    AVX512-BF16), and anywhere for FEW_ROWS; else upcasting is 2 to 4 times as fast. The CPU's
    native product is rounded to bfloat16 (+-0.125 at |z| >= 32), which upcasting avoids. float16 is upcast.
    """
    if hidden.dtype != weight.dtype or hidden.dtype not in LOW_PRECISION:
        return False
    if hidden.device.type != "cpu":
        return hidden.device.type in ("cuda", "xpu")  # elsewhere mm has no out_dtype
    if hidden.dtype != torch.bfloat16:
        return False
    return has_bf16_units() or hidden.shape[0] <= FEW_ROWS


def has_bf16_units() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


class LinearTile:
    """Makes tiles of z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), float32.

    `load_weight` then `load_hidden` choose the tile's sides; `logits` fills a (rows, vocab) buffer.
    Both sides are views where the inputs are float32, else copies in reused buffers.
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
        """`logits` in the inputs' own low precision, where the CPU's native product is all there is to them."""
        if self._rounded is None or self._bias is not None or self._softcap is not None or self._scale != 1.0:
            return None
        out = self._rounded.view(self.hidden.shape[0], self.weight.shape[0])
        return torch.mm(self.hidden, self.weight.T, out=out)

    def logits(self, out: Tensor) -> Tensor:
        """out (rows, vocab) <- the final logits of the loaded rows and columns."""
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
        if self._on_cpu:  # no float32 output from a bfloat16 matmul there
            out.copy_(torch.mm(self.hidden, self.weight.T, out=self._rounded.view(*out.shape)))
        else:
            torch.mm(self.hidden, self.weight.T, out_dtype=torch.float32, out=out)


def _loaded(operand: Tensor, copy: Buffer | None) -> Tensor:
    return operand if copy is None else copy.view(*operand.shape).copy_(operand)
