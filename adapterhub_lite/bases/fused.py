"""Linear layers of one input computed as one product, where their weights allow it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .quantization import is_quantized


@dataclass(frozen=True)
class FusedWeight:
    """The weights of several layers below each other [out of all, in]; the layers hold views of it."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def fuse(modules: tuple[nn.Module, ...]) -> FusedWeight | None:
    """Lay the dense weights of `modules` below each other, once; None where they must be computed by the modules.

    The values stay the same, and so does the memory: each module's weight becomes a view of the fused one. Layers that
    bitsandbytes quantised have a dense weight only as the working copy of a CPU.
    """
    weights = [_dense(module) for module in modules]
    if any(w is None or w.dtype != weights[0].dtype for w in weights):  # type: ignore[union-attr]
        return None
    biases: list[Any] = [getattr(module, "bias", None) for module in modules]
    if any((b is None) != (biases[0] is None) for b in biases):
        return None
    whole = weights[0] if len(weights) == 1 else _side_by_side(modules, weights)  # type: ignore[arg-type]
    assert whole is not None
    bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
    return FusedWeight(whole, bias)


def _dense(module: nn.Module) -> torch.Tensor | None:
    if is_quantized(module):
        copy = getattr(module, "_ahl_copy", None)
        return copy if isinstance(copy, torch.Tensor) else None
    weight = getattr(module, "weight", None)
    # A subclass computes in its own way.
    return weight.detach() if type(module) is nn.Linear and isinstance(weight, torch.Tensor) else None


def _side_by_side(modules: tuple[nn.Module, ...], weights: list[torch.Tensor]) -> torch.Tensor:
    whole = torch.cat(weights)
    for module, view in zip(modules, torch.split(whole, [w.shape[0] for w in weights]), strict=True):
        if is_quantized(module):
            module._ahl_copy = view  # type: ignore[assignment]
        else:
            module.weight = nn.Parameter(view, requires_grad=False)
    return whole
