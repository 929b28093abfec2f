"""From a pack to the tensors that a pass over it reads."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch

from ...tasks.task import IGNORED
from ..packs import Pack
from .layer import Scene
from .lora import Tokens, Tools


class Angles:
    """cos and sin of positions; no rope that we know depends on more than the position."""

    def __init__(self, rotary: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._rotary, self._device, self._dtype = rotary, device, dtype
        self._cos = self._sin = torch.empty((0, 0))

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [tokens, head_dim / 2]."""
        last = int(positions.max())
        if last >= len(self._cos):
            every = torch.arange(2 * last + 64, device=self._device)[None]
            with torch.no_grad():
                cos, sin = self._rotary(torch.empty((), device=self._device, dtype=self._dtype), every)
            half = cos.shape[-1] // 2  # both halves of a head turn alike
            self._cos, self._sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


def scene_of(
    pack: Pack, tools: Tools, angles: Angles, prefixes: Sequence[int]
) -> tuple[Scene, torch.Tensor, torch.Tensor]:
    """The scene of a pack, its token ids [tokens], and the targets of its supervised tokens.

    Args:
        prefixes: how many keys each learner's prefix has; they stand before the tokens' keys, in this order.
    """
    device = tools.buffers.device
    pieces, starts = pack.pieces, pack.starts()
    begins = [sum(prefixes[:i]) for i in range(len(prefixes))]
    before = sum(prefixes)
    spans: list[tuple[int, int, int, int, int]] = []
    positions: list[int] = []
    indices: list[int] = []
    keys: list[int] = []
    for piece, start in zip(pieces, starts, strict=False):
        count, prefix = len(piece.ids), prefixes[piece.learner]
        context, length = begins[piece.learner], prefix
        if piece.context >= 0:
            assert not prefix
            context, length = before + starts[piece.context], len(pieces[piece.context].ids)
        spans.append((start, count, before + start, context, length))
        indices += range(piece.first, piece.first + count)
        positions += range(prefix + piece.first, prefix + piece.first + count)
        keys += [piece.key] * count
    targets = [target for piece in pieces for target in piece.targets]
    chosen = [i for i, target in enumerate(targets) if target != IGNORED]
    segments = pack.segments()
    tokens = Tokens(len(targets), tuple(segments), *_tensors(device, keys, indices))
    asked = tuple((bisect_left(chosen, a), bisect_left(chosen, b), learner) for a, b, learner in segments)
    chosen_t, span_t, position_t, ids, wanted = _tensors(
        device,
        chosen,
        spans,
        positions,
        [i for piece in pieces for i in piece.ids],
        [targets[i] for i in chosen],
    )
    supervised = Tokens(len(chosen), asked, tokens.keys[chosen_t], tokens.indices[chosen_t])
    return Scene(tools, tokens, supervised, chosen_t, angles(position_t), span_t, before), ids, wanted


def _tensors(device: torch.device, *values: Any) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.long, device=device) for value in values]
