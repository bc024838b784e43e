"""Tile shapes, reused buffers and tiles of logits, shared by the chunked forward and backward.

A tile is (rows, vocab) float32. Its buffers fit the cores' caches, so that only `weight` (or stored logits) is read
from main memory. The sizes were chosen by measurement; bench/NOTES.md has the figures.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MIB = 1 << 20
EXP_IS_ZERO = -200.0  # exp(-200) and exp2(-200) are 0 in float32
LOW_PRECISION = (torch.bfloat16, torch.float16)
# Most columns that are reduced together. From 32K columns on, torch shares the sum of a single row among its threads,
# and the row's bits would depend on whether it is alone in the batch.
CHUNK = 8192
# torch starts another thread for every GRAIN elements, and its elementwise loops take VECTORS elements at a time.
GRAIN, VECTORS = 32768, 32


@dataclass(frozen=True)
class Limits:
    """Limits on the buffers of one device, in rows or in float32 elements (4 bytes)."""

    tile: int  # one (rows, vocab) buffer; the forward holds two, the backward three
    native_tile: int  # the same for a forward with a native low-precision matmul, which runs faster on wider tiles
    rows: int  # rows of a linear tile
    tall_tile: int  # the tile of a float32 forward with more than 2 * rows rows; reduced in parts of `tile`
    tall_rows: int  # its rows
    product: int  # columns of one float32 matmul of 2 to `rows` rows; a tile is filled by several
    copy: int  # one upcast copy: a chunk of weight, a tile of hidden or the accumulator of a gradient
    rows_per_sweep: int  # rows that share one sweep over the vocabulary; bounds the partials of the chunks


# For any N, all buffers together stay under 64 MiB on the CPU and under 256 MiB on a GPU.
CPU_LIMITS = Limits(
    tile=MIB // 2, native_tile=4 * MIB, rows=512, tall_tile=8 * MIB, tall_rows=2048, product=1024, copy=2 * MIB,
    rows_per_sweep=2048,
)  # fmt: skip
GPU_LIMITS = Limits(
    tile=16 * MIB, native_tile=16 * MIB, rows=2048, tall_tile=16 * MIB, tall_rows=2048, product=CHUNK, copy=8 * MIB,
    rows_per_sweep=16384,
)  # fmt: skip
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
    # Even pieces leave no small last tile. They also avoid widths of a power of two, which take 1.3 times as long.
    return Tiles(rows, chunk * even_share(vocab // chunk, max(1, tile // (rows * chunk))), chunk)


def linear_tiles(hidden: Tensor, weight: Tensor, *, backward: bool = False, limits: Limits | None = None) -> Tiles:
    """Return the tile shape of the linear path: as wide as the limits on tiles and on upcast copies allow.

    Only a tile of few rows holds several chunks: there, many small calls would cost as much as the matmul.
    """
    limits = limits or limits_for(hidden.device)
    num_rows, dim = hidden.shape
    most_rows, most_vocab, tile = limits.rows, min(CHUNK, weight.shape[0]), limits.tile
    in_float32 = hidden.dtype == weight.dtype == torch.float32
    if uses_native_matmul(hidden, weight) and not backward:
        tile = limits.native_tile
        if num_rows <= FEW_ROWS:
            most_vocab = weight.shape[0]
    elif not in_float32:  # operands are upcast, or accumulated in the backward
        most_rows = min(most_rows, max(1, limits.copy // dim))
        most_vocab = min(most_vocab, max(1, limits.copy // dim))
    elif num_rows == 1 and not backward:
        most_vocab, tile = weight.shape[0], limits.native_tile
    elif num_rows > 2 * limits.rows and not backward:
        most_rows, tile = limits.tall_rows, limits.tall_tile
    rows = even_share(num_rows, most_rows)
    vocab = min(most_vocab, max(1, tile // rows))
    if vocab > CHUNK:
        vocab -= vocab % CHUNK
    return Tiles(rows, vocab, min(vocab, CHUNK))


def parts(tile: tuple[int, int], chunk: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut a tile (rows, columns) into parts of about `size` elements: whole chunks, or one that is narrower."""
    rows, columns = tile
    whole = columns - columns % chunk
    height = even_share(rows, max(1, size // chunk))
    width = chunk * max(1, size // (height * chunk))
    for part_rows in spans(0, rows, height):
        for part_columns in [*spans(0, whole, width), *spans(whole, columns, chunk)]:
            yield part_rows, part_columns


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


def in_order(parts: Tensor) -> Tensor:
    """Sum (..., chunks, rows) over the chunks, in their order. torch's sum has another for the last rows of a batch."""
    return parts.cumsum(-2).select(-2, -1)


class Buffer:
    """Memory that is allocated once and reused as contiguous views."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype = torch.float32):
        self._flat = torch.empty(size + 2 * VECTORS * torch.get_num_threads(), device=device, dtype=dtype)

    def view(self, *shape: int) -> Tensor:
        return self._flat[: math.prod(shape)].view(shape)

    def padded(self, count: int) -> Tensor:
        """Return the first `count` elements, and so many more that every thread of torch's gets whole vectors.

        The elements that a thread has left over behind its last vector go through another exp2, with other last bits.
        Which elements these are depends on the batch.
        """
        threads = max(1, min(torch.get_num_threads(), -(-count // GRAIN)))
        return self._flat[: threads * VECTORS * -(-count // (threads * VECTORS))]


class LogitRows:
    """The rows of logits (B, T, V), any strides, with the given indices among B T; None: all. Tiles are read."""

    def __init__(self, logits: Tensor, index: Tensor | None):
        self._logits, self._count = logits, logits.shape[0] * logits.shape[1]
        pitch, inner = logits.stride(0), logits.shape[1] * logits.stride(1)
        one_pitch = logits.shape[0] == 1 or pitch == inner  # a slice [:, :-1] has gaps between its sequences
        self._flat = logits.view(self._count, logits.shape[2]) if one_pitch else None
        self._index = index
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

    def columns(self, named: Tensor) -> Tensor:
        """Return z[i, named[k]] of each kept row, (rows, K) float32; of a token that is no column, any number."""
        column = named.clamp(0, self._logits.shape[2] - 1)
        if self._index is None:
            return self._flat.index_select(1, column).float()
        index = self._index.unsqueeze(1)
        if self._flat is not None:
            return self._flat[index, column].float()
        length = self._logits.shape[1]
        return self._logits[index // length, index % length, column].float()

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

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias, logit_scale: float, softcap, tiles: Tiles,
        limits: Limits | None = None,
    ):  # fmt: skip
        self._inputs = (hidden, weight, bias)
        self._scale, self._softcap = logit_scale, softcap
        self._native = uses_native_matmul(hidden, weight)
        limits = limits or limits_for(hidden.device)
        self._width = limits.product if 1 < tiles.rows <= limits.rows else tiles.vocab
        device, dim = hidden.device, hidden.shape[1]
        self._weight_copy = None if self._keeps(weight) else Buffer(tiles.vocab * dim, device)
        self._hidden_copy = None if self._keeps(hidden) else Buffer(tiles.rows * dim, device)
        self.native_on_cpu = self._native and device.type == "cpu"  # its bfloat16 matmul has no float32 output
        self._rounded = Buffer(tiles.rows * tiles.vocab, device, hidden.dtype) if self.native_on_cpu else None
        self.weight = self.hidden = self._bias = None

    def _keeps(self, operand: Tensor) -> bool:
        return self._native or operand.dtype == torch.float32

    def load_weight(self, columns: slice) -> None:
        _, weight, bias = self._inputs
        self.weight = _loaded(weight[columns], self._weight_copy)
        self._bias = None if bias is None else bias[columns]

    def load_hidden(self, rows: slice) -> None:
        self.hidden = _loaded(self._inputs[0][rows], self._hidden_copy)

    def native_product(self) -> Tensor | None:
        """Return hidden @ weight.T in the inputs' low precision if that is the CPU's native product; otherwise None."""
        if self._rounded is None:
            return None
        return torch.mm(self.hidden, self.weight.T, out=self._rounded.view(self.hidden.shape[0], self.weight.shape[0]))

    def native_logits(self) -> Tensor | None:
        """Return the tile as `native_product` if the logits are nothing else; otherwise None."""
        plain = self._bias is None and self._softcap is None and self._scale == 1.0
        return self.native_product() if plain else None

    def logits(self, out: Tensor) -> Tensor:
        """Write the final logits of the loaded operands to out (rows, vocab) and return it."""
        if self._rounded is not None:
            return self.finish(out.copy_(self.native_product()), slice(None))
        if self._native:
            return self.finish(torch.mm(self.hidden, self.weight.T, out_dtype=torch.float32, out=out), slice(None))
        scale = self._scale if self._softcap is None else self._scale / self._softcap
        for columns in spans(0, len(self.weight), self._width):
            z, weight = out[:, columns], self.weight[columns].T
            if self._bias is None:
                z.addmm_(self.hidden, weight, beta=0, alpha=scale)
            else:
                z.copy_(self._bias[columns].expand_as(z))
                z.addmm_(self.hidden, weight, beta=scale, alpha=scale)
        return out if self._softcap is None else out.tanh_().mul_(self._softcap)

    def finish(self, z: Tensor, columns: slice) -> Tensor:
        """Turn `columns` of a native product, in float32, into logits, in place."""
        if self._bias is not None:
            z.add_(self._bias[columns])
        if self._softcap is None:
            return z if self._scale == 1.0 else z.mul_(self._scale)
        return z.mul_(self._scale / self._softcap).tanh_().mul_(self._softcap)


def _loaded(operand: Tensor, copy: Buffer | None) -> Tensor:
    return operand if copy is None else copy.view(*operand.shape).copy_(operand)
