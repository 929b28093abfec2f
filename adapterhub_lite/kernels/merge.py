"""A frozen matrix with what adapters add to it, in one pass: W + (L R) f + ..., rounded once (merge.c).

The bits are those of torch's float32 operations in that order; where there is no native code the caller uses torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .library import library

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Addition:
    """left [rows, rank] right [rank, columns], times a factor; both float32 and contiguous."""

    left: torch.Tensor
    right: torch.Tensor
    factor: float


class _Addition(ctypes.Structure):
    _fields_ = [
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("rank", ctypes.c_long),
        ("factor", ctypes.c_float),
    ]


class _Merge(ctypes.Structure):
    _fields_ = [
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("rows", "columns", "source_format", "target_format")),
        ("additions", ctypes.c_void_p),
        ("count", ctypes.c_long),
    ]


def merge_rows(source: torch.Tensor, additions: Sequence[Addition], target: torch.Tensor) -> bool | None:
    """target = source [rows, columns] plus all additions, summed in float32 in their order and rounded once.

    Source and target are float32, bfloat16 or float16; they may be one tensor.

    Returns:
        Whether every value of the target is finite; None where there is no native code for this, and nothing was done.
    """
    functions = library().functions
    if functions is None or not _possible(source, additions, target):
        return None
    rows, columns = source.shape
    table = (_Addition * len(additions))(
        *(_Addition(a.left.data_ptr(), a.right.data_ptr(), a.right.shape[0], a.factor) for a in additions)
    )
    what = _Merge(
        source.data_ptr(), target.data_ptr(), rows, columns, _FORMATS[source.dtype], _FORMATS[target.dtype],
        ctypes.addressof(table), len(additions),
    )  # fmt: skip
    found = functions.ahl_merge(ctypes.addressof(what))
    return None if found < 0 else bool(found)


def _possible(source: torch.Tensor, additions: Sequence[Addition], target: torch.Tensor) -> bool:
    rows, columns = source.shape
    fit = target.shape == source.shape and all(
        a.left.shape == (rows, len(a.right)) and a.right.shape == (len(a.right), columns) for a in additions
    )
    if not fit:
        raise ValueError("The matrices of a merge do not fit together.")
    return (
        source.dtype in _FORMATS
        and target.dtype in _FORMATS
        and all(t.is_cpu and t.is_contiguous() for t in (source, target))
        and all(
            t.is_cpu and t.is_contiguous() and t.dtype == torch.float32 for a in additions for t in (a.left, a.right)
        )
    )
