"""Many small matrices in one call: transposed copies, and whether every value is a number."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .library import library


@dataclass(frozen=True)
class Copy:
    """A matrix [rows, columns] whose transpose, times a factor, goes to `target` [columns, rows]."""

    source: torch.Tensor
    target: torch.Tensor
    factor: float = 1.0


class _Copy(ctypes.Structure):
    _fields_ = [
        ("source", ctypes.c_void_p),
        ("rows", ctypes.c_long),
        ("columns", ctypes.c_long),
        ("target", ctypes.c_void_p),
        ("stride", ctypes.c_long),
        ("factor", ctypes.c_double),
    ]


_SOURCE, _TARGET = 0, 3  # fields of a copy


def copy_transposed(copies: Sequence[Copy], room: torch.Tensor | None = None) -> bool:
    """Make the copies; whether all values are known to be finite.

    Native for float32 on a CPU where the values of a row stand side by side; else by torch.

    Args:
        room: new memory in which the targets lie one after another.
    """
    functions = library().functions
    native = [one for one in copies if functions is not None and _is_plain(one.source, one.target)]
    known = len(native) == len(copies)
    if native:
        known = _turn((_Copy * len(native))(*map(_entry, native)), room) and known
    if len(native) < len(copies):
        for one in copies:
            if functions is None or not _is_plain(one.source, one.target):
                one.target.copy_(one.source.t())
                if one.factor != 1.0:
                    one.target.mul_(one.factor)
    return known


class CopyTable:
    """Native copies whose sources lie in one buffer and whose targets in another, to be made in other such buffers."""

    def __init__(self, copies: Sequence[Copy], source: torch.Tensor, target: torch.Tensor) -> None:
        table = (_Copy * len(copies))(*map(_entry, copies))
        self._places = _numbers(table).clone()
        self._places[:, _SOURCE] -= source.data_ptr()
        self._places[:, _TARGET] -= target.data_ptr()

    @staticmethod
    def possible(copies: Sequence[Copy], source: torch.Tensor, target: torch.Tensor) -> bool:
        """Whether all copies are native ones, out of `source` into `target`."""
        return library().functions is not None and all(
            _is_plain(one.source, one.target) and _is_inside(one.source, source) and _is_inside(one.target, target)
            for one in copies
        )

    def __len__(self) -> int:
        return len(self._places)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> bool:
        """`copy_transposed` from one buffer to another; both are as large as those that this was made of."""
        table = (_Copy * len(self))()
        numbers = _numbers(table)
        numbers.copy_(self._places)
        numbers[:, _SOURCE] += source.data_ptr()
        numbers[:, _TARGET] += target.data_ptr()
        return _turn(table, target)


def _turn(table: ctypes.Array[_Copy], room: torch.Tensor | None) -> bool:
    functions = library().functions
    assert functions is not None
    place, size = (None, 0) if room is None else (room.data_ptr(), room.nbytes)
    return bool(functions.ahl_transpose(ctypes.addressof(table), len(table), place, size))


def _numbers(table: ctypes.Array[_Copy]) -> torch.Tensor:
    """The table as [copies, fields] int64, in its own memory."""
    return torch.frombuffer(table, dtype=torch.int64).view(len(table), -1)


def _is_inside(tensor: torch.Tensor, buffer: torch.Tensor) -> bool:
    begin = tensor.data_ptr() - buffer.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 0 and begin >= 0 and begin + (last + 1) * tensor.itemsize <= buffer.nbytes


def _entry(one: Copy) -> _Copy:
    rows, columns = one.source.shape
    target = one.target
    return _Copy(one.source.data_ptr(), rows, columns, target.data_ptr(), target.stride(0), one.factor)


def _is_plain(source: torch.Tensor, target: torch.Tensor) -> bool:
    return (
        source.device.type == target.device.type == "cpu"
        and source.dtype == target.dtype == torch.float32
        and source.is_contiguous()
        and (target.stride(1) == 1 or target.shape[1] == 1)
        and target.shape == source.t().shape
    )


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no value is NaN or infinite."""
    functions, natively = library().functions, []
    for tensor in tensors:
        if functions is not None and tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous():
            natively.append((tensor.data_ptr(), tensor.numel()))
        elif not bool(torch.isfinite(tensor).all()):
            return False
    if functions is None or not natively:
        return True
    stretches = torch.tensor(natively)
    return bool(functions.ahl_all_finite(stretches.data_ptr(), len(natively)))
