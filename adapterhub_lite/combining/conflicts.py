"""How far the changes of several adapters get in each other's way, before they are combined.

Of the weighted changes D = w up @ down of one layer, all but the signs from products of the size rank x rank:

    cosine          <D1, D2> / (|D1| |D2|), by Frobenius
    overlap         |V1^T V2|^2 / min(rank1, rank2), 0..1, for orthonormal V1 and V2 of the inputs that they read (rows)
                    and of the outputs that they write (columns): phi of LoRA, arXiv 2106.09685, section 7.2
    sign conflict   of the elements that are among the largest `density` of both, the share with opposite signs (as
                    TIES counts them, arXiv 2306.01708); changes that know nothing of each other have 0.5
    share           <D, S> / |S|^2 with the sum S of all: what part of the sum is this one's. Shares add up to 1; one
                    that the sum goes against is negative
    kept            <D, S> / |D|^2: what the sum does along this change, 1 being what it does alone

Elements are formed in blocks of rows that are thrown away; of a matrix of more than 4 million, rows evenly over it
stand for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch

from ..adapters.compare import layer_of, natural
from ..errors import AdapterMismatch, Unsupported
from ..events import Listener, Progress, ignore
from .advice import Advice, Question, advise, mean
from .changes import Changes
from .low_rank import LowRank
from .members import error_of, headed
from .rules.prune import trimmed
from .streamed import Streamed, largest
from .threads import one_thread

DENSITY = 0.2  # the share that TIES keeps of a change
_MOST = 1 << 22  # elements of a matrix whose signs are compared
_ROUNDING = 1e-6  # singular values below this share of the largest are rounding
_CLEAR = 1.2  # a winner's share is so many times the next one's

_Pair = tuple[int, int]


@dataclass(frozen=True)
class Meeting:
    """Two adapters at one place; None where one of them changes nothing there.

    Attributes:
        norm_ratio: |D2| / |D1|.
        inputs, outputs: overlap of what they read and of what they write; a mean over modules where there are several.
        sign_conflict: None too where no element is among the largest of both.
        both: how many of the elements that were compared are among the largest of both.
    """

    a: str
    b: str
    cosine: float | None
    norm_ratio: float | None
    inputs: float | None
    outputs: float | None
    sign_conflict: float | None
    both: int


@dataclass(frozen=True)
class Place:
    """A module, a layer or the whole.

    Attributes:
        norms: |D| of each member, None where it changes nothing here.
        shares, kept: of each member; None where it changes nothing. There are no shares of a sum that is 0.
        winner: the member whose share is clearly the largest; None where none is.
        meetings: one for each two members, in their order.
    """

    name: str
    norms: tuple[float | None, ...]
    shares: tuple[float | None, ...]
    kept: tuple[float | None, ...]
    winner: str | None
    meetings: tuple[Meeting, ...]


@dataclass(frozen=True)
class ConflictReport:
    """Every module, the layers they belong to, and the whole, as if all modules were one long vector.

    Attributes:
        approximated: relative error with which each member's change was brought to low rank (DoRA, IA3), else 0.
    """

    members: tuple[str, ...]
    weights: tuple[float, ...]
    approximated: tuple[float, ...]
    density: float
    modules: tuple[Place, ...]
    layers: tuple[Place, ...]
    whole: Place
    advice: Advice

    def to_dict(self) -> dict[str, Any]:
        """Plain form."""
        return asdict(self)


@dataclass
class _Tally:
    """What is counted at one place; tallies of several places add up."""

    gram: torch.Tensor
    overlaps: dict[_Pair, list[tuple[float, float]]] = field(default_factory=dict)
    signs: dict[_Pair, tuple[int, int]] = field(default_factory=dict)


def conflicts(
    members: Sequence[tuple[Changes, float]],
    density: float = DENSITY,
    *,
    trained_on: Sequence[str] | None = None,
    on_event: Listener = ignore,
) -> ConflictReport:
    """Compare the weighted changes of two or more adapters of one base.

    Args:
        density: share of each matrix's elements, the largest, whose signs count.
        trained_on: digest of each one's training data, "" where it is not known: the advice depends on it.

    Raises:
        Unsupported: fewer than two adapters, or a density outside 0..1.
        AdapterMismatch: a module that has another shape in another adapter.
    """
    if len(members) < 2:
        raise Unsupported("One adapter alone has nothing to be in conflict with.", "Name two or more.")
    if not 0 < density <= 1:
        raise Unsupported(f"A density of {density:g} is no share of elements.", "Give more than 0 and at most 1.")
    names = [changes.name for changes, _ in members]
    for changes, _ in members:
        if any(change.full for change in changes.modules.values()):
            raise Unsupported(f"{changes.name} is of full rank, and low ranks are compared.", "Bring it to one first.")
    modules = sorted({module for changes, _ in members for module in changes.modules}, key=natural)
    tallies: dict[str, _Tally] = {}
    for done, module in enumerate(modules):
        on_event(Progress("comparing changes", done, len(modules), "modules"))
        with one_thread():
            tallies[module] = _tally(module, members, density)
    on_event(Progress("comparing changes", len(modules), len(modules), "modules"))
    layers: dict[str, list[_Tally]] = {}
    for module, tally in tallies.items():
        layers.setdefault(layer_of(module), []).append(tally)
    whole = _place("whole", _sum(tallies.values(), len(members)), names)
    weights = tuple(weight for _, weight in members)
    heads = [changes.name for changes in headed([changes for changes, weight in members if weight])]
    return ConflictReport(
        members=tuple(names),
        weights=weights,
        approximated=tuple(error_of(changes) for changes, _ in members),
        density=density,
        modules=tuple(_place(module, tally, names) for module, tally in tallies.items()),
        layers=tuple(_place(layer, _sum(some, len(members)), names) for layer, some in layers.items()),
        whole=whole,
        advice=advise(Question(whole, names, weights, trained_on or [""] * len(names), heads)),
    )


# --- counting ----------------------------------------------------------------------------------------------------


def _tally(module: str, members: Sequence[tuple[Changes, float]], density: float) -> _Tally:
    held: dict[int, LowRank] = {}
    for index, (changes, weight) in enumerate(members):
        if module in changes.modules and weight:
            held[index] = changes.modules[module].matrix.scaled(weight)
    shapes = {index: tuple(matrix.shape) for index, matrix in held.items()}
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{list(shape)} in {members[index][0].name}" for index, shape in shapes.items())
        raise AdapterMismatch(f"{module} is {told}.", "They are not of one base.")
    gram = torch.zeros(len(members), len(members), dtype=torch.float64)
    for i, one in held.items():
        for j, other in held.items():
            if i <= j:
                gram[i, j] = gram[j, i] = one.inner(other)
    _check_finite(module, gram)
    moving = {index: matrix for index, matrix in held.items() if float(gram[index, index]) > 0}
    spaces = {index: _spaces(matrix) for index, matrix in moving.items()}
    overlaps = {pair: [_overlaps(spaces[pair[0]], spaces[pair[1]])] for pair in combinations(sorted(moving), 2)}
    return _Tally(gram, overlaps, _signs(moving, density))


def _check_finite(module: str, gram: torch.Tensor) -> None:
    if not bool(torch.isfinite(gram).all()):
        raise AdapterMismatch(
            f"The values at {module} are too large to compare.",
            "Give smaller weights; with small ones, the training diverged.",
        )


def _sum(tallies: Iterable[_Tally], members: int) -> _Tally:
    total = _Tally(torch.zeros(members, members, dtype=torch.float64))
    for tally in tallies:
        total.gram += tally.gram
        for pair, some in tally.overlaps.items():
            total.overlaps.setdefault(pair, []).extend(some)
        for pair, (opposite, both) in tally.signs.items():
            before = total.signs.get(pair, (0, 0))
            total.signs[pair] = (before[0] + opposite, before[1] + both)
    return total


def _spaces(matrix: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases of the rows [in, k] and of the columns [out, k] of up @ down, k being its numerical rank."""
    matrix = matrix.balanced()
    left, upper = torch.linalg.qr(matrix.up.double())
    right, lower = torch.linalg.qr(matrix.down.double().mT)
    u, values, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    kept = int((values > values[0] * _ROUNDING).sum())
    return right @ v[:kept].mT, left @ u[:, :kept]


def _overlaps(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    found = [float((a.T @ b).square().sum()) / min(a.shape[1], b.shape[1]) for a, b in zip(one, other, strict=True)]
    return min(found[0], 1.0), min(found[1], 1.0)


def _signs(matrices: Mapping[int, LowRank], density: float) -> dict[_Pair, tuple[int, int]]:
    """Of each pair how many elements are among the largest of both with opposite signs, and how many at all."""
    found = dict.fromkeys(combinations(sorted(matrices), 2), (0, 0))
    if not found:
        return found
    some = {index: _some_rows(matrix) for index, matrix in matrices.items()}
    streamed = {index: Streamed(matrix.shape, matrix.rows) for index, matrix in some.items()}
    wanted = max(1, round(density * math.prod(next(iter(some.values())).shape)))
    least = {index: largest(matrix, wanted) for index, matrix in streamed.items()}
    for blocks in zip(*(matrix.blocks() for matrix in streamed.values()), strict=True):
        signs = {index: _kept_signs(rows, least[index]) for index, (_, rows) in zip(streamed, blocks, strict=True)}
        for (i, j), (opposite, both) in found.items():
            product = signs[i] * signs[j]
            found[i, j] = (opposite + int((product < 0).sum()), both + int((product != 0).sum()))
    return found


def _some_rows(matrix: LowRank) -> LowRank:
    n_out, n_in = matrix.shape
    count = min(n_out, max(1, _MOST // n_in))
    return matrix if count == n_out else LowRank(matrix.down, matrix.up[torch.arange(count) * n_out // count])


def _kept_signs(rows: torch.Tensor, least: float) -> torch.Tensor:
    """-1, 0 or 1 of each element, 0 for those below `least`."""
    return trimmed(rows, least).sign().to(torch.int8)


# --- telling -----------------------------------------------------------------------------------------------------


def _place(name: str, tally: _Tally, names: Sequence[str]) -> Place:
    squares = [float(value) for value in tally.gram.diagonal()]
    total = max(float(tally.gram.sum()), 0.0)
    along = [float(value) for value in tally.gram.sum(1)]
    there = total > sum(squares) * 1e-6  # where changes cancel, nothing but rounding would be shared
    shares = tuple(d / total if square > 0 and there else None for d, square in zip(along, squares, strict=True))
    kept = tuple(d / square if square > 0 else None for d, square in zip(along, squares, strict=True))
    norms = tuple(math.sqrt(square) if square > 0 else None for square in squares)
    pairs = combinations(range(len(names)), 2)
    meetings = tuple(_meeting(tally, norms, pair, names) for pair in pairs)
    return Place(name, norms, shares, kept, _winner(shares, names), meetings)


def _meeting(tally: _Tally, norms: Sequence[float | None], pair: _Pair, names: Sequence[str]) -> Meeting:
    one, other = norms[pair[0]], norms[pair[1]]
    overlaps = tally.overlaps.get(pair, [])
    opposite, both = tally.signs.get(pair, (0, 0))
    cosine = max(-1.0, min(1.0, float(tally.gram[pair]) / one / other)) if one and other else None
    return Meeting(
        a=names[pair[0]],
        b=names[pair[1]],
        cosine=cosine,
        norm_ratio=other / one if one and other else None,
        inputs=mean(inputs for inputs, _ in overlaps),
        outputs=mean(outputs for _, outputs in overlaps),
        sign_conflict=opposite / both if both else None,
        both=both,
    )


def _winner(shares: Sequence[float | None], names: Sequence[str]) -> str | None:
    ranked = sorted(((share, i) for i, share in enumerate(shares) if share is not None), reverse=True)
    if not ranked or (len(ranked) > 1 and ranked[0][0] < _CLEAR * max(ranked[1][0], 0.0)):
        return None
    return names[ranked[0][1]]
