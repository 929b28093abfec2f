"""Linear layers of one input computed as one product, where their weights allow it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class FusedWeight:
    """The weights of several layers below each other [out of all, in]; the layers hold views of it."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def fuse(modules: tuple[nn.Module, ...]) -> FusedWeight | None:
    """Lay the dense weights of `modules` below each other, once; None where they must be computed by the modules.

    The values stay the same, and so does the memory: each module's weight becomes a view of the fused one. Layers that
    bitsandbytes quantised compute for themselves, with or without a working copy, so that both give the same bits.
    """
    # A subclass of Linear computes in its own way.
    if not all(type(module) is nn.Linear for module in modules):
        return None
    weights: list[torch.Tensor] = [module.weight.detach() for module in modules]  # type: ignore[union-attr,operator]
    biases: list[Any] = [module.bias for module in modules]
    if len({weight.dtype for weight in weights}) > 1 or len({bias is None for bias in biases}) > 1:
        return None
    whole = weights[0] if len(weights) == 1 else _below_each_other(modules, weights)
    return FusedWeight(whole, None if biases[0] is None else torch.cat([bias.detach() for bias in biases]))


def _below_each_other(modules: tuple[nn.Module, ...], weights: list[torch.Tensor]) -> torch.Tensor:
    already = _as_one(weights)
    if already is not None:
        return already
    whole = torch.cat(weights)
    for module, view in zip(modules, torch.split(whole, [w.shape[0] for w in weights]), strict=True):  # type: ignore[no-untyped-call]
        module.weight = nn.Parameter(view, requires_grad=False)
    return whole


def _as_one(weights: list[torch.Tensor]) -> torch.Tensor | None:
    """The whole of which `weights` are views from top to bottom; whoever else fused the layers holds the same one."""
    first = weights[0]
    ends = [first.storage_offset()]
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or not weight.is_contiguous() or weight.storage_offset() != ends[-1]:
            return None
        ends.append(ends[-1] + weight.numel())
    return first.as_strided((sum(w.shape[0] for w in weights), first.shape[1]), (first.shape[1], 1))
