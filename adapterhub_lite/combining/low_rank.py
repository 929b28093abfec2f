"""Matrices of low rank as two thin factors, and the best of a smaller rank, in float64.

With up = Q K and down^T = P L, Q and P of orthonormal columns, the SVD of the small core K L^T is that of up @ down:
nothing as large as the matrix is formed. What is left out of a best approximation is the norm of the singular values
that are left out (Eckart and Young, Psychometrika 1, 1936), so its error is known without forming it either.

K and L come of Cholesky's factorisation of the columns' inner products, at a length of 1, which takes a tenth of the
time of QR and loses twice as many digits; where columns are nearly dependent, they are those of QR.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

# Of the product of the factors' norms: what float64 makes of a singular value that is 0.
_ROUNDING = 1e-13
# Of the largest singular value: less than float32 keeps beside it.
_NEGLIGIBLE = 1e-9
_TINY = 1e-30  # its square root is still a number in float32
# Of a column's length: less than that outside the columns before it, and it is taken for dependent on them.
_DEPENDENT = 1e-3


@dataclass(frozen=True)
class LowRank:
    """The matrix up @ down [out, in], never formed.

    Attributes:
        down, up: [rank, in] and [out, rank], in float32 or float64: what is computed is in float64. The rank may be
            0, and larger than that of the product.
    """

    down: torch.Tensor
    up: torch.Tensor

    @classmethod
    def zero(cls, shape: tuple[int, int]) -> LowRank:
        """The matrix [out, in] of zeros, of rank 0."""
        n_out, n_in = shape
        return cls(torch.zeros(0, n_in, dtype=torch.float64), torch.zeros(n_out, 0, dtype=torch.float64))

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.up.shape[0], self.down.shape[1]

    def norm(self) -> float:
        """The Frobenius norm. Terms that cancel leave 1e-15 of theirs."""
        if not self.rank:
            return 0.0
        r_up, r_down = (torch.linalg.qr(m.double(), mode="r").R for m in (self.up, self.down.mT))
        return float(torch.linalg.matrix_norm(r_up @ r_down.mT))

    def inner(self, other: LowRank) -> float:
        """The Frobenius inner product with a matrix of the same shape."""
        ups = self.up.double().mT @ other.up.double()
        return float((ups * (self.down.double() @ other.down.double().mT)).sum())

    def scaled(self, weight: float) -> LowRank:
        """The matrix times a number."""
        return LowRank(self.down, self.up if weight == 1 else self.up.double() * weight)

    def plus(self, others: Iterable[LowRank]) -> LowRank:
        """The sum with others of the same shape: factors side by side, so ranks add up and nothing is rounded."""
        parts = [self, *others]
        return LowRank(torch.cat([p.down for p in parts]), torch.cat([p.up for p in parts], 1))

    def balanced(self) -> LowRank:
        """The same matrix with factors of like norm. They are moved by a power of two, which rounds nothing."""
        if not self.rank:
            return self
        up, down = float(torch.linalg.matrix_norm(self.up)), float(torch.linalg.matrix_norm(self.down))
        if not (up > 0 and down > 0 and math.isfinite(up) and math.isfinite(down)):
            return self
        move = 2.0 ** round(math.log2(up / down) / 2)
        return LowRank(self.down * move, self.up / move)

    def singular_values(self) -> torch.Tensor:
        """All that are more than rounding, largest first."""
        found = svd(self)
        return found.values[: found.rank]

    def truncated(self, rank: int | None = None, error: float | None = None) -> tuple[LowRank, float]:
        """The best approximation of at most this rank, or of the least rank within this relative error.

        With both, the error is aimed at and the rank is the limit; with neither, nothing is lost but rounding.

        Returns:
            The approximation, in float64, and its relative error (Frobenius), exactly.
        """
        found = svd(self)
        kept = found.rank_for(rank, error)
        return found.cut(kept), found.error_at(kept)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """The rows of the matrix from `start` to before `stop`, [stop - start, in] in float64."""
        return self.up[start:stop].double() @ self.down.double()


@dataclass(frozen=True)
class Svd:
    """The singular value decomposition of a sum of low rank, in parts: (up @ left) * values @ (right^T @ down).

    Attributes:
        up, down: [out, R] and [R, in], what the singular vectors are combined of, in float64.
        left, right: [R, n], how.
        values: [n], largest first.
        rank: how many of them are more than rounding.
    """

    up: torch.Tensor
    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    down: torch.Tensor
    rank: int

    @property
    def norm(self) -> float:
        """The Frobenius norm of the matrix."""
        return float(torch.linalg.vector_norm(self.values[: self.rank]))

    def rank_for(self, rank: int | None, error: float | None) -> int:
        """How many singular values to keep: see `LowRank.truncated`. 0 only for a matrix of zeros."""
        kept = self.rank
        if error is not None and kept:
            tails = self.values[:kept].square().flip(0).cumsum(0).flip(0)  # of what is left out from each one on
            kept = int((tails > float(tails[0]) * error**2).sum())
            kept = max(kept, 1)
        return kept if rank is None else min(kept, rank)

    def error_at(self, kept: int) -> float:
        """The relative error of keeping so many."""
        norm = self.norm
        return float(torch.linalg.vector_norm(self.values[kept : self.rank])) / norm if norm else 0.0

    def cut(self, kept: int) -> LowRank:
        """The matrix with so many singular values kept; both factors have their square roots."""
        root = self.values[:kept].sqrt()
        return LowRank((self.right[:, :kept] * root).mT @ self.down, self.up @ (self.left[:, :kept] * root))


Sum = Sequence[tuple[LowRank, float]]
"""Matrices of one shape, each with a weight."""


def svd(matrix: LowRank) -> Svd:
    """The singular value decomposition of one matrix."""
    return svds([[(matrix, 1.0)]])[0]


def svds(sums: Sequence[Sum]) -> list[Svd]:
    """The singular value decompositions of weighted sums that are alike in shape and in ranks, together."""
    first = sums[0]
    (n_out, n_in), ranks = first[0][0].shape, [matrix.rank for matrix, _ in first]
    ups = torch.empty(len(sums), n_out, sum(ranks), dtype=torch.float64)
    downs = torch.empty(len(sums), sum(ranks), n_in, dtype=torch.float64)
    weights = torch.empty(len(sums), sum(ranks), dtype=torch.float64)
    for one, up, down, weight in zip(sums, ups, downs, weights, strict=True):
        for (matrix, factor), u, d, w in zip(
            one, up.split(ranks, 1), down.split(ranks), weight.split(ranks), strict=True
        ):
            u.copy_(matrix.up)
            d.copy_(matrix.down)
            w.fill_(factor)
    found = _by_cholesky(ups, downs, weights)
    return [found[i] if i in found else _by_qr(one) for i, one in enumerate(sums)]


def _by_cholesky(ups: torch.Tensor, downs: torch.Tensor, weights: torch.Tensor) -> dict[int, Svd]:
    """Of those [b, out, R] and [b, R, in] whose columns are clearly independent, by their number."""
    if not weights.numel():
        return {}
    upper, wide = _triangles(ups.mT @ ups)
    lower, long = _triangles(downs @ downs.mT)
    least = torch.minimum(upper.diagonal(dim1=1, dim2=2), lower.diagonal(dim1=1, dim2=2)).amin(1)
    clear = (least > _DEPENDENT).nonzero().flatten()  # not where it is no number
    if not len(clear):
        return {}
    upper, lower, wide, long = upper[clear].mT, lower[clear], wide[clear], long[clear]
    u, values, v = torch.linalg.svd(upper * (weights[clear] * wide * long)[:, None, :] @ lower)
    left = torch.linalg.solve_triangular(upper, u, upper=True) / wide[:, :, None]
    right = torch.linalg.solve_triangular(lower.mT, v.mT, upper=True) / long[:, :, None]
    ranks = (values > (values[:, :1] * _NEGLIGIBLE).clamp(min=_TINY)).sum(1).tolist()
    parts = zip(clear.tolist(), left, values, right, ranks, strict=True)
    return {i: Svd(ups[i], x, s, y, downs[i], rank) for i, x, s, y, rank in parts}


def _triangles(products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower triangles [b, R, R] of inner products, with columns of length 1, and the lengths [b, R].

    Where there are none, the diagonal has a 0 or what is no number.
    """
    lengths = products.diagonal(dim1=1, dim2=2).sqrt()
    triangle, info = torch.linalg.cholesky_ex(products / (lengths[:, :, None] * lengths[:, None, :]))
    return triangle * (info == 0)[:, None, None], lengths


def _by_qr(one: Sum) -> Svd:
    """Of any sum."""
    matrix, *others = [matrix.scaled(weight).balanced() for matrix, weight in one]
    whole = matrix.plus(others)
    up, down = whole.up.double(), whole.down.double()
    if not whole.rank:
        return Svd(up, up.new_zeros(0, 0), up.new_zeros(0), up.new_zeros(0, 0), down, 0)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    u, values, v = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    scale = float(torch.linalg.matrix_norm(r_up) * torch.linalg.matrix_norm(r_down))
    least = max(scale * _ROUNDING, float(values[0]) * _NEGLIGIBLE, _TINY)
    return Svd(q_up, u, values, v.mT, q_down.mT, int((values > least).sum()))
