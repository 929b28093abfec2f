"""Packs hold every row once, whole, within the limit, and share beginnings where that is right."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from adapterhub_lite.tasks.task import IGNORED, Example
from adapterhub_lite.training.computation import Row
from adapterhub_lite.training.packs import LEAST_SHARED, Pack, Piece, make_packs, supervised


def row(ids: list[int], first: int, learner: int = 0, key: int = 0) -> Row:
    """A row whose labels begin at `first`."""
    return Row(Example(ids, [IGNORED] * first + ids[first:]), learner, key)


def whole(pack: Pack, piece: Piece) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids and targets of the row that a piece ends."""
    if piece.context < 0:
        return piece.ids, piece.targets
    begin = pack.pieces[piece.context]
    return begin.ids + piece.ids, begin.targets + piece.targets


def read(packs: list[Pack]) -> list[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    """(learner, key, ids, targets) of all rows."""
    found = []
    for pack in packs:
        begun = {piece.context for piece in pack.pieces}
        found += [(p.learner, p.key, *whole(pack, p)) for i, p in enumerate(pack.pieces) if i not in begun]
    return sorted(found)


def expected(rows: list[Row]) -> list[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    """What the rows hold up to the token before the last supervised one."""
    found = []
    for r in rows:
        labels = r.example.labels
        last = max((i for i in range(1, len(labels)) if labels[i] != IGNORED), default=0)
        if last:
            found.append((r.learner, r.key, tuple(r.example.ids[:last]), tuple(labels[1 : last + 1])))
    return sorted(found)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("learners", [1, 3])
@pytest.mark.parametrize("most", [1, 50, 200, 10_000])
def test_every_row_is_there_once(shares: bool, learners: int, most: int):
    source = random.Random(most + learners)
    system = [source.randrange(100) for _ in range(30)]
    rows = []
    for i in range(60):
        ids = (system if i % 2 else []) + [source.randrange(100) for _ in range(source.randrange(2, 60))]
        rows.append(row(ids, source.randrange(len(ids) + 1), source.randrange(learners), i))
    packs = make_packs(rows, most, [shares] * learners)
    assert read(packs) == expected(rows)
    assert make_packs(rows, most, [shares] * learners) == packs
    for pack in packs:
        assert pack.tokens <= most or len({p.key for p in pack.pieces}) == 1
        segments = pack.segments()
        assert [s[2] for s in segments] == sorted({p.learner for p in pack.pieces})
        assert segments[0][0] == 0
        assert segments[-1][1] == pack.tokens
        assert all(a[1] == b[0] for a, b in pairwise(segments))
    shared = [p for pack in packs for p in pack.pieces if p.context >= 0]
    assert bool(shared) == (shares and most > 50)


def test_a_beginning_counts_once_and_belongs_to_one_learner():
    system = list(range(100, 140))
    rows = [row([*system, i, i + 1, 7], 41, i % 2, i) for i in range(8)]
    (pack,) = make_packs(rows, 1000, [True, True])
    assert pack.tokens == 2 * 40 + 8 * 2
    for piece in pack.pieces:
        if piece.context >= 0:
            assert pack.pieces[piece.context].learner == piece.learner
            assert piece.first == 40
    (mixed,) = make_packs(rows, 1000, [True, False])
    assert mixed.tokens == 40 + 4 * 2 + 4 * 42


def test_nothing_supervised_is_shared():
    same = list(range(100, 130))
    rows = [row([*same, i], 12, key=i) for i in range(3)]
    (pack,) = make_packs(rows, 1000, [True])
    beginning = pack.pieces[0]
    assert len(beginning.ids) == 11
    assert set(beginning.targets) == {IGNORED}
    short = [row([*same, i], LEAST_SHARED, key=i) for i in range(3)]
    assert all(p.context < 0 for p in make_packs(short, 1000, [True])[0].pieces)


def test_a_beginning_that_one_row_of_a_pack_has_is_no_piece():
    same = list(range(100, 120))
    rows = [row([*same, i, 1, 2], 21, key=i) for i in range(2)]
    for pack in make_packs(rows, 23, [True]):
        assert len(pack.pieces) == 1
        assert pack.pieces[0].first == 0


def test_packs_are_full():
    source = random.Random(0)
    rows = [row(list(range(source.randrange(100, 300))), 1, key=i) for i in range(64)]
    packs = make_packs(rows, 1024, [False])
    tokens = sum(p.tokens for p in packs)
    assert len(packs) <= -(-tokens // 1024) + 1


def test_packs_are_of_like_size():
    rows = [row(list(range(100 + i)), 1, i % 2, i) for i in range(11)]
    packs = make_packs(rows, 1024, [False, False])
    assert len(packs) == 2
    assert max(p.tokens for p in packs) < 1.25 * min(p.tokens for p in packs)
    long = Row(Example([7] * 3000, [7] * 3000))
    packs = make_packs([*rows, long], 1024, [False, False])
    assert sorted(p.tokens > 1024 for p in packs) == [False, False, True]


@pytest.mark.parametrize("labels", [[IGNORED] * 4, [5, IGNORED, IGNORED, IGNORED]])
def test_rows_without_a_loss_are_in_no_pack(labels: list[int]):
    empty = Row(Example([5, 6, 7, 8], labels))
    assert supervised(empty) == 0
    assert make_packs([empty], 100, [False]) == []
