"""`EncoderOps` by native code: float32 on a CPU, heads whose width is a multiple of 16."""

from __future__ import annotations

import torch

from ...kernels import training as native
from ..decoder.ops import Parts
from .ops import Drop, EncoderOps, Heads, Norm, Rows


class NativeEncoderOps(EncoderOps):
    """See `EncoderOps`; dropout is part of what it belongs to and its masks are nowhere written."""

    name = "native"

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        drop: Drop,
        norm: Norm,
        total: torch.Tensor,
        out: torch.Tensor,
        sums: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """See `EncoderOps`."""
        by = native.Dropout(drop.keys, drop.indices, drop.salt, drop.p) if drop.p else None
        mean, inverse = sums[0][:, 0], sums[1][:, 0]
        native.add_layer_norm(x, delta, norm.weight, norm.bias, norm.eps, total, out, mean, inverse, by)

    def norm_back(
        self,
        grad: torch.Tensor,
        total: torch.Tensor,
        norm: Norm,
        sums: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        """See `EncoderOps`."""
        native.layer_norm_back(grad, total, norm.weight, sums[0][:, 0], sums[1][:, 0], out)

    def gelu(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """See `EncoderOps`."""
        native.gelu(x, out)

    def gelu_back(self, x: torch.Tensor, grad: torch.Tensor, out: torch.Tensor) -> None:
        """See `EncoderOps`."""
        native.gelu_back(x, grad, out)

    def attend_rows(self, parts: Parts, out: torch.Tensor, log_sum: torch.Tensor, rows: Rows, heads: Heads) -> None:
        """See `EncoderOps`."""
        count, dropout = heads.count, _dropout(rows, heads)
        native.attend(
            *parts, out, log_sum, rows.spans, count, count, heads.dim, heads.scaling, causal=False, dropout=dropout
        )

    def attend_rows_back(
        self,
        parts: Parts,
        out: torch.Tensor,
        log_sum: torch.Tensor,
        grad: torch.Tensor,
        grads: Parts,
        rows: Rows,
        heads: Heads,
    ) -> None:
        """See `EncoderOps`."""
        grads[1].zero_()
        grads[2].zero_()
        count, dropout = heads.count, _dropout(rows, heads)
        native.attend_back(
            *parts, out, log_sum, grad, *grads, rows.spans, count, count, heads.dim, heads.scaling, causal=False,
            dropout=dropout,
        )  # fmt: skip

    def drop(
        self, x: torch.Tensor, keys: torch.Tensor, tokens: torch.Tensor, salt: int, p: float, out: torch.Tensor
    ) -> None:
        """See `Ops`."""
        native.drop(x, keys, tokens, salt, p, out)


def _dropout(rows: Rows, heads: Heads) -> native.Dropout | None:
    return native.Dropout(rows.keys, rows.indices, heads.salt, heads.p) if heads.p else None
