"""Learners of one step computed one after the other rather than in common packs: the same gradients, other products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .computation import Computation, Load, Row, Sums


class Apart:
    """Gives an inner computation the rows of one learner at a time."""

    def __init__(self, inner: Computation) -> None:
        self._inner = inner
        self.name, self.why = f"{inner.name}, learner by learner", inner.why

    @property
    def padded(self) -> bool:
        """See `Computation`."""
        return self._inner.padded

    @property
    def on_host(self) -> int:
        """See `Computation`."""
        return self._inner.on_host

    def gradients(self, rows: Sequence[Row]) -> list[Sums]:
        """As the inner one's."""
        return _each(self._inner.gradients, rows)

    def losses(self, rows: Sequence[Row]) -> list[Sums]:
        """As the inner one's."""
        return _each(self._inner.losses, rows)

    def loads(self, rows: Sequence[Row], training: bool = True) -> list[Load]:
        """See `Computation`."""
        found = []
        for learner in sorted({row.learner for row in rows}):
            own = [n for n, row in enumerate(rows) if row.learner == learner]
            for load in self._inner.loads([rows[n] for n in own], training):
                found.append(replace(load, rows=tuple(own[i] for i in load.rows)))
        return found

    def tokens(self, row: Row) -> int:
        """See `Computation`."""
        return self._inner.tokens(row)

    def release(self) -> None:
        """See `Computation`."""
        self._inner.release()


def _each(compute: Callable[[Sequence[Row]], list[Sums]], rows: Sequence[Row]) -> list[Sums]:
    whole: list[Sums] = []
    for learner in sorted({row.learner for row in rows}):
        found = compute([row for row in rows if row.learner == learner])
        whole = [one if i == learner else kept for i, (one, kept) in enumerate(zip(found, whole or found, strict=True))]
    return whole
