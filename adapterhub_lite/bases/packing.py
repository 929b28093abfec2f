"""Pack the frozen weights of a base's layers for the native products, in the form the base keeps them in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..kernels.library import library
from ..kernels.packed import NF4_BLOCK, PackedWeight, pack_dense, pack_int8, pack_nf4
from .memory import available_bytes
from .quantization import dense_weight, is_quantized

# As for working copies: what is packed must leave room for activations, adapters and other programs.
_SHARE = 0.25


def packable(modules: list[nn.Module]) -> bool:
    """Whether the native products are here, and there is memory for a packed copy of these layers' weights."""
    if library().functions is None or any(_device(module) != "cpu" for module in modules):
        return False
    need = sum(2 * int(m.in_features) * int(m.out_features) for m in modules)  # type: ignore[arg-type]
    return need <= _SHARE * available_bytes()


def packed(modules: tuple[nn.Module, ...]) -> PackedWeight | None:
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


def _device(module: nn.Module) -> str:
    return next(module.parameters()).device.type


def _plain_nf4(module: nn.Module) -> bool:
    weight: Any = module.weight
    state = weight.quant_state
    return (
        state.quant_type == "nf4"
        and state.blocksize == NF4_BLOCK
        and not state.nested
        and int(module.in_features) % NF4_BLOCK == 0  # type: ignore[arg-type]
    )


def _nf4(modules: tuple[nn.Module, ...]) -> PackedWeight:
    codes, scales = [], []
    for module in modules:
        weight: Any = module.weight
        shape = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
        data = weight.data.reshape(-1)
        # bitsandbytes puts the first of two values in the upper half of a byte.
        codes.append(torch.stack([data >> 4, data & 15], 1).view(shape))
        scales.append(weight.quant_state.absmax.view(shape[0], -1))
    state = modules[0].weight.quant_state  # type: ignore[union-attr]
    return pack_nf4(torch.cat(codes), torch.cat(scales), state.code)  # type: ignore[union-attr]


def _int8(modules: tuple[nn.Module, ...]) -> PackedWeight:
    values, scales = [], []
    for module in modules:
        weight: Any = module.weight
        scale = weight.SCB if weight.SCB is not None else module.state.SCB  # type: ignore[union-attr]
        values.append(weight.CB if weight.CB is not None else weight.data)
        scales.append(scale.float() / 127)
    return pack_int8(torch.cat(values), torch.cat(scales))
