"""Rounding weights to NF4 (QLoRA, arXiv 2305.14314): scales found by search, and losses passed on to later columns.

Native where a compiler is, else with torch: the same rule, sums rounded otherwise. Blocks and rows are worked on alone,
so a result does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .library import library
from .training_checks import address

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
ZERO = 7  # the code of 0
_SMALLEST = 1e-38  # a scale of 0 is divided by as this, as in bitsandbytes
_PIECE = 1 << 15  # blocks that torch works on at once


@dataclass(frozen=True)
class Rounded:
    """Blocks of 64 numbers in NF4.

    Attributes:
        scales: [blocks] float32; codes: [blocks, 64] uint8, one a byte.
        errors: [blocks, 2], the (weighted) squared error under the first scale that was tried, and under these.
    """

    scales: torch.Tensor
    codes: torch.Tensor
    errors: torch.Tensor


def levels() -> torch.Tensor:
    """The sixteen values of NF4 [16], rising."""
    return torch.tensor(LEVELS)


def codes_of(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """weight [blocks, n] -> codes under scales [blocks], uint8: rounded to the nearest level, down where two are."""
    table = levels()
    by = scales.clamp(min=_SMALLEST).reciprocal()
    return torch.bucketize(weight * by[:, None], (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)


def values_of(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What codes [blocks, n] stand for under scales [blocks]."""
    return levels()[codes.int()] * scales[:, None]


def search(
    weight: torch.Tensor, factors: Sequence[float], importance: torch.Tensor | None = None, rounds: int = 0
) -> Rounded:
    """The scale of each block of weight [blocks, 64] with the least squared error, and its codes.

    Tried are the block's largest magnitude times each of `factors`, the first of equals winning; then, up to `rounds`
    times, the scale that fits the codes best, while it helps.

    Args:
        importance: [period, 64], what a squared error counts, for blocks in turn.
    """
    blocks = len(weight)
    weights = torch.ones((1, BLOCK)) if importance is None else importance
    if weight.shape != (blocks, BLOCK) or weights.shape[1:] != (BLOCK,) or not factors:
        raise ValueError(f"weight {list(weight.shape)} and importance {list(weights.shape)} should end in {BLOCK}.")
    functions = library().functions
    if functions is None:
        return _search(weight, factors, weights, rounds)
    made = Rounded(torch.empty(blocks), torch.empty((blocks, BLOCK), dtype=torch.uint8), torch.empty((blocks, 2)))
    tried, table = torch.tensor(list(factors), dtype=torch.float32), levels()
    functions.ahl_nf4_search(
        address("weight", weight, blocks, BLOCK), blocks, address("importance", weights, *weights.shape), len(weights),
        tried.data_ptr(), len(tried), rounds, table.data_ptr(), made.scales.data_ptr(), made.errors.data_ptr(),
        made.codes.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return made


def feedback(weight: torch.Tensor, upper: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, 64] of weight [rows, 64], a column at a time, each loss taken from the columns that follow.

    GPTQ (arXiv 2210.17323) within one block of columns.

    Args:
        upper: [64, 64], the diagonal block of the upper Cholesky factor of the inverse of the inputs' second moments.
        scales: [rows].

    Returns:
        The codes, and [rows, 64] the losses over the factor's diagonal, to be taken from what follows the block.
    """
    rows = len(weight)
    functions = library().functions
    if functions is None:
        return _feedback(weight, upper, scales)
    codes, errors, table = torch.empty((rows, BLOCK), dtype=torch.uint8), torch.empty((rows, BLOCK)), levels()
    functions.ahl_nf4_feedback(
        address("weight", weight, rows, BLOCK), rows, address("upper", upper, BLOCK, BLOCK),
        address("scales", scales, rows), table.data_ptr(), errors.data_ptr(), codes.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, errors


def _search(weight: torch.Tensor, factors: Sequence[float], importance: torch.Tensor, rounds: int) -> Rounded:
    """`search` with torch."""
    period = len(importance)
    found = []
    for begin in range(0, len(weight), _PIECE):
        w = weight[begin : begin + _PIECE]
        found.append(_search_piece(w, factors, importance[torch.arange(begin, begin + len(w)) % period], rounds))
    scales, errors = torch.cat([s for s, _ in found]), torch.cat([e for _, e in found])
    return Rounded(scales, codes_of(weight, scales), errors)


def _search_piece(
    w: torch.Tensor, factors: Sequence[float], importance: torch.Tensor, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    def error_of(scales: torch.Tensor) -> torch.Tensor:
        return ((w - values_of(codes_of(w, scales), scales)).square() * importance).sum(1)

    most = w.abs().amax(1)
    best = most * factors[0]
    first = least = error_of(best)
    for factor in factors[1:]:
        error = error_of(most * factor)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, most * factor, best)
    for _ in range(rounds):
        level = levels()[codes_of(w, best).int()]
        under = (level * level * importance).sum(1)
        fitted = torch.where(under > 0, (level * w * importance).sum(1) / under, best)
        error = error_of(fitted)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, fitted, best)
    return best, torch.stack([first, least], 1)


def _feedback(weight: torch.Tensor, upper: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`feedback` with torch."""
    left, errors = weight.clone(), torch.empty_like(weight)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for j in range(BLOCK):
        codes[:, j] = codes_of(left[:, j : j + 1], scales)[:, 0]
        errors[:, j] = (left[:, j] - values_of(codes[:, j : j + 1], scales)[:, 0]) / upper[j, j]
        left -= errors[:, j : j + 1] * upper[j]
    return codes, errors
