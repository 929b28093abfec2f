"""Bytes that training a decoder built as Llama is takes on CUDA, counted from its shapes alone.

The computation itself runs on tensors that have sizes and no contents (torch's meta device), and every tensor's memory
is counted from its making to its end: what the code asks for, temporaries too. Not seen are the
CUDA context and what the allocator loses between blocks; what kernels ask for inside is counted as their source has it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...bases.quantization import NF4_BLOCK_SIZE
from ...tasks.task import IGNORED, Example
from ..computation import Learner, Row, Settings
from ..decoder.cuda import Call, CudaOps
from ..decoder.fused import FusedDecoder
from ..decoder.ops import AttentionShape, Ops, Parts
from ..decoder.parts import DecoderParts, Frozen, LayerParts
from ..trainable import LoraParameters, TrainableLora

_META = torch.device("meta")
_BLOCK = 512  # bytes: what CUDA's allocator rounds up to
_LIBRARY = 32 * 2**20  # the most that cuBLAS takes for itself through the allocator (that of Hopper)
SITES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int
    tied: bool = False
    biased: bool = False
    norms_heads: bool = False

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Of a configuration as transformers has it."""
        heads, kind = int(config.num_attention_heads), str(config.model_type)
        return cls(
            int(config.hidden_size), int(config.intermediate_size), int(config.num_hidden_layers), heads,
            int(getattr(config, "num_key_value_heads", None) or heads),
            int(getattr(config, "head_dim", None) or config.hidden_size // heads), int(config.vocab_size),
            bool(config.tie_word_embeddings), kind == "qwen2" or bool(getattr(config, "attention_bias", False)),
            kind == "qwen3",
        )  # fmt: skip

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer."""
        queries, keys = self.heads * self.dim, self.kv_heads * self.dim
        return {
            "q": (queries, self.width), "k": (keys, self.width), "v": (keys, self.width), "o": (self.width, queries),
            "gate": (self.inner, self.width), "up": (self.inner, self.width), "down": (self.width, self.inner),
        }  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """A learner: LoRA of one rank at some of a layer's linear layers."""

    rank: int = 16
    sites: tuple[str, ...] = SITES


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device by kind.

    Attributes:
        weights: of the linear layers, quantised or not, and norms.
        tables: of input embeddings and output layer.
        moments: of AdamW.
        work: the most at once of all that computing gradients takes, buffers, copies of adapters and temporaries;
            `buffers` the most of `Buffers` alone.
        library: workspace of products.
    """

    weights: int
    tables: int
    parameters: int
    gradients: int
    moments: int
    work: int
    buffers: int
    library: int = _LIBRARY

    @property
    def total(self) -> int:
        """All of it at once."""
        held = self.weights + self.tables + self.parameters + self.gradients + self.moments
        return held + self.work + self.library


@dataclass(frozen=True)
class Plan:
    """What a footprint depends on beside the shape.

    Attributes:
        quantize: none, int8, nf4 or nf4-double.
        moments_on_host: whether the moments are.
        lean: whether buffers are freed as on CUDA.
    """

    settings: Settings
    dtype: torch.dtype = torch.bfloat16
    quantize: str = "nf4"
    moments_on_host: bool = False
    ops: Ops | None = None


def footprint(shape: Shape, learners: Sequence[Lora], plan: Plan, rows: Sequence[tuple[int, int]]) -> Footprint:
    """Bytes of one step.

    Args:
        rows: (tokens, supervised tokens at its end) of each row; they are dealt to the learners in turn.
    """
    trained = [_trainable(shape, lora, plan.dtype) for lora in learners]
    modules = [_modules(shape, plan) for _ in range(shape.layers)]
    parts = _parts(shape, modules, plan.dtype)
    sets = [_placed(trainable, modules) for trainable in trained]
    made = [Row(_example(*row), i % len(learners), i) for i, row in enumerate(rows)]
    base: Any = SimpleNamespace(device=_META, dtype=plan.dtype, derived={})
    with Counter() as counter:
        fused = FusedDecoder(
            base, [Learner(one) for one in sets], plan.settings, parts=parts, ops=plan.ops or CountedOps()
        )
        fused.gradients(made)
    count = sum(p.nbytes for one in sets for p in one.parameters())
    table = shape.vocabulary * shape.width * plan.dtype.itemsize
    tables = table * (1 if shape.tied or plan.settings.table_on_host else 2)
    moments = 0 if plan.moments_on_host else 2 * count
    return Footprint(_weights(shape, plan), tables, count, count, moments, counter.most, fused.most)


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors without contents that are made within, the most at once; their values are taken for 0."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.most = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count what an operation makes."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        found = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in _tensors((args, kwargs or {}))}
        for tensor in _tensors(found):
            storage = tensor.untyped_storage()
            if tensor.is_meta and id(storage) not in given:
                self._count(storage)
        return found

    def _count(self, storage: Any) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = math.ceil(storage.nbytes() / _BLOCK) * _BLOCK

        def ended(_: Any) -> None:
            self.held -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, ended)
        self.held += size
        self.most = max(self.most, self.held)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for one in value for t in _tensors(one)] if isinstance(value, list | tuple) else []


class CountedOps(CudaOps):
    """`CudaOps` on tensors without contents, with what FlashAttention's backward takes inside."""

    def __init__(self) -> None:
        super().__init__(_forward, _backward)

    def _calls_of(self, spans: torch.Tensor) -> list[Call]:
        starts = torch.empty(len(spans) + 1, dtype=torch.int32, device=spans.device)
        return [Call(0, 1 << 40, starts, starts, 1, 1, slice(0, 1 << 40))]  # slices end where tensors do


def _forward(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: Call, shape: AttentionShape
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(queries.dtype, torch.float32)
    sums = torch.empty((shape.heads, len(queries)), dtype=wide, device=queries.device)
    return torch.empty(queries.shape, dtype=queries.dtype, device=queries.device), sums


def _backward(
    grad: torch.Tensor, parts: Parts, out: torch.Tensor, sums: torch.Tensor, call: Call, shape: AttentionShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `mha_varlen_bwd` of FlashAttention 2 asks for memory: sums of queries' gradients in float32, their products
    with the output, and gradients of keys and values for every query head.
    """
    room = len(grad) + 128 * (len(call.starts) - 1)
    dim = math.ceil(shape.dim / 32) * 32
    inside = [
        torch.empty((room, shape.heads, dim), dtype=sums.dtype, device=grad.device),
        torch.empty((shape.heads, room), dtype=sums.dtype, device=grad.device),
    ]
    if shape.heads != shape.kv_heads:
        inside += [torch.empty_like(grad, memory_format=torch.contiguous_format) for _ in range(2)]
    first, second, third = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in parts)
    return first, second, third


class Linear4bit(nn.Module):
    """A quantised layer without contents; its class's name says what it is, `scales` how many are quantised."""

    def __init__(self, n_in: int, n_out: int, bias: bool, dtype: torch.dtype, double: bool) -> None:
        super().__init__()
        self.scales = math.ceil(n_in * n_out / NF4_BLOCK_SIZE) if double else 0
        self.in_features, self.out_features = n_in, n_out
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=_META), requires_grad=False)
        self.bias = torch.empty(n_out, dtype=dtype, device=_META) if bias else None


def _modules(shape: Shape, plan: Plan) -> dict[str, nn.Module]:
    def made(site: str, n_out: int, n_in: int) -> nn.Module:
        bias = shape.biased and site in ("q", "k", "v")
        if plan.quantize != "none":
            return Linear4bit(n_in, n_out, bias, plan.dtype, plan.quantize == "nf4-double")
        return nn.Linear(n_in, n_out, bias, device=_META, dtype=plan.dtype)

    return {site: made(site, *sizes) for site, sizes in shape.linear.items()}


def _parts(shape: Shape, modules: Sequence[dict[str, nn.Module]], dtype: torch.dtype) -> DecoderParts:
    parts = DecoderParts.__new__(DecoderParts)
    parts.heads, parts.kv_heads, parts.head_dim, parts.width = shape.heads, shape.kv_heads, shape.dim, shape.width
    parts.scaling, parts.eps = 1.0, 1e-6

    def vector(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=_META)

    def angles(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = torch.empty((1, positions.shape[1], shape.dim), dtype=dtype, device=_META)
        return made, made

    parts.norm, parts.rotary = vector(shape.width), angles
    parts.embed = nn.Embedding(shape.vocabulary, shape.width, device=_META, dtype=dtype)
    parts.head = nn.Linear(shape.width, shape.vocabulary, False, device=_META, dtype=dtype)

    def group(of: dict[str, nn.Module], *sites: str) -> Frozen:
        return Frozen(tuple(of[site] for site in sites), dtype)

    heads = (vector(shape.dim), vector(shape.dim)) if shape.norms_heads else None
    parts.layers = [
        LayerParts(
            vector(shape.width), group(of, "q", "k", "v"), heads, group(of, "o"), vector(shape.width),
            group(of, "gate", "up"), group(of, "down"), None,
        )
        for of in modules
    ]  # fmt: skip
    return parts


def _trainable(shape: Shape, lora: Lora, dtype: torch.dtype) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A and B of each site of all layers, with their gradients."""
    wide = torch.promote_types(dtype, torch.float32)
    made = {}
    for layer in range(shape.layers):
        for site in lora.sites:
            n_out, n_in = shape.linear[site]
            pair = tuple(
                nn.Parameter(torch.empty(size, dtype=wide, device=_META))
                for size in ((lora.rank, n_in), (n_out, lora.rank))
            )
            for parameter in pair:
                parameter.grad = torch.empty_like(parameter)
            made[f"{layer} {site}"] = pair[0], pair[1]
    return made


def _placed(
    trained: Mapping[str, tuple[nn.Parameter, nn.Parameter]], modules: Sequence[dict[str, nn.Module]]
) -> TrainableLora:
    made = TrainableLora.__new__(TrainableLora)
    made.spec = SimpleNamespace(dropout=0.0)  # type: ignore[assignment]
    made.sites = {}
    for name, (a, b) in trained.items():
        layer, _, site = name.partition(" ")
        made.sites[name] = LoraParameters(modules[int(layer)][site], 1.0, a, b)
    return made


def _example(tokens: int, supervised: int) -> Example:
    """One token more than go through the model: nothing is asked after the last."""
    return Example([5] * (tokens + 1), [IGNORED] * (tokens + 1 - supervised) + [5] * supervised)


def _weights(shape: Shape, plan: Plan) -> int:
    """Bytes of linear layers, biases and norms."""
    total = 0
    for site, (n_out, n_in) in shape.linear.items():
        count = n_out * n_in
        if plan.quantize in ("nf4", "nf4-double"):
            scales, double = math.ceil(count / NF4_BLOCK_SIZE), plan.quantize == "nf4-double"
            # Scales of 8 bits with a float32 for 256 of them, beside tables of 256 values; or float32 each.
            total += count // 2 + (scales + 4 * math.ceil(scales / 256) + 1028 if double else 4 * scales) + 64
        elif plan.quantize == "int8":
            total += count + 4 * n_out
        else:
            total += count * plan.dtype.itemsize
        if shape.biased and site in ("q", "k", "v"):
            total += n_out * plan.dtype.itemsize
    norms = 2 * shape.width + (2 * shape.dim if shape.norms_heads else 0)
    return shape.layers * (total + norms * plan.dtype.itemsize) + shape.width * plan.dtype.itemsize
