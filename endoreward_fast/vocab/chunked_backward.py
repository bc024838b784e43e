"""Gradients of the vocabulary statistics. Logits are recomputed tile by tile in a bounded workspace.

With p = exp((z - shift) / alpha - log_total), H the entropy, and one upstream gradient g per row and statistic:

    dz_j = p_j (g_lse - g_entropy (log p_j + H)) / alpha + g_target [j = target] + g_mean / V + sum_k g_k [j = named_k]
    dy   = logit_scale dz (1 - (z / softcap)^2)                      without a softcap the last factor is 1
    dhidden = dy @ weight    dweight = dy^T @ hidden    dbias = sum_rows dy

A row that is all -inf has p = 0. Sums over the vocabulary and over rows accumulate in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..types import NO_TARGET
from .chunked_tiles import (
    EXP_IS_ZERO,
    Buffer,
    LinearTile,
    LogitRows,
    length,
    limits_for,
    linear_tiles,
    logits_tiles,
    spans,
)
from .rows import KeptRows, RowGrads, RowStats, per_row


@torch.no_grad()
def logits_backward(
    logits: Tensor, targets: Tensor, stats: RowStats, grads: RowGrads, *, mask: Tensor | None, alpha: float | Tensor,
    named: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return dlogits (B, T, V), contiguous, in the logits' dtype; 0 off the mask (N,)."""
    vocab = logits.shape[-1]
    kept = KeptRows(mask)
    source = LogitRows(logits, kept.index)
    tiles = logits_tiles(len(source), vocab, logits.device)
    upstream = upstream_factors(targets, stats, grads, vocab, alpha, named=named).kept(kept.take)
    z_buffer, scratch = (Buffer(tiles.rows * tiles.vocab, logits.device) for _ in range(2))
    make = torch.empty_like if mask is None else torch.zeros_like
    dlogits = make(logits, memory_format=torch.contiguous_format)
    for rows in spans(0, len(source), tiles.rows):
        row_upstream = upstream.kept(lambda field, rows=rows: field[rows])
        for columns in spans(0, vocab, tiles.vocab):
            shape = (length(rows), length(columns))
            z = z_buffer.view(*shape).copy_(source.load(rows, columns))
            source.store(dlogits.view(-1, vocab), rows, columns, row_upstream.dz(z, columns, scratch.view(*shape)))
    return dlogits


@torch.no_grad()
def linear_backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, stats: RowStats, grads: RowGrads, *, mask: Tensor | None = None,
    bias: Tensor | None, logit_scale: float, softcap: float | None, alpha: float | Tensor,
    needs: tuple[bool, bool, bool], named: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return (dhidden, dweight, dbias) in the inputs' dtypes; None where `needs` is False."""
    kept = KeptRows(mask)
    hidden, targets = kept.take(hidden), kept.take(targets)
    alpha = kept.take(alpha) if isinstance(alpha, Tensor) else alpha
    stats, grads = RowStats(*map(kept.take, stats)), RowGrads(*map(kept.take, grads))
    upstream = upstream_factors(targets, stats, grads, weight.shape[0], alpha, logit_scale, named)
    source = _TileGradients(hidden, weight, bias, logit_scale, softcap, upstream)
    dhidden, *others = sweep_gradients(
        source, hidden, weight, bias, needs, most_elements=limits_for(hidden.device).copy
    )
    return kept.spread(dhidden), *others


def sweep_gradients(
    source, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool], most_elements: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Sum (dhidden, dweight, dbias) over the tiles of dy that `source` makes (see _TileGradients).

    A sweep over the vocabulary finishes dweight chunk by chunk, but dhidden only at its end. One sweep computes both if
    the float32 accumulator of dhidden is the output itself, or fits the workspace (`most_elements` float32 numbers).
    Otherwise dhidden is computed in separate sweeps over blocks of rows that fit: four matmuls instead of three.
    """
    dhidden, dweight, dbias = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )
    rows_that_fit = max(1, most_elements // hidden.shape[1])
    everything = slice(0, hidden.shape[0])
    if dhidden is None or hidden.dtype == torch.float32 or hidden.shape[0] <= rows_that_fit:
        _sweep(source, everything, weight.shape[0], dhidden, dweight, dbias)
    else:
        for rows in spans(0, hidden.shape[0], rows_that_fit):
            _sweep(source, rows, weight.shape[0], dhidden, None, None)
        if dweight is not None or dbias is not None:
            _sweep(source, everything, weight.shape[0], None, dweight, dbias)
    return dhidden, dweight, dbias


def _sweep(source, rows: slice, vocab: int, dhidden: Tensor | None, dweight: Tensor | None, dbias: Tensor | None):
    """Compute the given rows of dhidden, and dweight and dbias of these rows, in one pass over the vocabulary."""
    into_hidden = None if dhidden is None else _accumulator(dhidden[rows])
    one_tile = 0 < length(rows) <= source.tiles.rows
    for columns in spans(0, vocab, source.tiles.vocab):
        source.load_weight(columns)
        into_weight = None if dweight is None or one_tile else _accumulator(dweight[columns])
        into_bias = None if dbias is None else dbias.new_zeros(length(columns), dtype=torch.float32)
        for tile_rows in spans(rows.start, rows.stop, source.tiles.rows):
            source.load_hidden(tile_rows)
            dy = source.dy(tile_rows, columns)
            if into_bias is not None:
                into_bias.add_(dy.sum(0, dtype=torch.float32))
            if into_weight is not None:
                _add_product(into_weight, dy.T, source.hidden)
            elif dweight is not None:
                _write_product(dweight[columns], dy.T, source.hidden)
            if into_hidden is not None:
                in_sweep = slice(tile_rows.start - rows.start, tile_rows.stop - rows.start)
                _add_product(into_hidden[in_sweep], dy, source.weight)
        if into_weight is not None:
            _store(into_weight, dweight, columns)
        _store(into_bias, dbias, columns)
    _store(into_hidden, dhidden, rows)


@dataclass(frozen=True)
class _Upstream:
    """Factors of dz, each (N, 1); at_named is (N, K). With y = (z - shift) / alpha:

        dz = exp(y) (constant + slope y) + each_column + at_target [j = target] + sum_k at_named_k [j = named_k]

    constant and slope contain the factor exp(-log_total). Subtracting log_total from every y would round the largest p
    the most.
    """

    shift: Tensor
    constant: Tensor
    slope: Tensor | None
    each_column: Tensor | None
    at_target: Tensor
    targets: Tensor
    at_named: Tensor | None
    alpha: float | Tensor
    named: Tensor | None

    def kept(self, select: Callable[[Tensor], Tensor]) -> "_Upstream":
        """Return the factors of the rows that `select` picks from a field."""
        of_rows = [getattr(self, f.name) for f in fields(self) if f.name not in ("alpha", "named")]
        alpha = select(self.alpha) if isinstance(self.alpha, Tensor) else self.alpha
        return _Upstream(*(None if t is None else select(t) for t in of_rows), alpha, self.named)

    def dz(self, z: Tensor, columns: slice, scratch: Tensor) -> Tensor:
        """Return the gradient of z (rows, columns) in one of the two buffers. Overwrites both."""
        y = z.sub_(self.shift)
        if isinstance(self.alpha, Tensor) or self.alpha != 1.0:
            y.div_(self.alpha)
        if self.slope is None:
            dz = y.exp_().mul_(self.constant)
        else:
            y.clamp_(min=EXP_IS_ZERO)  # 0 * (slope * -inf) would be NaN
            weight = torch.exp(y, out=scratch)
            dz = torch.addcmul(self.constant, y, self.slope, out=y).mul_(weight)
        if self.each_column is not None:
            dz.add_(self.each_column)
        index = self.targets - columns.start
        here = (index >= 0) & (index < length(columns))
        dz.scatter_add_(1, torch.where(here, index, 0), torch.where(here, self.at_target, 0.0))
        if self.named is not None and self.at_named is not None:
            for k in range(len(self.named)):  # one at a time: a token may be named twice
                index = self.named[k] - columns.start
                here = (index >= 0) & (index < length(columns))
                grad = torch.where(here, self.at_named[:, k : k + 1], 0.0)
                dz.scatter_add_(1, torch.where(here, index, 0).expand(len(dz), 1), grad)
        return dz


def upstream_factors(
    targets: Tensor, stats: RowStats, grads: RowGrads, vocab: int, alpha: float | Tensor, scale: float = 1.0,
    named: Tensor | None = None,
) -> _Upstream:  # fmt: skip
    """Return the factors of dz from the statistics and their upstream gradients. `scale` multiplies every dz."""
    dead = stats.log_total == -torch.inf  # all -inf: p is 0
    shift, log_total = stats.shift.masked_fill(dead, 0.0), stats.log_total.masked_fill(dead, 0.0)
    share = torch.exp(-log_total).masked_fill(dead, 0.0) * (scale / alpha)
    constant, slope = grads.lse, None
    if grads.entropy is not None:  # log p + H = y - log_total + H
        constant, slope = grads.lse + grads.entropy * (log_total - stats.entropy), -grads.entropy * share
    each_column = None if grads.logit_mean is None else grads.logit_mean * (scale / vocab)
    at_target = torch.where(targets == NO_TARGET, 0.0, grads.target_logit * scale)
    of_rows = (shift, constant * share, slope, each_column, at_target, targets)
    at_named = None if grads.named is None else grads.named * scale
    return _Upstream(*(None if t is None else t.unsqueeze(1) for t in of_rows), at_named, per_row(alpha), named)


class _TileGradients:
    """Makes tiles of dy in float32 with torch: recomputes logits, takes their gradient, goes back through the softcap.

    `tiles` is the tile shape. `load_weight` and `load_hidden` select a tile and set its operands `weight` and `hidden`.
    """

    def __init__(self, hidden, weight, bias, logit_scale: float, softcap: float | None, upstream: _Upstream):
        self.tiles = tiles = linear_tiles(hidden, weight, backward=True)
        self._tile = LinearTile(hidden, weight, bias, logit_scale, softcap, tiles)
        self._softcap, self._upstream = softcap, upstream
        count = 2 if softcap is None else 3
        self._buffers = [Buffer(tiles.rows * tiles.vocab, hidden.device) for _ in range(count)]
        self.load_weight, self.load_hidden = self._tile.load_weight, self._tile.load_hidden

    @property
    def weight(self) -> Tensor:
        return self._tile.weight

    @property
    def hidden(self) -> Tensor:
        return self._tile.hidden

    def dy(self, rows: slice, columns: slice) -> Tensor:
        """Return dy (rows, columns) for the loaded operands. The tile is valid until the next call."""
        z, scratch, *slopes = (buffer.view(length(rows), length(columns)) for buffer in self._buffers)
        self._tile.logits(z)
        if self._softcap is not None:
            torch.mul(z, z, out=slopes[0]).mul_(-1 / self._softcap**2).add_(1.0)
        dz = self._upstream.kept(lambda field: field[rows]).dz(z, columns, scratch)
        return dz.mul_(slopes[0]) if slopes else dz


def _accumulator(out: Tensor) -> Tensor:
    """Return float32 zeros of out's shape: `out` itself if it is float32."""
    return out.zero_() if out.dtype == torch.float32 else torch.zeros_like(out, dtype=torch.float32)


def _store(accumulated: Tensor | None, out: Tensor | None, where: slice) -> None:
    if out is not None and accumulated.data_ptr() != out[where].data_ptr():
        out[where] = accumulated


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `into` in float32. Each operand is float32 or low precision."""
    if left.dtype == right.dtype == torch.float32:
        into.addmm_(left, right)
    elif right.device.type == "cpu":
        into.addmm_(left.float(), right.float())
    else:
        torch.addmm(into, left.to(right.dtype), right, out_dtype=torch.float32, out=into)


def _write_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write left @ right, summed in float32, to `out`."""
    if left.dtype == right.dtype == out.dtype and (out.dtype == torch.float32 or out.device.type != "cpu"):
        torch.mm(left, right, out=out)
    elif left.dtype == right.dtype == torch.float32 or right.device.type == "cpu":
        out.copy_(torch.mm(left.float(), right.float()))
    else:
        out.copy_(torch.mm(left.to(right.dtype), right, out_dtype=torch.float32))
