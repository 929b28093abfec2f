"""A Llama-type decoder taken apart into frozen products, norms and sizes; and what can be computed so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ...bases.allocator import return_freed_memory
from ...bases.fused import fuse
from ...bases.llama import FAMILIES, rope_follows_length, windows
from ...bases.load import Base
from ...bases.quantization import dense_weight, is_quantized
from ...kernels.products import Change, available, product, unpacked
from ..computation import Learner
from ..memory.buffers import Buffers
from ..memory.scratch import write_dense
from ..precision import through_bfloat16
from ..trainable import TrainableLora, TrainablePrefix

_LEAST = 512  # tokens: of fewer, laying the weights out takes as long as it saves
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Frozen:
    """Frozen linear layers of one input, their outputs side by side.

    Attributes:
        columns: where each layer's outputs stand.
        bias: of all layers [out], or None where none has one.
    """

    def __init__(self, modules: tuple[nn.Module, ...], dtype: torch.dtype, *, fused: bool = True) -> None:
        """fused: dense weights are laid below each other, so that one product serves all layers (`bases.fused`)."""
        self.modules = modules
        self.n_in = int(modules[0].in_features)  # type: ignore[arg-type]
        ends = [0]
        for module in modules:
            ends.append(ends[-1] + int(module.out_features))  # type: ignore[arg-type]
        self.columns = [slice(a, b) for a, b in pairwise(ends)]
        self.n_out = ends[-1]
        self.dtype = dtype
        self.bias = self._bias()
        below = fuse(modules) if fused else None
        self._whole = None if below is None else below.weight
        self._quantized = [is_quantized(module) for module in modules]
        on_cpu = next(modules[0].parameters()).device.type == "cpu"
        self._native = dtype == torch.float32 and on_cpu and available()

    def adds(self, x: torch.Tensor) -> bool:
        """Whether `forward` and `back` take changes for this many tokens: natively, where that is the faster way."""
        return self._native and len(x) >= _LEAST and not through_bfloat16()

    def forward(
        self, x: torch.Tensor, out: torch.Tensor, buffers: Buffers, changes: Sequence[Sequence[Change]] | None = None
    ) -> None:
        """out = x W^T + bias, and changes of each layer where `adds`."""
        for i, (columns, weight) in enumerate(self._parts(buffers)):
            place = out if columns is None else out[:, columns]
            bias = None if self.bias is None else self.bias if columns is None else self.bias[columns]
            if self.adds(x) and columns is None and changes:
                self._forward(x, out, weight, changes)
            elif self.adds(x):
                product(x, unpacked(weight, False), place, bias=bias, changes=changes[i] if changes else ())
            elif bias is None:
                torch.mm(x, weight.t(), out=place)
            else:
                torch.addmm(bias, x, weight.t(), out=place)

    def _forward(
        self, x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor, changes: Sequence[Sequence[Change]]
    ) -> None:
        for columns, some in zip(self.columns, changes, strict=True):
            bias = None if self.bias is None else self.bias[columns]
            product(x, unpacked(weight[columns], False), out[:, columns], bias=bias, changes=some)

    def back(self, grad: torch.Tensor, out: torch.Tensor, buffers: Buffers, changes: Sequence[Change] = ()) -> None:
        """out = grad W, and changes where `adds`."""
        for i, (columns, weight) in enumerate(self._parts(buffers)):
            some = grad if columns is None else grad[:, columns]
            if self.adds(grad):
                product(some, unpacked(weight, True), out, add=i > 0, changes=changes if i == 0 else ())
            elif i == 0:
                torch.mm(some, weight, out=out)
            else:
                out.addmm_(some, weight)

    def weight(self, member: int) -> torch.Tensor:
        """The dense weight of one layer [out, in]."""
        return dense_weight(self.modules[member], self.dtype)

    def _parts(self, buffers: Buffers) -> Iterable[tuple[slice | None, torch.Tensor]]:
        """(columns, weight) to multiply with one after another, each before the next is asked for; None: all columns.

        What has to be dequantised goes into one buffer for all layers of the model: below each other where products
        of many columns are the faster ones, else one after another.
        """
        if self._whole is not None:
            return [(None, self._whole)]
        kept = [getattr(module, "_ahl_copy", None) for module in self.modules]
        if not any(self._quantized) or all(copy is not None for copy in kept):
            return [(columns, self.weight(i)) for i, columns in enumerate(self.columns)]
        if buffers.device.type != "cpu" or buffers.lean:
            return self._one_by_one(buffers)
        whole = buffers("dequantised", self.n_out, self.n_in)
        for i, columns in enumerate(self.columns):
            whole[columns] = self.weight(i)
        return [(None, whole)]

    def _one_by_one(self, buffers: Buffers) -> Iterator[tuple[slice, torch.Tensor]]:
        """Never is more than one weight dense, whatever the group."""
        for module, columns, quantized in zip(self.modules, self.columns, self._quantized, strict=True):
            if quantized:
                out = buffers("dequantised", columns.stop - columns.start, self.n_in)
                write_dense(module, out)
                yield columns, out
            else:
                yield columns, dense_weight(module, self.dtype)

    def _bias(self) -> torch.Tensor | None:
        biases: list[Any] = [getattr(module, "bias", None) for module in self.modules]
        some = next((bias for bias in biases if bias is not None), None)
        if some is None:
            return None
        widths = [columns.stop - columns.start for columns in self.columns]
        parts = [
            torch.zeros(width, device=some.device) if bias is None else bias.detach()
            for bias, width in zip(biases, widths, strict=True)
        ]
        return torch.cat([part.to(self.dtype) for part in parts])


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer.

    Attributes:
        before, after: weights of the norms before attention and before the feed-forward part.
        heads: weights of the norms of each head's query and key, or None.
        window: how many tokens a token sees, or None.
    """

    before: torch.Tensor
    qkv: Frozen
    heads: tuple[torch.Tensor, torch.Tensor] | None
    out: Frozen
    after: torch.Tensor
    gate_up: Frozen
    down: Frozen
    window: int | None

    @property
    def groups(self) -> tuple[Frozen, Frozen, Frozen, Frozen]:
        """All products in the order of the forward."""
        return self.qkv, self.out, self.gate_up, self.down


class DecoderParts:
    """What of a base its fused computation reads."""

    def __init__(self, base: Base) -> None:
        model: Any = base.model
        config = base.config
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or self.heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        self.width = int(config.hidden_size)
        self.scaling = float(model.model.layers[0].self_attn.scaling)
        self.eps = float(model.model.norm.variance_epsilon)
        self.embed, self.rotary = model.model.embed_tokens, model.model.rotary_emb
        self.norm: torch.Tensor = model.model.norm.weight.detach()
        self.head: Any = model.get_output_embeddings()
        self.layers = [
            _layer(layer, window, base.dtype) for layer, window in zip(model.model.layers, windows(model), strict=True)
        ]

    @property
    def queries(self) -> int:
        """Columns of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Columns of all key heads."""
        return self.kv_heads * self.head_dim


def _layer(layer: Any, window: int | None, dtype: torch.dtype) -> LayerParts:
    attention, mlp = layer.self_attn, layer.mlp
    norms = None
    if getattr(attention, "q_norm", None) is not None:
        norms = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
    return LayerParts(
        layer.input_layernorm.weight.detach(),
        Frozen((attention.q_proj, attention.k_proj, attention.v_proj), dtype),
        norms,
        Frozen((attention.o_proj,), dtype),
        layer.post_attention_layernorm.weight.detach(),
        Frozen((mlp.gate_proj, mlp.up_proj), dtype),
        Frozen((mlp.down_proj,), dtype),
        window,
    )


def not_covered(base: Base, learners: Sequence[Learner]) -> str | None:
    """Why the fused computation does not cover this base or one of these adapters; None where it does."""
    if "training decoder" not in base.derived:
        base.derived["training decoder"] = _taken_apart(base)
    parts = base.derived["training decoder"]
    if isinstance(parts, str):
        return parts
    known = {module for layer in parts.layers for group in layer.groups for module in group.modules}
    for learner in learners:
        if isinstance(learner.trainable, TrainableLora):
            if any(site.module not in known for site in learner.trainable.sites.values()):
                return "an adapter changes modules outside the decoder's layers"
        elif not isinstance(learner.trainable, TrainablePrefix):
            return "its method is computed by PEFT's own layers"
        if learner.head is not None or learner.task_type != "CAUSAL_LM":
            return "an adapter trains a head of its own"
    return None


def parts_of(base: Base) -> DecoderParts:
    """The parts of a base that `not_covered` found to be covered."""
    parts = base.derived["training decoder"]
    assert isinstance(parts, DecoderParts)
    return parts


def _taken_apart(base: Base) -> DecoderParts | str:
    config = base.config
    kind = str(getattr(config, "model_type", ""))
    if base.kind != "causal" or kind not in FAMILIES:
        return f"{kind} is not built as Llama is"
    reason = _unlike(base)
    if reason is not None:
        return f"this {kind} {reason}"
    parts = DecoderParts(base)
    return_freed_memory()  # weights that now lie side by side lay elsewhere before
    from .fused import agrees

    return parts if agrees(base, parts) else f"this {kind} computes otherwise than Llama does"


def _unlike(base: Base) -> str | None:
    """What of this base the fused computation does not do."""
    model: Any = base.model
    config = base.config
    if base.dtype not in DTYPES:
        return f"computes in {base.dtype}"
    if config.hidden_act != "silu":
        return f"has the activation {config.hidden_act}"
    if rope_follows_length(config):
        return "has angles that depend on the longest row"
    if getattr(config, "attention_dropout", 0.0):
        return "drops attention"
    layers = list(model.model.layers)
    linear = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear) or is_quantized(m)]
    if any(type(m) is not nn.Linear and not is_quantized(m) for m in linear) or len(linear) != 7 * len(layers):
        return "has layers of an unknown kind"
    norms = [m for m in model.model.modules() if hasattr(m, "variance_epsilon")]
    if len({norm.variance_epsilon for norm in norms}) > 1 or any(n.weight.dtype != base.dtype for n in norms):
        return "has norms of different kinds"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype != base.dtype:
        return "has an output layer of its own kind"
    return None
