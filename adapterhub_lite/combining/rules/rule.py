"""What a rule is: how the changes of several adapters become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Majority = Literal["total", "frequency"]
Merge = Callable[[Sequence[torch.Tensor], Majority], torch.Tensor]
"""Blocks of the members' weighted changes, alike in shape -> the block of the result, value by value."""
Share = Callable[[torch.Tensor, Sequence[float]], tuple[list[float], str]]
"""Inner products of the members' whole changes [n, n], and weights -> factors, and a line that says what was done."""


@dataclass(frozen=True)
class Rule:
    """A rule that sums changes, each times a factor, or (with `merge`) one that makes each value of its own.

    Attributes:
        keeps: the rank where none is wished: the sum of all (factors as they are), as much as is not lost in rounding,
            or that of the largest member.
        share: makes factors of the weights; None where the weights are the factors.
        sparsify: what is done to the values of each member before `merge`: the smallest are set to 0, or random ones
            are and the others divided by the share that is kept.
        members: so many it takes, None for any number.
    """

    name: str
    summary: str
    source: str
    keeps: Literal["all", "lossless", "largest"] = "largest"
    share: Share | None = None
    merge: Merge | None = None
    sparsify: Literal["trim", "drop"] | None = None
    members: int | None = None


def added(changes: Sequence[torch.Tensor], majority: Majority = "total") -> torch.Tensor:
    """The sum."""
    total = changes[0].clone()
    for change in changes[1:]:
        total += change
    return total
