"""One token a row through a decoder, by native products and native code for what stands between them (float32, CPU)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..kernels import step
from ..kernels.library import library
from .changes import Changes
from .window import Window

if TYPE_CHECKING:
    from .decoder import Decoder


def can_step_natively(decoder: Decoder) -> bool:
    """Whether this machine and this model allow it: native code, float32, SiLU, root-mean-square norms."""
    base = decoder.base
    layer = decoder.layers[0]
    return (
        library().functions is not None
        and base.device.type == "cpu"
        and base.dtype == torch.float32
        and decoder.head_dim % 16 == 0
        and layer.norms == (None, None)
        and base.config.hidden_act == "silu"
        and all(hasattr(norm, "variance_epsilon") for norm in (layer.before, layer.after, decoder.norm))
    )


class NativeStep:
    """Calls as `Decoder.step`, and gives the same but for rounding."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, window: Window, changes: Changes) -> torch.Tensor:
        """Logits [rows, vocabulary]; tokens and positions are [rows]."""
        decoder = self._decoder
        heads, scaling = decoder.heads, decoder.scaling
        x = decoder.embed(tokens)
        hidden = torch.empty_like(x)
        cos, sin = decoder.rotary(x[:, None], positions[:, None])
        turn = cos[:, 0].contiguous(), sin[:, 0].contiguous()
        filled = None if window.mask() is None else window.filled
        added = None
        for i, layer in enumerate(decoder.layers):
            keys, values = window.keys[i], window.values[i]
            qkv = layer.qkv(_norm(layer.before, x, added, hidden), changes)
            step.rotate(qkv, turn, heads, keys, values, window.end - 1)
            added = layer.out(step.attend(qkv, heads, keys, values, filled, window.end, scaling), changes)
            both = layer.gate_up(_norm(layer.after, x, added, hidden), changes)
            added = layer.down(step.silu_mul(both), changes)
        return decoder.lm_head(_norm(decoder.norm, x, added, hidden), changes)


def _norm(module: Any, x: torch.Tensor, added: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    return step.add_norm(x, added, module.weight, module.variance_epsilon, out)
