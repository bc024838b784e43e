"""What a model keeps of the tokens that it has read, so that others can be read behind them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Past(NamedTuple):
    """Keys, values and states of B rows in C columns. A row's tokens are consecutive columns; the others are padding.

    Padding on the left keeps the distance of two tokens equal to the distance of their columns, which is how a sliding
    window is told.
    """

    keys: list[Tensor]
    """of each layer, (B, heads, C, size)"""
    values: list[Tensor]
    hidden: Tensor
    """(B, C, D), the states that the head reads"""
    stops: Tensor
    """(B,) int64: the column behind a row's last token"""
    lengths: Tensor
    """(B,) int64: its tokens"""

    @property
    def size(self) -> int:
        """Tokens that are held, padding included."""
        return self.hidden.shape[0] * self.hidden.shape[1]

    @property
    def first(self) -> list[int]:
        """The column of each row's first token."""
        found: list[int] = (self.stops - self.lengths).tolist()
        return found

    def of(self, rows: Tensor) -> "Past":
        """These rows (N,), as wide as the longest of them, padded on the left."""
        stops, lengths = self.stops[rows], self.lengths[rows]
        width = int(lengths.amax())
        if bool((stops == stops[0]).all()):
            columns = slice(int(stops[0]) - width, int(stops[0]))

            def chosen(x: Tensor, dim: int) -> Tensor:
                part = x[:, columns] if dim == 1 else x[:, :, columns]
                return part.index_select(0, rows.to(x.device))

        else:
            places = (stops[:, None] - width + torch.arange(width, device=stops.device)).clamp(min=0)

            def chosen(x: Tensor, dim: int) -> Tensor:
                row, place = rows[:, None].to(x.device), places.to(x.device)
                return x[row, place] if dim == 1 else x[row, :, place].transpose(1, 2)

        return Past(
            [chosen(k, 2) for k in self.keys], [chosen(v, 2) for v in self.values], chosen(self.hidden, 1),
            torch.full_like(stops, width), lengths,
        )  # fmt: skip
