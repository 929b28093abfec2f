"""Magnitude pruning: of each change only its largest values, then their weighted sum."""

from __future__ import annotations

import math

import torch

from .rule import Rule, added


def trimmed(change: torch.Tensor, least: float) -> torch.Tensor:
    """The values of at least this magnitude, in float64; the others are 0."""
    below = math.nextafter(least, 0.0)
    return torch.nn.functional.hardshrink(change, below) if least else change


MAGNITUDE_PRUNE = Rule(
    "magnitude_prune",
    "the weighted sum of the largest values of each",
    "Yadav et al., arXiv 2306.01708, section 3",
    merge=added,
    sparsify="trim",
)
