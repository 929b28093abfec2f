"""What the harnesses have tried: one row each, printed after the tests, and how much each of them tries."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

LONG = os.environ.get("AHL_STRESS") == "long"
"""`make stress` tries everything; `make test` a sample."""


@dataclass
class Row:
    """One harness on one operation.

    `kills` are points at which the process died, `faults` calls that failed or did half, `states` different stores that
    were then looked at, `violations` what was wrong with them.
    """

    harness: str
    operation: str
    kills: int = 0
    faults: int = 0
    states: int = 0
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0


ROWS: list[Row] = []


@contextmanager
def row(harness: str, operation: str) -> Iterator[Row]:
    """A row to fill in; what it says of violations fails the test at the end."""
    made = Row(harness, operation)
    ROWS.append(made)
    start = time.monotonic()
    try:
        yield made
    finally:
        made.seconds += time.monotonic() - start
    assert not made.violations, f"{len(made.violations)} violations, such as: " + "\n".join(made.violations[:3])


def table() -> list[str]:
    """All rows with their sum, in columns; of a sample a line for each harness."""
    head = ("harness", "operation", "kill points", "fault points", "states", "violations", "seconds")
    merged: dict[tuple[str, str], Row] = {}
    for one in ROWS:
        many = len({other.operation for other in ROWS if other.harness == one.harness})
        operation = one.operation if LONG or many == 1 else f"{many} operations"
        _add(merged.setdefault((one.harness, operation), Row(one.harness, operation)), one)
    everything = Row("all", "")
    for one in merged.values():
        _add(everything, one)
    cells = [head, *(_cells(one) for one in (*merged.values(), everything))]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) if at < 2 else cell.rjust(width) for at, (cell, width) in enumerate(zipped))
        for zipped in (list(zip(line, widths, strict=True)) for line in cells)
    ]


def _add(total: Row, one: Row) -> None:
    total.kills += one.kills
    total.faults += one.faults
    total.states += one.states
    total.violations += one.violations
    total.seconds += one.seconds


def _cells(one: Row) -> tuple[str, ...]:
    counts = (one.kills, one.faults, one.states, len(one.violations))
    return (one.harness, one.operation, *(f"{count:,}" for count in counts), f"{one.seconds:.1f}")
