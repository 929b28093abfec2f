"""Attention within the rows of a packed sequence, for models that ask transformers for their attention function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..packs import Piece
from .dropout import Dropping, attend_dropping

_NAME = "adapterhub_packed"
_SPANS: ContextVar[Spans]


class CannotPack(Exception):
    """The model asks for what attention within packed rows does not do."""


class Group(NamedTuple):
    """Neighbouring rows of one length, and the tokens that stand before all of them."""

    first: int
    rows: int
    length: int
    context: int
    before: int


@dataclass(frozen=True)
class Spans:
    """Rows of a packed sequence; those of one group attend in one call.

    Attributes:
        dropping: the base's dropout, or None where it is off.
    """

    groups: tuple[Group, ...]
    dropping: Dropping | None = None

    @classmethod
    def of(cls, pieces: Sequence[Piece], dropping: Dropping | None = None) -> Spans:
        """Spans of these pieces, one after another."""
        groups: list[Group] = []
        starts: list[int] = []
        at = 0
        for piece in pieces:
            length = len(piece.ids)
            starts.append(at)
            shared = (starts[piece.context], len(pieces[piece.context].ids)) if piece.context >= 0 else (0, 0)
            if groups and (groups[-1].length, groups[-1].context, groups[-1].before) == (length, *shared):
                groups[-1] = groups[-1]._replace(rows=groups[-1].rows + 1)
            else:
                groups.append(Group(at, 1, length, *shared))
            at += length
        return cls(tuple(groups), dropping)


_SPANS = ContextVar("spans")


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, tokens, width], key and value likewise -> [1, tokens, heads, width], each row among itself."""
    odd = [k for k in ("sliding_window", "softcap", "position_bias", "s_aux") if other.get(k) is not None]
    if attention_mask is not None or odd or query.shape[2] != key.shape[2]:
        raise CannotPack(", ".join(odd) or "a mask")
    spans = _SPANS.get()
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    salt = spans.dropping.next_salt() if spans.dropping is not None and dropout else 0
    parts = []
    for first, rows, length, context, before in spans.groups:
        mine = (t[0, :, first : first + rows * length] for t in (query, key, value))
        q, k, v = (t.reshape(t.shape[0], rows, length, -1).transpose(0, 1) for t in mine)
        if spans.dropping is not None and dropout:
            keys = spans.dropping.run.lines(query.shape[2], query.device).keys[first : first + rows * length : length]
            seen = attend_dropping(q, k, v, None, causal, scaling, dropout, keys, salt)
        else:
            mask = None
            if before:
                front = (t[:, :, context : context + before].expand(rows, -1, -1, -1) for t in (key, value))
                k, v = (torch.cat(both, 2) for both in zip(front, (k, v), strict=True))
                mask = torch.ones((length, before + length), dtype=torch.bool, device=q.device)
                mask = mask.tril(before) if causal else mask
            seen = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=causal and mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        parts.append(seen.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


@contextmanager
def packed_attention(model: nn.Module, spans: Spans) -> Iterator[None]:
    """Within the block the model attends within these spans."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)  # type: ignore[no-untyped-call]
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    token = _SPANS.set(spans)
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        yield
    finally:
        _SPANS.reset(token)
        for key, config in configs.items():
            config._attn_implementation = before[key]
