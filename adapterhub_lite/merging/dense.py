"""What adapters make of one frozen weight, in blocks of its rows: W' = W + the sum of w_i dW_i, in float32.

A weight is taken as the checkpoint stores it, [rows, columns]: [out, in] for linear layers, [in, out] for Conv1D,
[tokens, width] for embeddings. Operations have the order that they have when PEFT 0.21 merges in float32, so that the
bits are the same: (B @ A) * s, then W + it; for DoRA magnitude / ||W + dW|| times W + dW; for IA3 W * l. Each adapter's
change is that of the frozen weight, whatever others stand beside it. Blocks of rows cannot have PEFT's bits at ranks
above 768, which MKL sums in an order that depends on the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..bases.quantization import NF4_BLOCK_SIZE, quantized_round_trip
from ..kernels.merge import Addition, merge_rows

_IN_ORDER = 384  # terms that MKL sums from the first to the last; more are sums of several sums


class Delta(Protocol):
    """A matrix [rows, columns] that is formed in blocks of rows, in float32."""

    def rows(self, start: int, stop: int, weight: float = 1.0) -> torch.Tensor:
        """`weight` times rows start, ..., stop - 1."""
        ...


@dataclass(frozen=True)
class Product:
    """(left right) * factor / divisor, of left [rows, rank] and right [rank, columns], float32 and contiguous."""

    left: torch.Tensor
    right: torch.Tensor
    factor: float = 1.0
    divisor: float = 1.0

    @property
    def in_order(self) -> bool:
        """Whether torch forms it as the native code does: each sum from the first rank to the last."""
        return self.divisor == 1.0 and self.right.shape[0] <= _IN_ORDER and self.left.shape[0] > 1

    def rows(self, start: int, stop: int, weight: float = 1.0) -> torch.Tensor:
        """`weight` times rows start, ..., stop - 1."""
        # A single row would be summed in another order than among others.
        first = start - 1 if start and stop - start == 1 else start
        last = stop + 1 if stop - first == 1 else stop
        made = (self.left[first:last] @ self.right)[start - first : stop - first].mul_(self.factor * weight)
        return made if self.divisor == 1.0 else made.div_(self.divisor)


@dataclass(frozen=True)
class Hadamard:
    """one * two * factor, value by value (LoHa)."""

    one: Product
    two: Product
    factor: float

    def rows(self, start: int, stop: int, weight: float = 1.0) -> torch.Tensor:
        """`weight` times rows start, ..., stop - 1."""
        return self.one.rows(start, stop).mul_(self.two.rows(start, stop)).mul_(self.factor * weight)


@dataclass(frozen=True)
class Kronecker:
    """kron(one, two) * factor (LoKr)."""

    one: torch.Tensor
    two: torch.Tensor
    factor: float

    def rows(self, start: int, stop: int, weight: float = 1.0) -> torch.Tensor:
        """`weight` times rows start, ..., stop - 1; of a row of `one`, only the rows of `two` that are asked for."""
        height, parts = self.two.shape[0], []
        while start < stop:
            row, first = divmod(start, height)
            last = min(height, first + stop - start)
            parts.append(torch.kron(self.one[row : row + 1].contiguous(), self.two[first:last].contiguous()))
            start += last - first
        return torch.cat(parts).mul_(self.factor * weight)


@dataclass(frozen=True)
class Term:
    """What one adapter does to one weight.

    Attributes:
        make: forms the matrix that is added; called when the weight's turn comes, so that copies live no longer.
        weight: the factor on the whole change.
        magnitude: DoRA's, one of each output; then `make` is there too.
        factors: IA3's, [rows, 1] or [1, columns]; then nothing is added.
        turned: the weight is stored [in, out].
    """

    make: Callable[[], Delta] | None
    weight: float = 1.0
    magnitude: torch.Tensor | None = None
    factors: torch.Tensor | None = None
    turned: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is a sum and nothing else."""
        return self.magnitude is None and self.factors is None


@dataclass(frozen=True)
class Edit:
    """What is done to a frozen weight: it goes through a quantisation and back, and adapters change it.

    Attributes:
        turned: the weight is stored [in, out], and quantised as [out, in].
    """

    terms: tuple[Term, ...] = ()
    quantization: str = "none"
    turned: bool = False

    @property
    def step(self) -> int:
        """Blocks begin at multiples of so many rows; 0: all rows are one block."""
        if any(term.magnitude is not None and term.turned for term in self.terms):
            return 0  # the norm of an output goes over all rows
        if self.quantization == "nf4-double":
            return 0  # scales are quantised with what all of them have in common
        if self.turned and self.quantization != "none":
            return 0  # blocks of values with one scale go over all rows
        return NF4_BLOCK_SIZE if self.quantization == "nf4" else 1

    def plus(self, *terms: Term) -> Edit:
        """The same with more terms."""
        return replace(self, terms=(*self.terms, *terms))

    def open(self) -> OpenEdit:
        """The edit with its matrices formed."""
        terms = [(term, None if term.make is None else term.make()) for term in self.terms]
        return OpenEdit(terms, self.quantization, self.turned)


class OpenEdit:
    """An edit in work; its blocks may be made in any order, by several threads."""

    def __init__(self, terms: list[tuple[Term, Delta | None]], quantization: str, turned: bool = False) -> None:
        self._terms, self._quantization, self._turned = terms, quantization, turned

    def into(self, block: torch.Tensor, start: int, target: torch.Tensor) -> bool:
        """Make rows of the result; whether all values are finite.

        Args:
            block: rows start, ... of the frozen weight, as they are stored.
            target: gets the rows, rounded once from float32; it may be `block` itself.
        """
        if self._quantization != "none":
            block = quantized_round_trip(block.float(), self._quantization, self._turned)
        found = self._natively(block, start, target)
        if found is None:
            target.copy_(self._made(block.float(), start, start + len(block)))
            found = bool(torch.isfinite(target).all())
        return found

    def _natively(self, block: torch.Tensor, start: int, target: torch.Tensor) -> bool | None:
        stop, additions = start + len(block), []
        for term, delta in self._terms:
            if not term.plain or not isinstance(delta, Product) or not delta.in_order:
                return None
            additions.append(Addition(delta.left[start:stop], delta.right, delta.factor * term.weight))
        return merge_rows(block, additions, target)

    def _made(self, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        terms = self._terms
        if len(terms) == 1 and not terms[0][0].plain and terms[0][0].weight == 1.0:
            return _changed(*terms[0], weight, start, stop)
        total = weight
        for term, delta in terms:
            if term.plain:
                assert delta is not None
                total = total + delta.rows(start, stop, term.weight)
            else:
                total = total + term.weight * (_changed(term, delta, weight, start, stop) - weight)
        return total


def _changed(term: Term, delta: Delta | None, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """What a term that is more than a sum makes of rows of a weight, at weight 1."""
    if term.factors is not None:
        return weight * (term.factors if len(term.factors) == 1 else term.factors[start:stop])
    assert term.magnitude is not None
    assert delta is not None
    merged = weight + delta.rows(start, stop)
    if term.turned:
        factors = (term.magnitude / torch.linalg.norm(merged.T, dim=1))[None]
    else:
        factors = (term.magnitude[start:stop] / torch.linalg.norm(merged, dim=1))[:, None]
    return merged.mul_(factors)


def moves(delta: Delta, rows: int, columns: int) -> Iterator[float]:
    """How far blocks of a change move an output for a fixed input of ones and minus ones."""
    signs = torch.where(torch.arange(columns) % 3 == 0, -1.0, 1.0)
    for start in range(0, rows, 256):
        yield float((delta.rows(start, min(rows, start + 256)) @ signs).abs().max())
