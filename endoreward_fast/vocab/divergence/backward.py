"""Gradients of the divergence in a bounded workspace: both logits are computed again, tile by tile.

rows.py has the formulas. A head that needs no gradient costs its logits and nothing else. If both heads need
one, each takes a sweep of its own, so logits are computed twice.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..chunked_backward import sweep_gradients
from ..chunked_tiles import EXP_IS_ZERO, Buffer, length, limits_for, spans
from ..rows import KeptRows
from .chunked import LOG2_E, LinearPair, StoredPair, exponent, over_mixture, per_row
from .rows import LOWEST, Head, Stats

BUFFERS = 5


@torch.no_grad()
def logits_backward(
    p: Tensor, q: Tensor, stats: Stats, g: Tensor, *, mask: Tensor | None, beta: float | None, alpha: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return (dp, dq) (B, T, V), contiguous, in the logits' dtypes; None where `needs` is False, 0 off the mask."""
    kept = KeptRows(mask)
    pair = StoredPair(p, q, kept.index)
    make = torch.empty_like if mask is None else torch.zeros_like
    grads = [
        make(x, memory_format=torch.contiguous_format) if need else None for x, need in zip((p, q), needs, strict=True)
    ]
    factors = _Factors(Stats(*map(kept.take, stats)), kept.take(g), beta, alpha)
    work = [Buffer(pair.tiles.rows * pair.tiles.vocab, p.device) for _ in range(BUFFERS)]
    for rows in spans(0, pair.rows, pair.tiles.rows):
        for columns in spans(0, pair.vocab, pair.tiles.vocab):
            pair.select(columns)
            z = pair.load(rows, tuple(buffer.view(length(rows), length(columns)) for buffer in work[:2]))
            for i, dz in factors.of(rows).gradients(*z, work, needs):
                pair.sources[i].store(grads[i].view(-1, pair.vocab), rows, columns, dz)
    return tuple(grads)


@torch.no_grad()
def linear_backward(
    p: Head, q: Head, stats: Stats, g: Tensor, *, mask: Tensor | None, beta: float | None, alpha: float,
    needs: tuple[tuple[bool, bool, bool], tuple[bool, bool, bool]],
) -> list[Tensor | None]:  # fmt: skip
    """Return (dhidden, dweight, dbias) of p, then of q, in the inputs' dtypes; None where `needs` is False."""
    kept = KeptRows(mask)
    heads = tuple(head._replace(hidden=kept.take(head.hidden)) for head in (p, q))
    factors = _Factors(Stats(*map(kept.take, stats)), kept.take(g), beta, alpha)
    found: list[Tensor | None] = []
    for i, head in enumerate(heads):
        if not any(needs[i]):
            found += [None] * 3
            continue
        dhidden, *others = sweep_gradients(
            _HeadGradients(heads, i, factors), head.hidden, head.weight, head.bias, needs[i],
            most_elements=limits_for(head.hidden.device).copy,
        )  # fmt: skip
        found += [kept.spread(dhidden), *others]
    return found


class _Factors:
    """The factors of the gradient of some rows."""

    def __init__(self, stats: Stats, g: Tensor, beta: float | None, alpha: float):
        self._stats, self._g, self._beta, self._alpha = stats, stats.upstream(g), beta, alpha
        self._scale = LOG2_E / alpha

    def of(self, rows: slice) -> "_Factors":
        return _Factors(Stats(*(field[rows] for field in self._stats)), self._g[rows], self._beta, self._alpha)

    def gradients(
        self, z_p: Tensor, z_q: Tensor, work: list[Buffer], needs: tuple[bool, ...]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (0, dz_p) and (1, dz_q), those that are needed. Each is valid until the next one."""
        stats, shape, count = self._stats, z_p.shape, z_p.numel()
        share_p, share_q = (
            per_row(torch.exp(-total) * self._g / self._alpha, 2) for total in (stats.log_total_p, stats.log_total_q)
        )
        y_p = exponent(z_p, per_row(stats.shift_p, 2), self._scale, work[0].view(*shape))
        y_q = exponent(z_q, per_row(stats.shift_q, 2), self._scale, work[1].view(*shape))
        if self._beta is not None:
            weighted = (share_p * self._beta, stats.mean_p), (share_q * (1 - self._beta), stats.mean_q)
            for i, log in enumerate(over_mixture(y_p, y_q, stats, self._beta, work)):
                if needs[i]:
                    share, mean = weighted[i]
                    torch.exp2(work[i].padded(count), out=work[i].padded(count))
                    yield i, log.sub_(per_row(mean, 2)).mul_(work[i].view(*shape)).mul_(share)
            return
        y_p.clamp_(min=EXP_IS_ZERO)
        y_q.clamp_(min=LOWEST)
        torch.exp2(work[0].padded(count), out=work[2].padded(count))
        of_p, out = work[2].view(*shape).mul_(share_p), work[3].view(*shape)
        if needs[0]:
            rest = per_row(stats.log_total_q - stats.log_total_p - stats.mean_p, 2)
            yield 0, torch.sub(y_p, y_q, out=out).div_(LOG2_E).add_(rest).mul_(of_p)
        if needs[1]:
            torch.exp2(work[1].padded(count), out=work[3].padded(count))
            yield 1, out.mul_(share_q).sub_(of_p)


class _HeadGradients:
    """Makes tiles of dy of one of the two heads (see chunked_backward.sweep_gradients)."""

    def __init__(self, heads: tuple[Head, Head], which: int, factors: _Factors):
        self._pair = LinearPair(*heads)
        self._which, self._factors, self._head = which, factors, heads[which]
        self.tiles = self._pair.tiles
        self._work = [
            Buffer(self.tiles.rows * self.tiles.vocab, self._pair.device)
            for _ in range(BUFFERS + (self._head.softcap is not None))
        ]
        self.load_weight = self._pair.select

    @property
    def weight(self) -> Tensor:
        return self._pair.heads[self._which].weight

    @property
    def hidden(self) -> Tensor:
        return self._pair.heads[self._which].hidden

    def load_hidden(self, rows: slice) -> None:
        """Nothing: `dy` loads the rows of both heads."""

    def dy(self, rows: slice, columns: slice) -> Tensor:
        """Return dy (rows, columns) for the loaded weights. The tile is valid until the next call."""
        shape = length(rows), length(columns)
        z = tuple(self._pair.load(rows, tuple(buffer.view(*shape) for buffer in self._work[:2])))
        slope = None
        if self._head.softcap is not None:
            slope = torch.mul(z[self._which], z[self._which], out=self._work[BUFFERS].view(*shape))
            slope.mul_(-1 / self._head.softcap**2).add_(1.0)
        _, dz = next(self._factors.of(rows).gradients(*z, self._work, (self._which == 0, self._which == 1)))
        if self._head.logit_scale != 1.0:
            dz.mul_(self._head.logit_scale)
        return dz if slope is None else dz.mul_(slope)
