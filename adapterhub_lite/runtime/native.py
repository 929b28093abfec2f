"""Tokens through a decoder in one native call, where this machine and this model allow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.forward import Forward, LayerParts, Linear, Sizes, Text
from ..kernels.library import library
from .changes import NativeChanges
from .products import Site
from .window import Window

if TYPE_CHECKING:
    from .decoder import Decoder, Layer

_FEW = 64  # of so many tokens one call for everything saves more than a product of it can lose


def native_forward(decoder: Decoder) -> NativeForward | None:
    """The native forward, if there is native code and the model is float32, with SiLU and root-mean-square norms."""
    base = decoder.base
    norms = [norm for layer in decoder.layers for norm in (layer.before, layer.after, *layer.norms) if norm is not None]
    eps = {getattr(norm, "variance_epsilon", None) for norm in (decoder.norm, *norms)}
    fits = (
        library().functions is not None
        and base.device.type == "cpu"
        and base.dtype == torch.float32
        and decoder.head_dim % 16 == 0
        and base.config.hidden_act == "silu"
        and len(eps) == 1
        and None not in eps
        and all(norm.weight.dtype == torch.float32 for norm in (decoder.norm, *norms))
        and all(site.packed is not None for site in decoder.sites)
    )
    return NativeForward(decoder) if fits else None


class NativeForward:
    """Gives what `Decoder` gives, but for rounding; rows of different lengths need no padding.

    Attributes:
        most_tokens: with more tokens torch's products are faster. Up to there the two are near each other, and this
            one computes no padding: the measurements of single sites may differ by chance.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.most_tokens = max(_FEW, *(site.packed_rows for site in decoder.sites))
        self._sites = [site.modules for layer in decoder.layers for site in _sites(layer)] + [decoder.lm_head.modules]
        gate = decoder.layers[0].gate_up.packed
        assert gate is not None
        sizes = Sizes(
            int(decoder.base.config.hidden_size), decoder.heads, decoder.kv_heads, decoder.head_dim, gate.n_out // 2,
            decoder.norm.variance_epsilon, decoder.scaling,
        )  # fmt: skip
        layers = [_parts(layer) for layer in decoder.layers]
        self._forward = Forward(sizes, layers, decoder.norm.weight.detach(), _linear(decoder.lm_head))
        self._cos = self._sin = torch.empty((0, decoder.head_dim))

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, window: Window, changes: NativeChanges
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] after one more token a row; tokens and positions are [rows]."""
        count = len(tokens)
        ones, columns = (1,) * count, torch.full((count,), window.end - 1)
        return self._run(tokens, positions, (ones, torch.arange(count), columns), window, changes, ones)

    def read(
        self,
        prompts: Sequence[list[int]],
        before: torch.Tensor,
        window: Window,
        changes: NativeChanges,
        every: bool = False,
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] after prompts, whose last tokens stand in the window's last column; after `every`
        token [tokens of all rows, vocabulary].

        Args:
            before: [rows], positions that a row has used before its prompt.
        """
        lengths = tuple(len(prompt) for prompt in prompts)
        rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        within = torch.cat([torch.arange(length) for length in lengths])
        columns = window.end - torch.tensor(lengths)[rows] + within
        tokens = torch.tensor([token for prompt in prompts for token in prompt])
        wanted = lengths if every else (1,) * len(lengths)
        return self._run(tokens, before[rows] + within, (lengths, rows, columns), window, changes, wanted)

    def _run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        places: tuple[tuple[int, ...], torch.Tensor, torch.Tensor],
        window: Window,
        changes: NativeChanges,
        wanted: tuple[int, ...],
    ) -> torch.Tensor:
        cos, sin = self._angles(positions)
        x = self._decoder.embed(tokens).contiguous()
        text = Text(*places, cos, sin)
        batch = changes.batch(self._sites)
        return self._forward(x, text, batch, window.keys, window.values, window.filled, wanted)

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [tokens, head_dim] of positions; no rope that we know depends on more than the position."""
        last = int(positions.max())
        if last >= len(self._cos):
            every = torch.arange(2 * last + 64)[None]
            cos, sin = self._decoder.rotary(torch.empty((), dtype=torch.float32), every)
            self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


def _sites(layer: Layer) -> tuple[Site, Site, Site, Site]:
    return layer.qkv, layer.out, layer.gate_up, layer.down


def _linear(site: Site) -> Linear:
    assert site.packed is not None
    return Linear(site.packed, site.bias)


def _parts(layer: Layer) -> LayerParts:
    def weight(norm: Any) -> torch.Tensor | None:
        found: torch.Tensor | None = None if norm is None else norm.weight.detach()
        return found

    qkv, out, gate_up, down = (_linear(site) for site in _sites(layer))
    before, after, *head_norms = (weight(norm) for norm in (layer.before, layer.after, *layer.norms))
    assert before is not None
    assert after is not None
    return LayerParts(qkv, out, gate_up, down, before, after, (head_norms[0], head_norms[1]))
