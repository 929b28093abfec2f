"""Where a version is made of others, and how it is measured: what `combine` and `convert` are told alike."""

from __future__ import annotations

from dataclasses import dataclass

from ..bases.load import Base
from ..errors import Unsupported
from ..events import Listener, ignore
from ..store import Store

ROWS = 200
"""Test rows of each parent that are answered where nobody says how many."""


@dataclass(frozen=True)
class Setting:
    """Keywords of `combine` and of `convert`.

    Attributes:
        base: of the members, loaded or by name; None: their own, where it is on this disk.
        quantize, device: how a base that is loaded is.
        evaluate: False: no base is loaded to measure what was made.
        rows: most rows of each parent's test set to measure on, evenly over all of them; 0: none.
    """

    store: Store
    base: Base | str | None = None
    quantize: str | None = None
    device: str = "auto"
    evaluate: bool = True
    rows: int = ROWS
    on_event: Listener = ignore

    def check(self) -> None:
        """Raise Unsupported for a number of rows that is none."""
        if isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 0:
            raise Unsupported(f"{self.rows!r} is no number of rows.", "Give a whole number; 0 measures no test set.")
