"""Low-rank changes of rows that each have an adapter of their own, in float32 on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .library import library

_TILE = 4


@dataclass(frozen=True)
class RowMatrices:
    """One adapter at the layers of one input: down [in, R], and for each layer up [rank, out] or None."""

    down: torch.Tensor
    ups: tuple[torch.Tensor | None, ...]


class RowChanges:
    """The changes of one group of layers, each row by its own adapter's matrices.

    Args:
        rows: the matrices of each row of the batch, or None; rows of one adapter give the same object.
        widths: outputs of each layer of the group, which stand side by side in the output.
    """

    def __init__(self, rows: Sequence[RowMatrices | None], widths: Sequence[int]) -> None:
        self._rows = rows  # keeps the matrices in memory: the C side knows addresses only
        self._widths = torch.tensor(widths)
        self._offsets = torch.tensor([sum(widths[:i]) for i in range(len(widths))])
        self._stride = max((int(row.down.shape[1]) for row in rows if row is not None), default=0)
        self._tables: dict[int, _Table] = {}

    def apply(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add the changes to out [rows * tokens, all outputs], for x [rows * tokens, in], in place; both contiguous."""
        if self._stride == 0:
            return
        tokens = x.shape[0] // len(self._rows)
        if tokens not in self._tables:
            self._tables[tokens] = _table(self._rows, tokens, len(self._widths))
        table = self._tables[tokens]
        hidden = torch.empty((x.shape[0], self._stride))
        functions = library().functions
        assert functions is not None
        functions.ahl_change(
            x.data_ptr(), x.shape[1], table.count, table.tiles.data_ptr(), table.downs.data_ptr(),
            table.strides.data_ptr(), len(self._widths), table.ups.data_ptr(), table.ranks.data_ptr(),
            table.firsts.data_ptr(), self._offsets.data_ptr(), self._widths.data_ptr(), out.data_ptr(), out.shape[1],
            hidden.data_ptr(), self._stride, torch.get_num_threads(),
        )  # fmt: skip


@dataclass(frozen=True)
class _Table:
    """What `ahl_change` reads: tiles [count, 2], addresses and sizes [count] and [layers, count]; all int64."""

    count: int
    tiles: torch.Tensor
    downs: torch.Tensor
    strides: torch.Tensor
    ups: torch.Tensor
    ranks: torch.Tensor
    firsts: torch.Tensor


def _table(rows: Sequence[RowMatrices | None], tokens: int, layers: int) -> _Table:
    tiles: list[tuple[int, int]] = []
    owners: list[RowMatrices] = []
    begin = 0
    while begin < len(rows):
        end = begin + 1
        while end < len(rows) and rows[end] is rows[begin]:
            end += 1
        owner = rows[begin]
        if owner is not None:
            for first in range(begin * tokens, end * tokens, _TILE):
                tiles.append((first, min(_TILE, end * tokens - first)))
                owners.append(owner)
        begin = end
    columns = {id(owner): _columns(owner, layers) for owner in owners}
    per_layer = torch.tensor([columns[id(owner)] for owner in owners]).view(len(owners), layers, 3).permute(2, 1, 0)
    ups, ranks, firsts = per_layer.contiguous()
    sizes = torch.tensor([(owner.down.data_ptr(), owner.down.shape[1]) for owner in owners]).t().contiguous()
    return _Table(len(tiles), torch.tensor(tiles), sizes[0], sizes[1], ups, ranks, firsts)


def _columns(owner: RowMatrices, layers: int) -> list[tuple[int, int, int]]:
    """For each layer: the address of its matrix (0: none), its rank, its first column of `down`."""
    found, first = [], 0
    for up in owner.ups:
        rank = 0 if up is None else int(up.shape[0])
        found.append((0 if up is None else up.data_ptr(), rank, first))
        first += rank
    assert len(found) == layers
    return found
