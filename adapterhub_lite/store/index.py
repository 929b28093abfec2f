"""Summaries of cards in one SQLite file of the user's cache: derived, checked when read, and rebuilt when in doubt.

Reading a store writes nothing into it, so the index is not part of the store. Each row carries a checksum over all of
itself; a row that is missing, damaged or out of date only means that the cards are read again.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

from .. import __version__

_FACTS = 2  # one more whenever a summary of a card gets other fields
_SCHEMA = "CREATE TABLE IF NOT EXISTS names (name TEXT PRIMARY KEY, mark TEXT, facts TEXT, checksum INT) WITHOUT ROWID"
_T = TypeVar("_T")


class Index:
    """What was read of the names of one store: a mark of the folder, and facts."""

    def __init__(self, cache: Path, store: Path) -> None:
        told = f"{__version__}\n{_FACTS}\n{store}".encode()
        self.path = cache / "index" / f"{hashlib.sha256(told).hexdigest()[:32]}.sqlite"

    def read(self) -> dict[str, tuple[str, list[Any]]]:
        """Mark and facts by name, of the rows that are sound; empty where the index cannot be used."""
        rows: list[Any] = self._try(lambda db: db.execute("SELECT * FROM names").fetchall(), create=False) or []
        with suppress(TypeError, ValueError, RecursionError):
            return {
                name: (mark, json.loads(facts))
                for name, mark, facts, checksum in rows
                if checksum == _checksum(name, mark, facts)
            }
        return {}

    def write(self, fresh: Mapping[str, tuple[str, list[Any]]], gone: Iterable[str] = ()) -> None:
        """Keep these, and drop those; best effort."""
        rows = []
        for name, (mark, facts) in fresh.items():
            text = json.dumps(facts, separators=(",", ":"))
            rows.append((name, mark, text, _checksum(name, mark, text)))
        dropped = [(name,) for name in gone]
        if rows or dropped:
            self._try(lambda db: _store(db, rows, dropped), create=True)

    def _try(self, work: Callable[[sqlite3.Connection], _T], create: bool) -> _T | None:
        """The result of `work`; None where the file is absent or busy. A file that is no database is removed."""
        if not create and not self.path.is_file():
            return None
        try:
            with suppress(sqlite3.OperationalError, OSError), self._open() as db:  # locked, read-only, disk full
                return work(db)
        except sqlite3.Error:
            for suffix in ("", "-wal", "-shm"):
                with suppress(OSError):
                    Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        return None

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.path, timeout=0.0, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = OFF")  # a torn index is noticed, and costs only a new reading
            db.execute(_SCHEMA)
            yield db
        finally:
            db.close()


def _store(db: sqlite3.Connection, rows: list[Any], dropped: list[tuple[str]]) -> None:
    db.execute("BEGIN IMMEDIATE")
    db.executemany("INSERT OR REPLACE INTO names VALUES (?, ?, ?, ?)", rows)
    db.executemany("DELETE FROM names WHERE name = ?", dropped)
    db.execute("COMMIT")


def _checksum(name: str, mark: str, facts: str) -> int:
    return crc32(f"{name}\n{mark}\n{facts}".encode())
