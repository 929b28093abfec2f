"""Learners of one step computed one after the other rather than in common packs: the same gradients, other products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .computation import Computation, Row, Sums


class Apart:
    """Gives an inner computation the rows of one learner at a time."""

    def __init__(self, inner: Computation) -> None:
        self._inner = inner
        self.name, self.why = f"{inner.name}, learner by learner", inner.why

    def gradients(self, rows: Sequence[Row]) -> list[Sums]:
        """As the inner one's."""
        return _each(self._inner.gradients, rows)

    def losses(self, rows: Sequence[Row]) -> list[Sums]:
        """As the inner one's."""
        return _each(self._inner.losses, rows)


def _each(compute: Callable[[Sequence[Row]], list[Sums]], rows: Sequence[Row]) -> list[Sums]:
    whole: list[Sums] = []
    for learner in sorted({row.learner for row in rows}):
        found = compute([row for row in rows if row.learner == learner])
        whole = [one if i == learner else kept for i, (one, kept) in enumerate(zip(found, whole or found, strict=True))]
    return whole
