"""Many small matrices in one call: transposed copies, and whether every value is a number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .library import library


def copy_transposed(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write the transpose of the first of each pair, [rows, columns], to the second, [columns, rows].

    Native for float32 on a CPU where the values of a row stand side by side; else by torch.
    """
    functions = library().functions
    natively = [] if functions is None else [pair for pair in pairs if _is_plain(*pair)]
    if functions is not None and natively:
        copies = torch.tensor([(a.data_ptr(), *a.shape, b.data_ptr(), b.stride(0)) for a, b in natively])
        functions.ahl_transpose(copies.data_ptr(), len(copies))
    if len(natively) < len(pairs):
        for source, target in pairs:
            if functions is None or not _is_plain(source, target):
                target.copy_(source.t())


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
