"""Execution match: two SQL queries agree when they give the same rows on the same small database.

The database comes from data and one of the queries from a model; both are hostile until shown otherwise. Everything
runs in memory under an authorizer, with a clock, and with limits on rows, columns and the length of a value.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from ..errors import DataError

_SECONDS = 2.0
_VALUE_BYTES = 20_000
_COLUMNS = 64
_ROWS = 10_000
_READING = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
_NEVER = frozenset({sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA, sqlite3.SQLITE_CREATE_VTABLE})
# Functions that make large values from nothing, or reach outside.
_FUNCTIONS = frozenset({"zeroblob", "randomblob", "printf", "format", "hex", "load_extension", "readfile", "writefile"})


def sql_execution(answer: str, reference: str, row: Mapping[str, Any]) -> float:
    """1 if both queries give the same rows on the database that the row's `database` script builds.

    The order of rows counts only where the reference orders its result. Floats are compared rounded to 6 digits.

    Raises:
        DataError: the row has no database, or its script or reference query fails.
    """
    script = row.get("database")
    if not isinstance(script, str):
        raise DataError("sql_execution needs a field 'database' with the script that builds it.", "Use exact_match.")
    try:
        expected = _rows(script, reference, _ROWS)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        raise DataError(f"The reference query fails ({error}): {reference}", "Mend the data.") from error
    try:
        given = _rows(script, answer, len(expected))
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError):
        return 0.0
    if _orders_its_result(reference):
        return float(given == expected)
    return float(Counter(given) == Counter(expected))


def _rows(script: str, query: str, most: int) -> list[tuple[Any, ...]]:
    """The rows of one query that can only read.

    Raises:
        ValueError: it is no query, or gives more than `most` rows.
    """
    with closing(sqlite3.connect(":memory:")) as database:
        deadline = time.monotonic() + _SECONDS
        database.set_progress_handler(lambda: time.monotonic() > deadline, 1000)
        database.set_authorizer(_authorizer(lambda action: action not in _NEVER))
        database.executescript(script)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _VALUE_BYTES)
        database.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, _COLUMNS)
        database.set_authorizer(_authorizer(lambda action: action in _READING))
        found = database.execute(query)
        if found.description is None:
            raise ValueError("it is not a query")
        rows = found.fetchmany(most + 1)
    if len(rows) > most:
        raise ValueError(f"it gives more than {most} rows")
    return [tuple(round(v, 6) if isinstance(v, float) else v for v in row) for row in rows]


def _authorizer(allowed: Callable[[int], bool]) -> Callable[..., int]:
    def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        function = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FUNCTIONS
        return sqlite3.SQLITE_OK if allowed(action) and not function else sqlite3.SQLITE_DENY

    return authorize


def _orders_its_result(query: str) -> bool:
    """Whether ORDER BY stands outside of quotes, comments and parentheses."""
    bare = re.sub(r"'(?:[^']|'')*'|\"[^\"]*\"|--[^\n]*|/\*.*?\*/", " ", query, flags=re.DOTALL)
    while (shorter := re.sub(r"\([^()]*\)", " ", bare)) != bare:
        bare = shorter
    return re.search(r"\border\s+by\b", bare, re.IGNORECASE) is not None
