"""Gradients of adapters on decoders built as Llama is, forward and backward by hand: no autograd, no padding.

Tokens of many rows, of one or several learners, go through the layers one after another. Frozen products are plain
matrix products into memory that is reused, a step allocates nothing large, and only what a supervised token needs is
computed after the last attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from ...bases.load import Base
from ...tasks.task import Example
from ..computation import Learner, Load, Row, Settings, Sums
from ..losses import head_losses
from ..memory.buffers import Buffers
from ..memory.offload import inputs_for, look_up
from ..packs import Pack, load_of, make_packs, placed, supervised
from ..trainable import TrainablePrefix
from .cuda import CudaOps
from .layer import AGAIN, Layer, PrefixKeys, Scene
from .lora import Tools
from .native import ops_for
from .ops import Ops
from .parts import DecoderParts, parts_of
from .scene import Angles, scene_of

# Largest difference of a logit from the model's own forward, as a share of the largest logit: rounding, not meaning.
_BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.05}


class FusedDecoder:
    """A `Computation` for what `decoder_parts.not_covered` finds covered."""

    name = "fused decoder"
    padded = False

    def __init__(
        self,
        base: Base,
        learners: Sequence[Learner],
        settings: Settings,
        *,
        parts: DecoderParts | None = None,
        ops: Ops | None = None,
    ) -> None:
        self.why = "the base is built as Llama is, and all adapters change its layers only"
        self._base, self._learners, self._settings = base, tuple(learners), settings
        self._parts = parts or parts_of(base)
        self._ops = ops or ops_for(base, self._parts)
        if settings.offload and isinstance(self._ops, CudaOps):
            self._ops = self._ops.sparing()
        self.note: str | None = getattr(self._ops, "note", None)
        self._checkpoint = settings.checkpoint or settings.offload
        self._buffers = Buffers(base.device, base.dtype, self._checkpoint and isinstance(self._ops, CudaOps))
        trainables = [learner.trainable for learner in learners]
        depth = len(self._parts.layers)
        self._layers = [Layer(self._parts, i, trainables, settings.recompute_mlp) for i in range(depth)]
        if isinstance(self._ops, CudaOps):
            for change in (change for layer in self._layers for change in layer.changes):
                change.stacked()
        self._prefixes = _Prefixes(self._parts, trainables)
        trained = [layer.index for layer in self._layers if layer.trained]
        self._lowest = 0 if self._prefixes.count else min(trained, default=len(self._layers))
        self._inputs = inputs_for(self._buffers, len(self._layers)) if settings.offload else None
        self._angles = Angles(self._parts.rotary, base.device, base.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that packs so far have asked for."""
        return self._buffers.nbytes

    @property
    def most(self) -> int:
        """The most bytes of buffers at once so far."""
        return self._buffers.most

    @property
    def on_host(self) -> int:
        """See `Computation`."""
        return self._inputs.on_host if self._inputs else 0

    def gradients(self, rows: Sequence[Row]) -> list[Sums]:
        """See `Computation`."""
        with torch.no_grad():
            self._read()
            self._prefixes.read(self._base.dtype)
            found = self._run(rows, True)
            self._give()
        self._prefixes.give()
        return found

    def losses(self, rows: Sequence[Row]) -> list[Sums]:
        """See `Computation`."""
        with torch.no_grad():
            self._read()
            self._prefixes.read(self._base.dtype)
            return self._run(rows, False)

    def loads(self, rows: Sequence[Row], training: bool = True) -> list[Load]:
        """See `Computation`."""
        return [load_of(pack.pieces) for pack in self._packs(placed(rows), training)]

    def tokens(self, row: Row) -> int:
        """See `Computation`."""
        return len(row.example.ids)

    def release(self) -> None:
        """See `Computation`."""
        self._buffers.clear()

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits [tokens, vocabulary] of one text without any adapter."""
        pack = make_packs([Row(Example([*ids, 0], [*ids, 0]))], len(ids), [False])[0]
        with torch.no_grad():
            tools = Tools(self._ops, self._buffers, False)
            scene, tokens, _ = scene_of(pack, tools, self._angles, self._prefixes.counts or [0])
            hidden = self._forward(scene, tokens, False)[1]
            return torch.nn.functional.linear(hidden, self._parts.head.weight, self._parts.head.bias)

    def _run(self, rows: Sequence[Row], gradients: bool) -> list[Sums]:
        sums = [Sums() for _ in self._learners]
        for row in rows:
            sums[row.learner].tokens += len(row.example.ids)
            sums[row.learner].count += supervised(row)
        tools = Tools(self._ops, self._buffers, gradients)
        packs = self._packs(rows, gradients)
        for pack in sorted(packs, key=lambda pack: -pack.tokens):  # buffers have their size from the first one on
            self._one(pack, tools, sums)
        return sums

    def _packs(self, rows: Sequence[Row], training: bool) -> list[Pack]:
        drops = [training and getattr(one.trainable, "dropout", 0.0) > 0 for one in self._learners]
        shares = [not drop and not count for drop, count in zip(drops, self._prefixes.counts, strict=True)]
        return make_packs(rows, self._settings.pack_tokens, shares)

    def _one(self, pack: Pack, tools: Tools, sums: list[Sums]) -> None:
        """Losses of a pack, and with `training` its gradients."""
        scene, ids, targets = scene_of(pack, tools, self._angles, self._prefixes.counts)
        last, hidden, inverse = self._forward(scene, ids, tools.training)
        head = self._parts.head.weight.detach(), self._parts.head.bias
        losses = head_losses(hidden, head, targets, (self._ops, self._buffers), tools.training)
        for first, end, learner in scene.supervised.segments:
            sums[learner].total += float(losses[first:end].sum(dtype=torch.float64))
        if not tools.training or self._lowest == len(self._layers):
            return
        grad = self._buffers("grad", *last.shape)
        self._ops.rms_norm_back(hidden, last, self._parts.norm, inverse, grad, False)
        del last, hidden, inverse
        self._buffers.free("logits", "last", "hidden")
        self._backward(scene, grad)

    def _forward(self, scene: Scene, ids: torch.Tensor, keeps: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The last layer's output at supervised tokens, the same normed [supervised, width], and its 1 / rms."""
        buffers, count, width = self._buffers, scene.tokens.count, self._parts.width
        entry: tuple[torch.Tensor, torch.Tensor] | None = None
        for layer in self._layers:
            kept = keeps and layer.index >= self._lowest
            offloads = self._inputs if kept else None
            own = layer.index if kept else ""
            x = offloads.place(layer.index, count, width) if offloads else buffers(f"x {own}", count, width)
            if entry is None:
                look_up(self._parts.embed.weight.detach(), ids, x)
            self._fetch(layer)
            entry = layer.forward(scene, x, entry, self._prefixes.keys(layer.index), self._keep(layer.index, kept))
            self._release(layer)
            if offloads:
                offloads.keep(layer.index)
        assert entry is not None
        asked = scene.supervised.count
        last, hidden = buffers("last", asked, width), buffers("hidden", asked, width)
        inverse = buffers("last inverse", asked, 1, torch.promote_types(buffers.dtype, torch.float32))[:, 0]
        self._ops.add_rms_norm(*entry, self._parts.norm, self._parts.eps, last, hidden, inverse)
        return last, hidden, inverse

    def _backward(self, scene: Scene, grad: torch.Tensor) -> None:
        left: torch.Tensor | None = grad
        for layer in reversed(self._layers[self._lowest :]):
            assert left is not None
            keep = self._keep(layer.index, True)
            if self._inputs:
                x = self._inputs.get(layer.index, self._lowest)
            else:
                x = self._buffers(f"x {layer.index}", scene.tokens.count, self._parts.width)
            self._fetch(layer)
            if self._checkpoint:
                layer.forward(scene, x, None, self._prefixes.keys(layer.index), keep, again=True)
            lowest = layer.index == self._lowest
            left = layer.backward(scene, x, left, self._prefixes.grads(layer.index), keep, lowest)
            self._release(layer)

    def _keep(self, layer: int, kept: bool) -> str:
        return f"of {layer}" if kept and not self._checkpoint else AGAIN

    def _read(self) -> None:
        for layer in self._layers:
            for change in layer.changes:
                for group in change.learners.values():
                    group.read()
                if change.stack is not None:
                    change.stack.read()
            self._release(layer)

    def _fetch(self, layer: Layer) -> None:
        """Where inputs are offloaded, copies of the adapters are made for one layer at a time, too."""
        if self._inputs:
            for change in layer.changes:
                for group in change.learners.values():
                    group.fetch()

    def _release(self, layer: Layer) -> None:
        if self._inputs:
            for change in layer.changes:
                for group in change.learners.values():
                    group.release()

    def _give(self) -> None:
        for layer in self._layers:
            for change in layer.changes:
                if change.stack is not None:
                    change.stack.give()
                for group in change.learners.values():
                    group.give()


class _Prefixes:
    """The keys and values of all learners' prefixes, one learner below the other, and their gradients.

    Attributes:
        counts: rows of each learner's prefix.
    """

    def __init__(self, parts: DecoderParts, trainables: Sequence[object]) -> None:
        self._trainables = [t for t in trainables if isinstance(t, TrainablePrefix)]
        self.counts = [t.spec.num_virtual_tokens if isinstance(t, TrainablePrefix) else 0 for t in trainables]
        self.count = sum(self.counts)
        self._made: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._held: list[torch.Tensor] = []
        self._slopes: list[torch.Tensor] = []

    def read(self, dtype: torch.dtype) -> None:
        """Make all prefixes from their parameters as they are now, and begin new gradients."""
        if not self.count:
            return
        with torch.enable_grad():
            rows = [prefix for t in self._trainables if (prefix := t.prefix(1, dtype)) is not None]
            self._made = [(row.keys[:, 0], row.values[:, 0]) for row in rows]
        both = [torch.cat([made[i].detach() for made in self._made], 2) for i in (0, 1)]
        self._held = [part.transpose(1, 2).flatten(2).contiguous() for part in both]
        wide = torch.promote_types(dtype, torch.float32)
        self._slopes = [torch.zeros_like(part, dtype=wide) for part in self._held]

    def keys(self, layer: int) -> PrefixKeys | None:
        """Keys and values of one layer."""
        return (self._held[0][layer], self._held[1][layer]) if self._held else None

    def grads(self, layer: int) -> PrefixKeys | None:
        """Where the gradients of one layer's keys and values are summed up."""
        return (self._slopes[0][layer], self._slopes[1][layer]) if self._slopes else None

    def give(self) -> None:
        """Take the gradients on to the parameters."""
        ends = [0]
        for count in (c for c in self.counts if c):
            ends.append(ends[-1] + count)
        for made, (first, end) in zip(self._made, pairwise(ends), strict=True):
            slopes = [
                slope[:, first:end].view(len(slope), end - first, part.shape[1], -1).transpose(1, 2).to(part.dtype)
                for slope, part in zip(self._slopes, made, strict=True)
            ]
            torch.autograd.backward(made, slopes)
        self._made, self._held, self._slopes = [], [], []


def agrees(base: Base, parts: DecoderParts) -> bool:
    """Whether a forward of ours gives the logits of the model's own."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(parts.head.weight.shape[0])
    ids = torch.randint(0, vocabulary, (12,), generator=generator).tolist()
    ours = FusedDecoder(base, [], Settings(), parts=parts).logits(ids)
    with torch.inference_mode():
        expected = base.model(input_ids=torch.tensor([ids], device=base.device)).logits[0]
    difference = (ours - expected).abs().max()
    return float(difference) <= _BOUNDS[base.dtype] * float(expected.abs().max())
