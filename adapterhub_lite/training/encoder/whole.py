"""All layers of an encoder in one native call forward and one backward: plain LoRA in float32 on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...bases.quantization import is_quantized
from ...kernels.encoder import has_encoder, lying_linear
from ...kernels.training_encoder import Adapters, Crowd, LayerWeights, LowRank, Pass, Sizes, TrainedEncoder
from ...kernels.training_encoder import Norm as NativeNorm
from ..decoder.parts import Frozen
from ..trainable import TrainableLora
from .layer import PLACES, SALTS, Scene
from .ops import Norm
from .parts import EncoderParts, LayerParts


def reads_whole(parts: EncoderParts, trainables: Sequence[object]) -> bool:
    """Whether these adapters on this float32 base on a CPU are what one call computes."""
    groups = [group for layer in parts.layers for group in layer.groups]
    return (
        has_encoder()
        and not any(is_quantized(module) for group in groups for module in group.modules)
        and all(_is_plain(trainable) for trainable in trainables)
    )


def _is_plain(trainable: object) -> bool:
    if not isinstance(trainable, TrainableLora) or trainable.dropout > 0:
        return False
    sites = trainable.sites.values()
    return all(s.magnitude is None and s.a.dtype == torch.float32 and s.a.device.type == "cpu" for s in sites)


class WholeLayers:
    """The layers with what all learners change of them."""

    def __init__(self, parts: EncoderParts, trainables: Sequence[object], lowest: int) -> None:
        sizes = Sizes(
            parts.width, parts.heads, parts.head_dim, parts.layers[0].up.n_out, parts.scaling, PLACES, SALTS
        )  # fmt: skip
        weights = [_weights(layer) for layer in parts.layers]
        self._native = TrainedEncoder(sizes, weights, _adapters(parts, trainables), lowest)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that packs so far have asked for."""
        return self._native.nbytes

    def forward(self, scene: Scene, x: torch.Tensor) -> torch.Tensor:
        """What the last layer gives for tokens that are read."""
        return self._native.forward(_pass(scene), x)

    def backward(self, scene: Scene, x: torch.Tensor, grad: torch.Tensor, below: torch.Tensor | None) -> None:
        """Add to the parameters' gradients; below becomes the gradient of x."""
        self._native.backward(_pass(scene), x, grad, below)


def _pass(scene: Scene) -> Pass:
    everyone, read = (
        Crowd(t.count, t.segments, t.keys, t.indices, rows.begin)
        for t, rows in ((scene.tokens, scene.every), (scene.read, scene.some))
    )
    return Pass(everyone, read, scene.every.longest, scene.chosen, scene.tools.training, scene.drops)


def _weights(layer: LayerParts) -> LayerWeights:
    qkv, out, up, down = layer.groups
    three = [lying_linear(qkv.weight(i), _bias(qkv, columns)) for i, columns in enumerate(qkv.columns)]
    single = [lying_linear(group.weight(0), group.bias) for group in (out, up, down)]
    return LayerWeights(
        three[0], three[1], three[2], single[0], single[1], single[2], _norm(layer.attended), _norm(layer.norm),
        (layer.drop_seen, layer.drop_attended, layer.drop_made),
    )  # fmt: skip


def _bias(frozen: Frozen, columns: slice) -> torch.Tensor | None:
    return None if frozen.bias is None else frozen.bias[columns]


def _norm(norm: Norm) -> NativeNorm:
    return NativeNorm(norm.weight, norm.bias, norm.eps)


def _adapters(parts: EncoderParts, trainables: Sequence[object]) -> Adapters:
    return [[[_members(group, one) for group in layer.groups] for layer in parts.layers] for one in trainables]


def _members(group: Frozen, trainable: object) -> list[LowRank | None]:
    assert isinstance(trainable, TrainableLora)
    by_module = {site.module: site for site in trainable.sites.values()}
    found = [by_module.get(module) for module in group.modules]
    return [None if site is None else LowRank(site.a, site.b, site.scaling) for site in found]
