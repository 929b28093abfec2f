"""Weighted sums of changes, and what is lost in bringing them to rank and in storing them.

Sums of thin factors stay factors: those of all members side by side, times weights, and the SVD of their small core.
Where a member is of full rank, the true sum of all is formed by blocks of rows, and only the sum is brought to a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import AdapterMismatch
from ..formats.peft_config import MAX_RANK
from .low_rank import LowRank, svds
from .members import Part
from .streamed import Streamed, brought_to_rank

RankOf = Callable[[Sequence[Part]], int | None]
"""The largest rank that a layer of these parts may have."""

_TOGETHER = 1 << 23  # values of factors that are decomposed at once
_CANCELLING = 1e-3  # of the terms: where less is left, what float64 loses in the factors counts too
_ZERO = 1e-13  # of the terms: what rounding leaves of terms that cancel
_LARGEST = 1e38


@dataclass(frozen=True)
class Result:
    """What a rule makes of one layer: the matrix, its relative error and the norm of the exact one.

    Attributes:
        rounding: the part of the error that float32 makes.
    """

    matrix: LowRank
    error: float = 0.0
    norm: float = 0.0
    rounding: float = 0.0


def summed(
    modules: Mapping[str, Sequence[Part]], rank_of: RankOf, error: float | None, stacked: bool
) -> Iterator[tuple[str, Result]]:
    """Layers of like shape and rank together: their decompositions are too small to be made one by one.

    Args:
        modules: none of whose parts is of full rank.
        stacked: the members' factors are kept side by side, as they are.
    """
    alike: dict[tuple[tuple[int, ...], ...], list[str]] = {}
    for name, parts in modules.items():
        key = parts[0].change.matrix.shape, tuple(part.change.matrix.rank for part in parts)
        alike.setdefault(key, []).append(name)
    for (shape, ranks), names in alike.items():
        count = max(1, _TOGETHER // max(1, sum(shape) * sum(ranks)))
        for start in range(0, len(names), count):
            some = names[start : start + count]
            if stacked:
                yield from ((name, _stacked(modules[name])) for name in some)
                continue
            sums = [[(part.change.matrix, part.factor) for part in modules[name]] for name in some]
            for name, found in zip(some, svds(sums), strict=True):
                kept = found.rank_for(rank_of(modules[name]), error)
                result = Result(found.cut(kept), found.error_at(kept), found.norm)
                yield name, _as_stored(result, modules[name])


def _stacked(parts: Sequence[Part]) -> Result:
    stack = _side_by_side(parts)
    square, scale = stack.inner(stack), _scale(parts)
    if not (square > (1e-6 * scale) ** 2 > 1e-60 or stack.singular_values().numel()):
        return Result(LowRank.zero(stack.shape))
    norm = math.sqrt(square) if square > (_CANCELLING * scale) ** 2 else stack.norm()
    return _as_stored(Result(stack, 0.0, norm), parts)


def _side_by_side(parts: Sequence[Part]) -> LowRank:
    first, *others = [part.change.matrix.scaled(part.factor).balanced() for part in parts]
    return first.plus(others)


def _scale(parts: Sequence[Part]) -> float:
    """A bound of the sum of the terms' norms."""
    norms = [float(torch.linalg.matrix_norm(m)) for p in parts for m in (p.change.matrix.up, p.change.matrix.down)]
    return sum(abs(p.factor) * up * down for p, up, down in zip(parts, norms[::2], norms[1::2], strict=True))


def _as_stored(result: Result, parts: Sequence[Part]) -> Result:
    """With the error that storing makes; where the terms nearly cancel, measured against them."""
    if not result.norm or result.norm > _CANCELLING * _scale(parts):
        return stored(result)
    matrix = LowRank(result.matrix.down.float(), result.matrix.up.float())
    exact = [part.change.matrix.scaled(-part.factor) for part in parts]
    error = matrix.plus(exact).norm() / result.norm
    return replace(result, error=error, rounding=math.sqrt(max(error**2 - result.error**2, 0.0)))


def stored(result: Result) -> Result:
    """With the error that float32 makes of the factors; it is orthogonal to what a best approximation leaves out."""
    up, down = result.matrix.up.double(), result.matrix.down.double()
    if not (result.norm and result.matrix.rank):
        return result
    kept = up.float().double()
    lost = LowRank(torch.cat([down, down.float().double() - down]), torch.cat([kept - up, kept], 1))
    rounding = math.sqrt(max(lost.inner(lost), 0.0)) / result.norm
    return replace(result, error=math.hypot(result.error, rounding), rounding=rounding)


def summed_whole(module: str, parts: Sequence[Part], rank: int | None, error: float | None) -> Result:
    """The true sum of parts of which some are of full rank, brought to a rank or within an error.

    Raises:
        Unsupported: an error that no storable rank reaches.
        AdapterMismatch: values that float32 cannot hold.
    """
    terms = [(part.change.streamed(), part.factor) for part in parts]

    def rows(start: int, stop: int) -> torch.Tensor:
        (first, factor), *others = terms
        total = first.rows(start, stop) * factor
        for term, weight in others:
            total.add_(term.rows(start, stop), alpha=weight)
        return total

    whole = Streamed(terms[0][0].shape, rows)
    scale = sum(abs(factor) * _norm(term) for term, factor in terms)
    if not scale < _LARGEST:
        message = f"The weighted changes of {module} are beyond what float32 holds, or no numbers."
        raise AdapterMismatch(message, "Give smaller weights.")
    if _norm(whole) <= _ZERO * scale:
        return Result(LowRank.zero(whole.shape))
    found = brought_to_rank(whole, rank, error, MAX_RANK)
    return stored(Result(found.matrix, found.error, found.norm))


def _norm(matrix: Streamed) -> float:
    return math.sqrt(math.fsum(float(rows.square().sum()) for _, rows in matrix.blocks()))
