"""The divergence of two vocabulary distributions in a bounded workspace, with torch, on any device.

Tiles of both logits, stored or computed, pass through the same buffers. KL needs one pass. With the largest logits m
and e = exp((z_p - m_p) / alpha), a chunk c of a row gives

    s_p, s_q = sum exp((z - m) / alpha)          gap = sum e ((z_p - m_p) - (z_q - m_q)) / alpha

and with w = exp((m_p - M_p) / alpha), M the maxima of the row and L = log sum_c w s of p and of q,

    KL(p || q) = sum_c w (gap + s_p ((m_p - M_p) - (m_q - M_q)) / alpha) / sum_c w s_p + L_q - L_p

JSD needs M and L of the whole row, and so a second pass, which computes logits again. Equal rows give exactly 0. All
arithmetic is float32. Stored logits: a row's bits do not depend on the batch around it. From hidden states they may,
because those of the library's matmul may.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..chunked_tiles import (
    EXP_IS_ZERO,
    Buffer,
    Limits,
    LinearTile,
    LogitRows,
    Tiles,
    even_share,
    in_order,
    length,
    limits_for,
    linear_tiles,
    logits_tiles,
    spans,
)
from ..rows import KeptRows
from .rows import LOWEST, Head, Stats

LOG2_E = 1 / math.log(2)


@torch.no_grad()
def logits_forward(p: Tensor, q: Tensor, *, mask: Tensor | None, beta: float | None, alpha: float) -> Stats:
    """Return the statistics of logits p and q (B, T, V), any strides; 0 off the mask (N,)."""
    kept = KeptRows(mask)
    return _spread(_forward(StoredPair(p, q, kept.index), beta, alpha), kept)


@torch.no_grad()
def linear_forward(p: Head, q: Head, *, mask: Tensor | None, beta: float | None, alpha: float) -> Stats:
    """Return the statistics of two heads of V words each. Rows off the mask skip the matmuls."""
    kept = KeptRows(mask)
    pair = LinearPair(*(head._replace(hidden=kept.take(head.hidden)) for head in (p, q)))
    return _spread(_forward(pair, beta, alpha), kept)


class StoredPair:
    """Tiles of two stored logits (B, T, V). `load` gives float32 tiles, which may be views of the logits."""

    def __init__(self, p: Tensor, q: Tensor, index: Tensor | None):
        self.sources = LogitRows(p, index), LogitRows(q, index)
        self.rows, self.vocab, self.device = len(self.sources[0]), p.shape[-1], p.device
        tiles = logits_tiles(self.rows, self.vocab, p.device)
        # Six buffers and not two: a quarter of the rows keeps them within a GPU's limit.
        rows = even_share(tiles.rows, max(1, tiles.rows // 4)) if p.device.type != "cpu" else tiles.rows
        self.tiles = Tiles(rows, tiles.vocab, tiles.chunk)
        self._columns = slice(0)

    def select(self, columns: slice) -> None:
        self._columns = columns

    def load(self, rows: slice, out: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
        for source, buffer in zip(self.sources, out, strict=True):
            z = source.load(rows, self._columns)
            yield z if z.dtype == torch.float32 else buffer.copy_(z)


class LinearPair:
    """Tiles of the logits of two heads, computed into the given buffers."""

    def __init__(self, p: Head, q: Head):
        limits = linear_limits(p.hidden.device)
        self.rows, self.vocab, self.device = p.hidden.shape[0], p.weight.shape[0], p.hidden.device
        self.tiles = common_tiles(p, q, limits)
        self.heads = tuple(LinearTile(*head, self.tiles, limits) for head in (p, q))

    def select(self, columns: slice) -> None:
        for head in self.heads:
            head.load_weight(columns)

    def load(self, rows: slice, out: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
        for head, buffer in zip(self.heads, out, strict=True):
            head.load_hidden(rows)
            yield head.logits(buffer)


def linear_limits(device: torch.device) -> Limits:
    """Return the device's limits, with smaller tiles on a GPU: a pair of heads takes six buffers and not two."""
    limits = limits_for(device)
    return limits if device.type == "cpu" else replace(limits, tile=limits.tile // 4, native_tile=limits.tile // 4)


def common_tiles(p: Head, q: Head, limits: Limits) -> Tiles:
    """Return a tile shape that both heads can fill. A tile is one chunk."""
    both = [linear_tiles(head.hidden, head.weight, backward=True, limits=limits) for head in (p, q)]
    rows, vocab = min(tiles.rows for tiles in both), min(tiles.vocab for tiles in both)
    return Tiles(rows, vocab, vocab)


def _forward(pair, beta: float | None, alpha: float) -> Stats:
    stats = Stats(*(torch.zeros(pair.rows, device=pair.device) for _ in Stats._fields))
    tiles, scale = pair.tiles, LOG2_E / alpha
    work = [Buffer(tiles.rows * tiles.vocab, pair.device) for _ in range(3 if beta is None else 5)]
    whole = pair.vocab - pair.vocab % tiles.chunk
    columns = [*spans(0, whole, tiles.vocab), *spans(whole, pair.vocab, tiles.chunk)]
    for sweep in spans(0, pair.rows, limits_for(pair.device).rows_per_sweep):
        passes = [_Peaks(pair, sweep, scale, beta is None)]
        if beta is not None:
            passes.append(_Mixture(pair, sweep, scale, beta))
        rows = Stats(*(field[sweep] for field in stats))
        for reduction in passes:
            for part in columns:
                pair.select(part)
                chunks = slice(part.start // tiles.chunk, -(-part.stop // tiles.chunk))
                for block in spans(sweep.start, sweep.stop, tiles.rows):
                    shape = length(block), length(chunks), length(part) // length(chunks)
                    y = tuple(buffer.view(shape[0], length(part)) for buffer in work[:2])
                    z = (tile.unflatten(1, shape[1:]) for tile in pair.load(block, y))
                    here = slice(block.start - sweep.start, block.stop - sweep.start)
                    reduction.reduce(*z, work, chunks, here, Stats(*(field[here] for field in rows)))
            reduction.finish(rows)
    return stats


class _Peaks:
    """First pass: maxima and sums of both rows and, for KL, the divergence. One (chunks, rows) tensor per partial."""

    def __init__(self, pair, sweep: slice, scale: float, kl: bool):
        shape = -(-pair.vocab // pair.tiles.chunk), length(sweep)
        self._peaks, self._totals = torch.empty((2, 2, *shape), device=pair.device)
        self._gap = torch.empty(shape, device=pair.device) if kl else None
        self._scale = scale

    def reduce(self, z_p: Tensor, z_q: Tensor, work: list[Buffer], chunks: slice, rows: slice, _: Stats) -> None:
        shape, scratch = z_p.shape, work[2]
        outside = None if self._gap is None else _excludes(z_q, z_p)  # before the tiles are overwritten
        exponents = []
        for i, z in ((1, z_q), (0, z_p)):  # p last: its weights stay in scratch
            peak = z.amax(-1)
            self._peaks[i, chunks, rows] = peak.T
            y = exponent(z, _finite(peak).unsqueeze(-1), self._scale, work[i].view(*shape))
            if i == 0 and self._gap is not None:
                y.clamp_(min=EXP_IS_ZERO)  # 0 * -inf would be NaN
            torch.exp2(work[i].padded(y.numel()), out=scratch.padded(y.numel()))
            self._totals[i, chunks, rows] = scratch.view(*shape).sum(-1).T
            exponents.append(y)
        if self._gap is None:
            return
        y_q, y_p = exponents
        gap = y_p.sub_(y_q.clamp_(min=LOWEST)).mul_(scratch.view(*shape)).sum(-1)
        self._gap[chunks, rows] = (gap if outside is None else gap.masked_fill_(outside, torch.inf)).T

    def finish(self, out: Stats) -> None:
        """Write shift and log_total, for KL all statistics."""
        tops = self._peaks.amax(1)
        # In nats: torch's exp, unlike its exp2, gives a number the same bits wherever it stands in the batch.
        offsets = (self._peaks - _finite(tops).unsqueeze(1)).mul_(self._scale / LOG2_E)  # (2, chunks, rows)
        weights = torch.exp(offsets).mul_(self._totals)
        totals = in_order(weights)
        dead = totals == 0
        for i, (shift, log_total) in enumerate(((out.shift_p, out.log_total_p), (out.shift_q, out.log_total_q))):
            shift.copy_(_finite(tops[i]))
            log_total.copy_(totals[i].masked_fill(dead[i], 1.0).log())
        alive = ~(dead[0] | dead[1])
        if self._gap is None:
            out.live.copy_(alive)
            return
        outside = self._gap == torch.inf
        ahead = offsets[0].clamp(min=EXP_IS_ZERO)
        means = torch.exp(ahead).mul_(self._gap.masked_fill(outside, 0.0)).div_(LOG2_E)
        means += weights[0] * (ahead - offsets[1].clamp(min=LOWEST))
        kl = in_order(means) / totals[0].masked_fill(dead[0], 1.0) + (out.log_total_q - out.log_total_p)
        kl.masked_fill_(dead[0], 0.0)
        infinite = outside.any(0)
        out.divergence.copy_(non_negative(kl).masked_fill_(infinite, torch.inf))
        out.mean_p.copy_(kl.masked_fill_(infinite | ~alive, 0.0))
        out.live.copy_(alive & ~infinite)


class _Mixture:
    """Second pass: KL(p || m) and KL(q || m), from the statistics of the first."""

    def __init__(self, pair, sweep: slice, scale: float, beta: float):
        shape = -(-pair.vocab // pair.tiles.chunk), length(sweep)
        self._over = torch.empty((2, *shape), device=pair.device)
        self._scale, self._beta = scale, beta

    def reduce(self, z_p: Tensor, z_q: Tensor, work: list[Buffer], chunks: slice, rows: slice, stats: Stats) -> None:
        shape = z_p.shape
        y_p = exponent(z_p, per_row(stats.shift_p, 3), self._scale, work[0].view(*shape))
        y_q = exponent(z_q, per_row(stats.shift_q, 3), self._scale, work[1].view(*shape))
        logs = over_mixture(y_p, y_q, stats, self._beta, work)
        for i, (log, log_total) in enumerate(zip(logs, (stats.log_total_p, stats.log_total_q), strict=True)):
            torch.exp2(work[i].padded(log.numel()), out=work[i].padded(log.numel()))
            over = log.mul_(work[i].view(*shape)).sum(-1)
            self._over[i, chunks, rows] = over.mul_(torch.exp(-log_total).unsqueeze(-1)).T

    def finish(self, out: Stats) -> None:
        over_p, over_q = in_order(self._over)
        out.divergence.copy_(non_negative(self._beta * over_p + (1 - self._beta) * over_q))
        out.mean_p.copy_(over_p)
        out.mean_q.copy_(over_q)


def exponent(z: Tensor, shift: Tensor, scale: float, out: Tensor) -> Tensor:
    """Write (z - shift) scale to `out`. Scaling first would round a common offset into the differences."""
    return torch.sub(z, shift, out=out).mul_(scale)


def over_mixture(y_p: Tensor, y_q: Tensor, stats: Stats, beta: float, work: list[Buffer]) -> Iterator[Tensor]:
    """Yield log(p / m), then log(q / m), in work[4]. work[0] and work[1] hold exponents of 2 and are clamped.

    With u = log(q / p) and l = log(1 + b (e^-|u| - 1)), where b is 1 - beta if u <= 0 and beta if not,
    log(p / m) = -max(u, 0) - l and log(q / m) = min(u, 0) - l. Nothing cancels, and equal rows give 0.
    """
    shape, count = y_p.shape, y_p.numel()
    u, low, out = (buffer.view(*shape) for buffer in work[2:5])
    torch.sub(y_q.clamp_(min=LOWEST), y_p.clamp_(min=LOWEST), out=u).div_(LOG2_E)
    u.add_(per_row(stats.log_total_p - stats.log_total_q, u.ndim))
    torch.abs(u, out=low).neg_()
    torch.expm1(work[3].padded(count), out=work[3].padded(count))
    if beta == 0.5:
        low.mul_(beta)
    else:
        low.mul_(torch.sign(u, out=out).clamp_(min=0.0).mul_(2 * beta - 1).add_(1 - beta))
    torch.log1p(work[3].padded(count), out=work[3].padded(count))
    yield torch.clamp(u, min=0.0, out=out).add_(low).neg_()
    yield torch.clamp(u, max=0.0, out=out).sub_(low)


def per_row(field: Tensor, ndim: int) -> Tensor:
    """Return a field (N,) with as many dimensions as a tile."""
    return field.view(-1, *(1,) * (ndim - 1))


def non_negative(divergence: Tensor) -> Tensor:
    """Return the divergence without what rounding leaves below 0. NaN stays."""
    return torch.where(divergence < 0, 0.0, divergence)


def _excludes(z_q: Tensor, z_p: Tensor) -> Tensor | None:
    """Return which chunks have a word that q excludes and p does not; None if q excludes no word of the tile."""
    if z_q.device.type == "cpu" and not (z_q.amin(-1) == -torch.inf).any():
        return None
    return ((z_q == -torch.inf) & (z_p > -torch.inf)).any(-1)


def _finite(peak: Tensor) -> Tensor:
    return peak.masked_fill(peak == -torch.inf, 0.0)


def _spread(stats: Stats, kept: KeptRows) -> Stats:
    return Stats(*map(kept.spread, stats))
