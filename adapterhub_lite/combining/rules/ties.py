"""TIES (Yadav et al., arXiv 2306.01708): trim each change, elect a sign for each value, average those who agree.

As in the paper a value that sums to 0 has no sign, so nothing of it is kept. Weights multiply the changes before the
election; the mean is over the members that agree, whatever their weights, as in PEFT's `ties`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .rule import Majority, Rule, added


def elected_mean(changes: Sequence[torch.Tensor], majority: Majority) -> torch.Tensor:
    """Of each value the mean over the changes that have the elected sign; zeros agree with nobody.

    Args:
        majority: the sign is that of the sum ("total"), or that of most ("frequency"; the sum decides between equals).
    """
    sign = added(changes).sign_()
    if majority == "frequency":
        votes = added([change.sign() for change in changes]).sign_()
        sign = votes + (1 - votes.abs()) * sign
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for change in changes:
        agreeing = (change * sign).clamp_(min=0)  # not by a mask of bits: those take ten times as long on a CPU
        total += agreeing
        count += agreeing.sign_()
    return total.mul_(sign).div_(count.clamp_(min=1))


TIES = Rule(
    "ties",
    "of each value the mean over those with the elected sign, the smallest values trimmed",
    "Yadav et al., arXiv 2306.01708",
    merge=elected_mean,
    sparsify="trim",
)
