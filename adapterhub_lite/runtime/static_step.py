"""One decode step whose shapes and addresses stand still, so that it can be captured or compiled once.

It computes what `Decoder.step` computes by torch. Whatever changes between two steps is data in buffers: tokens, each
row's position and lane, keys and values, the adapters' matrices. A row's tokens lie in columns 0, 1, 2, ... of its own
place, so its position says where it writes, what it sees and how its head turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..adapters.pack import Group
from .decoder import Decoder, Layer
from .products import Site
from .static_lanes import Arena, Deal, SiteLanes, StaticLanes
from .static_size import Size


def kinds_of(decoder: Decoder) -> list[list[Group]]:
    """The groups of each kind of site, over all layers: q k v, attention output, gate and up, down, output layer."""
    layers = decoder.layers
    kinds = [[x.qkv for x in layers], [x.out for x in layers], [x.gate_up for x in layers], [x.down for x in layers]]
    return [[site.modules for site in sites] for sites in (*kinds, [decoder.lm_head])]


class StaticStep:
    """The step of one size.

    Attributes:
        tokens, positions, lane: [rows], what a step reads; a place without a row has position 0 and no lane.
        keys, values: for each layer [rows, heads, columns, head_dim].
        lanes: one for each layer and kind, and one for the output layer.
    """

    def __init__(self, decoder: Decoder, size: Size, lanes: StaticLanes, arena: Arena) -> None:
        device = decoder.base.device
        self.size, self.lanes = size, lanes
        self._decoder, self._sites = decoder, lanes.sites
        shape = (size.rows, decoder.kv_heads, size.columns, decoder.head_dim)
        layers = range(len(decoder.layers))
        self.keys = [arena.take(("keys", i), *shape) for i in layers]
        self.values = [arena.take(("values", i), *shape) for i in layers]
        with torch.inference_mode(False):
            self.tokens = torch.zeros(size.rows, dtype=torch.long, device=device)
            self.positions = torch.zeros_like(self.tokens)
            self.lane = torch.full_like(self.tokens, size.lanes)
            self._columns = torch.arange(size.columns, device=device)
            self._numbers = torch.arange(size.lanes, device=device)
            self._starts = torch.arange(size.rows * decoder.kv_heads, device=device) * size.columns

    def __call__(self) -> torch.Tensor:
        """Logits [rows, vocabulary] after the tokens, whose keys and values are written."""
        decoder, rows = self._decoder, self.size.rows
        x = decoder.embed(self.tokens)
        cos, sin = decoder.rotary(x[:, None], self.positions[:, None])
        half = decoder.head_dim // 2
        turn = cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)
        unseen = self._columns > self.positions[:, None]
        mask = torch.zeros(unseen.shape, dtype=x.dtype, device=x.device).masked_fill_(unseen, float("-inf"))
        at = self._starts + self.positions[:, None].expand(rows, decoder.kv_heads).reshape(-1)
        deal = Deal(self.lane, (self._numbers != self.lane[:, None])[:, None, :, None])
        for i, layer in enumerate(decoder.layers):
            qkv, out, gate_up, down = self._sites[4 * i : 4 * i + 4]
            heads = _product(layer.qkv, qkv, layer.before(x), deal)
            x = x + _product(layer.out, out, self._attend(layer, i, heads, turn, at, mask[:, None, None]), deal)
            gate, up = _product(layer.gate_up, gate_up, layer.after(x), deal).chunk(2, -1)
            x = x + _product(layer.down, down, layer.act(gate) * up, deal)
        return _product(decoder.lm_head, self._sites[-1], decoder.norm(x), deal)

    def _attend(
        self,
        layer: Layer,
        i: int,
        qkv: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor],
        at: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """The heads' outputs [rows, heads * head_dim] of qkv [rows, all heads * head_dim].

        Args:
            at: [rows * kv_heads], the columns to write, counted through all of `keys`.
            mask: [rows, 1, 1, columns], added to scores.
        """
        decoder, rows = self._decoder, self.size.rows
        both = decoder.heads + decoder.kv_heads
        heads = qkv.view(rows, both + decoder.kv_heads, decoder.head_dim)
        turned = heads[:, :both]
        if layer.norms[0] is not None and layer.norms[1] is not None:
            turned = torch.cat(
                [layer.norms[0](heads[:, : decoder.heads]), layer.norms[1](heads[:, decoder.heads : both])], 1
            )
        turned = torch.addcmul(turned * turn[0], turned.roll(decoder.head_dim // 2, -1), turn[1])
        keys, values = self.keys[i], self.values[i]
        for held, new in ((keys, turned[:, decoder.heads :]), (values, heads[:, both:])):
            held.view(-1, decoder.head_dim).index_copy_(0, at, new.reshape(-1, decoder.head_dim))
        queries = turned[:, : decoder.heads].reshape(rows, decoder.kv_heads, -1, decoder.head_dim)
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=decoder.scaling)
        return seen.reshape(rows, -1)


def _product(site: Site, lanes: SiteLanes | None, x: torch.Tensor, deal: Deal) -> torch.Tensor:
    if lanes is None:
        return site.plain(x)
    given = lanes.scale_input(x, deal)
    out = site.plain(given)
    lanes.apply(given, out, deal)
    return out


def sites_in_order(kinds: Sequence[Sequence[Group]]) -> list[tuple[int, Group]]:
    """(kind, group) of every site as a step meets them: the kinds of each layer in turn, then the output layer."""
    layered = [(kind, groups[i]) for i in range(len(kinds[0])) for kind, groups in enumerate(kinds[:-1])]
    return [*layered, (len(kinds) - 1, kinds[-1][0])]
