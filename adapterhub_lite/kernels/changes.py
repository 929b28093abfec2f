"""Low-rank changes of tokens that each have an adapter of their own, in float32 on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .library import library

_TILE = 4
_MEMBERS = 3


@dataclass(frozen=True)
class Matrices:
    """One adapter at the layers of one input, at most three of them.

    Attributes:
        down: [in, R], the down matrices of all layers side by side.
        ups: for each layer [rank, out], or None.
        gains: for each layer [out], the factor minus one on the frozen output without its bias, or None.
        biases: for each layer [out], or None.
        scale: [in], the factor on the input, or None.
    """

    down: torch.Tensor
    ups: tuple[torch.Tensor | None, ...]
    gains: tuple[torch.Tensor | None, ...]
    biases: tuple[torch.Tensor | None, ...]
    scale: torch.Tensor | None = None


class _Member(ctypes.Structure):
    _fields_ = [
        ("up", ctypes.c_void_p),
        ("rank", ctypes.c_long),
        ("first", ctypes.c_long),
        ("gain", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class Change(ctypes.Structure):
    """`change` of work.h: addresses only, so whoever makes one keeps the matrices."""

    _fields_ = [
        ("down", ctypes.c_void_p),
        ("width", ctypes.c_long),
        ("scale", ctypes.c_void_p),
        ("members", _Member * _MEMBERS),
    ]


def address_fields(count: int) -> torch.Tensor:
    """Which of the 8-byte fields of so many changes hold an address: [count * fields] bool."""
    pointers = [field[1] is ctypes.c_void_p for field in Change._fields_[:-1]]
    pointers += [field[1] is ctypes.c_void_p for field in _Member._fields_] * _MEMBERS
    assert len(pointers) * 8 == ctypes.sizeof(Change)
    return torch.tensor(pointers).repeat(count)


def change_of(matrices: Matrices | None) -> Change:
    """What the native products read of an adapter; nothing of None."""
    if matrices is None:
        return Change()
    members, first = [], 0
    for up, gain, bias in zip(matrices.ups, matrices.gains, matrices.biases, strict=True):
        rank = 0 if up is None else int(up.shape[0])
        members.append(_Member(address(up), rank, first, address(gain), address(bias)))
        first += rank
    width = int(matrices.down.shape[1])
    return Change(address(matrices.down) if width else None, width, address(matrices.scale), (*members,))


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a contiguous float32 tensor lies; None of None."""
    if tensor is None:
        return None
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def tiles(owners: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """Neighbouring tokens of one adapter: first token, how many (at most 4), adapter -> [count, 3].

    Args:
        owners: the adapter of each row; -1: none, and no tile.
        tokens: how many tokens of each row stand one after another.
    """
    found: list[tuple[int, int, int]] = []
    first, row = 0, 0
    while row < len(owners):
        end, owner = first, owners[row]
        while row < len(owners) and owners[row] == owner:
            end += tokens[row]
            row += 1
        if owner >= 0:
            found += [(at, min(_TILE, end - at), owner) for at in range(first, end, _TILE)]
        first = end
    return torch.tensor(found, dtype=torch.long).view(-1, 3)


class RowChanges:
    """The changes of one group of layers, each row by its own adapter's matrices.

    Args:
        rows: the matrices of each row of the batch, or None; rows of one adapter give the same object.
        widths: outputs of each layer of the group, which stand side by side in the output.
        own: the frozen biases [all outputs], or None.
    """

    def __init__(self, rows: Sequence[Matrices | None], widths: Sequence[int], own: torch.Tensor | None) -> None:
        self._kept = {id(row): row for row in rows if row is not None}
        numbers = {key: number for number, key in enumerate(self._kept)}
        self._owners = [-1 if row is None else numbers[id(row)] for row in rows]
        self._changes = (Change * len(numbers))(*map(change_of, self._kept.values()))
        self._widths, self._own = torch.tensor(widths), own
        self._stride = max((int(row.down.shape[1]) for row in self._kept.values()), default=0)
        self._tiles: dict[int, torch.Tensor] = {}

    def apply(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add the changes to out [rows * tokens, all outputs], for x [rows * tokens, in], in place; both contiguous."""
        tokens = x.shape[0] // len(self._owners)
        if tokens not in self._tiles:
            self._tiles[tokens] = tiles(self._owners, [tokens] * len(self._owners))
        some = self._tiles[tokens]
        hidden = torch.empty((x.shape[0], self._stride))
        functions = library().functions
        assert functions is not None
        functions.ahl_change(
            x.data_ptr(), x.shape[1], len(some), some.data_ptr(), ctypes.addressof(self._changes), len(self._widths),
            self._widths.data_ptr(), address(self._own), out.data_ptr(), out.shape[1], hidden.data_ptr(), self._stride,
            torch.get_num_threads(),
        )  # fmt: skip
