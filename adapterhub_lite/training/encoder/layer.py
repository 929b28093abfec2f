"""One encoder layer forward and backward, by hand: products, dropout, layer norms, attention within rows.

Kept for a layer: its input, queries, keys and values, attention's output and the logarithm of its sums, both sums that
are normed and their statistics, what the feed-forward part read and made, and A x of the adapters. Masks of dropout are
made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..decoder.changes import Changes
from ..decoder.lora import Tokens, Tools
from ..decoder.ops import Parts
from ..memory.buffers import Buffers
from .ops import Drop, EncoderOps, Heads, Norm, Rows
from .parts import EncoderParts, LayerParts

# Numbers of the places of one layer in which something is dropped: adapters' inputs first, as their products come.
PLACES = 16
_GROUPS, SALTS = (0, 3, 4, 5), (6, 7, 8)
_SEEN, _ATTENDED, _MADE = SALTS


@dataclass(frozen=True)
class Scene:
    """What all layers of one pass share.

    Attributes:
        tokens: all of them.
        read: those that a head reads, by their places among all.
        chosen: these places.
        every, some: who attends in all layers but the last, and in the last.
        drops: whether the base's own dropout is on.
    """

    tools: Tools
    ops: EncoderOps
    tokens: Tokens
    read: Tokens
    chosen: torch.Tensor
    every: Rows
    some: Rows
    drops: bool


class Layer:
    """The forward and backward of one layer with all learners' changes."""

    def __init__(self, parts: EncoderParts, index: int, trainables: Sequence[object]) -> None:
        self.index, self.model = index, parts
        self.parts: LayerParts = parts.layers[index]
        self.last = index == len(parts.layers) - 1
        self.changes = [
            Changes(frozen, trainables, PLACES * index + salt)
            for frozen, salt in zip(self.parts.groups, _GROUPS, strict=True)
        ]

    def forward(self, scene: Scene, x: torch.Tensor, keep: str) -> torch.Tensor:
        """What the next layer reads, in a buffer; in the last layer only for tokens that a head reads.

        Args:
            keep: part of the names of the buffers that hold what the backward needs.
        """
        buffers, ops, width = scene.tools.buffers, scene.ops, self.model.width
        tokens, rows = (scene.read, scene.some) if self.last else (scene.tokens, scene.every)
        qkv = buffers(f"qkv {keep}", scene.tokens.count, self.parts.qkv.n_out)
        self._change(0, x, qkv, scene.tokens, scene.tools, keep)
        seen, sums = self._seen(scene, tokens, keep)
        ops.attend_rows(self._parts(scene, qkv, keep), seen, sums, rows, self._heads(scene))
        if self.last:
            x = torch.index_select(x, 0, scene.chosen, out=buffers("chosen x", tokens.count, width))
        delta = buffers("delta", tokens.count, width)
        self._change(1, seen, delta, tokens, scene.tools, keep)
        middle = buffers(f"middle {keep}", tokens.count, width)
        self._add_norm(scene, x, delta, tokens, "attended", middle, keep)
        up = buffers(f"up {keep}", tokens.count, self.parts.up.n_out)
        self._change(2, middle, up, tokens, scene.tools, keep)
        active = buffers(f"active {keep}", tokens.count, self.parts.up.n_out)
        ops.gelu(up, active)
        self._change(3, active, delta, tokens, scene.tools, keep)
        out = buffers(f"out {keep}", tokens.count, width)
        self._add_norm(scene, middle, delta, tokens, "made", out, keep)
        return out

    def backward(
        self, scene: Scene, x: torch.Tensor, grad: torch.Tensor, keep: str, lowest: bool
    ) -> torch.Tensor | None:
        """The gradient of the layer's input x from that of its output; None at the lowest. Both may be buffers."""
        tools, ops, width = scene.tools, scene.ops, self.model.width
        buffers = tools.buffers
        tokens = scene.read if self.last else scene.tokens
        through = buffers("through", tokens.count, width)
        grad = self._feed_back(scene, tokens, grad, through, keep)
        total = buffers("attended slope", tokens.count, width)
        ops.norm_back(grad, *self._normed(scene, tokens, "attended", keep), total)
        delta = self._dropped(scene, total, tokens, "attended", through)
        seen, sums = self._seen(scene, tokens, keep)
        slope = buffers("seen slope", tokens.count, width)
        self.changes[1].back(delta, seen, self._hidden(1, tokens, buffers, keep), slope, tokens, tools)
        qkv = buffers(f"qkv {keep}", scene.tokens.count, self.parts.qkv.n_out)
        grads = self._attend_back(scene, qkv, seen, sums, slope, keep)
        below = None if lowest else buffers(f"below {self.index % 2}", scene.tokens.count, width)
        hidden = self._hidden(0, scene.tokens, buffers, keep)
        self.changes[0].back(grads, x, hidden, below, scene.tokens, tools)
        if below is not None:
            if self.last:
                below.index_add_(0, scene.chosen, total)
            else:
                below.add_(total)
        return below

    def _feed_back(
        self, scene: Scene, tokens: Tokens, grad: torch.Tensor, through: torch.Tensor, keep: str
    ) -> torch.Tensor:
        """The gradient of what the feed-forward part read, from that of the layer's output."""
        tools, ops, buffers = scene.tools, scene.ops, scene.tools.buffers
        total = buffers("made slope", tokens.count, self.model.width)
        ops.norm_back(grad, *self._normed(scene, tokens, "made", keep), total)
        delta = self._dropped(scene, total, tokens, "made", through)
        up, active = (buffers(f"{name} {keep}", tokens.count, self.parts.up.n_out) for name in ("up", "active"))
        slope = buffers("active slope", tokens.count, self.parts.up.n_out)
        self.changes[3].back(delta, active, self._hidden(3, tokens, buffers, keep), slope, tokens, tools)
        ops.gelu_back(up, slope, slope)
        middle = buffers(f"middle {keep}", tokens.count, self.model.width)
        self.changes[2].back(slope, middle, self._hidden(2, tokens, buffers, keep), through, tokens, tools)
        return total.add_(through)

    def _attend_back(
        self,
        scene: Scene,
        qkv: torch.Tensor,
        seen: torch.Tensor,
        sums: torch.Tensor,
        slope: torch.Tensor,
        keep: str,
    ) -> torch.Tensor:
        """The gradient of what the product q, k, v gave [tokens, 3 * width]."""
        buffers, width = scene.tools.buffers, self.model.width
        grads = buffers("qkv slope", scene.tokens.count, self.parts.qkv.n_out)
        split: Parts = grads[:, :width], grads[:, width : 2 * width], grads[:, 2 * width :]
        rows, own = scene.every, split
        if self.last:
            rows, own = scene.some, (buffers("query slope", scene.read.count, width), *split[1:])
        scene.ops.attend_rows_back(self._parts(scene, qkv, keep), seen, sums, slope, own, rows, self._heads(scene))
        if self.last:
            split[0].zero_()
            split[0].index_copy_(0, scene.chosen, own[0])
        return grads

    def _parts(self, scene: Scene, qkv: torch.Tensor, keep: str) -> Parts:
        """Queries (in the last layer only those that are asked for), keys and values."""
        width = self.model.width
        q, k, v = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
        if self.last:
            out = scene.tools.buffers("chosen q", scene.read.count, width)
            q = torch.index_select(q, 0, scene.chosen, out=out)
        return q, k, v

    def _heads(self, scene: Scene) -> Heads:
        p = self.parts.drop_seen if scene.drops else 0.0
        salt = PLACES * self.index + _SEEN
        return Heads(self.model.heads, self.model.head_dim, self.model.scaling, salt, p)

    def _drop(self, scene: Scene, tokens: Tokens, which: str) -> Drop:
        p, salt = (self.parts.drop_attended, _ATTENDED) if which == "attended" else (self.parts.drop_made, _MADE)
        return Drop(tokens.keys, tokens.indices, PLACES * self.index + salt, p if scene.drops else 0.0)

    def _add_norm(
        self,
        scene: Scene,
        x: torch.Tensor,
        delta: torch.Tensor,
        tokens: Tokens,
        which: str,
        out: torch.Tensor,
        keep: str,
    ) -> None:
        total, norm, sums = self._normed(scene, tokens, which, keep)
        scene.ops.add_norm(x, delta, self._drop(scene, tokens, which), norm, total, out, sums)

    def _normed(
        self, scene: Scene, tokens: Tokens, which: str, keep: str
    ) -> tuple[torch.Tensor, Norm, tuple[torch.Tensor, torch.Tensor]]:
        """The sum that is normed, the norm, and where its statistics are."""
        buffers = scene.tools.buffers
        wide = torch.promote_types(buffers.dtype, torch.float32)
        total = buffers(f"{which} total {keep}", tokens.count, self.model.width)
        mean, inverse = (buffers(f"{which} {name} {keep}", tokens.count, 1, wide) for name in ("mean", "inverse"))
        return total, self.parts.attended if which == "attended" else self.parts.norm, (mean, inverse)

    def _dropped(self, scene: Scene, grad: torch.Tensor, tokens: Tokens, which: str, out: torch.Tensor) -> torch.Tensor:
        """The gradient of what was dropped before it was added."""
        drop = self._drop(scene, tokens, which)
        if not drop.p:
            return grad
        scene.ops.drop(grad, drop.keys, drop.indices, drop.salt, drop.p, out)
        return out

    def _seen(self, scene: Scene, tokens: Tokens, keep: str) -> tuple[torch.Tensor, torch.Tensor]:
        buffers = scene.tools.buffers
        wide = torch.promote_types(buffers.dtype, torch.float32)
        seen = buffers(f"seen {keep}", tokens.count, self.model.width)
        return seen, buffers(f"sums {keep}", tokens.count, self.model.heads, wide)

    def _change(self, group: int, x: torch.Tensor, out: torch.Tensor, tokens: Tokens, tools: Tools, keep: str) -> None:
        self.changes[group].forward(x, out, self._hidden(group, tokens, tools.buffers, keep), tokens, tools)

    def _hidden(self, group: int, tokens: Tokens, buffers: Buffers, keep: str) -> torch.Tensor:
        return buffers(f"hidden {group} {keep}", tokens.count, self.changes[group].rank)
