"""Rules: each a function of tensors, in a file of its own, and a line in `RULES`."""

from __future__ import annotations

from .dare import DARE_LINEAR, DARE_TIES
from .prune import MAGNITUDE_PRUNE
from .rule import Rule
from .slerp import SLERP
from .sums import CAT, LINEAR, SVD, TASK_ARITHMETIC
from .ties import TIES

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (LINEAR, CAT, SVD, TASK_ARITHMETIC, SLERP, TIES, DARE_LINEAR, DARE_TIES, MAGNITUDE_PRUNE)
}
"""All rules by the names that users give."""
