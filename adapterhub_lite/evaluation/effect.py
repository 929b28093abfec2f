"""Proof of effect: how far an adapter moves the logits of its base on fixed texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..bases.load import Base
from ..errors import NoEffect
from ..names import Ref
from ..runtime.runtime import Runtime

PROBES = (
    "The ferry leaves at seven and the ticket office opens an hour before.",
    "Which of the two answers is correct, and why?",
    "List three things that you would take on a long walk.",
    "def area(width, height):",
)


def measure_effect(runtime: Runtime, adapter: str | Ref, texts: Sequence[str] = ()) -> dict[str, Any]:
    """The largest and mean absolute change of a logit against the bare base, over the probe texts and `texts`.

    A classifier has no bare counterpart: its probe compares the labels' logits between texts that differ.

    Raises:
        NoEffect: no logit moves, or one moves to infinity.
    """
    rows = [_ids(runtime.base, t) for t in (*PROBES, *texts)]
    adapted = runtime.logits(rows, adapter, _decoder_rows(runtime.base, rows))
    if adapted[0].dim() == 1:
        spread = torch.stack([a.float() for a in adapted])
        change = (spread - spread.mean(0)).abs()
    else:
        bare = runtime.logits(rows, None, _decoder_rows(runtime.base, rows))
        change = torch.cat([(a.float() - b.float()).abs().flatten() for a, b in zip(adapted, bare, strict=True)])
    largest = float(change.max())
    if not math.isfinite(largest):
        raise NoEffect(f"{adapter} makes logits of {runtime.base.name} that are not finite.", "The training diverged.")
    if largest == 0.0:
        raise NoEffect(
            f"{adapter} moves no logit of {runtime.base.name}: it does nothing.", "Train it longer, or anew."
        )
    return {"max_logit_change": largest, "mean_logit_change": float(change.mean()), "probes": len(rows)}


def _ids(base: Base, text: str) -> list[int]:
    return list(base.tokenizer(text, truncation=True, max_length=64)["input_ids"])


def _decoder_rows(base: Base, rows: list[list[int]]) -> list[list[int]] | None:
    return [r[:8] for r in rows] if base.kind == "seq2seq" else None
