"""Embeddings of texts: what leaves an encoder's last layer, pooled; rows of all adapters share a forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from ..errors import NoEffect, Unsupported
from ..names import Ref
from .engine import Engine
from .forward import hidden_states
from .prompting import check_lengths, class_ids
from .texts import tokenizer_lock

Pooling = Literal["mean", "cls"]


def embed(
    engine: Engine, texts: Sequence[str], rows: Sequence[Ref | None], pooling: Pooling, normalize: bool
) -> torch.Tensor:
    """One vector a row [rows, width], float32, on the CPU.

    Raises:
        Unsupported: the base is no encoder, or there is no such pooling.
        NoEffect: an adapter makes values that are not finite.
    """
    base = engine.base
    if base.kind != "encoder":
        raise Unsupported(f"{base.name} is no encoder: it gives no embeddings.", "Load an encoder, such as minilm-l6.")
    if pooling not in ("mean", "cls"):
        raise Unsupported(f"There is no pooling {pooling!r}.", "Use mean or cls.")
    virtual = {row: engine.fitted(row).virtual_tokens if row is not None else 0 for row in dict.fromkeys(rows)}
    with tokenizer_lock(base):
        ids = [class_ids(base, text, None, virtual[row]) for text, row in zip(texts, rows, strict=True)]
    found = torch.empty((len(texts), int(base.config.hidden_size)))
    for part in engine.parts(ids, rows):
        with engine.plan([rows[i] for i in part]) as plan:
            some = [ids[i] for i in part]
            check_lengths(base, plan, some, 0)
            for i, hidden in zip(part, hidden_states(base, engine.hooks, plan, some), strict=True):
                found[i] = hidden[0] if pooling == "cls" else hidden.float().mean(0)
    if not bool(found.isfinite().all()):
        raise NoEffect("An adapter makes embeddings that are not finite.", "Use another adapter, or a wider dtype.")
    return F.normalize(found, dim=-1) if normalize else found
