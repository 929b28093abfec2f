"""FlashAttention's calls, computed plainly in float64: what `CudaOps` is tried with where there is no GPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from adapterhub_lite.training.decoder.cuda import Call, CudaOps
from adapterhub_lite.training.decoder.ops import AttentionShape, Parts


def oracle() -> CudaOps:
    """Ops with attention of the same signature and meaning as the kernels'."""
    return CudaOps(forward, backward)


def _spans(call: Call) -> Any:
    assert call.starts.dtype == call.key_starts.dtype == torch.int32
    starts, keys = call.starts.tolist(), call.key_starts.tolist()
    assert max(b - a for a, b in pairwise(starts)) == call.longest
    assert max(b - a for a, b in pairwise(keys)) == call.longest_keys
    return [(slice(*q), slice(*k)) for q, k in zip(_pairs(starts), _pairs(keys), strict=True)]


def _pairs(ends: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(ends))


def _shares(
    queries: torch.Tensor, keys: torch.Tensor, shape: AttentionShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax [heads, queries, keys] aligned at the bottom right, its log-sums, and keys for each query head."""
    wide = keys.repeat_interleave(shape.heads // shape.kv_heads, 1)
    scores = torch.einsum("qhd,khd->hqk", queries, wide) * shape.scaling
    distance = torch.arange(len(queries))[:, None] + len(keys) - len(queries) - torch.arange(len(keys))
    hidden = distance < 0
    if shape.window is not None:
        hidden |= distance >= shape.window
    scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1), scores.logsumexp(-1), wide


def forward(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: Call, shape: AttentionShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [queries, heads, dim] and log-sums [heads, queries]."""
    assert queries.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    out = torch.empty(queries.shape, dtype=queries.dtype)
    sums = torch.empty((shape.heads, len(queries)), dtype=torch.promote_types(queries.dtype, torch.float32))
    for q, k in _spans(call):
        shares, log_sums, _ = _shares(queries[q].double(), keys[k].double(), shape)
        seen = values[k].double().repeat_interleave(shape.heads // shape.kv_heads, 1)
        out[q] = torch.einsum("hqk,khd->qhd", shares, seen).to(out.dtype)
        sums[:, q] = log_sums.to(sums.dtype)
    return out, sums


def backward(
    grad: torch.Tensor, parts: Parts, out: torch.Tensor, sums: torch.Tensor, call: Call, shape: AttentionShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients from what the forward gave: the log-sums must be those of these queries."""
    assert sums.is_contiguous()
    assert sums.shape == (shape.heads, len(grad))
    found = [torch.full(part.shape, float("nan"), dtype=part.dtype) for part in parts]
    for q, k in _spans(call):
        with torch.enable_grad():
            own = [part[some].double().requires_grad_() for part, some in zip(parts, (q, k, k), strict=True)]
            shares, log_sums, _ = _shares(own[0], own[1], shape)
            again = torch.einsum("hqk,khd->qhd", shares, own[2].repeat_interleave(shape.heads // shape.kv_heads, 1))
        torch.testing.assert_close(log_sums.detach().to(sums.dtype), sums[:, q], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(again.detach().to(out.dtype), out[q], rtol=2e-2, atol=2e-2)
        for place, some, into in zip((q, k, k), torch.autograd.grad(again, own, grad[q].double()), found, strict=True):
            into[place] = some.to(into.dtype)
    return found[0], found[1], found[2]
