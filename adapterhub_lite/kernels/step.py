"""What stands between the products of a decoder's step: one new token a row, float32, contiguous, on a CPU."""

from __future__ import annotations

from typing import Any

import torch

from .library import library


def add_norm(
    x: torch.Tensor, change: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """x [rows, n] += change, in place; returns x / sqrt(mean(x^2) + eps) * weight in `out` (arXiv 1910.07467)."""
    rows, n = x.shape
    added = None if change is None else change.data_ptr()
    _functions().ahl_add_norm(x.data_ptr(), added, weight.data_ptr(), eps, rows, n, out.data_ptr())
    return out


def silu_mul(both: torch.Tensor) -> torch.Tensor:
    """both [rows, 2n] holds gate and up -> silu(gate) * up [rows, n] (arXiv 2002.05202)."""
    rows, n = both.shape[0], both.shape[1] // 2
    out = torch.empty((rows, n))
    _functions().ahl_silu_mul(both.data_ptr(), rows, n, out.data_ptr(), torch.get_num_threads())
    return out


def rotate(
    qkv: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor],
    heads: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    column: int,
) -> None:
    """Turn queries and keys of qkv [rows, (heads + 2 kv_heads) * dim] in place; write keys and values to a column.

    Args:
        turn: cos and sin [rows, dim] of each row's position (arXiv 2104.09864, halves as Llama pairs them).
        keys, values: [rows, kv_heads, columns, dim].
    """
    rows, kv_heads, columns, dim = keys.shape
    _functions().ahl_rotate(
        qkv.data_ptr(), turn[0].data_ptr(), turn[1].data_ptr(), rows, heads, kv_heads, dim,
        keys.data_ptr(), values.data_ptr(), columns, column,
    )  # fmt: skip


def attend(
    qkv: torch.Tensor,
    heads: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    filled: torch.Tensor | None,
    end: int,
    scaling: float,
) -> torch.Tensor:
    """Attention of the queries in qkv over the first `end` columns -> [rows, heads * dim].

    Args:
        filled: [rows, columns] bool, which columns a row sees; None: all of them.
    """
    rows, kv_heads, columns, dim = keys.shape
    out, scores = torch.empty((rows, heads * dim)), torch.empty(rows * heads * (end + 16))
    seen = None if filled is None else filled.data_ptr()
    _functions().ahl_attend(
        qkv.data_ptr(), keys.data_ptr(), values.data_ptr(), seen, rows, heads, kv_heads, dim, columns, end, scaling,
        scores.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _functions() -> Any:
    return library().functions
