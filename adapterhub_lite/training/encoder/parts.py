"""A BERT-type encoder taken apart: frozen products, norms, dropout and sizes; and which bases can be computed so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...adapters.sites import is_linear
from ...bases.load import Base
from ...bases.quantization import is_quantized
from ..computation import Learner
from ..decoder.parts import DTYPES, Frozen
from ..trainable import TrainableLora, TrainablePrefix
from .ops import Norm, gelu_of

# Families whose position ids begin after the padding token's id; the others' begin at 0.
_COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")
FAMILIES = ("bert", "electra", "distilbert", *_COUNTS_FROM_PADDING)


@dataclass(frozen=True)
class LayerParts:
    """One layer; `drop_attended`, `drop_made` and `drop_seen` are shares that its own dropout drops."""

    qkv: Frozen
    out: Frozen
    attended: Norm
    up: Frozen
    down: Frozen
    norm: Norm
    drop_attended: float
    drop_made: float
    drop_seen: float

    @property
    def groups(self) -> tuple[Frozen, Frozen, Frozen, Frozen]:
        """All products in the order of the forward."""
        return self.qkv, self.out, self.up, self.down


class EncoderParts:
    """What of a base its fused computation reads, for heads of one task type.

    Attributes:
        project: what stands between embeddings and layers, or None.
        pool, pool_act: what stands between the first token and a head, or None.
        drop_read: share that is dropped of what a head reads.
    """

    def __init__(self, base: Base, task_type: str) -> None:
        view = base.view(task_type)
        model: Any = view.model
        inner, config = model.base_model, base.config
        distil = config.model_type == "distilbert"
        layers = inner.transformer.layer if distil else inner.encoder.layer
        self.heads = int(config.num_attention_heads)
        self.width = int(config.hidden_size)
        self.head_dim = self.width // self.heads
        self.inner = inner
        self.embeddings = inner.embeddings
        self.first_position = int(config.pad_token_id) + 1 if config.model_type in _COUNTS_FROM_PADDING else 0
        self.positions = int(self.embeddings.position_embeddings.num_embeddings) - self.first_position
        self.scaling = float((layers[0].attention if distil else layers[0].attention.self).scaling)
        self.layers = [_distil_layer(x, base.dtype) if distil else _bert_layer(x, base.dtype) for x in layers]
        project = getattr(inner, "embeddings_project", None)
        self.project = None if project is None else Frozen((project,), base.dtype)
        self.tags = task_type == "TOKEN_CLS"
        self.pool: Frozen | None = None
        self.pool_act = "identity"
        if not self.tags and config.model_type == "bert":
            self.pool, self.pool_act = Frozen((inner.pooler.dense,), base.dtype), "tanh"
        elif not self.tags and distil:
            self.pool, self.pool_act = Frozen((model.pre_classifier,), base.dtype), "relu"
        dropout = getattr(model, "dropout", None)
        self.drop_read = float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0
        self.drop_embedded = float(self.embeddings.dropout.p)

    @property
    def groups(self) -> list[Frozen]:
        """All products."""
        found = [group for layer in self.layers for group in layer.groups]
        return [*found, *(one for one in (self.project, self.pool) if one is not None)]

    def trained(self, trainables: Sequence[object]) -> list[int]:
        """The layers that some of these adapters change."""
        sites = {s.module for one in trainables if isinstance(one, TrainableLora) for s in one.sites.values()}
        modules = [{m for group in layer.groups for m in group.modules} for layer in self.layers]
        return [i for i, own in enumerate(modules) if not own.isdisjoint(sites)]


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.bias.detach(), float(module.eps))


def _beside(three: tuple[nn.Module, ...], dtype: torch.dtype) -> Frozen:
    """Queries, keys and values; on a CPU each is read where it lies, and a second copy would be for nothing."""
    return Frozen(three, dtype, fused=next(three[0].parameters()).device.type != "cpu")


def _bert_layer(layer: Any, dtype: torch.dtype) -> LayerParts:
    attention = layer.attention
    three = attention.self.query, attention.self.key, attention.self.value
    return LayerParts(
        _beside(three, dtype),
        Frozen((attention.output.dense,), dtype),
        _norm(attention.output.LayerNorm),
        Frozen((layer.intermediate.dense,), dtype),
        Frozen((layer.output.dense,), dtype),
        _norm(layer.output.LayerNorm),
        float(attention.output.dropout.p),
        float(layer.output.dropout.p),
        float(attention.self.dropout.p),
    )


def _distil_layer(layer: Any, dtype: torch.dtype) -> LayerParts:
    attention, feed = layer.attention, layer.ffn
    dropout = attention.dropout
    return LayerParts(
        _beside((attention.q_lin, attention.k_lin, attention.v_lin), dtype),
        Frozen((attention.out_lin,), dtype),
        _norm(layer.sa_layer_norm),
        Frozen((feed.lin1,), dtype),
        Frozen((feed.lin2,), dtype),
        _norm(layer.output_layer_norm),
        0.0,
        float(feed.dropout.p),
        float(dropout.p if isinstance(dropout, nn.Dropout) else dropout),
    )


def not_covered(base: Base, learners: Sequence[Learner]) -> str | None:
    """Why the fused computation does not cover this base or one of these adapters; None where it does."""
    if base.kind != "encoder":
        return f"{base.config.model_type} is no encoder"
    kinds = {learner.task_type for learner in learners}
    if len(kinds) > 1 or not kinds <= {"SEQ_CLS", "TOKEN_CLS"}:
        return "the heads read different things"
    (kind,) = kinds
    key = f"training encoder {kind}"
    if key not in base.derived:
        base.derived[key] = _taken_apart(base, kind)
    parts = base.derived[key]
    if isinstance(parts, str):
        return parts
    known = {module for group in parts.groups for module in group.modules}
    for learner in learners:
        if not isinstance(learner.trainable, TrainableLora):
            prefix = isinstance(learner.trainable, TrainablePrefix)
            return "a prefix is no change of layers" if prefix else "its method is computed by PEFT's own layers"
        if any(site.module not in known for site in learner.trainable.sites.values()):
            return "an adapter changes modules outside the encoder's layers"
        if learner.head is None:
            return "there is no head"
    return None


def parts_of(base: Base, task_type: str) -> EncoderParts:
    """The parts of a base that `not_covered` found to be covered."""
    parts = base.derived[f"training encoder {task_type}"]
    assert isinstance(parts, EncoderParts)
    return parts


def _taken_apart(base: Base, task_type: str) -> EncoderParts | str:
    kind = str(base.config.model_type)
    if kind not in FAMILIES:
        return f"{kind} is not built as BERT is"
    if base.dtype not in DTYPES:
        return f"{kind} computes in {base.dtype}"
    if not gelu_of(base.config):
        return f"this {kind} has an activation of another kind"
    if getattr(base.config, "is_decoder", False):
        return f"this {kind} reads from left to right"
    parts = EncoderParts(base, task_type)
    linear = [m for layer in _layers_of(parts) for m in layer.modules() if is_linear(m) or is_quantized(m)]
    if any(type(m) is not nn.Linear and not is_quantized(m) for m in linear) or len(linear) != 6 * len(parts.layers):
        return f"this {kind} has layers of an unknown kind"
    from .fused import agrees

    return parts if agrees(base, parts) else f"this {kind} computes otherwise than BERT does"


def _layers_of(parts: EncoderParts) -> Any:
    inner = parts.inner
    return inner.transformer.layer if hasattr(inner, "transformer") else inner.encoder.layer
