"""Learners that one computation cannot take together, each in the one it would have alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .computation import Computation, Load, Row, Sums


@dataclass(frozen=True)
class Share:
    """Some of the learners, by their places among all, and what computes them."""

    learners: tuple[int, ...]
    computation: Computation

    def own(self, rows: Sequence[Row]) -> list[tuple[int, Row]]:
        """The rows of these learners, as their computation counts learners, with their places among all rows."""
        places = {learner: i for i, learner in enumerate(self.learners)}
        return [(n, replace(row, learner=places[row.learner])) for n, row in enumerate(rows) if row.learner in places]


class Divided:
    """Computations side by side. A learner's dropout and rounding stay those it has alone, whoever is beside it."""

    def __init__(self, shares: Sequence[Share]) -> None:
        self.shares = tuple(shares)
        self.name = " beside ".join(share.computation.name for share in shares)
        self.why = "; ".join(share.computation.why for share in shares)

    @property
    def padded(self) -> bool:
        """See `Computation`."""
        return any(share.computation.padded for share in self.shares)

    @property
    def on_host(self) -> int:
        """See `Computation`."""
        return sum(share.computation.on_host for share in self.shares)

    def gradients(self, rows: Sequence[Row]) -> list[Sums]:
        """See `Computation`."""
        return self._each(rows, lambda computation, own: computation.gradients(own))

    def losses(self, rows: Sequence[Row]) -> list[Sums]:
        """See `Computation`."""
        return self._each(rows, lambda computation, own: computation.losses(own))

    def loads(self, rows: Sequence[Row], training: bool = True) -> list[Load]:
        """See `Computation`."""
        found = []
        for share in self.shares:
            own = share.own(rows)
            for load in share.computation.loads([row for _, row in own], training):
                found.append(replace(load, rows=tuple(own[i][0] for i in load.rows)))
        return found

    def tokens(self, row: Row) -> int:
        """See `Computation`."""
        (share,) = (share for share in self.shares if row.learner in share.learners)
        return share.computation.tokens(row)

    def release(self) -> None:
        """See `Computation`."""
        for share in self.shares:
            share.computation.release()

    def _each(self, rows: Sequence[Row], compute: Callable[[Computation, list[Row]], list[Sums]]) -> list[Sums]:
        sums: dict[int, Sums] = {}
        for share in self.shares:
            own = [row for _, row in share.own(rows)]
            found = compute(share.computation, own) if own else [Sums() for _ in share.learners]
            sums |= dict(zip(share.learners, found, strict=True))
        return [sums[learner] for learner in sorted(sums)]
