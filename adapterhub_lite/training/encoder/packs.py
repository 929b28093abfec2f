"""Rows of an encoder's step in packs, and which of their tokens heads read."""

from __future__ import annotations

from collections.abc import Sequence

from ...tasks.task import IGNORED
from ..computation import Row
from ..packs import Pack, Piece


def read_places(
    pack: Pack,
) -> tuple[list[int], list[int], tuple[tuple[int, int, int], ...], tuple[tuple[int, int, int], ...]]:
    """The tokens that heads read and how many of each row; learners' segments of all tokens, and of those."""
    places: list[int] = []
    counts: list[int] = []
    segments: list[tuple[int, int, int]] = []
    asked: list[tuple[int, int, int]] = []
    at = 0
    for piece in pack.pieces:
        mine = [at + i for i, t in enumerate(piece.targets) if t != IGNORED] if len(piece.targets) > 1 else [at]
        for found, first, count in ((segments, at, len(piece.ids)), (asked, len(places), len(mine))):
            if found and found[-1][2] == piece.learner:
                found[-1] = (found[-1][0], first + count, piece.learner)
            else:
                found.append((first, first + count, piece.learner))
        places += mine
        counts.append(len(mine))
        at += len(piece.ids)
    return places, counts, tuple(segments), tuple(asked)


def encoder_packs(rows: Sequence[Row], most: int, tags: bool) -> list[Pack]:
    """Whole rows, those of one learner side by side by length, at most `most` tokens a pack."""
    pieces = [Piece(r.learner, r.key, 0, tuple(r.example.ids), tuple(r.example.labels)) for r in rows]
    if tags:
        pieces = [piece for piece in pieces if any(t != IGNORED for t in piece.targets)]
    packs: list[list[Piece]] = []
    held = 0
    for piece in sorted(pieces, key=lambda p: (p.learner, len(p.ids))):
        if not packs or held + len(piece.ids) > most:
            packs.append([])
            held = 0
        packs[-1].append(piece)
        held += len(piece.ids)
    return [Pack(tuple(pack)) for pack in packs]
