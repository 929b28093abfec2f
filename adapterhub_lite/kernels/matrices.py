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


def copy_transposed(copies: Sequence[Copy]) -> bool:
    """Make the copies; whether all values are known to be finite.

    Native for float32 on a CPU where the values of a row stand side by side; else by torch.
    """
    functions = library().functions
    native = [one for one in copies if functions is not None and _is_plain(one.source, one.target)]
    known = len(native) == len(copies)
    if functions is not None and native:
        table = (_Copy * len(native))(*map(_entry, native))
        known = bool(functions.ahl_transpose(ctypes.addressof(table), len(native))) and known
    if len(native) < len(copies):
        for one in copies:
            if functions is None or not _is_plain(one.source, one.target):
                one.target.copy_(one.source.t())
                if one.factor != 1.0:
                    one.target.mul_(one.factor)
    return known


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
