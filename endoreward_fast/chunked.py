"""Vocabulary statistics in a bounded workspace: logits, stored or recomputed, pass through cache-sized tiles.

Each chunk c of a row of x = z / alpha leaves three numbers:

    m_c = max x          l_c = log sum exp(x - m_c)          H_c = entropy of softmax(x) within the chunk

and a row's chunks combine, in a fixed order, with no subtraction that cancels (M = max m_c, a_c = m_c - M + l_c):

    lse = M + log sum_c exp(a_c)        P_c = exp(a_c) / sum exp(a)        entropy = sum_c P_c (H_c - log P_c)

so an offset common to a row's logits never meets the sums. All of it is float32. The same torch code serves the
CPU (extra memory under 64 MiB whatever N is) and GPUs (under 256 MiB). In the linear path the last bits of a row
may depend on the batch around it, as far as the library's matmul does; from run to run they are the same.
"""

import math

import torch
from torch import Tensor

from .chunked_backward import linear_backward, logits_backward
from .chunked_tiles import FLOAT_MIN, Buffer, LinearTile, length, limits_for, linear_tiles, logits_tiles, spans
from .types import NO_TARGET

__all__ = ["linear_backward", "linear_forward", "logits_backward", "logits_forward"]

Stats = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@torch.no_grad()
def logits_forward(logits: Tensor, targets: Tensor, *, alpha: float, entropy: bool, logit_mean: bool) -> Stats:
    """(lse, target_logit, entropy, logit_mean), float32 (N,), of stored logits (N, V) with any strides."""
    num_rows, vocab = logits.shape
    tiles = logits_tiles(num_rows, vocab, logits.device)
    whole = vocab - vocab % tiles.chunk
    x_buffer, scratch = (Buffer(tiles.rows * tiles.vocab, logits.device) for _ in range(2))
    lse, h, mean = _empty_stats(num_rows, logits.device, entropy, logit_mean)
    for rows in spans(0, num_rows, tiles.rows):
        partials = _Partials(-(-vocab // tiles.chunk), length(rows), logits.device, entropy, logit_mean)
        for columns in [*spans(0, whole, tiles.vocab), *spans(whole, vocab, tiles.chunk)]:
            x = x_buffer.view(length(rows), length(columns)).copy_(logits[rows, columns])
            if alpha != 1.0:  # after the copy: dividing bfloat16 would round to bfloat16
                x.div_(alpha)
            chunks = slice(columns.start // tiles.chunk, -(-columns.stop // tiles.chunk))
            partials.reduce(x, scratch, chunks, slice(0, length(rows)))
        partials.combine(vocab, alpha, rows, lse, h, mean)
    has_target = targets != NO_TARGET
    picked = logits.gather(1, torch.where(has_target, targets, 0).unsqueeze(1)).squeeze(1).float()
    return lse, torch.where(has_target, picked, 0.0), h, mean


@torch.no_grad()
def linear_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None, logit_scale: float,
    softcap: float | None, alpha: float, entropy: bool, logit_mean: bool,
) -> Stats:  # fmt: skip
    """(lse, target_logit, entropy, logit_mean), float32 (N,), of the head hidden (N, D), weight (V, D).

    The logits are made tile by tile and never stored. For bfloat16 inputs see: chunked_tiles.uses_native_matmul.
    """
    num_rows, vocab, device = hidden.shape[0], weight.shape[0], hidden.device
    tiles = linear_tiles(hidden, weight)
    tile = LinearTile(hidden, weight, bias, logit_scale, softcap, tiles)
    x_buffer, scratch = (Buffer(tiles.rows * tiles.vocab, device) for _ in range(2))
    target_logit = torch.zeros(num_rows, device=device)
    lse, h, mean = _empty_stats(num_rows, device, entropy, logit_mean)
    for sweep in spans(0, num_rows, limits_for(device).rows_per_sweep):
        partials = _Partials(-(-vocab // tiles.vocab), length(sweep), device, entropy, logit_mean)
        for chunk, columns in enumerate(spans(0, vocab, tiles.vocab)):
            tile.load_weight(columns)
            for rows in spans(sweep.start, sweep.stop, tiles.rows):
                tile.load_hidden(rows)
                z = tile.logits(x_buffer.view(length(rows), length(columns)))
                _pick_targets(z, targets[rows], columns, target_logit[rows])
                x = z if alpha == 1.0 else z.div_(alpha)
                in_sweep = slice(rows.start - sweep.start, rows.stop - sweep.start)
                partials.reduce(x, scratch, slice(chunk, chunk + 1), in_sweep)
        partials.combine(vocab, alpha, sweep, lse, h, mean)
    return lse, target_logit, h, mean


class _Partials:
    """What the chunks of some rows leave, one (chunks, rows) tensor per statistic, and how they combine."""

    def __init__(self, chunks: int, rows: int, device: torch.device, entropy: bool, logit_mean: bool):
        self._peak = torch.empty(chunks, rows, device=device)
        self._log_sum = torch.empty_like(self._peak)
        self._entropy = torch.empty_like(self._peak) if entropy else None
        self._sum = torch.empty_like(self._peak) if logit_mean else None

    def reduce(self, x: Tensor, scratch: Buffer, chunks: slice, rows: slice) -> None:
        """Take in `chunks` of x (rows, chunks * width), contiguous. x is overwritten.

        log_softmax makes its three passes while a chunk's row is in the first-level cache, and its maximum is
        exactly -log_sum. A chunk that is all -inf comes out as NaN here; `combine` puts it right.
        """
        shape = (length(rows), length(chunks))
        x = x.view(shape[0] * shape[1], -1)
        self._peak[chunks, rows] = x.amax(-1).view(shape).T
        if self._sum is not None:
            self._sum[chunks, rows] = x.sum(-1).view(shape).T
        log_p = torch.log_softmax(x, -1, out=scratch.view(*x.shape))
        self._log_sum[chunks, rows] = -log_p.amax(-1).view(shape).T
        if self._entropy is not None:
            log_p.clamp_(min=FLOAT_MIN)  # so that 0 * log 0 is 0
            self._entropy[chunks, rows] = -torch.exp(log_p, out=x).mul_(log_p).sum(-1).view(shape).T

    def combine(
        self, vocab: int, alpha: float, rows: slice, lse: Tensor, entropy: Tensor | None, mean: Tensor | None
    ) -> None:
        """Write these rows' statistics into `rows` of the outputs (N,)."""
        dead = self._peak == -torch.inf
        peak = self._peak.amax(0)
        offset = (self._peak - peak + self._log_sum).masked_fill_(dead, -torch.inf)
        log_total = torch.logsumexp(offset, 0)
        lse[rows] = peak + log_total
        if entropy is not None:
            log_share = (offset - log_total).clamp_(min=FLOAT_MIN).masked_fill_(dead, FLOAT_MIN)
            within = self._entropy.masked_fill(dead, 0.0)
            entropy[rows] = (log_share.exp() * (within - log_share)).sum(0).clamp_(0.0, math.log(vocab))
        if mean is not None:
            mean[rows] = self._sum.sum(0) * (alpha / vocab)


def _empty_stats(num_rows: int, device: torch.device, entropy: bool, logit_mean: bool):
    wanted = (True, entropy, logit_mean)
    return tuple(torch.empty(num_rows, device=device) if w else None for w in wanted)


def _pick_targets(z: Tensor, targets: Tensor, columns: slice, out: Tensor) -> None:
    """out <- z[i, targets[i]] for targets that lie in `columns`; others are left alone (-100 lies in none)."""
    index = targets - columns.start
    here = (index >= 0) & (index < length(columns))
    picked = z.gather(1, torch.where(here, index, 0).unsqueeze(1)).squeeze(1)
    torch.where(here, picked, out, out=out)
