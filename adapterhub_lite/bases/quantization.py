"""Frozen 4-bit and 8-bit linear layers through bitsandbytes, right in training and inference on CPU and CUDA.

On CUDA bitsandbytes' own kernels run. On CPU its 4-bit layer repacks the weights at the first evaluation forward and
the packed path has no backward, and its 8-bit layer rounds activations as well; both are replaced by one exact path:
dequantise, multiply, and for the backward dequantise again. Where memory allows, the dequantised weight is kept
(a "working copy"), which changes the speed and no bit of an answer; gradients of layers that read one input are then
formed by one product, which rounds otherwise.

nf4-double is NF4 whose scales are quantised, too, to 8 bits in blocks of 256 (arXiv 2305.14314, section 3): 0.37 bits a
weight less, for weights that differ a little from those of nf4. So it has a name, and a fingerprint, of its own.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import Unsupported
from .heads import HEAD_NAMES

QUANTIZATIONS = ("none", "int8", "nf4", "nf4-double")
NOT_QUANTISED = (*HEAD_NAMES, "lm_head", "embed_out")
"""Modules that a base never quantises: heads, and output layers."""
NF4_BLOCK_SIZE = 64
_SCALES_BLOCK_SIZE = 256
# Of a weight, with its share of the scales.
_BYTES = {
    "int8": 1.0,
    "nf4": 0.5 + 4 / NF4_BLOCK_SIZE,
    "nf4-double": 0.5 + (1 + 4 / _SCALES_BLOCK_SIZE) / NF4_BLOCK_SIZE,
}


def quantization_config(quantize: str, dtype: torch.dtype, skip: list[str]) -> Any | None:
    """transformers' configuration object for `quantize`, or None. `skip` names modules left unquantised.

    Raises:
        Unsupported: unknown quantisation.
    """
    if quantize not in QUANTIZATIONS:
        raise Unsupported(f"{quantize!r} is not a quantisation.", f"Use {', '.join(QUANTIZATIONS)}.")
    if quantize == "none":
        return None
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantize == "nf4-double",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a bitsandbytes 4-bit or 8-bit linear layer."""
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def linear_layers(model: nn.Module, skip: Sequence[str] = NOT_QUANTISED) -> dict[str, bool]:
    """Names of the layers that transformers quantises with bitsandbytes, and whether each is a Conv1D ([in, out]).

    transformers stores a Conv1D the other way round once it is quantised: as [out, in].

    Args:
        model: not quantised yet.
        skip: names that are left as they are, beside those that the model's class keeps in float32 (T5's `wo`).
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept: Any = HfQuantizer.get_modules_to_not_convert(
        model,  # type: ignore[arg-type]
        list(skip),
        getattr(model, "_keep_in_fp32_modules", None),
    )
    return {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is nn.Linear) and should_convert_module(name, kept)
    }


def nf4_scales(state: Any) -> torch.Tensor:
    """The float32 scale of each block of a 4-bit weight, dequantised if it is quantised itself."""
    if not state.nested:
        scales: torch.Tensor = state.absmax
        return scales
    import bitsandbytes.functional as bnb

    back: torch.Tensor = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return back.float()


def state_tensors(state: Any) -> dict[str, torch.Tensor]:
    """What a 4-bit weight is dequantised with, beside the table of its 16 values."""
    found: dict[str, torch.Tensor] = {"absmax": state.absmax}
    if state.nested:
        found |= {"scales": state.state2.absmax, "scale values": state.state2.code, "offset": state.offset}
    return found


def bytes_of_weights(model: Any, quantize: str) -> int:
    """Bytes that the linear layers which are quantised take, or would take, in `quantize`."""
    output, total = model.get_output_embeddings(), 0
    for module in model.modules():
        if module is not output and (is_quantized(module) or type(module).__name__ in ("Linear", "Conv1D")):
            count = module.in_features * module.out_features if is_quantized(module) else module.weight.numel()
            total += round(count * _BYTES.get(quantize, float(module.weight.element_size())))
    return total


def dense_weight(module: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight of a linear site as a dense tensor [out, in] ([in, out] for Conv1D), dequantised if needed.

    `dtype` defaults to the dtype the layer computes in; a kept working copy of that dtype is returned as it is.
    """
    if not is_quantized(module):
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.detach() if dtype is None else weight.detach().to(dtype)
    kept: torch.dtype = getattr(module, "_ahl_dtype", torch.float32)
    wanted = dtype or kept
    copy: torch.Tensor | None = getattr(module, "_ahl_copy", None)
    if copy is not None and copy.dtype == wanted:
        return copy
    return _dequantize(module, wanted)


def _dequantize(module: Any, dtype: torch.dtype) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    weight = module.weight
    if type(module).__name__ == "Linear4bit":
        dense: torch.Tensor = bnb.dequantize_4bit(weight.data, weight.quant_state)
        return dense.to(dtype)
    scale: torch.Tensor = weight.SCB if weight.SCB is not None else module.state.SCB
    values: torch.Tensor = weight.CB if weight.CB is not None else weight.data
    back: torch.Tensor = bnb.int8_vectorwise_dequant(values, scale)
    return back.to(dtype)


class _FrozenMatmul(torch.autograd.Function):
    """y = x W^T with W dequantised for the call, and again for the backward, so that no dense copy is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: nn.Module) -> torch.Tensor:  # type: ignore[override]
        ctx.module = module
        return F.linear(x, dense_weight(module, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad @ dense_weight(ctx.module, grad.dtype), None


def _exact_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Replaces the forward of a bitsandbytes layer on CPU."""
    if self._ahl_copy is not None and self._ahl_copy.dtype == x.dtype:
        out = F.linear(x, self._ahl_copy)
    else:
        out = _FrozenMatmul.apply(x, self)  # type: ignore[no-untyped-call]
    return out if self.bias is None else out + self.bias.to(out.dtype)


def make_exact_on_cpu(model: nn.Module, dtype: torch.dtype, keep_copies: bool) -> int:
    """Give every quantised layer of a CPU model the exact forward; returns the bytes of the working copies kept."""
    kept = 0
    for module in model.modules():
        if not is_quantized(module):
            continue
        module._ahl_dtype = dtype  # type: ignore[assignment]
        module._ahl_copy = None  # type: ignore[assignment]
        if keep_copies:
            copy = _dequantize(module, dtype)
            module._ahl_copy = copy  # type: ignore[assignment]  # a plain attribute: no buffer, not in the state dict
            kept += copy.nbytes
        module.forward = types.MethodType(_exact_forward, module)  # type: ignore[method-assign]
    return kept


def quantized_round_trip(weight: torch.Tensor, quantize: str, turned: bool = False) -> torch.Tensor:
    """What `weight` [out, in] becomes in a base quantised with `quantize`, as a dense tensor of the same dtype.

    Args:
        turned: the weight is [in, out], as Conv1D's are; so is the result.
    """
    if quantize == "none":
        return weight
    if turned:
        return quantized_round_trip(weight.T.contiguous(), quantize).T.contiguous()
    import bitsandbytes.functional as bnb

    if quantize in ("nf4", "nf4-double"):
        packed, state = bnb.quantize_4bit(
            weight.contiguous(),
            blocksize=NF4_BLOCK_SIZE,
            quant_type="nf4",
            compress_statistics=quantize == "nf4-double",
        )
        dense: torch.Tensor = bnb.dequantize_4bit(packed, state)
        return dense.to(weight.dtype)
    values: torch.Tensor
    scale: torch.Tensor
    values, scale, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
    back: torch.Tensor = bnb.int8_vectorwise_dequant(values, scale)
    return back.to(weight.dtype)
