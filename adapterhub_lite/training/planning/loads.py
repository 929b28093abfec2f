"""What a step costs a computation: its packs, and how much there is to do in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...tasks.task import IGNORED
from ..computation import Computation, Learner, Row, Settings
from ..divided import Divided, Share
from ..encoder.fused import FusedEncoder
from ..encoder.packs import encoder_packs
from ..member import Member
from ..modules.computation import ModuleComputation
from ..packs import Piece, make_packs

_LOOKED_AT = 2000  # steps of a run
_SEARCHED = 50_000  # steps of the first epoch, for the largest


@dataclass(frozen=True)
class Load:
    """One forward and backward.

    Attributes:
        rows: indices of the rows, of those that were asked about.
        tokens: that go through the model, padding included.
        squares: sum of what each token attends to, times two: the squared lengths of rows.
        supervised: tokens or texts that have a loss.
    """

    rows: tuple[int, ...]
    tokens: int
    squares: int
    supervised: int


@dataclass(frozen=True)
class Stride:
    """A step that stands for `weight` steps of the run: its rows, of all learners, and their packs."""

    rows: tuple[Row, ...]
    packs: tuple[Load, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Work:
    """All there is to do in a run.

    Attributes:
        steps: of the learner that has the most.
        updates: of all learners.
        tokens: of all rows of all steps, without padding.
        strides: steps of the run, evenly taken, and those with the longest rows (of weight 0).
        evaluations: each learner's validation part, `weight` times measured.
    """

    steps: int
    updates: int
    tokens: int
    strides: tuple[Stride, ...]
    evaluations: tuple[Stride, ...]


def work_of(
    computation: Computation, learners: Sequence[Learner], settings: Settings, members: Sequence[Member]
) -> Work:
    """The whole run of members that have not begun."""
    steps = max(member.order.total for member in members)
    count = min(steps, _LOOKED_AT)
    taken = {round(i * steps / count): steps / count for i in range(count)}
    for step in _largest(members):
        taken.setdefault(step, 0.0)
    strides = []
    for step, weight in sorted(taken.items()):
        rows = rows_of(members, step)
        strides.append(Stride(tuple(rows), tuple(loads(computation, learners, settings, rows)), weight))
    evaluations = []
    for member in members:
        times = len(evaluated_after(member))
        for part in member.validation_rows() if times else ():
            evaluations.append(Stride(tuple(part), tuple(loads(computation, learners, settings, part, False)), times))
    first = computation.shares[0].computation if isinstance(computation, Divided) else computation
    seq2seq = isinstance(first, ModuleComputation) and first._base.kind == "seq2seq"
    tokens = round(sum(stride.weight * sum(real_tokens(row, seq2seq) for row in stride.rows) for stride in strides))
    return Work(steps, sum(m.order.total for m in members), tokens, tuple(strides), tuple(evaluations))


def rows_of(members: Sequence[Member], step: int) -> list[Row]:
    """The rows of one step of all that are still learning."""
    return [
        Row(member.course.train[i], member.index)
        for member in members
        if step < member.order.total
        for i in member.order.rows(step)
    ]


def evaluated_after(member: Member) -> list[int]:
    """The steps after which the validation part is measured, if training does not stop early."""
    if not member.course.validation:
        return []
    every, total = member.config.eval_every or member.order.steps_per_epoch, member.order.total
    return sorted({*range(every, total + 1, every), total})


def real_tokens(row: Row, seq2seq: bool) -> int:
    """Tokens of a row as a run counts them."""
    return len(row.example.ids) + (len(row.example.labels) if seq2seq else 0)


def _largest(members: Sequence[Member]) -> set[int]:
    """Of the first epoch, the step with the longest row and the one with the most tokens."""
    found = set()
    for member in members:
        longest = most = (-1, 0)
        for step in range(min(member.order.total, member.order.steps_per_epoch, _SEARCHED)):
            lengths = [len(member.course.train[i].ids) for i in member.order.rows(step)]
            longest, most = max(longest, (max(lengths), step)), max(most, (sum(lengths), step))
        found |= {longest[1], most[1]}
    return found


def loads(
    computation: Computation,
    learners: Sequence[Learner],
    settings: Settings,
    rows: Sequence[Row],
    training: bool = True,
) -> list[Load]:
    """The packs in which `computation` goes over these rows, with dropout if `training`."""
    if isinstance(computation, Divided):
        return [load for share in computation.shares for load in _shared(share, learners, settings, rows, training)]
    # A piece is known by the key of its row: here that is the row's place.
    named = [Row(row.example, row.learner, place) for place, row in enumerate(rows)]
    if isinstance(computation, ModuleComputation):
        computation._run.dropping = training
        packs = computation._packs(named)
        computation._run.dropping = False
        answers = computation._base.kind == "seq2seq"
        return [_packed(pack) if computation._pass.packs else _padded(pack, answers) for pack in packs]
    if isinstance(computation, FusedEncoder):
        found = encoder_packs(named, settings.pack_tokens, computation._parts.tags)
    else:
        drops = [training and getattr(one.trainable, "dropout", 0.0) > 0 for one in learners]
        shares = [not drop and not _has_prefix(one) for drop, one in zip(drops, learners, strict=True)]
        found = make_packs(named, settings.pack_tokens, shares)
    return [_packed(pack.pieces) for pack in found]


def _shared(
    share: Share, learners: Sequence[Learner], settings: Settings, rows: Sequence[Row], training: bool
) -> list[Load]:
    own = share.own(rows)
    theirs = [learners[i] for i in share.learners]
    found = loads(share.computation, theirs, settings, [row for _, row in own], training)
    return [replace(load, rows=tuple(own[i][0] for i in load.rows)) for load in found]


def is_padded(computation: Computation) -> bool:
    """Whether rows are made as long as the longest beside them."""
    if isinstance(computation, Divided):
        return any(is_padded(share.computation) for share in computation.shares)
    return isinstance(computation, ModuleComputation) and not computation._pass.packs


def _has_prefix(learner: Learner) -> bool:
    return hasattr(getattr(learner.trainable, "spec", None), "num_virtual_tokens")


def _packed(pieces: Sequence[Piece]) -> Load:
    squares = 0
    for piece in pieces:
        before = len(pieces[piece.context].ids) if piece.context >= 0 else 0
        squares += (before + len(piece.ids)) ** 2 - before**2
    return _load(pieces, sum(len(piece.ids) for piece in pieces), squares)


def _padded(pieces: Sequence[Piece], answers: bool) -> Load:
    """Rows side by side, as long as the longest; an encoder-decoder's answers beside them."""
    text = max(len(piece.ids) for piece in pieces)
    answer = max(len(piece.targets) for piece in pieces) if answers else 0
    return _load(pieces, len(pieces) * (text + answer), len(pieces) * (text + answer) ** 2)


def _load(pieces: Sequence[Piece], tokens: int, squares: int) -> Load:
    # The beginning that rows share is a piece with the key of one of them.
    rows = tuple(sorted({piece.key for piece in pieces}))
    return Load(rows, tokens, squares, sum(t != IGNORED for piece in pieces for t in piece.targets))
