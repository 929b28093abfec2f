"""DARE (Yu et al., arXiv 2311.03099): values are dropped at random and the others divided by the share that is kept.

Which ones is a hash of seed, member, module, row and column, so it is the same however a matrix is cut into blocks.
"""

from __future__ import annotations

import hashlib

import torch

from .rule import Rule, added
from .ties import elected_mean

# Of the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), as signed numbers of 64 bits.
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_BITS = 53


def stream(seed: int, member: str, module: str) -> int:
    """The number at which the drawing of one matrix begins."""
    digest = hashlib.sha256(f"{seed}\n{member}\n{module}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def dropped(change: torch.Tensor, density: float, begun: int, first_row: int) -> torch.Tensor:
    """Rows [n, in] of a matrix, in float64, the first of them its row `first_row`.

    Each value is kept with probability `density`.
    """
    rows, columns = change.shape
    places = torch.arange(first_row * columns, (first_row + rows) * columns) + torch.tensor(begun)
    kept = (_hash(places) - int(density * 2**_BITS)) >> 63  # all bits or none
    return ((change / density).flatten().view(torch.int64) & kept).view(torch.float64).view(rows, columns)


def _hash(places: torch.Tensor) -> torch.Tensor:
    """Numbers of 53 random bits; products wrap around."""
    found = places * _STEP
    found = _right(found, 30).bitwise_xor_(found).mul_(_FIRST)
    found = _right(found, 27).bitwise_xor_(found).mul_(_SECOND)
    return _right(_right(found, 31).bitwise_xor_(found), 64 - _BITS)


def _right(bits: torch.Tensor, count: int) -> torch.Tensor:
    """A shift that lets zeros in."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


DARE_LINEAR = Rule(
    "dare_linear",
    "the weighted sum, of each a random part made larger",
    "Yu et al., arXiv 2311.03099",
    merge=added,
    sparsify="drop",
)
DARE_TIES = Rule(
    "dare_ties",
    "of each value the mean over those with the elected sign, of each a random part made larger",
    "Yu et al., arXiv 2311.03099",
    merge=elected_mean,
    sparsify="drop",
)
