"""Weighted sums of whole changes, W + w1 dW1 + w2 dW2 + ..., without cross terms of one's A and another's B."""

from __future__ import annotations

from .rule import Rule

LINEAR = Rule(
    "linear",
    "the weighted sum, exactly, in as few ranks as it has",
    "Ilharco et al., arXiv 2212.04089",
    keeps="lossless",
)
CAT = Rule("cat", "the weighted sum, exactly, with the members' own factors side by side", "PEFT", keeps="all")
SVD = Rule("svd", "the weighted sum, brought to the rank of the largest member", "Eckart and Young, 1936")
TASK_ARITHMETIC = Rule(
    "task_arithmetic",
    "the weighted sum of task vectors; negative weights take a task away",
    "Ilharco et al., arXiv 2212.04089",
    keeps="lossless",
)
