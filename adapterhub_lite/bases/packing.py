"""Pack the frozen weights of a base's layers for the native products, in the form the base keeps them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.library import library
from ..kernels.packed import NF4_BLOCK, PackedWeight, pack_dense, pack_int8, pack_nf4
from .memory import available_bytes
from .quantization import dense_weight, is_quantized, nf4_scales

# As for working copies: what is packed must leave room for activations, adapters and other programs.
_SHARE = 0.25


def packable(modules: Sequence[Any]) -> bool:
    """Whether the native products are here, and there is memory for a packed copy of these layers' weights."""
    if library().functions is None or any(_device(module) != "cpu" for module in modules):
        return False
    need = sum(2 * int(module.in_features) * int(module.out_features) for module in modules)
    return need <= _SHARE * available_bytes()


def packed(modules: Sequence[Any]) -> PackedWeight | None:
    """The weights of layers with one input, below each other, packed; None for layers of a kind that is not packed.

    No value is rounded: 4-bit codes and int8 values are moved, and a dense weight becomes bfloat16 only if it is one.
    """
    kinds = {type(module).__name__ for module in modules}
    if kinds == {"Linear4bit"} and all(_plain_nf4(module) for module in modules):
        return _nf4(modules)
    if kinds == {"Linear8bitLt"}:
        return _int8(modules)
    if all(type(module) is nn.Linear or is_quantized(module) for module in modules):
        return pack_dense(torch.cat([dense_weight(module, torch.float32) for module in modules]))
    return None


def _device(module: Any) -> str:
    return str(next(module.parameters()).device.type)


def _plain_nf4(module: Any) -> bool:
    state = module.weight.quant_state
    plain = state.quant_type == "nf4" and state.blocksize == NF4_BLOCK
    return plain and int(module.in_features) % NF4_BLOCK == 0


def _nf4(modules: Sequence[Any]) -> PackedWeight:
    codes, scales = [], []
    for module in modules:
        data, state = module.weight.data.reshape(-1), module.weight.quant_state
        # bitsandbytes puts the first of two values in the upper half of a byte.
        codes.append(torch.stack([data >> 4, data & 15], 1).view(module.out_features, module.in_features))
        scales.append(nf4_scales(state).view(module.out_features, -1))
    return pack_nf4(torch.cat(codes), torch.cat(scales), modules[0].weight.quant_state.code)


def _int8(modules: Sequence[Any]) -> PackedWeight:
    values, scales = [], []
    for module in modules:
        weight = module.weight
        values.append(weight.CB if weight.CB is not None else weight.data)
        scales.append((weight.SCB if weight.SCB is not None else module.state.SCB).float() / 127)
    return pack_int8(torch.cat(values), torch.cat(scales))
