"""All there is to do in a run: its steps and evaluations, and the packs of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..computation import Computation, Load, Row
from ..member import Member

_LOOKED_AT = 2000  # steps of a run
_SEARCHED = 50_000  # steps of the first epoch, for the largest


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


def work_of(computation: Computation, members: Sequence[Member]) -> Work:
    """The whole run of members that have not begun."""
    steps = max(member.order.total for member in members)
    count = min(steps, _LOOKED_AT)
    taken = {round(i * steps / count): steps / count for i in range(count)}
    for step in _largest(members):
        taken.setdefault(step, 0.0)
    strides = []
    for step, weight in sorted(taken.items()):
        rows = rows_of(members, step)
        strides.append(Stride(tuple(rows), tuple(computation.loads(rows)), weight))
    evaluations = []
    for member in members:
        times = len(evaluated_after(member))
        for part in member.validation_rows() if times else ():
            evaluations.append(Stride(tuple(part), tuple(computation.loads(part, training=False)), times))
    tokens = round(sum(stride.weight * sum(map(computation.tokens, stride.rows)) for stride in strides))
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
