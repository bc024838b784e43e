"""Vocabulary statistics in a bounded workspace. Logits, stored or computed, pass through cache-sized tiles.

Each chunk c of a row is reduced to three numbers, with x = z / alpha:

    m_c = max z          l_c = log sum exp((z - m_c) / alpha)          H_c = entropy of softmax(x) within the chunk

The chunks of a row combine in a fixed order and without cancellation, with M = max_c m_c:

    a_c = (m_c - M) / alpha + l_c        L = log sum_c exp(a_c)        lse = M / alpha + L
    P_c = exp(a_c - L)                   entropy = sum_c P_c (H_c - log P_c)

An offset common to a row's logits therefore never enters the sums. All arithmetic is float32. The same torch code runs
on the CPU (extra memory under 64 MiB for any N) and on GPUs (under 256 MiB). Results repeat bitwise from run to run. In
the linear path the last bits of a row may depend on the batch around it, because those of the library's matmul may.
"""

import math

import torch
from torch import Tensor

from .chunked_backward import linear_backward, logits_backward
from .chunked_tiles import (
    EXP_IS_ZERO,
    Buffer,
    Limits,
    LinearTile,
    LogitRows,
    in_order,
    length,
    limits_for,
    linear_tiles,
    logits_tiles,
    parts,
    spans,
)
from .rows import SUM_SCALE, KeptRows, RowRewards, RowStats, at, of_named, with_rewards

LOG2_E = 1 / math.log(2)

__all__ = ["linear_backward", "linear_forward", "logits_backward", "logits_forward"]


@torch.no_grad()
def logits_forward(
    logits: Tensor, targets: Tensor, *, mask: Tensor | None, alpha: float | Tensor, entropy: bool, logit_mean: bool,
    successor: Tensor | None = None, named: Tensor | None = None,
) -> tuple[RowStats, RowRewards | None]:  # fmt: skip
    """Return statistics, and rewards if `successor` is given, of logits (B, T, V), any strides; 0 off the mask (N,).

    alpha  one temperature, or one for each row (N,)
    named  (K,) tokens whose log-probabilities are wanted too
    """
    vocab, device = logits.shape[-1], logits.device
    kept, all_alpha = KeptRows(mask), alpha
    alpha = kept.take(alpha) if isinstance(alpha, Tensor) else alpha
    source = LogitRows(logits, kept.index)
    stats = _empty_stats(len(source), device, entropy, logit_mean)
    tiles = logits_tiles(len(source), vocab, device)
    work = _Workspace(tiles.rows * tiles.vocab, device, entropy or logit_mean)
    stats.target_logit.copy_(source.pick(kept.take(targets)))
    whole = vocab - vocab % tiles.chunk
    for rows in spans(0, len(source), tiles.rows):
        partials = _Partials(-(-vocab // tiles.chunk), length(rows), device, at(alpha, rows), entropy, logit_mean)
        for columns in [*spans(0, whole, tiles.vocab), *spans(whole, vocab, tiles.chunk)]:
            z = source.load(rows, columns)
            if z.dtype != torch.float32:
                z = work.y.view(length(rows), length(columns)).copy_(z)
            chunks = slice(columns.start // tiles.chunk, -(-columns.stop // tiles.chunk))
            partials.reduce(z, work, chunks, slice(0, length(rows)))
        partials.combine(vocab, rows, stats)
    stats = _with_lse(stats, alpha)
    if named is not None:
        stats = stats._replace(named=of_named(source.columns(named), named, vocab, stats, alpha))
    stats = RowStats(*map(kept.spread, stats))
    return with_rewards(stats, targets, mask, vocab, successor, all_alpha)


@torch.no_grad()
def linear_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, mask: Tensor | None = None, bias: Tensor | None,
    logit_scale: float, softcap: float | None, alpha: float | Tensor, entropy: bool, logit_mean: bool,
    successor: Tensor | None = None, named: Tensor | None = None, limits: Limits | None = None,
) -> tuple[RowStats, RowRewards | None]:  # fmt: skip
    """Return statistics, and rewards if `successor` is given, from hidden (N, D) and weight (V, D); 0 off the mask.

    The logits are computed tile by tile and never stored. chunked_tiles.uses_native_matmul says how bfloat16 inputs are
    multiplied. `limits` replaces the device's limits on the tiles. alpha and named are as in `logits_forward`.
    """
    kept, all_targets, all_alpha = KeptRows(mask), targets, alpha
    hidden, targets = kept.take(hidden), kept.take(targets)
    alpha = kept.take(alpha) if isinstance(alpha, Tensor) else alpha
    num_rows, vocab, device = hidden.shape[0], weight.shape[0], hidden.device
    limits = limits or limits_for(device)
    tiles = linear_tiles(hidden, weight, limits=limits)
    tile = LinearTile(hidden, weight, bias, logit_scale, softcap, tiles, limits)
    size = max(tiles.chunk, min(limits.tile, tiles.rows * tiles.vocab))
    work = _Workspace(size, device, entropy or logit_mean)
    buffer = work.y  # a tile of one part is reduced in place
    if not tile.native_on_cpu and (tiles.vocab > tiles.chunk or tiles.rows * tiles.vocab > size):
        buffer = Buffer(tiles.rows * tiles.vocab, device)
    stats = _empty_stats(num_rows, device, entropy, logit_mean)
    picked = None if named is None else torch.empty(num_rows, len(named), device=device)
    for sweep in spans(0, num_rows, limits.rows_per_sweep):
        partials = _Partials(-(-vocab // tiles.chunk), length(sweep), device, at(alpha, sweep), entropy, logit_mean)
        for columns in spans(0, vocab, tiles.vocab):
            tile.load_weight(columns)
            for rows in spans(sweep.start, sweep.stop, tiles.rows):
                tile.load_hidden(rows)
                product = tile.native_product()
                logits = tile.logits(buffer.view(length(rows), length(columns))) if product is None else None
                for r, c in parts((length(rows), length(columns)), tiles.chunk, size):
                    if product is None:
                        z = logits[r, c]
                    else:
                        z = tile.finish(work.y.view(length(r), length(c)).copy_(product[r, c]), c)
                    here = slice(rows.start + r.start, rows.start + r.stop)
                    vocabulary = slice(columns.start + c.start, columns.start + c.stop)
                    _pick_targets(z, targets[here], vocabulary, stats.target_logit[here])
                    if named is not None and picked is not None:
                        _pick_named(z, named, vocabulary, picked[here])
                    chunks = slice(vocabulary.start // tiles.chunk, -(-vocabulary.stop // tiles.chunk))
                    partials.reduce(z, work, chunks, slice(here.start - sweep.start, here.stop - sweep.start))
        partials.combine(vocab, sweep, stats)
    stats = _with_lse(stats, alpha)
    if named is not None:
        stats = stats._replace(named=of_named(picked, named, vocab, stats, alpha))
    stats = RowStats(*map(kept.spread, stats))
    return with_rewards(stats, all_targets, mask, vocab, successor, all_alpha)


class _Workspace:
    """The buffers that `_Partials.reduce` overwrites: y, and a second one if entropy or the mean are wanted."""

    def __init__(self, size: int, device: torch.device, second: bool):
        self.y = Buffer(size, device)
        self.scratch = Buffer(size, device) if second else self.y


class _Partials:
    """Partial results of the chunks of some rows, one (chunks, rows) tensor per statistic. alpha may be (rows,)."""

    def __init__(
        self, chunks: int, rows: int, device: torch.device, alpha: float | Tensor, entropy: bool, logit_mean: bool
    ):  # fmt: skip
        self._alpha = alpha
        self._peak = torch.empty(chunks, rows, device=device, dtype=torch.float32)
        self._total = torch.empty_like(self._peak)
        self._entropy = torch.empty_like(self._peak) if entropy else None
        self._sum = torch.empty_like(self._peak) if logit_mean else None

    def reduce(self, z: Tensor, work: _Workspace, chunks: slice, rows: slice) -> None:
        """Reduce the given chunks of z (rows, chunks * width), any strides. z may be work.y, which is overwritten.

        log_softmax would sum a row one lane at a time. With one large logit among many equal ones its sum is off by up
        to 300 units in the last place. A chunk that is all -inf becomes NaN here; `combine` corrects it.
        """
        shape = (z.shape[0], length(chunks), z.shape[1] // length(chunks))
        z = z.unflatten(1, shape[1:])
        peak = z.amax(-1)
        self._peak[chunks, rows] = peak.T
        if self._sum is not None:
            self._sum[chunks, rows] = torch.mul(z, SUM_SCALE, out=work.scratch.view(*shape)).sum(-1).T
        # Subtract before dividing. Dividing first would round a common offset into the differences.
        y = torch.sub(z, peak.unsqueeze(-1), out=work.y.view(*shape))
        if isinstance(self._alpha, Tensor):
            y.div_(self._alpha[rows, None, None])
        elif self._alpha != 1.0:
            y.div_(self._alpha)
        y.mul_(LOG2_E)  # torch's exp2 takes a third of the time of its exp on some CPUs, and no longer on others
        if self._entropy is not None:
            y.clamp_(min=EXP_IS_ZERO)  # 0 * -inf would be NaN
        torch.exp2(work.y.padded(y.numel()), out=work.scratch.padded(y.numel()))
        weight = work.scratch.view(*shape)
        total = weight.sum(-1)
        if self._entropy is not None:
            entropy = total.log() - weight.mul_(y).sum(-1) / (total * LOG2_E)  # y <= 0: nothing cancels
            self._entropy[chunks, rows] = entropy.T
        self._total[chunks, rows] = total.T

    def combine(self, vocab: int, rows: slice, stats: RowStats) -> None:
        """Write the statistics of these rows, except lse and target_logit, into `rows` of stats."""
        dead = self._peak == -torch.inf
        peak = self._peak.amax(0)
        part = ((self._peak - peak) / self._alpha).exp_().mul_(self._total).masked_fill_(dead, 0.0)
        total = in_order(part)
        stats.shift[rows], stats.log_total[rows] = peak, total.log()
        if stats.entropy is not None:
            share = part / total.clamp(min=1.0)  # smaller only in a row that is all -inf, where it is 0
            log_share = share.log().clamp_(min=EXP_IS_ZERO)
            within = self._entropy.masked_fill(dead, 0.0)
            stats.entropy[rows] = in_order(share * (within - log_share)).clamp_(0.0, math.log(vocab))
        if stats.logit_mean is not None:
            stats.logit_mean[rows] = in_order(self._sum) / vocab / SUM_SCALE


def _empty_stats(num_rows: int, device: torch.device, entropy: bool, logit_mean: bool) -> RowStats:
    wanted = (True, True, entropy, logit_mean, True, True)
    return RowStats(*(torch.zeros(num_rows, device=device, dtype=torch.float32) if w else None for w in wanted))


def _with_lse(stats: RowStats, alpha: float | Tensor) -> RowStats:
    return stats._replace(lse=stats.shift / alpha + stats.log_total)


def _pick_named(z: Tensor, named: Tensor, columns: slice, out: Tensor) -> None:
    """Write z[:, named[k]] to out[:, k] for named tokens in `columns`. Leave other columns of out alone."""
    index = named - columns.start
    here = (index >= 0) & (index < length(columns))
    torch.where(here, z.index_select(1, torch.where(here, index, 0)), out, out=out)


def _pick_targets(z: Tensor, targets: Tensor, columns: slice, out: Tensor) -> None:
    """Write z[i, targets[i]] to out for targets in `columns`. Leave other rows alone (-100 is in no column)."""
    index = targets - columns.start
    here = (index >= 0) & (index < length(columns))
    picked = z.gather(1, torch.where(here, index, 0).unsqueeze(1)).squeeze(1)
    torch.where(here, picked, out, out=out)
