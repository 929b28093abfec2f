"""Attention of packed rows, natively in float32 on a CPU, with its backward; see `training` for what both promise.

Spans, int64 [spans, 5]: first query row, number of queries, first own key row, first context key row, number of context
keys. A query sees all context keys of its span, then as many own keys as there are queries: up to its own where it is
causal, else all. With a window it sees the last `window` of these keys alone. Spans may share a context, which may be
another span's own keys. Keys and values serve heads / kv_heads heads each.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from .training_checks import Dropout, DropoutEntry, address, dropout_entry, functions, is_plain, looks

LARGEST_DIM = 256
_TABLE = 5
_MATRICES = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")


class _Lines(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("stride", ctypes.c_long)]


class _Attention(ctypes.Structure):
    """`attention` of training_attention.h."""

    _fields_ = [
        *((name, _Lines) for name in _MATRICES),
        ("log_sum", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        *(
            (name, ctypes.c_long)
            for name in ("count", "heads", "kv_heads", "dim", "causal", "window", "query_lines", "key_lines")
        ),
        ("scaling", ctypes.c_float),
        ("drop", DropoutEntry),
    ]


@dataclass(frozen=True)
class Shape:
    """What is the same for all spans of a layer; window 0: none. dim: a multiple of 16, at most 256."""

    heads: int
    kv_heads: int
    dim: int
    scaling: float
    causal: bool = True
    window: int = 0


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    spans: torch.Tensor,
    heads: int,
    kv_heads: int,
    dim: int,
    scaling: float,
    causal: bool = True,
    window: int = 0,
    dropout: Dropout | None = None,
) -> None:
    """out = softmax(scaling * q k^T) v within spans (arXiv 2205.14135); lines of no span are left as they are.

    Args:
        q: [tokens, heads * dim]; like k, v and out it may be columns of wider lines.
        k: [key lines, kv_heads * dim]; v likewise.
        out: [tokens, heads * dim].
        log_sum: [tokens, heads], for the backward: the logarithm of each softmax's denominator.
        spans: int64 [spans, 5], see the module.
        dropout: of the weights; its tokens are the queries' indices in their rows.

    Raises:
        ValueError: a tensor or span is not what it should be; nothing is written then.
    """
    shape = Shape(heads, kv_heads, dim, scaling, causal, window)
    what = _entry(shape, spans, log_sum, dropout, (("q", q), ("k", k), ("v", v), ("out", out)))
    if not functions().ahl_attend(ctypes.addressof(what), torch.get_num_threads()):
        raise MemoryError


def attend_back(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    grad_out: torch.Tensor,
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    spans: torch.Tensor,
    heads: int,
    kv_heads: int,
    dim: int,
    scaling: float,
    causal: bool = True,
    window: int = 0,
    dropout: Dropout | None = None,
) -> None:
    """grad_q = the gradient of q for lines of spans; grad_k, grad_v += those of k and v (arXiv 2307.08691).

    Arguments are those of `attend`, out and log_sum its results. Gradients share no memory with what is read.

    Raises:
        ValueError: a tensor or span is not what it should be; nothing is written then.
    """
    shape = Shape(heads, kv_heads, dim, scaling, causal, window)
    given = (("q", q), ("k", k), ("v", v), ("out", out), ("grad_out", grad_out))
    found = (("grad_q", grad_q), ("grad_k", grad_k), ("grad_v", grad_v))
    what = _entry(shape, spans, log_sum, dropout, (*given, *found))
    if not functions().ahl_attend_back(ctypes.addressof(what), torch.get_num_threads()):
        raise MemoryError


def _entry(
    shape: Shape,
    spans: torch.Tensor,
    log_sum: torch.Tensor,
    dropout: Dropout | None,
    matrices: tuple[tuple[str, torch.Tensor], ...],
) -> _Attention:
    _check(shape)
    named = dict(matrices)
    queries, keys = named["q"].shape[0], named["k"].shape[0]
    table = {
        name: _lines(name, matrix, keys, shape.kv_heads * shape.dim)
        if name.endswith(("k", "v"))
        else _lines(name, matrix, queries, shape.heads * shape.dim)
        for name, matrix in matrices
    }
    count = spans.shape[0]
    at = address("spans", spans, count, _TABLE, dtype=torch.int64)
    if not functions().ahl_are_spans(at, count, queries, keys):
        raise ValueError(
            f"A span lies outside of {queries} queries and {keys} keys, is empty, or shares a query or an own key."
        )
    return _Attention(
        **table, log_sum=address("log_sum", log_sum, queries, shape.heads), spans=at, count=count, heads=shape.heads,
        kv_heads=shape.kv_heads, dim=shape.dim, causal=shape.causal, window=shape.window, query_lines=queries,
        key_lines=keys, scaling=shape.scaling, drop=dropout_entry(dropout, queries),
    )  # fmt: skip


def _check(shape: Shape) -> None:
    if shape.dim % 16 or not 0 < shape.dim <= LARGEST_DIM:
        raise ValueError(f"A head's width should be a multiple of 16 up to {LARGEST_DIM}; it is {shape.dim}.")
    if shape.kv_heads < 1 or shape.heads < 1 or shape.heads % shape.kv_heads:
        raise ValueError(f"{shape.heads} heads cannot share {shape.kv_heads} heads of keys evenly.")
    if shape.window < 0 or (shape.window and not shape.causal):
        raise ValueError("A window should be positive, and of causal attention.")


def _lines(name: str, matrix: torch.Tensor, lines: int, width: int) -> _Lines:
    dense = matrix.dim() == 2 and matrix.stride(1) == 1 and (lines < 2 or matrix.stride(0) >= width)
    if not is_plain(matrix) or matrix.shape != (lines, width) or not dense:
        raise ValueError(f"{name} should be float32 [{lines}, {width}] with dense lines; it is {looks(matrix)}.")
    return _Lines(matrix.data_ptr(), matrix.stride(0))
