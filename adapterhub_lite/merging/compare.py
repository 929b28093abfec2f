"""How far the logits of one model are from those of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

# Edges of the histogram of |difference of a logit|: half decades from 1e-8 to 1e2.
_EDGES = tuple(10 ** (k / 2) for k in range(-16, 5))


@dataclass(frozen=True)
class RowDifference:
    """One row: largest and mean absolute difference of a logit, mean KL in nats, share of equal likeliest tokens."""

    max_logit: float
    mean_logit: float
    kl: float
    top1: float
    tokens: int
    text: str = ""


@dataclass(frozen=True)
class Difference:
    """Merged against base + adapter over all tokens of the probe rows.

    Attributes:
        histogram: (lower edge, count) of absolute differences of logits, in half decades; the first from 0.
    """

    max_logit: float
    mean_logit: float
    mean_kl: float
    top1_agreement: float
    tokens: int
    rows: tuple[RowDifference, ...] = ()
    histogram: tuple[tuple[float, int], ...] = ()

    def named(self, texts: Sequence[str]) -> Difference:
        """The same with a text for each row."""
        if len(texts) != len(self.rows):
            return self
        return replace(self, rows=tuple(replace(r, text=t) for r, t in zip(self.rows, texts, strict=True)))


def compare_logits(expected: Sequence[torch.Tensor], merged: Sequence[torch.Tensor]) -> Difference:
    """Compare logits row by row; each pair has one shape [..., classes]. What is not finite agrees with nothing.

    KL is of `merged` from `expected`: sum p log(p / q), p the expected distribution.
    """
    tokens = sum(t.numel() // t.shape[-1] for t in expected)
    if not tokens or not all(bool(torch.isfinite(t).all()) for t in (*expected, *merged)):
        return Difference(math.inf, math.inf, math.inf, 0.0, tokens)
    rows, values = [], 0
    counts = torch.zeros(len(_EDGES) + 1, dtype=torch.long)
    for a, b in zip(expected, merged, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"logits of shapes {tuple(a.shape)} and {tuple(b.shape)}")
        a, b = (t.detach().cpu().double().reshape(-1, t.shape[-1]) for t in (a, b))
        gap = (a - b).abs()
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        kl = float((p.exp() * (p - q)).sum()) / a.shape[0]
        agree = float((a.argmax(-1) == b.argmax(-1)).double().mean())
        rows.append(RowDifference(float(gap.max()), float(gap.mean()), max(0.0, kl), agree, a.shape[0]))
        places = torch.bucketize(gap.flatten(), torch.tensor(_EDGES, dtype=torch.double))
        counts += torch.bincount(places, minlength=len(_EDGES) + 1)
        values += gap.numel()
    sizes = [t.numel() for t in expected]
    return Difference(
        max(row.max_logit for row in rows),
        sum(row.mean_logit * size for row, size in zip(rows, sizes, strict=True)) / values,
        sum(row.kl * row.tokens for row in rows) / tokens,
        sum(row.top1 * row.tokens for row in rows) / tokens,
        tokens,
        tuple(rows),
        _trimmed(list(zip((0.0, *_EDGES), counts.tolist(), strict=True))),
    )


def _trimmed(counts: list[tuple[float, int]]) -> tuple[tuple[float, int], ...]:
    """Without empty ends."""
    held = [i for i, (_, count) in enumerate(counts) if count]
    return tuple(counts[held[0] : held[-1] + 1]) if held else ()
