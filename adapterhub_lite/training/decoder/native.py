"""What a decoder's layers do between the products, natively: float32 on a CPU with a compiler."""

from __future__ import annotations

import torch

from ...bases.load import Base
from ...kernels import training as native
from ...kernels.training_attention import LARGEST_DIM
from .cuda import cuda_ops
from .ops import AttentionShape, Ops, Parts, TorchOps
from .parts import DecoderParts


class NativeOps:
    """`Ops` by `kernels.training`."""

    name = "native"

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, inverse: torch.Tensor
    ) -> None:
        """See `Ops`."""
        native.rms_norm(x, weight, eps, out, inverse)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        total: torch.Tensor,
        out: torch.Tensor,
        inverse: torch.Tensor,
    ) -> None:
        """See `Ops`."""
        native.add_rms_norm(x, delta, weight, eps, total, out, inverse)

    def rms_norm_back(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        inverse: torch.Tensor,
        out: torch.Tensor,
        add: bool,
    ) -> None:
        """See `Ops`."""
        native.rms_norm_back(grad, x, weight, inverse, out, add)

    def swiglu(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """See `Ops`."""
        native.swiglu(gate_up, out)

    def swiglu_back(self, gate_up: torch.Tensor, grad: torch.Tensor, out: torch.Tensor) -> None:
        """See `Ops`."""
        native.swiglu_back(gate_up, grad, out, gate_up)

    def rotate(self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], back: bool) -> None:
        """See `Ops`."""
        native.rotate(x, *turns, inverse=back)

    def attend(
        self, parts: Parts, out: torch.Tensor, log_sum: torch.Tensor, spans: torch.Tensor, shape: AttentionShape
    ) -> None:
        """See `Ops`."""
        native.attend(
            *parts, out, log_sum, spans,
            shape.heads, shape.kv_heads, shape.dim, shape.scaling, window=shape.window or 0,
        )  # fmt: skip

    def attend_back(
        self,
        parts: Parts,
        out: torch.Tensor,
        log_sum: torch.Tensor,
        grad: torch.Tensor,
        grads: Parts,
        spans: torch.Tensor,
        shape: AttentionShape,
    ) -> None:
        """See `Ops`."""
        for some in grads[1:]:  # it adds to these
            some.zero_()
        native.attend_back(
            *parts, out, log_sum, grad, *grads, spans,
            shape.heads, shape.kv_heads, shape.dim, shape.scaling, window=shape.window or 0,
        )  # fmt: skip

    def cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
        """See `Ops`."""
        native.cross_entropy_rows(logits, targets, losses)

    def drop(
        self, x: torch.Tensor, keys: torch.Tensor, tokens: torch.Tensor, salt: int, p: float, out: torch.Tensor
    ) -> None:
        """See `Ops`."""
        native.drop(x, keys, tokens, salt, p, out)


def ops_for(base: Base, parts: DecoderParts) -> Ops:
    """The fastest element-wise work for a base's device, dtype and sizes."""
    if base.device.type == "cuda":
        if "training ops" not in base.derived:
            window = next((layer.window for layer in parts.layers if layer.window is not None), None)
            shape = AttentionShape(parts.heads, parts.kv_heads, parts.head_dim, parts.scaling, window)
            base.derived["training ops"] = cuda_ops(shape, base.device, base.dtype)
        found: Ops = base.derived["training ops"]
        return found
    fits = base.device.type == "cpu" and base.dtype == torch.float32 and native.available()
    heads = parts.head_dim % 16 == 0 and parts.head_dim <= LARGEST_DIM
    return NativeOps() if fits and heads else TorchOps()
