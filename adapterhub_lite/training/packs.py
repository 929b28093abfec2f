"""Rows of an optimiser step laid one after another in packs: no padding, and nothing twice that can be done once.

Tokens behind the last supervised one change nothing and are left out. Rows of one learner that begin alike may share
these tokens: they are a piece of their own, and the rests attend it as context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..tasks.task import IGNORED
from .computation import Load, Row

# A shorter common beginning costs more as a piece of its own than it saves.
LEAST_SHARED = 8
# How much larger than the mean of all packs the largest may be, tried in this order.
_SLACKS = (1.02, 1.06, 1.12, 1.2, 1.35, 1.5)


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one row, or a beginning that rows share.

    Attributes:
        first: index of its first token within the row.
        targets: for each token the one that should follow, or IGNORED.
        context: which piece of the pack stands before it in the same row, or -1.
    """

    learner: int
    key: int
    first: int
    ids: tuple[int, ...]
    targets: tuple[int, ...]
    context: int = -1


@dataclass(frozen=True)
class Pack:
    """Pieces in the order in which their tokens stand, those of one learner side by side."""

    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """How many tokens go through the model."""
        return sum(len(piece.ids) for piece in self.pieces)

    def starts(self) -> list[int]:
        """The first token of each piece, and the end."""
        found = [0]
        for piece in self.pieces:
            found.append(found[-1] + len(piece.ids))
        return found

    def segments(self) -> list[tuple[int, int, int]]:
        """(first token, end token, learner) of each learner's tokens."""
        found: list[tuple[int, int, int]] = []
        for piece, first in zip(self.pieces, self.starts(), strict=False):
            end = first + len(piece.ids)
            if found and found[-1][2] == piece.learner:
                found[-1] = (found[-1][0], end, piece.learner)
            else:
                found.append((first, end, piece.learner))
        return found


@dataclass(frozen=True)
class _Cut:
    """A row without what follows its last supervised token; `shared` of its first tokens begin its cluster, too."""

    row: Row
    ids: tuple[int, ...]
    targets: tuple[int, ...]
    cluster: int = -1
    shared: int = 0

    @property
    def own(self) -> int:
        return len(self.ids) - self.shared


def make_packs(rows: Sequence[Row], most: int, shares: Sequence[bool]) -> list[Pack]:
    """Packs of at most `most` tokens, whole rows; a longer row is a pack of its own. Rows without a supervised token
    are in none.

    Args:
        shares: for each learner whether beginnings of its rows may be shared.
    """
    cuts = [cut for row in rows if (cut := _cut(row)) is not None]
    clustered = _clustered(cuts, shares)
    by_length = sorted(clustered, key=lambda cut: -cut.own)
    by_learner = sorted(by_length, key=lambda cut: (cut.row.learner, cut.cluster))
    # Few learners in a pack make large products of their changes; few packs make large products of everything.
    first, second = _fitted(by_learner, most), _fitted(by_length, most)
    order, found = (by_length, second) if len(second) < len(first) else (by_learner, first)
    return [_pack(bin_) for bin_ in _even(order, found, most)]


def _even(order: Sequence[_Cut], found: list[list[_Cut]], most: int) -> list[list[_Cut]]:
    """As many packs, but of like size where that can be had: less memory, and no small products at the end."""
    mean = sum(_pack(bin_).tokens for bin_ in found) / max(len(found), 1)
    for slack in _SLACKS:
        if mean * slack < most:
            tried = _fitted(order, int(mean * slack))
            if len(tried) == len(found):
                return tried
    return found


def supervised(row: Row) -> int:
    """How many tokens of a row have a loss: its first token follows nothing."""
    return sum(label != IGNORED for label in row.example.labels[1:])


def _cut(row: Row) -> _Cut | None:
    labels = row.example.labels
    end = next((i for i in range(len(labels) - 1, 0, -1) if labels[i] != IGNORED), 0)
    if end == 0:
        return None
    return _Cut(row, tuple(row.example.ids[:end]), tuple(labels[1 : end + 1]))


def _clustered(cuts: Sequence[_Cut], shares: Sequence[bool]) -> list[_Cut]:
    """The same rows, each with how much of its beginning it shares with others of its learner."""
    clusters: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for i, cut in enumerate(cuts):
        if shares[cut.row.learner] and _unsupervised(cut) >= LEAST_SHARED:
            clusters.setdefault((cut.row.learner, cut.ids[:LEAST_SHARED]), []).append(i)
    found = list(cuts)
    for number, members in enumerate(clusters.values()):
        if len(members) > 1:
            shared = _common([cuts[i] for i in members])
            for i in members:
                found[i] = _Cut(cuts[i].row, cuts[i].ids, cuts[i].targets, number, shared)
    return found


def _unsupervised(cut: _Cut) -> int:
    """How many first tokens have no loss."""
    return next(i for i, target in enumerate(cut.targets) if target != IGNORED)


def _common(cuts: Sequence[_Cut]) -> int:
    """How many first tokens all rows have in common, none of them supervised."""
    limit = min(_unsupervised(cut) for cut in cuts)
    first = cuts[0].ids
    return next((i for i in range(limit) if any(cut.ids[i] != first[i] for cut in cuts)), limit)


def _fitted(cuts: Sequence[_Cut], most: int) -> list[list[_Cut]]:
    """Each row into the first pack that has room for it; a beginning counts once a pack."""
    packs: list[list[_Cut]] = []
    used: list[int] = []
    held: list[set[int]] = []
    for cut in cuts:
        place = next(
            (i for i in range(len(packs)) if used[i] + cut.own + (0 if cut.cluster in held[i] else cut.shared) <= most),
            len(packs),
        )
        if place == len(packs):
            packs.append([])
            used.append(0)
            held.append(set())
        used[place] += cut.own + (0 if cut.cluster in held[place] else cut.shared)
        held[place].add(cut.cluster)
        packs[place].append(cut)
    return packs


def _pack(cuts: Sequence[_Cut]) -> Pack:
    """The pieces of a pack: a beginning stands before the rests of its rows; one that only one row has is none."""
    pieces: list[Piece] = []
    begun: dict[int, int] = {}
    alone = {c for c in {cut.cluster for cut in cuts} if sum(cut.cluster == c for cut in cuts) == 1}
    for cut in sorted(cuts, key=lambda c: (c.row.learner, c.cluster)):
        shared, context = (0, -1) if cut.cluster in alone else (cut.shared, begun.get(cut.cluster, -1))
        learner, key = cut.row.learner, cut.row.key
        if shared and context < 0:
            context = begun[cut.cluster] = len(pieces)
            pieces.append(Piece(learner, key, 0, cut.ids[:shared], cut.targets[:shared]))
        pieces.append(Piece(learner, key, shared, cut.ids[shared:], cut.targets[shared:], context if shared else -1))
    return Pack(tuple(pieces))


def placed(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with its place among them as its key: by it a piece is known in `load_of`."""
    return [Row(row.example, row.learner, place) for place, row in enumerate(rows)]


def load_of(pieces: Sequence[Piece]) -> Load:
    """What there is to do in a pack of `placed` rows, one after another."""
    squares = 0
    for piece in pieces:
        before = len(pieces[piece.context].ids) if piece.context >= 0 else 0
        squares += (before + len(piece.ids)) ** 2 - before**2
    return _load(pieces, sum(len(piece.ids) for piece in pieces), squares)


def padded_load(pieces: Sequence[Piece], answers: bool) -> Load:
    """Of rows side by side, as long as the longest; an encoder-decoder's answers beside them."""
    text = max(len(piece.ids) for piece in pieces)
    answer = max(len(piece.targets) for piece in pieces) if answers else 0
    return _load(pieces, len(pieces) * (text + answer), len(pieces) * (text + answer) ** 2)


def _load(pieces: Sequence[Piece], tokens: int, squares: int) -> Load:
    # The beginning that rows share is a piece with the key of one of them.
    rows = tuple(sorted({piece.key for piece in pieces}))
    return Load(rows, tokens, squares, sum(t != IGNORED for piece in pieces for t in piece.targets))
