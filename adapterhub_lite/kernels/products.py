"""Products of many tokens with frozen float32 matrices, with what adapters add summed in the same pass (products.c).

A row's sums have one order, whatever rows are beside it and however many threads compute. `available` says whether
there is native code for it; without, or for other dtypes and devices, the caller multiplies with torch.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from .library import library
from .training_checks import address, functions, is_plain, looks

_PANEL = 48
_ROOM = 196608  # floats of the panels that a thread lays at once: they stay in the second cache
_CHUNK = 1536  # inputs of them, at most
_OUTPUTS, _INPUTS, _PANELS = range(3)


@dataclass(frozen=True)
class Packed:
    """A matrix that x [tokens, n_in] is multiplied with, to [tokens, n_out].

    Attributes:
        matrix: panels of 48 outputs [panels, n_in, 48]; or the weight as it lies, which is laid so at every product.
        form: which of them (see products.c).
    """

    matrix: torch.Tensor
    form: int
    n_in: int
    n_out: int

    @property
    def nbytes(self) -> int:
        """Bytes beside the weight."""
        return self.matrix.nbytes if self.form == _PANELS else 0


@dataclass(frozen=True)
class Change:
    """What an adapter adds to its rows: low [rows, rank] up [rank, n_out].

    Attributes:
        end: its rows end here, and begin where those of the change before end.
    """

    end: int
    low: torch.Tensor | None = None
    up: torch.Tensor | None = None


class _Addition(ctypes.Structure):
    _fields_ = [
        ("end", ctypes.c_long),
        ("up", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("rank", "ldu", "ldl")),
    ]


class _Products(ctypes.Structure):
    _fields_ = [
        ("w", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("ldw", "form", "k", "n")),
        *((name, ctypes.c_void_p) for name in ("bias", "x")),
        *((name, ctypes.c_long) for name in ("ldx", "rows")),
        ("y", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("ldy", "add")),
        ("additions", ctypes.c_void_p),
        ("segments", ctypes.c_long),
        ("room", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("each", "all")),
        ("tiles", ctypes.c_void_p),
    ]


class _Rooms(threading.local):
    """Memory of a Python thread's products, kept from one to the next."""

    def __init__(self) -> None:
        self.floats, self.tiles = torch.empty(0), torch.empty(0, dtype=torch.long)

    def __call__(self, floats: int, tiles: int) -> tuple[int, int]:
        if self.floats.numel() < floats:
            self.floats = torch.empty(floats)
        if self.tiles.numel() < 3 * tiles:
            self.tiles = torch.empty(3 * tiles, dtype=torch.long)
        return self.floats.data_ptr(), self.tiles.data_ptr()


_rooms = _Rooms()


def available() -> bool:
    """Whether there is native code, for registers that hold the sums it keeps in them (AVX-512)."""
    found = library().functions
    return found is not None and bool(found.ahl_wide_registers())


def pack(weight: torch.Tensor, transposed: bool) -> Packed:
    """A copy of weight [out, in] in panels, for x W^T (transposed: for x W, a gradient through it)."""
    matrix = _checked("weight", weight).t() if transposed else _checked("weight", weight)
    n_out, n_in = matrix.shape
    whole = F.pad(matrix, (0, 0, 0, -n_out % _PANEL)).view(-1, _PANEL, n_in)
    return Packed(whole.transpose(1, 2).contiguous(), _PANELS, n_in, n_out)


def unpacked(weight: torch.Tensor, transposed: bool) -> Packed:
    """The same without a copy: the weight [out, in] is read where it lies."""
    n_out, n_in = _checked("weight", weight).shape
    return Packed(weight, _INPUTS, n_out, n_in) if transposed else Packed(weight, _OUTPUTS, n_in, n_out)


def product(
    x: torch.Tensor,
    packed: Packed,
    out: torch.Tensor,
    add: bool = False,
    bias: torch.Tensor | None = None,
    changes: Sequence[Change] = (),
) -> None:
    """out [tokens, n_out] = (add: +=) x [tokens, n_in] times the matrix, plus bias [n_out] and changes.

    x, out and all of a change may be columns of wider matrices; out may be none of the others' memory.
    """
    tokens = len(x)
    if _checked("x", x).shape[1] != packed.n_in or _checked("out", out).shape != (tokens, packed.n_out):
        wanted = f"x should be [tokens, {packed.n_in}] and out [tokens, {packed.n_out}]"
        raise ValueError(f"{wanted}: {looks(x)}, {looks(out)}.")
    if changes and changes[-1].end > tokens:
        raise ValueError(f"A change ends at row {changes[-1].end} of {tokens}.")
    entries = [_addition(first, change, packed.n_out) for first, change in _spans(changes)]
    if not changes or changes[-1].end < tokens:
        entries.append(_Addition(tokens))
    table = (_Addition * len(entries))(*entries)
    threads, each = torch.get_num_threads(), max(_ROOM, min(packed.n_in, _CHUNK) * _PANEL)
    most = each // (min(packed.n_in, _CHUNK) * _PANEL)  # panels at once
    whole = each + min(most, -(-packed.n_out // _PANEL)) * max(entry.rank for entry in entries) * _PANEL
    room, tiles = _rooms(whole * threads, tokens + len(entries))
    what = _Products(
        packed.matrix.data_ptr(), packed.matrix.stride(0), packed.form, packed.n_in, packed.n_out,
        address("bias", bias, packed.n_out), x.data_ptr(), x.stride(0), tokens, out.data_ptr(), out.stride(0), add,
        ctypes.addressof(table), len(entries), room, each, whole, tiles,
    )  # fmt: skip
    functions().ahl_products(ctypes.addressof(what), threads)


def _spans(changes: Sequence[Change]) -> list[tuple[int, Change]]:
    """Each change with its first row."""
    firsts = [0, *(change.end for change in changes)]
    if any(a > b for a, b in pairwise(firsts)):
        raise ValueError("Changes should stand in the order of their rows.")
    return list(zip(firsts, changes, strict=False))


def _addition(first: int, change: Change, n_out: int) -> _Addition:
    if change.up is None or change.low is None or change.end == first:
        return _Addition(change.end)
    rank, rows = len(change.up), change.end - first
    if _checked("up", change.up).shape != (rank, n_out) or _checked("low", change.low).shape != (rows, rank):
        raise ValueError(f"up should be [rank, {n_out}], low [{rows}, rank]: {looks(change.up)}, {looks(change.low)}.")
    stride = change.low.stride(0)
    # Rows are counted from the first of all, so the place of a row before its segment's may be outside of `low`.
    return _Addition(
        change.end, change.up.data_ptr(), change.low.data_ptr() - 4 * first * stride, rank, change.up.stride(0), stride
    )


def _checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not is_plain(tensor) or tensor.dim() != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
        raise ValueError(f"{name} should be float32 in lines on a CPU; it is {looks(tensor)}.")
    return tensor
