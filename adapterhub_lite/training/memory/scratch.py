"""What is made for a moment on a device, and how large it may be: dequantised weights, and parts of long matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...bases.quantization import dense_weight

# Bytes that one float32 temporary of an element-wise operation may take, and where memory is short; there are up to
# four at once.
TEMPORARY, SPARING = 32 * 2**20, 4 * 2**20


def blocks(x: torch.Tensor, most: int, itemsize: int = 4) -> list[slice]:
    """Rows to compute at once, so that a temporary of them takes no more than `most` bytes."""
    columns = x[0].numel() if len(x) else 1
    each = max(most // (columns * itemsize), 1)
    return [slice(first, min(first + each, len(x))) for first in range(0, len(x), each)]


def write_dense(module: nn.Module, out: torch.Tensor) -> None:
    """Write the weight of a quantised layer to `out` [out, in], with no second dense copy of it beside."""
    if out.is_meta:  # only the bytes are counted; quantised scales are dequantised before the weight
        torch.empty(getattr(module, "scales", 0), dtype=torch.float32, device=out.device)
        return
    weight: Any = module.weight
    import bitsandbytes.functional as bnb

    if type(module).__name__ == "Linear4bit":
        state = weight.quant_state
        if weight.is_cuda and state.dtype == out.dtype and tuple(state.shape) == tuple(out.shape):
            bnb.dequantize_4bit(weight.data, state, out=out)
        else:
            out.copy_(dense_weight(module, out.dtype))
        return
    values: Any = weight.CB if weight.CB is not None else weight.data
    scale: Any = weight.SCB if weight.SCB is not None else module.state.SCB  # type: ignore[union-attr]
    for rows in blocks(out, SPARING):
        out[rows] = bnb.int8_vectorwise_dequant(values[rows], scale[rows])
