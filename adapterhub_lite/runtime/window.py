"""The key-value cache of a running batch: one window of columns that all rows share, aligned at its right end.

Whenever a row came in, its last token stands in the window's last column. So a step writes one column for all rows,
`filled` says which columns are a row's own, and positions are counted by the row, not by the column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Columns are added this many at a time, so that one copy of the window pays for many steps.
_BLOCK = 64


@dataclass(frozen=True)
class WindowShape:
    """What a window keeps of one column of one row: layers, key-value heads and their width."""

    layers: int
    heads: int
    head_dim: int


class Window:
    """Keys and values [layers, rows, heads, columns, head_dim] of the rows of a batch.

    Attributes:
        filled: [rows, columns], True where a column holds content of the row.
        end: first free column.
    """

    def __init__(self, shape: WindowShape, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> None:
        size = (shape.layers, rows, shape.heads, _rounded(columns), shape.head_dim)
        # Zeros, not what memory held: a masked column takes part with weight zero, and zero times NaN is NaN.
        self.keys = torch.zeros(size, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.filled = torch.zeros((rows, size[3]), dtype=torch.bool, device=device)
        self.end = 0
        self._full: bool | None = None

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return int(self.filled.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def mask(self) -> torch.Tensor | None:
        """[rows, end], True where a column holds content; None where all do."""
        if self._full is None:
            self._full = bool(self.filled[:, : self.end].all())
        return None if self._full else self.filled[:, : self.end]

    def extend(self, lengths: torch.Tensor | None = None) -> None:
        """Count more columns, which the caller is about to write, as content: one of every row.

        Args:
            lengths: [rows], so many of each row instead, which end in the same column.
        """
        new = 1 if lengths is None else int(lengths.max())
        if self.end + new > self.keys.shape[3]:
            self._rebuild(torch.arange(self.rows, device=self.keys.device), new)
        if lengths is None:
            self.filled[:, self.end] = True
        else:
            columns = torch.arange(new, device=lengths.device)
            self.filled[:, self.end : self.end + new] = columns >= new - lengths[:, None]
            self._full = None
        self.end += new

    def select(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self._rebuild(torch.tensor(rows, dtype=torch.long, device=self.keys.device), 1)

    def join(self, other: Window) -> None:
        """Take in the rows of another window, after these rows."""
        rows, end = self.rows, max(self.end, other.end)
        merged = [
            _placed(mine, its, end, self.end, other.end, dim)
            for mine, its, dim in (
                (self.keys, other.keys, 3),
                (self.values, other.values, 3),
                (self.filled, other.filled, 1),
            )
        ]
        self.keys, self.values, self.filled = merged
        assert self.rows == rows + other.rows
        self.end, self._full = end, None

    def _rebuild(self, rows: torch.Tensor, room: int) -> None:
        """Copy these rows to a new window with room for more columns, without the columns that none of them uses."""
        filled = self.filled[:, : self.end].index_select(0, rows)
        used = filled.any(0).nonzero()
        begin = int(used[0]) if len(used) else self.end
        columns = self.end - begin
        old = (self.keys, self.values)
        shape = (*self.keys.shape[:1], len(rows), self.keys.shape[2], _rounded(columns + room), self.keys.shape[4])
        self.keys, self.values = old[0].new_zeros(shape), old[1].new_zeros(shape)
        for new, before in zip((self.keys, self.values), old, strict=True):
            new[:, :, :, :columns] = before[:, :, :, begin : self.end].index_select(1, rows)
        self.filled = filled.new_zeros((len(rows), shape[3]))
        self.filled[:, :columns] = filled[:, begin:]
        self.end, self._full = columns, None


def _placed(mine: torch.Tensor, its: torch.Tensor, end: int, my_end: int, its_end: int, columns: int) -> torch.Tensor:
    """Rows of both, each aligned so that its content ends at column `end`; rows stand one dimension before heads."""
    row_dim = 1 if columns == 3 else 0
    shape = list(mine.shape)
    rows = shape[row_dim]
    shape[row_dim], shape[columns] = rows + its.shape[row_dim], _rounded(end + 1)
    whole = mine.new_zeros(shape)
    whole.narrow(row_dim, 0, rows).narrow(columns, end - my_end, my_end).copy_(mine.narrow(columns, 0, my_end))
    rest = whole.narrow(row_dim, rows, its.shape[row_dim]).narrow(columns, end - its_end, its_end)
    rest.copy_(its.narrow(columns, 0, its_end))
    return whole


def _rounded(columns: int) -> int:
    return max(_BLOCK, -(-columns // _BLOCK) * _BLOCK)
