"""One decoder layer forward and backward, by hand: what is kept is what cannot be made again cheaply.

Kept for a layer: its input, queries, keys and values as attention reads them, attention's output and the logarithm of
its sums, what enters the feed-forward part, gate and up, and A x of the adapters. Norms and SiLU are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..memory.buffers import Buffers
from .changes import Changes
from .lora import Tokens, Tools
from .ops import AttentionShape, Parts, TorchOps
from .parts import DecoderParts, LayerParts

_TORCH = TorchOps()  # heads lie too wide apart for others

AGAIN = "of any"
"""Part of the names of buffers whose contents are made again in the backward."""
PrefixKeys = tuple[torch.Tensor, torch.Tensor]
"""Keys and values [rows, key columns] of all learners' prefixes in one layer, one below the other."""


@dataclass(frozen=True)
class Scene:
    """What all layers of one pass over a pack share.

    Attributes:
        tokens: all of them.
        supervised: those after which the loss asks, by their places among all.
        chosen: these places; None: all tokens.
        turns: cos and sin [tokens, head_dim / 2].
        spans: see `kernels.training`: first query, queries, first own key, first context key, context keys.
        before: rows of keys that prefixes take before the first token's.
    """

    tools: Tools
    tokens: Tokens
    supervised: Tokens
    chosen: torch.Tensor
    turns: tuple[torch.Tensor, torch.Tensor]
    spans: torch.Tensor
    before: int


class Layer:
    """The forward and backward of one layer with all learners' changes."""

    def __init__(
        self, parts: DecoderParts, index: int, trainables: Sequence[object], recompute_mlp: bool = False
    ) -> None:
        """recompute_mlp: gate and up are not kept, but made again in the backward."""
        self.recompute_mlp = recompute_mlp
        self.index, self.model = index, parts
        self.parts: LayerParts = parts.layers[index]
        self.last = index == len(parts.layers) - 1
        self.changes = [
            Changes(frozen, trainables, 8 * index + salt)
            for frozen, salt in zip(self.parts.groups, (0, 3, 4, 6), strict=True)
        ]
        self.shape = AttentionShape(parts.heads, parts.kv_heads, parts.head_dim, parts.scaling, self.parts.window)

    @property
    def trained(self) -> bool:
        """Whether some learner changes this layer."""
        return any(change.learners for change in self.changes)

    def forward(
        self,
        scene: Scene,
        x: torch.Tensor,
        entry: tuple[torch.Tensor, torch.Tensor] | None,
        prefix: PrefixKeys | None,
        keep: str,
        again: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the two results enters the next layer: what the feed-forward part reads, and what it adds.

        Args:
            x: the layer's input; it is made here where `entry` gives the two results of the layer below.
            keep: part of the names of the buffers that hold what the backward needs.
            again: only make what the backward needs.
        """
        buffers, ops = scene.tools.buffers, scene.tools.ops
        count, width = scene.tokens.count, self.model.width
        normed, inverse = buffers("normed", count, width), self._inverse(buffers, "before", keep, count)
        if entry is None:
            ops.rms_norm(x, self.parts.before, self.model.eps, normed, inverse)
        else:
            ops.add_rms_norm(*entry, self.parts.before, self.model.eps, x, normed, inverse)
        seen = self._attend(scene, normed, prefix, keep)
        tokens = scene.tokens
        if not again and keep == AGAIN:
            buffers.free(*(f"{name} {keep}" for name in ("qkv", "raw heads")))
        if self.last:
            tokens = scene.supervised
            some = buffers(f"chosen seen {keep}", tokens.count, self.model.queries)
            seen = torch.index_select(seen, 0, scene.chosen, out=some)
            x = torch.index_select(x, 0, scene.chosen, out=buffers("chosen x", tokens.count, width))
        delta = buffers("delta", tokens.count, width)
        self._change(1, seen, delta, tokens, scene.tools, keep)
        if not again and keep == AGAIN:
            buffers.free(f"seen {keep}", f"chosen seen {keep}", "normed")
            del seen, normed
        middle = buffers(f"middle {keep}", tokens.count, width)
        normed, inverse = buffers("normed", tokens.count, width), self._inverse(buffers, "after", keep, tokens.count)
        ops.add_rms_norm(x, delta, self.parts.after, self.model.eps, middle, normed, inverse)
        if again:
            buffers.free("delta", "chosen x")
            del x
        gate_up = self._gate_up(buffers, tokens, keep)
        self._change(2, normed, gate_up, tokens, scene.tools, keep)
        buffers.free("normed")
        del normed
        active = buffers("active", tokens.count, self.parts.down.n_in)
        ops.swiglu(gate_up, active)
        if not again and keep == AGAIN:
            buffers.free(f"gate_up {keep}")
            del gate_up
        if again:
            self.changes[3].lower(active, self._hidden(3, tokens, buffers, keep), tokens, scene.tools)
            return middle, delta
        self._change(3, active, delta, tokens, scene.tools, keep)
        buffers.free("active")
        return middle, delta

    def backward(
        self, scene: Scene, x: torch.Tensor, grad: torch.Tensor, prefix: PrefixKeys | None, keep: str, lowest: bool
    ) -> torch.Tensor | None:
        """The gradient of the layer's input x from that of its output, which is overwritten; None at the lowest."""
        tools = scene.tools
        buffers = tools.buffers
        tokens = scene.supervised if self.last else scene.tokens
        self._feed_forward_back(scene, tokens, grad, keep)
        seen = buffers(f"{'chosen ' if self.last else ''}seen {keep}", tokens.count, self.model.queries)
        slope = buffers("seen slope", tokens.count, self.model.queries)
        self.changes[1].back(grad, seen, self._hidden(1, tokens, buffers, keep), slope, tokens, tools)
        if self.last:
            grad = _spread(grad, scene, buffers("grad of all", scene.tokens.count, self.model.width))
            slope = _spread(slope, scene, buffers("seen slope of all", scene.tokens.count, self.model.queries))
        slope = self._attend_back(scene, slope, prefix, keep)
        buffers.free(f"qkv {keep}", f"seen {keep}", f"chosen seen {keep}", "seen slope", "seen slope of all")
        count, width = scene.tokens.count, self.model.width
        normed, inverse = buffers("normed", count, width), self._inverse(buffers, "before", keep, count)
        tools.ops.rms_norm(x, self.parts.before, self.model.eps, normed, inverse)
        through = None if lowest else buffers("normed slope", count, width)
        hidden = self._hidden(0, scene.tokens, buffers, keep)
        self.changes[0].back(slope, normed, hidden, through, scene.tokens, tools)
        buffers.free("qkv slope", "normed", "scaled gradient")
        if through is None:
            return None
        tools.ops.rms_norm_back(through, x, self.parts.before, inverse, grad, True)
        buffers.free("normed slope")
        return grad

    def _feed_forward_back(self, scene: Scene, tokens: Tokens, grad: torch.Tensor, keep: str) -> None:
        """grad: of the layer's output; becomes that of what attention's output was added to."""
        tools = scene.tools
        buffers, ops = tools.buffers, tools.ops
        middle = buffers(f"middle {keep}", tokens.count, self.model.width)
        gate_up = self._gate_up(buffers, tokens, keep)
        active = buffers("active", tokens.count, self.parts.down.n_in)
        down, needs_input = self.changes[3], self.changes[3].needs_input(tools.training)
        own = "active slope" if needs_input or not buffers.lean else "active"  # both may be one
        slope = buffers(own, tokens.count, self.parts.down.n_in)
        if self.recompute_mlp and keep != AGAIN and not self.last:  # the last layer's are still there
            self._make_gate_up(scene, tokens, middle, keep)
        if needs_input:
            ops.swiglu(gate_up, active)
        hidden = self._hidden(3, tokens, buffers, keep)
        down.back(grad, active if needs_input else None, hidden, slope, tokens, tools)
        ops.swiglu_back(gate_up, slope, active)
        if not needs_input:
            down.back_down(active, tokens, tools)
        buffers.free("active", "active slope")
        del active, slope
        normed = buffers("normed", tokens.count, self.model.width)
        inverse = self._inverse(buffers, "after", keep, tokens.count)
        ops.rms_norm(middle, self.parts.after, self.model.eps, normed, inverse)
        through = buffers("normed slope", tokens.count, self.model.width)
        self.changes[2].back(gate_up, normed, self._hidden(2, tokens, buffers, keep), through, tokens, tools)
        ops.rms_norm_back(through, middle, self.parts.after, inverse, grad, True)
        buffers.free(f"gate_up {keep}", f"middle {keep}", "normed", "normed slope")

    def _make_gate_up(self, scene: Scene, tokens: Tokens, middle: torch.Tensor, keep: str) -> None:
        buffers = scene.tools.buffers
        normed = buffers("normed", tokens.count, self.model.width)
        inverse = self._inverse(buffers, "after", keep, tokens.count)
        scene.tools.ops.rms_norm(middle, self.parts.after, self.model.eps, normed, inverse)
        self._change(2, normed, self._gate_up(buffers, tokens, keep), tokens, scene.tools, keep)

    def _gate_up(self, buffers: Buffers, tokens: Tokens, keep: str) -> torch.Tensor:
        name = f"gate_up {AGAIN if self.recompute_mlp else keep}"
        return buffers(name, tokens.count, self.parts.gate_up.n_out)

    def _attend(self, scene: Scene, normed: torch.Tensor, prefix: PrefixKeys | None, keep: str) -> torch.Tensor:
        buffers, ops = scene.tools.buffers, scene.tools.ops
        count = scene.tokens.count
        whole = buffers(f"qkv {keep}", scene.before + count, self.parts.qkv.n_out)
        own = whole[scene.before :]
        self._change(0, normed, own, scene.tokens, scene.tools, keep)
        turned = self._turned(own)
        if self.parts.heads is not None:
            self._norm_heads(turned, buffers, keep)
        ops.rotate(turned, scene.turns, False)
        parts = self._split(whole, scene.before)
        if prefix is not None:
            parts[1][: scene.before].copy_(prefix[0])
            parts[2][: scene.before].copy_(prefix[1])
        seen = buffers(f"seen {keep}", count, self.model.queries)
        sums = self._sums(buffers, keep, count)
        ops.attend(parts, seen, sums, scene.spans, self.shape)
        return seen

    def _attend_back(self, scene: Scene, slope: torch.Tensor, prefix: PrefixKeys | None, keep: str) -> torch.Tensor:
        """The gradient of what the product q, k, v gave; that of prefixes goes into `prefix`."""
        buffers, ops = scene.tools.buffers, scene.tools.ops
        count = scene.tokens.count
        whole = buffers(f"qkv {keep}", scene.before + count, self.parts.qkv.n_out)
        grads = buffers("qkv slope", scene.before + count, self.parts.qkv.n_out)
        split = self._split(grads, scene.before)
        seen = buffers(f"seen {keep}", count, self.model.queries)
        sums = self._sums(buffers, keep, count)
        ops.attend_back(self._split(whole, scene.before), seen, sums, slope, split, scene.spans, self.shape)
        if prefix is not None:
            prefix[0].add_(split[1][: scene.before])
            prefix[1].add_(split[2][: scene.before])
        own = grads[scene.before :]
        turned = self._turned(own)
        ops.rotate(turned, scene.turns, True)
        if self.parts.heads is not None:
            self._norm_heads_back(turned, buffers, keep)
        return own

    def _turned(self, own: torch.Tensor) -> torch.Tensor:
        """The heads of queries and keys [tokens, heads, head_dim], a view."""
        both = self.model.heads + self.model.kv_heads
        return own[:, : both * self.model.head_dim].view(len(own), both, self.model.head_dim)

    def _norm_heads(self, heads: torch.Tensor, buffers: Buffers, keep: str) -> None:
        """Norm each head's query and key in place; what they were is kept."""
        raw, inverse = self._raw(heads, buffers, keep)
        raw.copy_(heads)
        for part, weight in self._head_parts():
            _TORCH.rms_norm(raw[:, part], weight, self.model.eps, heads[:, part], inverse[:, part])

    def _norm_heads_back(self, grads: torch.Tensor, buffers: Buffers, keep: str) -> None:
        raw, inverse = self._raw(grads, buffers, keep)
        for part, weight in self._head_parts():
            _TORCH.rms_norm_back(grads[:, part], raw[:, part], weight, inverse[:, part], grads[:, part], False)

    def _head_parts(self) -> list[tuple[slice, torch.Tensor]]:
        assert self.parts.heads is not None
        return [(slice(0, self.model.heads), self.parts.heads[0]), (slice(self.model.heads, None), self.parts.heads[1])]

    def _raw(self, heads: torch.Tensor, buffers: Buffers, keep: str) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(heads.dtype, torch.float32)
        raw = buffers(f"raw heads {keep}", heads.shape[0], heads.shape[1] * heads.shape[2]).view(heads.shape)
        return raw, buffers(f"raw inverse {keep}", heads.shape[0], heads.shape[1], wide)

    def _split(self, whole: torch.Tensor, before: int) -> Parts:
        first, second = self.model.queries, self.model.queries + self.model.keys
        return whole[before:, :first], whole[:, first:second], whole[:, second:]

    def _change(self, group: int, x: torch.Tensor, out: torch.Tensor, tokens: Tokens, tools: Tools, keep: str) -> None:
        self.changes[group].forward(x, out, self._hidden(group, tokens, tools.buffers, keep), tokens, tools)

    def _hidden(self, group: int, tokens: Tokens, buffers: Buffers, keep: str) -> torch.Tensor:
        return buffers(f"hidden {group} {keep}", tokens.count, self.changes[group].rank)

    def _inverse(self, buffers: Buffers, which: str, keep: str, count: int) -> torch.Tensor:
        return buffers(f"{which} {keep}", count, 1, torch.promote_types(buffers.dtype, torch.float32))[:, 0]

    def _sums(self, buffers: Buffers, keep: str, count: int) -> torch.Tensor:
        return buffers(f"sums {keep}", count, self.model.heads, torch.promote_types(buffers.dtype, torch.float32))


def _spread(some: torch.Tensor, scene: Scene, out: torch.Tensor) -> torch.Tensor:
    """Rows of supervised tokens at their places among all, zeros elsewhere."""
    out.zero_()
    out.index_copy_(0, scene.chosen, some)
    return out
