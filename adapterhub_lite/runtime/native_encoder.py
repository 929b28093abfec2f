"""The layers of an encoder in one native call, where this machine and this model allow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters.sites import features
from ..bases.packing import packable
from ..kernels.encoder import Embedding, LayerParts, Sizes, TallLinear, Texts, has_encoder, tall_linear
from ..kernels.encoder import Encoder as NativeLayers
from .batch import BatchPlan
from .changes import NativeChanges
from .side_by_side import Layout

if TYPE_CHECKING:
    from .encoder import Encoder, Layer


def native_encoder(encoder: Encoder) -> NativeEncoder | None:
    """The native layers, if there is native code and the model is float32, not quantised, its GELU by erf (or ReLU)."""
    base, layers = encoder.base, encoder.layers
    norms: list[Any] = [norm for layer in layers for norm in (layer.attended, layer.norm)]
    hidden, heads = int(base.config.hidden_size), encoder.heads
    fits = (
        has_encoder()
        and base.device.type == "cpu"
        and base.dtype == torch.float32
        and hidden % heads == 0
        and hidden // heads % 16 == 0
        and len({_act(layer.act) for layer in layers}) == 1
        and _act(layers[0].act) is not None
        and len({norm.eps for norm in norms}) == 1
        and all(type(norm) is nn.LayerNorm and norm.bias is not None for norm in norms)
        and all(type(module) is nn.Linear for layer in layers for site in layer.sites for module in site)
        and packable([module for layer in layers for site in layer.sites for module in site])
    )
    return NativeEncoder(encoder) if fits else None


class NativeEncoder:
    """Gives what the layers of `Encoder` give, but for rounding; what a row gets does not depend on its neighbours."""

    def __init__(self, encoder: Encoder) -> None:
        base, layers = encoder.base, encoder.layers
        self._sites = [site for layer in layers for site in layer.sites]
        around = {site.modules for site in (encoder.project, encoder.pool) if site is not None}  # by torch
        self._known = {*self._sites, *around}
        self._scaled = {site for layer in layers for site in (layer.sites[1], layer.sites[3])} | around
        hidden, eps, up = int(base.config.hidden_size), _eps(layers[0].norm), layers[0].sites[2]
        act = _act(layers[0].act)
        assert act is not None
        sizes = Sizes(
            hidden, encoder.heads, hidden // encoder.heads, features(up[0])[1], eps,
            encoder.scaling, act,
        )  # fmt: skip
        self._embedding = None if encoder.project is not None else _embedding(encoder.embeddings, eps)
        self._layers = NativeLayers(sizes, [_parts(layer) for layer in layers], self._embedding)

    def knows(self, plan: BatchPlan) -> bool:
        """Whether all that the plan changes is changed here: no keys before a text, nothing between q, k and v."""
        for row in plan.rows:
            if row is None:
                continue
            if row.prefix is not None or not row.packs.keys() <= self._known:
                return False
            if any(pack.scale is not None and group not in self._scaled for group, pack in row.packs.items()):
                return False
            if row.sites and not row.packs:
                return False
        return True

    def embeds(self, layout: Layout, positions: Sequence[int]) -> bool:
        """Whether the texts can be embedded here: nothing but words that the model has."""
        table = self._embedding
        return (
            table is not None
            and not any(run.fitted.prompt for run in layout.runs)
            and all(min(ids) >= 0 and max(ids) < len(table.words) for ids in layout.ids)
            and max(positions) < len(table.positions)
        )

    def __call__(
        self, x: torch.Tensor | tuple[Sequence[int], Sequence[int]], layout: Layout, plan: BatchPlan
    ) -> torch.Tensor:
        """What leaves the last layer at the tokens that heads read [read, hidden].

        Args:
            x: embeddings [tokens, hidden], or, where it `embeds` them, the numbers of words and positions.
        """
        batch = NativeChanges(plan).batch(self._sites)
        runs = [run for run in layout.runs for _ in range(run.rows)]
        texts = Texts(
            [run.length for run in runs],
            [(run.first, run.read) for run in runs],
            [batch.owners[i] if batch.owners else -1 for i in layout.order],
            x.contiguous() if isinstance(x, torch.Tensor) else x,
        )
        return self._layers(texts, batch)


def _embedding(embeddings: Any, eps: float) -> Embedding | None:
    """The tables of BERT's embeddings, where they are what they look like."""
    tables = embeddings.word_embeddings, embeddings.position_embeddings
    norm, kinds = embeddings.LayerNorm, getattr(embeddings, "token_type_embeddings", None)
    plain = all(type(table) is nn.Embedding and table.max_norm is None for table in tables)
    if not plain or type(norm) is not nn.LayerNorm or norm.bias is None or norm.eps != eps:
        return None
    kind = None if kinds is None else kinds.weight[0].detach()
    words, positions = (table.weight.detach() for table in tables)
    return Embedding(words, kind, positions, _weights(norm))


def _act(act: nn.Module) -> str | None:
    """The activation's name in the native layers; None for one they do not have."""
    if type(act) is nn.ReLU:
        return "relu"
    exact = type(act) is nn.GELU and act.approximate == "none"
    exact = exact or (type(act).__name__ == "GELUActivation" and getattr(act, "act", None) is nn.functional.gelu)
    return "gelu" if exact else None


def _eps(norm: Any) -> float:
    return float(norm.eps)


def _parts(layer: Layer) -> LayerParts:
    q, k, v, out, up, down = (_linear(module) for site in layer.sites for module in site)
    return LayerParts(q, k, v, out, up, down, _weights(layer.attended), _weights(layer.norm))


def _weights(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return norm.weight.detach(), norm.bias.detach()


def _linear(module: Any) -> TallLinear:
    return tall_linear(module.weight.detach(), None if module.bias is None else module.bias.detach())
