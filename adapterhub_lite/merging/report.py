"""How far a merged model is from base + adapter, and whether that passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Thresholds:
    """What a merge must keep: mean KL divergence (nats), the share of tokens with the same next token, and that the
    divergence is at most `max_lost` of what the adapter itself causes (a weak adapter can drown in rounding).
    """

    max_kl: float = 0.01
    min_top1: float = 0.95
    max_lost: float = 0.25


@dataclass(frozen=True)
class Difference:
    """Merged against base + adapter over all tokens of the probe rows."""

    max_logit: float
    mean_logit: float
    mean_kl: float
    top1_agreement: float
    tokens: int

    def passes(self, limits: Thresholds, effect: float | None = None) -> bool:
        """Whether it is within the thresholds; `effect` is the divergence of the bare base, where there is one."""
        close = self.mean_kl <= limits.max_kl and self.top1_agreement >= limits.min_top1
        return close and (effect is None or self.mean_kl <= limits.max_lost * effect)


@dataclass(frozen=True)
class MergeReport:
    """What was merged into what, how, and how the result compares."""

    adapter: str
    digest: str
    base: str
    out: str
    bake: str
    quantization: str
    dtype: str
    changed_tensors: int
    tensors: int
    bytes: int
    seconds: float
    difference: Difference
    effect_kl: float | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)

    @property
    def passed(self) -> bool:
        """Whether the merged model is within the thresholds."""
        return self.difference.passes(self.thresholds, self.effect_kl)

    def to_dict(self) -> dict[str, Any]:
        """Plain form, as in merge_report.json."""
        return {**asdict(self), "passed": self.passed}

    def lines(self) -> list[str]:
        """What a person reads."""
        d = self.difference
        kind = f"{self.bake} {self.quantization} weights" if self.quantization != "none" else "the checkpoint's weights"
        return [
            f"{self.adapter} merged into {self.base} ({kind}): {self.changed_tensors} of {self.tensors} tensors "
            f"changed, {self.bytes / 1e6:,.0f} MB, {self.seconds:.1f} s",
            f"against base + adapter over {d.tokens} tokens: largest logit difference {d.max_logit:.3g}, "
            f"mean {d.mean_logit:.3g}, KL {d.mean_kl:.2g} nats, same next token {d.top1_agreement:.1%}"
            + ("" if self.effect_kl is None else f" (the adapter's own effect: KL {self.effect_kl:.2g})"),
            f"{'passed' if self.passed else 'FAILED'} (KL <= {self.thresholds.max_kl:g} "
            f"and {self.thresholds.max_lost:.0%} of the effect, "
            f"same next token >= {self.thresholds.min_top1:.0%})",
        ]


def compare_logits(expected: Sequence[torch.Tensor], merged: Sequence[torch.Tensor]) -> Difference:
    """Compare logits row by row; each pair has one shape [..., classes]. What is not finite agrees with nothing."""
    if not all(bool(torch.isfinite(t).all()) for t in (*expected, *merged)):
        return Difference(math.inf, math.inf, math.inf, 0.0, sum(t.numel() // t.shape[-1] for t in expected))
    largest, absolute, kl, agree, tokens, values = 0.0, 0.0, 0.0, 0, 0, 0
    for a, b in zip(expected, merged, strict=True):
        a, b = a.double().reshape(-1, a.shape[-1]), b.double().reshape(-1, b.shape[-1])
        gap = (a - b).abs()
        largest = max(largest, float(gap.max()))
        absolute, values = absolute + float(gap.sum()), values + gap.numel()
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        agree += int((a.argmax(-1) == b.argmax(-1)).sum())
        tokens += a.shape[0]
    return Difference(largest, absolute / values, max(0.0, kl / tokens), agree / tokens, tokens)
