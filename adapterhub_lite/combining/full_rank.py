"""Changes of full rank (DoRA, IA3): rows of the layer's frozen weight, scaled, beside what is of low rank.

Nothing of them is kept but how they are made: the weight is read when a layer is computed, and let go after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .low_rank import LowRank
from .streamed import Rows, Streamed


@dataclass(frozen=True)
class FullRank:
    """A matrix [out, in] that only a frozen weight tells.

    Attributes:
        usual: the rank that it is brought to where nothing else is wished.
        read: reads the weight, which lives as long as the rows that are given.
    """

    shape: tuple[int, int]
    usual: int
    read: Callable[[], Rows]


def dora_rows(weight: torch.Tensor, added: LowRank, magnitude: torch.Tensor) -> Rows:
    """Rows of (g - 1) W + g s B A, with g = m / |W + s B A| by rows (arXiv 2402.09353).

    Args:
        weight: W [out, in]; `added` is s B A, `magnitude` m [out] in float64.
    """
    whole = Streamed(added.shape, lambda start, stop: weight[start:stop].double() + added.rows(start, stop))
    norms = torch.cat([torch.linalg.vector_norm(rows, dim=1) for _, rows in whole.blocks()])
    gain = (magnitude / norms)[:, None]
    up, down = added.up.double() * gain, added.down.double()

    def rows(start: int, stop: int) -> torch.Tensor:
        return torch.addmm(weight[start:stop].double().mul_(gain[start:stop] - 1), up[start:stop], down)

    return rows


def scaled_rows(weight: torch.Tensor, gain: torch.Tensor) -> Rows:
    """Rows of a weight [out, in] times `gain`, [in] or [out, 1] in float64."""
    by_row = gain.dim() == 2
    return lambda start, stop: weight[start:stop].double() * (gain[start:stop] if by_row else gain)
