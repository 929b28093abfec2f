"""Matrices that are known by blocks of rows alone: their best approximations of low rank, and their largest values.

What a rule makes of single values is of no low rank. Such a matrix is not held unless it is small: each pass forms its
rows anew, block by block, and throws them away. A block Krylov space of A^T A (Musco and Musco, arXiv 1504.05477) is
grown by one pass at a time, with all of it kept orthogonal, until what it captures no longer grows; a last pass
measures the error. Where a rank leaves more than a tenth of the matrix, the space is grown in float32, and what it
captures is the same to the error that is promised; the last pass is in float64 always.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import Unsupported
from .low_rank import LowRank

Rows = Callable[[int, int], torch.Tensor]
"""(start, stop) -> rows [stop - start, in] of a matrix, in float64; the same whenever it is asked."""

BLOCK = 1 << 16  # values of a block: what a few of them take stays in the second cache
_MORE = 16  # columns beside those wished, so that the last of these converge
_PASSES = 60
_SETTLED = 1e-5  # of what is left (squared): what a further pass would still gain is no more than a few times this
_NOTHING = 1e-15  # of the squared norm: less than float32 keeps, and what float64 makes of A^T A
_ROUNDING = {  # of the squared norm: what two projections leave of columns that lie in the space
    torch.float64: 1e-14,
    torch.float32: 1e-6,
}
_NARROW = 1e-2  # of the squared norm: where more is left, float32 tells what a pass gains, in half the time
_CLEAR = 10  # times what rounding leaves: columns that have so much of their own are kept as they are
_LITTLE = 1e-4  # of the squared norm: where more is left, a difference tells it to twelve digits
_HELD = 1 << 21  # values of a matrix that takes less memory than the space: it is formed once
_SPACE = 10  # blocks of columns that are kept before the best of them begin anew
_FEW, _SMALL = 8, 640  # times the width of the space, and columns: see `_is_small`
_GATHERED = 1 << 18  # values that are sorted


@dataclass(frozen=True)
class Streamed:
    """A matrix [out, in] by its rows."""

    shape: tuple[int, int]
    rows: Rows
    block: int = BLOCK

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(number of the first row, rows) from the first to the last."""
        n_out, n_in = self.shape
        step = max(1, self.block // max(n_in, 1))
        for start in range(0, n_out, step):
            yield start, self.rows(start, min(start + step, n_out))


@dataclass(frozen=True)
class Brought:
    """An approximation of low rank, its relative error (Frobenius, measured), and the norm of the whole matrix."""

    matrix: LowRank
    error: float
    norm: float


def brought_to_rank(matrix: Streamed, rank: int | None, error: float | None, most: int) -> Brought:
    """The best approximation of at most `rank`, or of the least rank within a relative `error`, to 1e-4 of its error.

    Args:
        rank: None for as much as the error needs.
        most: the largest rank that can be stored.

    Raises:
        Unsupported: the error needs a larger rank than `most`.
    """
    limit = min(*matrix.shape, most if rank is None else min(rank, most))
    matrix = _held(matrix)
    if _is_small(matrix.shape, limit, error):
        found, reached = _direct(matrix, limit, error)
        return _checked(found, limit, error, rank is not None or reached)
    if error is None and limit < min(matrix.shape):
        narrow, energy = _narrowed(matrix)
        if energy:
            space = _Krylov(narrow, limit, None, torch.float32)
            _, vectors, _ = space.run()
            if space.left > _NARROW * space.energy:
                return _projected(matrix, torch.linalg.qr(vectors.double()).Q, energy)
    energy, vectors, reached = _Krylov(matrix, limit, error).run()
    if not vectors.shape[1]:
        return Brought(LowRank.zero(matrix.shape), 0.0, 0.0)
    return _checked(_projected(matrix, vectors, energy), limit, error, rank is not None or reached)


def _checked(found: Brought, limit: int, error: float | None, reached: bool) -> Brought:
    if error is not None and not reached:
        raise Unsupported(
            f"An error of {error:.3g} needs a rank of more than {limit}, which leaves {found.error:.3g}.",
            f"Give a rank of at most {limit}, or a larger error.",
        )
    return found


def _is_small(shape: tuple[int, int], limit: int, error: float | None) -> bool:
    """Whether a space that is grown would soon be all there is: products of all columns, or rows, cost less then."""
    small = min(shape)
    of_rows = shape[0] < shape[1] and math.prod(shape) > _HELD  # products of rows need all of them in memory
    return not of_rows and small <= (_SMALL if error is not None else min(_SMALL, _FEW * (limit + _MORE)))


def _direct(matrix: Streamed, limit: int, error: float | None) -> tuple[Brought, bool]:
    """The best approximation from all eigenvectors of A^T A, or of A A^T where that is smaller."""
    if matrix.shape[0] < matrix.shape[1]:
        whole = matrix.rows(0, matrix.shape[0])
        flat = Streamed((matrix.shape[1], matrix.shape[0]), lambda start, stop: whole[:, start:stop].mT, matrix.block)
        turned, reached = _direct(flat, limit, error)
        return Brought(LowRank(turned.matrix.up.mT, turned.matrix.down.mT), turned.error, turned.norm), reached
    products = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    for _, rows in matrix.blocks():
        products.addmm_(rows.mT, rows)
    energy = float(products.trace())
    if not energy:
        return Brought(LowRank.zero(matrix.shape), 0.0, 0.0), True
    if error is None and limit < len(products):
        values, vectors = torch.linalg.eigh((products / energy).float())
        if 1 - float(values[-limit:].sum(dtype=torch.float64)) > _NARROW:
            return _projected(matrix, torch.linalg.qr(vectors[:, -limit:].double()).Q, energy), True
    values, vectors = torch.linalg.eigh(products)
    kept, reached = _rank_for(values.flip(0).clamp(min=0), energy, limit, error, len(values))
    return _projected(matrix, vectors.flip(1)[:, :kept], energy), reached


def _rank_for(values: torch.Tensor, energy: float, limit: int, error: float | None, whole: int) -> tuple[int, bool]:
    """How many columns to keep that capture so much of the squared norm each, and whether they reach the error.

    Args:
        whole: the rank that the matrix has at most, which reaches any error.
    """
    some = int((values > _NOTHING * energy).sum())
    if error is None:
        return min(limit, some), True
    left = energy - values.cumsum(0)
    within = int((left > error**2 * energy).sum()) + 1
    return min(within, limit, some), within <= min(limit, len(values)) or whole <= min(limit, len(values))


def _held(matrix: Streamed) -> Streamed:
    """The same, formed once where it is small."""
    if math.prod(matrix.shape) > _HELD:
        return matrix
    whole = torch.cat([rows for _, rows in matrix.blocks()])
    return Streamed(matrix.shape, lambda start, stop: whole[start:stop], 2 * BLOCK)


def _narrowed(matrix: Streamed) -> tuple[Streamed, float]:
    """The matrix in float32, of norm 1, and its squared norm."""
    energy = sum(float(rows.square().sum()) for _, rows in matrix.blocks())
    if not energy:
        return matrix, 0.0
    scale = 1 / math.sqrt(energy)
    narrow = Streamed(matrix.shape, lambda start, stop: (matrix.rows(start, stop) * scale).float(), matrix.block)
    return _held(narrow), energy


class _Krylov:
    """The space that is grown: `basis` [in, k], and `images` = A^T A basis."""

    def __init__(self, matrix: Streamed, limit: int, error: float | None, dtype: torch.dtype = torch.float64) -> None:
        self.matrix, self.limit, self.error = matrix, limit, error
        n_in = matrix.shape[1]
        self.wanted = limit if error is None else min(limit, 16)
        self.width = min(n_in, self.wanted + _MORE)
        self.dtype = dtype
        self.basis = torch.zeros(n_in, 0, dtype=dtype)
        self.images = self.basis
        self.product = torch.zeros(0, 0, dtype=dtype)  # basis^T images
        self.energy = self.left = 0.0  # the squared norm, and what the columns to keep leave of it
        self.generator = torch.Generator().manual_seed(0)

    def run(self) -> tuple[float, torch.Tensor, bool]:
        """The squared norm, the columns [in, rank] to project rows on, and whether the error is reached."""
        fresh, before = self._orthonormal(self._drawn()), math.inf
        for count in range(1, _PASSES + 1):
            image = self._grow(fresh)
            if not self.energy:
                return 0.0, self.basis[:, :0], True
            values = self._ritz_values()
            kept, reached = _rank_for(values, self.energy, self.limit, self.error, min(self.matrix.shape))
            left = self.left = max(self.energy - float(values[:kept].sum(dtype=torch.float64)), 0.0)
            settled = before - left <= _SETTLED * left or left <= _NOTHING * self.energy
            done = settled and (reached or kept == self.limit)
            done = done or (self.dtype == torch.float32 and left <= _NARROW * self.energy)
            fresh = self._orthonormal(image)
            if not (fresh.shape[1] or reached):  # the space is closed, as where many singular values are equal
                fresh = self._orthonormal(self._drawn())
            if done or not fresh.shape[1] or count == _PASSES:
                break
            before, self.wanted = left if kept == self.wanted else math.inf, kept
            if self.basis.shape[1] + fresh.shape[1] > max(_SPACE * self.width, 4 * kept):
                turn = self._ritz_vectors(min(len(values), kept + self.width))
                self.basis, self.images = self.basis @ turn, self.images @ turn
                self.product = turn.mT @ self.product @ turn
        return self.energy, self.basis @ self._ritz_vectors(kept), reached

    def _drawn(self) -> torch.Tensor:
        shape = self.basis.shape[0], self.width
        return torch.randn(shape, dtype=self.dtype, generator=self.generator) * max(self.energy, 1.0)

    def _grow(self, fresh: torch.Tensor) -> torch.Tensor:
        """One pass: A^T A of new columns, which join the space."""
        image, energy = torch.zeros_like(fresh), 0.0
        for _, rows in self.matrix.blocks():
            image += rows.mT @ (rows @ fresh)
            if not self.energy:
                energy += float(rows.square().sum(dtype=torch.float64))
        self.energy = self.energy or energy
        across, own = self.basis.mT @ image, fresh.mT @ image
        self.product = torch.cat([torch.cat([self.product, across], 1), torch.cat([across.mT, own], 1)])
        self.basis, self.images = torch.cat([self.basis, fresh], 1), torch.cat([self.images, image], 1)
        return image

    def _ritz_values(self) -> torch.Tensor:
        """What columns of the space capture of the squared norm, most first."""
        values: torch.Tensor = torch.linalg.eigvalsh((self.product + self.product.mT) / 2)
        return values.flip(0).clamp(min=0)

    def _ritz_vectors(self, count: int) -> torch.Tensor:
        """How the columns of the space are turned so that the first `count` capture most."""
        turn: torch.Tensor = torch.linalg.eigh((self.product + self.product.mT) / 2).eigenvectors
        return turn.flip(1)[:, :count]

    def _orthonormal(self, columns: torch.Tensor) -> torch.Tensor:
        """An orthonormal basis of what columns have outside the space; none where that is no more than rounding."""
        room = self.basis.shape[0] - self.basis.shape[1]
        columns = columns - self.basis @ (self.basis.mT @ columns)
        least = _ROUNDING[self.dtype] * self.energy
        fresh, triangle = torch.linalg.qr(columns)
        if columns.shape[1] > room or not float(triangle.diagonal().abs().min()) > _CLEAR * least:
            u, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
            fresh = u[:, : min(int((sizes > least).sum()), room)]
        for _ in range(2):  # what is left may be 1e-14 of what was there
            fresh = fresh - self.basis @ (self.basis.mT @ fresh)
        found: torch.Tensor = torch.linalg.qr(fresh).Q
        return found


def _projected(matrix: Streamed, vectors: torch.Tensor, energy: float) -> Brought:
    """(A X) X^T for orthonormal X, and what it leaves of A, from one pass; from a second where that is little."""
    up = torch.cat([rows @ vectors for _, rows in matrix.blocks()])
    left = energy - float(up.square().sum())
    if left < _LITTLE * energy:
        parts = ((rows - up[start : start + len(rows)] @ vectors.mT) for start, rows in matrix.blocks())
        left = sum(float(part.square().sum()) for part in parts)
    found, _ = LowRank(vectors.mT, up).truncated()
    return Brought(found, math.sqrt(left / energy), math.sqrt(energy))


def largest(matrix: Streamed, count: int) -> float:
    """The `count`-th largest magnitude of all values, exactly (`count` from 1)."""
    if math.prod(matrix.shape) > _HELD:
        return _counted(matrix, count)
    sizes = np.concatenate([rows.detach().abs().flatten().numpy() for _, rows in matrix.blocks()])
    return float(np.partition(sizes, len(sizes) - count)[-count])  # a tenth of the time of torch's


def _counted(matrix: Streamed, count: int) -> float:
    """The same, whatever the values are.

    Magnitudes are ordered as the bits of their float64 are, so they are counted by leading bits, pass by pass, until
    few enough are left to be sorted.
    """
    prefix, shift = 0, 63
    while True:
        width = min(16, shift)
        shift -= width
        counts = torch.zeros(1 << width, dtype=torch.int64)
        for _, rows in matrix.blocks():
            bits = _bits(rows)
            bits = bits[bits >> (shift + width) == prefix]
            counts += torch.bincount((bits >> shift) & ((1 << width) - 1), minlength=1 << width)
        above = counts.flip(0).cumsum(0).flip(0)  # so many have these bits or more
        bucket = int((above >= count).sum()) - 1
        count -= int(above[bucket]) - int(counts[bucket])
        prefix = (prefix << width) | bucket
        if not shift:
            return _value(prefix)
        if int(counts[bucket]) <= _GATHERED:
            some = [bits[bits >> shift == prefix] for bits in (_bits(rows) for _, rows in matrix.blocks())]
            return _value(int(torch.cat(some).sort(descending=True).values[count - 1]))


def _bits(rows: torch.Tensor) -> torch.Tensor:
    return rows.abs().flatten().view(torch.int64)


def _value(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int64).view(torch.float64))
