"""Read rows of data with their digest: JSON Lines files, or a dataset of the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import AdapterHubError, DataError, FormatError, NotFound
from ..formats.files import read_regular

Row = Mapping[str, Any]
MAX_LINE_BYTES = 10 * 2**20
MAX_FILE_BYTES = 8 * 2**30
_SHOWN = 5  # lines


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Rows with where they came from. `lines[i]` is the 1-based line (or index) of row i in `source`."""

    rows: tuple[Row, ...]
    lines: tuple[int, ...]
    source: str
    sha256: str
    is_file: bool = True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def field(self, index: int, name: str) -> Any:
        """A row's field.

        Raises:
            DataError: naming file, line and the fields there are.
        """
        row = self.rows[index]
        if row.get(name) is None:
            more = [self.lines[i] for i in range(index + 1, len(self)) if self.rows[i].get(name) is None]
            raise DataError(
                f"{self.source}, line {self.lines[index]}: no field {name!r}.",
                f"It has: {', '.join(sorted(row))}.{_others(more, 'lack it')}",
            )
        return row[name]

    def at(self, indices: Sequence[int]) -> Rows:
        """Some of the rows, with their lines in the same source."""
        return replace(self, rows=tuple(self.rows[i] for i in indices), lines=tuple(self.lines[i] for i in indices))

    def summary(self) -> dict[str, Any]:
        """What a card keeps of the data; `path` is where a file was, to find it again on this machine."""
        if self.is_file:
            path = Path(self.source).absolute()
            return {"source": path.name, "path": str(path), "sha256": self.sha256, "rows": len(self)}
        return {"source": self.source, "sha256": self.sha256, "rows": len(self)}


def read_jsonl(path: Path) -> Rows:
    """Read a JSON Lines file (UTF-8, one object a line, blank lines ignored).

    Raises:
        DataError: no file, no row, or lines that are no objects: what is wrong with the first, and which others.
    """
    try:
        data = read_regular(path.resolve(), MAX_FILE_BYTES)
    except (OSError, FormatError, NotFound) as error:
        reason = error.message if isinstance(error, AdapterHubError) else error.strerror
        raise DataError(
            f"{path} cannot be read: {str(reason).rstrip('.')}.", "Check the path in the recipe."
        ) from error
    rows: list[Row] = []
    lines: list[int] = []
    broken: list[int] = []
    first: DataError | None = None
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(_parse(line, path, number))
            lines.append(number)
        except DataError as error:
            first = first or error
            broken.append(number)
    if first is not None:
        first.hint += _others(broken[1:], "cannot be read")
        raise first
    if not rows:
        raise DataError(f"{path} holds no rows.", "Expected JSON Lines: one object a line.")
    return Rows(tuple(rows), tuple(lines), str(path), hashlib.sha256(data).hexdigest())


def read_hub(hub: str, split: str, config: str | None = None, revision: str | None = None) -> Rows:
    """Read a dataset of the Hub through `datasets`, data only.

    Raises:
        DataError: it cannot be reached or read.
    """
    import datasets

    try:
        data = datasets.load_dataset(hub, config, split=split, revision=revision)
    except Exception as error:  # datasets raises many types for "not there" and "not reachable"
        raise DataError(f"Dataset {hub!r} ({split}) cannot be read: {error}", "Check the id, or use a file.") from error
    rows = tuple(dict(row) for row in data)
    if not rows:
        raise DataError(f"Dataset {hub!r} ({split}) holds no rows.", "Check the split.")
    text = "\n".join(json.dumps(row, sort_keys=True, default=str) for row in rows)
    return Rows(
        rows, tuple(range(1, len(rows) + 1)), f"{hub}:{split}", hashlib.sha256(text.encode()).hexdigest(), False
    )


def _others(lines: Sequence[int], what: str) -> str:
    """Which other lines have the same fault."""
    if not lines:
        return ""
    shown = ", ".join(str(line) for line in lines[:_SHOWN])
    plural, rest = "s" if len(lines) > 1 else "", ", ..." if len(lines) > _SHOWN else ""
    return f" {len(lines):,} more {what}: line{plural} {shown}{rest}."


def _parse(line: bytes, path: Path, number: int) -> Row:
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes.", "Split the row.")
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\u" in line:  # an escaped half of a surrogate pair is no text
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 ({error}).", "Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not JSON ({error}).", "Write one JSON object a line.") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: not a JSON object.", "Write one JSON object a line.")
    return row
