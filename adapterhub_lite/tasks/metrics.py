"""Metrics: each scores answers in 0..1. A text metric takes (answer, reference, row)."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

from ..errors import DataError

# Virtual-machine steps of sqlite3 that one generated query may take: a cross join written by a model can run for ever.
_SQL_STEPS = 2_000_000
# Bytes of one text or blob: `randomblob(1e9)` is a single step.
_SQL_BYTES = 1_000_000


def accuracy(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that are equal."""
    return sum(a == e for a, e in zip(answers, expected, strict=True)) / len(expected)


def macro_f1(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Mean over the expected labels of the harmonic mean of precision and recall."""
    scores = []
    for label in sorted(set(expected)):
        both = sum(a == e == label for a, e in zip(answers, expected, strict=True))
        scores.append(2 * both / (sum(a == label for a in answers) + sum(e == label for e in expected)))
    return sum(scores) / len(scores)


def exact_match(answer: str, reference: str, row: Mapping[str, Any]) -> float:
    """1 if the texts are equal but for white space."""
    return float(" ".join(answer.split()) == " ".join(reference.split()))


def sql_execution(answer: str, reference: str, row: Mapping[str, Any]) -> float:
    """1 if both queries give the same rows on the database that the row's `database` script builds.

    The order of rows counts only where the reference orders them. Floats are compared after rounding to 6 digits.

    Raises:
        DataError: the row has no database, or its reference query fails.
    """
    if not isinstance(row.get("database"), str):
        raise DataError("sql_execution needs a field 'database' with the script that builds it.", "Use exact_match.")
    try:
        expected = _run(row["database"], reference)
    except sqlite3.Error as error:
        raise DataError(f"The reference query fails ({error}): {reference}", "Mend the data.") from error
    try:
        given = _run(row["database"], answer)
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return 0.0
    if "order by" not in reference.lower():
        return float(Counter(given) == Counter(expected))
    return float(given == expected)


def _run(script: str, query: str) -> list[tuple[Any, ...]]:
    """Rows of one query on a database in memory that the query can only read."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(script)
        database.execute("PRAGMA query_only = ON")
        steps = iter(range(_SQL_STEPS // 1000))
        database.set_progress_handler(lambda: next(steps, None) is None, 1000)
        database.set_authorizer(_read_only)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _SQL_BYTES)
        rows = database.execute(query).fetchmany(10_000)
    return [tuple(round(v, 6) if isinstance(v, float) else v for v in row) for row in rows]


def _read_only(action: int, *_: str | None) -> int:
    """Reading is allowed; attaching files, pragmas and writing are not."""
    allowed = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
    return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY


METRICS: dict[str, Callable[[str, str, Mapping[str, Any]], float]] = {
    "exact_match": exact_match,
    "sql_execution": sql_execution,
}
