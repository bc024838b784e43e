"""Vocabulary statistics from hidden states with a library matmul and the row kernels.

The matmul fills a bounded workspace with float32 logits, and the row kernels read it once. This is `chunked` on a GPU
and the backward of `fused`.

Apart from the matmul's own traffic, the forward writes and reads 4 bytes per logit. The backward writes and reads 4
bytes and writes 2 more (16-bit inputs). The forward's workspace fits the L2 cache of an A100 or H100. How a row is cut
into pieces does not depend on N. The bits of its logits may, because those of the library's matmul may.

The number of rows that a mask keeps is read back to the host, because a matmul needs its shape. A CUDA graph cannot
wait for that: under capture all rows are computed, and those off the mask come out 0.

The matmul follows torch's settings. If TF32 is allowed, float32 inputs use it, also in the backward of `fused`, whose
forward is exact float32. A float16 backward holds the gradient of the logits in float16, where numbers under 6e-8
become 0. Scale the loss, as for the model's own float16 backward.
"""

import torch
from torch import Tensor

from .chunked_backward import sweep_gradients
from .chunked_tiles import LOW_PRECISION, MIB, Buffer, Tiles, even_share, length, spans
from .rows import EveryRow, KeptRows, RowGrads, RowRewards, RowStats, at

PIECE = 2048  # vocabulary entries per program of the row kernel
FORWARD_TILE = 8 * MIB  # float32 logits in the workspace at a time: 32 MiB
FORWARD_ROWS = 4096
# Backward, in elements: float32 logits 32 MiB, 16 bits of their gradient 64 MiB (half as many in float32), and float32
# accumulators of dhidden 128 MiB (float32: none) and of a chunk of dweight 64 MiB (with more than BACKWARD_ROWS rows).
BACKWARD_TILE, BACKWARD_ROWS, GRADIENT, ACCUMULATOR = 8 * MIB, 8192, 32 * MIB, 32 * MIB
WEIGHT_COPY = 16 * MIB  # a chunk of weight in float32, or of its gradient: 64 MiB


@torch.no_grad()
def linear_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, mask: Tensor | None = None, bias: Tensor | None,
    logit_scale: float, softcap: float | None, alpha: float | Tensor, entropy: bool, logit_mean: bool,
    successor: Tensor | None = None, named: Tensor | None = None, tile: int | None = None,
) -> tuple[RowStats, RowRewards | None]:  # fmt: skip
    """Return statistics, and rewards if `successor` is given. `tile` replaces FORWARD_TILE.

    alpha is one temperature, or one for each row (N,). named (K,) are tokens whose log-probabilities are wanted too.
    """
    from ..kernels.combine import Partials, combine
    from ..kernels.config import LogitsConfig
    from ..kernels.primitives import Head
    from ..kernels.vocab_stats import logits_partials

    mask, all_targets = None if mask is None else mask.contiguous(), targets.contiguous()
    kept = _kept(mask)
    hidden, targets = kept.take(hidden), kept.take(all_targets)
    alpha, named = _dense_alpha(alpha), None if named is None else named.contiguous()
    kept_alpha = _take_alpha(kept, alpha)
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    tiles = _tiles(hidden, weight, tile or FORWARD_TILE)
    buffer = Buffer(tiles.rows * tiles.vocab, hidden.device)
    partials = Partials.empty(
        -(-vocab // PIECE), num_rows, hidden.device, entropy=entropy, logit_mean=logit_mean,
        names=0 if named is None else len(named),
    )  # fmt: skip
    for columns in spans(0, vocab, tiles.vocab):
        head = Head(None if bias is None else bias[columns].contiguous(), logit_scale, softcap)
        part = _operand(weight[columns], hidden)
        for rows in spans(0, num_rows, tiles.rows):
            z = _product(hidden[rows], part, buffer.view(length(rows), length(columns)))
            logits_partials(
                z[None], targets[rows], alpha=at(kept_alpha, rows), entropy=entropy, logit_mean=logit_mean, head=head,
                first=columns.start, config=LogitsConfig(block_v=PIECE, num_warps=4), named=named,
                out=partials.part(slice(columns.start // PIECE, -(-columns.stop // PIECE)), rows),
            )  # fmt: skip
    successor = None if successor is None else successor.contiguous()
    stats, rewards = combine(
        partials, all_targets, vocab=vocab, alpha=alpha, needed=mask, place=kept.place(), successor=successor,
        named=named,
    )  # fmt: skip
    return RowStats(*stats), rewards and RowRewards(*rewards)


@torch.no_grad()
def linear_backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, stats: RowStats, grads: RowGrads, *, mask: Tensor | None = None,
    bias: Tensor | None, logit_scale: float, softcap: float | None, alpha: float | Tensor,
    needs: tuple[bool, bool, bool], named: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return (dhidden, dweight, dbias) in the inputs' dtypes; None where `needs` is False. Recomputes the logits."""
    kept = _kept(mask)
    hidden, targets, stats = kept.take(hidden), kept.take(targets), RowStats(*map(kept.take, stats))
    grads, alpha = RowGrads(*map(kept.take, grads)), _take_alpha(kept, _dense_alpha(alpha))
    if isinstance(kept, EveryRow):  # with a log_total of -inf a row has no gradient
        stats = stats._replace(log_total=torch.where(mask, stats.log_total, -torch.inf))
    source = _KernelGradients(hidden, weight, bias, logit_scale, softcap, targets, stats, grads, alpha, named)
    dhidden, *others = sweep_gradients(source, hidden, weight, bias, needs, most_elements=ACCUMULATOR)
    return kept.spread(dhidden), *others


class _KernelGradients:
    """Makes tiles of dy (see chunked_backward.sweep_gradients) in hidden's dtype by a matmul and one kernel launch."""

    def __init__(
        self, hidden, weight, bias, logit_scale, softcap, targets, stats: RowStats, grads: RowGrads, alpha, named=None
    ):  # fmt: skip
        rows = even_share(hidden.shape[0], BACKWARD_ROWS)
        columns = min(weight.shape[0], max(1, GRADIENT * 2 // (rows * hidden.element_size())))
        if weight.dtype != hidden.dtype or hidden.shape[0] > rows:
            columns = min(columns, max(1, WEIGHT_COPY // weight.shape[1]))
        if columns < weight.shape[0]:  # whole 16 bytes, so that the rows of a tile are aligned
            columns = max(1, columns - columns % 8)
        self.tiles = Tiles(rows, columns, columns)
        self._inputs, self._head = (hidden, weight, bias), (logit_scale, softcap)
        rowwise = (targets, stats.shift, stats.log_total, stats.entropy, *grads)
        self._rowwise = [None if x is None else x.contiguous() for x in rowwise]
        self._alpha, self._named = alpha, None if named is None else named.contiguous()
        self._logit_rows = max(1, min(rows, BACKWARD_TILE // columns))
        self._logits = Buffer(self._logit_rows * columns, hidden.device)
        self._dy = Buffer(rows * columns, hidden.device, hidden.dtype)
        self.hidden = self.weight = self._bias = None

    def load_weight(self, columns: slice) -> None:
        hidden, weight, bias = self._inputs
        self.weight = _operand(weight[columns], hidden)
        self._bias = None if bias is None else bias[columns].contiguous()

    def load_hidden(self, rows: slice) -> None:
        self.hidden = self._inputs[0][rows]

    def dy(self, rows: slice, columns: slice) -> Tensor:
        from ..kernels.config import LogitsConfig
        from ..kernels.primitives import Head
        from ..kernels.vocab_stats import logits_backward

        dy = self._dy.view(length(rows), length(columns))
        for part in spans(0, length(rows), self._logit_rows):
            z = _product(self.hidden[part], self.weight, self._logits.view(length(part), length(columns)))
            here = slice(rows.start + part.start, rows.start + part.stop)
            logits_backward(
                z[None], *(None if x is None else x[here] for x in self._rowwise), alpha=at(self._alpha, here),
                config=LogitsConfig(block_v=PIECE, num_warps=4), head=Head(self._bias, *self._head),
                first=columns.start, vocab=self._inputs[1].shape[0], out=dy[part], named=self._named,
            )  # fmt: skip
        return dy


def _dense_alpha(alpha: float | Tensor) -> float | Tensor:
    return alpha.contiguous() if isinstance(alpha, Tensor) else alpha


def _take_alpha(kept: KeptRows, alpha: float | Tensor) -> float | Tensor:
    """Return the temperatures of the rows that are computed. Those off the mask keep theirs: 0 would divide by 0."""
    return alpha if kept.index is None else at(alpha, kept.index)


def _kept(mask: Tensor | None) -> KeptRows:
    return EveryRow(mask) if mask is not None and _capturing(mask.device) else KeptRows(mask)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _tiles(hidden: Tensor, weight: Tensor, size: int) -> Tiles:
    """Return tiles that hold as many whole pieces side by side as fit a workspace of `size` logits."""
    rows = even_share(hidden.shape[0], FORWARD_ROWS)
    columns = size // rows
    if weight.dtype != hidden.dtype:
        columns = min(columns, WEIGHT_COPY // weight.shape[1])
    pieces = max(1, columns // PIECE)
    return Tiles(rows, PIECE * min(pieces, -(-weight.shape[0] // PIECE)), PIECE)


def _operand(weight: Tensor, hidden: Tensor) -> Tensor:
    """Return a chunk of weight in hidden's dtype. It is a copy only for a low-precision weight with float32 hidden."""
    return weight.to(hidden.dtype)


def _product(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Write hidden @ weight.T to out in float32."""
    if hidden.dtype not in LOW_PRECISION:
        return torch.mm(hidden, weight.T, out=out)
    if hidden.device.type == "cpu":  # in Triton's interpreter; the CPU's 16-bit matmul has no float32 output
        return torch.mm(hidden.float(), weight.T.float(), out=out)
    return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
