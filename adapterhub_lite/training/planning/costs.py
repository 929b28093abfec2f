"""Seconds of a pack as a sum of what there is to do in it, fitted to packs that were timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from ..computation import Load


@dataclass(frozen=True)
class Costs:
    """Seconds of a pack: each, of a token, of a token that attends a token, and of a supervised token."""

    pack: float = 0.0
    token: float = 0.0
    square: float = 0.0
    supervised: float = 0.0

    def seconds(self, load: Load) -> float:
        """Of one pack."""
        parts = zip((self.pack, self.token, self.square, self.supervised), _facts(load), strict=True)
        return sum(cost * fact for cost, fact in parts)


def fit_costs(samples: Sequence[tuple[Load, float]]) -> Costs:
    """The costs, none below 0, whose largest share of error is least in the mean of squares.

    Every choice of terms is solved, and the best one without a negative cost taken: there are fifteen.
    """
    samples = [(load, seconds) for load, seconds in samples if seconds > 0]
    if not samples:
        return Costs()
    # Each line is divided by its seconds: a small pack counts as much as a large one.
    lines = [[fact / seconds for fact in _facts(load)] for load, seconds in samples]
    scales = [max(line[i] for line in lines) or 1.0 for i in range(4)]
    lines = [[value / scale for value, scale in zip(line, scales, strict=True)] for line in lines]
    best, least = [0.0] * 4, float("inf")
    for size in range(1, min(4, len({load for load, _ in samples})) + 1):
        for chosen in combinations(range(4), size):
            solved = _solved([[line[i] for i in chosen] for line in lines])
            if solved is None or min(solved) < 0:
                continue
            found = [0.0] * 4
            for i, value in zip(chosen, solved, strict=True):
                found[i] = value
            error = sum((sum(f * v for f, v in zip(found, line, strict=True)) - 1) ** 2 for line in lines)
            if error < least * 0.999:
                best, least = found, error
    return Costs(*(value / scale for value, scale in zip(best, scales, strict=True)))


def _facts(load: Load) -> tuple[float, float, float, float]:
    return 1.0, float(load.tokens), float(load.squares), float(load.supervised)


def _solved(lines: Sequence[Sequence[float]]) -> list[float] | None:
    """x with the least squares of `lines` x - 1, by the normal equations; None where they do not say."""
    size = len(lines[0])
    matrix = [[sum(a[i] * a[j] for a in lines) for j in range(size)] + [sum(a[i] for a in lines)] for i in range(size)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(matrix[r][i]))
        if abs(matrix[pivot][i]) < 1e-10:
            return None
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        for r in range(size):
            if r != i:
                share = matrix[r][i] / matrix[i][i]
                matrix[r] = [a - share * b for a, b in zip(matrix[r], matrix[i], strict=True)]
    return [matrix[i][size] / matrix[i][i] for i in range(size)]
