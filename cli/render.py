"""Values as text: tables that fit, sizes, ages, sparklines, JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

_UNLIMITED = 100_000
_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
_LEAST = 8  # columns for a value, however narrow the terminal


class Unwritten(OSError):
    """stdout takes nothing more: the disk is full, it was closed, or its reader has gone."""


def put(text: str) -> None:
    """Text on stdout, at once.

    Raises:
        Unwritten: it could not be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise Unwritten(error.errno, error.strerror or str(error)) from error


def emit(data: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    put(json.dumps(data, indent=2, ensure_ascii=not unicode, default=str) + "\n")


def say(*lines: str) -> None:
    """Lines of result on stdout."""
    for line in lines:
        put(f"{line}\n")


def remark(line: str) -> None:
    """A line beside the result, on stderr. Work does not end because nobody can be told how it goes."""
    with suppress(OSError):
        print(line, file=sys.stderr)


def printable(text: object, keep_lines: bool = False) -> str:
    """Text that cannot steer a terminal: control characters are escaped."""
    kept = "\n\t" if keep_lines else ""
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in str(text))


def shows(text: str) -> bool:
    """Whether the encoding of stdout has these characters."""
    stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # rich's stand-in does not tell its encoding
    try:
        text.encode(stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def width() -> int:
    """Columns of the output: COLUMNS, else the terminal's; without limit where there is none."""
    told = os.environ.get("COLUMNS", "")
    if told.isdigit() and int(told) > 0:
        return int(told)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else _UNLIMITED
    except (OSError, ValueError):
        return _UNLIMITED


class Column(NamedTuple):
    """A column of a table.

    Where there is no room a `picture` is left out, then those with the highest `spare` go below their rows; 0 stays.
    """

    title: str
    spare: int = 0
    right: bool = False
    picture: bool = False


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]], limit: int | None = None) -> list[str]:
    """Lines of an aligned table: a head, where a column has a title, and a line for each row.

    In fewer than `limit` characters no value is lost: columns go below their rows as `TITLE value`, and where too
    little is left for a table, all but the first do.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    titles = [column.title for column in columns]
    sizes = [max(len(row[i]) for row in [titles, *cells]) for i in range(len(columns))]
    limit = width() if limit is None else limit
    kept = _kept(columns, sizes, limit)
    below = [i for i, column in enumerate(columns) if i not in kept and not column.picture]
    lines = []
    for row in [titles, *cells] if any(titles) and len(kept) > 1 else cells:
        line = "  ".join(_pad(row[i], sizes[i], columns[i].right) for i in kept).rstrip()
        lines += [line] if len(kept) > 1 else _wrapped(line, limit)
        if row is not titles:
            lines += _filled([f"{titles[i]} {row[i]}".strip() for i in below if row[i]], limit)
    return lines


def _kept(columns: Sequence[Column], sizes: Sequence[int], limit: int) -> list[int]:
    """The columns that stand side by side."""
    kept = list(range(len(columns)))
    while sum(sizes[i] + 2 for i in kept) - 2 > limit:
        going = [i for i in kept if columns[i].picture] or [i for i in kept if columns[i].spare]
        if not going:
            return kept[:1]
        kept.remove(max(going, key=lambda i: columns[i].spare))
    return kept


def _filled(parts: Iterable[str], limit: int) -> list[str]:
    """Indented lines with as many parts on each as fit; a part that is longer than a line is wrapped."""
    room = max(limit - 2, _LEAST)
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= room:
            lines[-1] += f"  {part}"
        else:
            lines += _wrapped(part, room)
    return [f"  {line}" for line in lines]


def _wrapped(text: str, limit: int) -> list[str]:
    if len(text) <= limit:
        return [text]
    from textwrap import wrap

    return wrap(text, max(limit, _LEAST), break_on_hyphens=False)


def counted(count: object, thing: str) -> str:
    """`1 version`, `2,000 versions`; `thing` is the word for many."""
    number = f"{count:,}" if isinstance(count, int | float) else str(count)
    return f"{number} {thing.removesuffix('s') if count == 1 else thing}"


def cut(text: str, limit: int) -> str:
    """At most `limit` characters of a text, marked where some are left out."""
    mark = ellipsis()
    return text if len(text) <= limit else f"{text[: max(limit - len(mark), 0)]}{mark}"


def ellipsis() -> str:
    """What stands for text that is left out."""
    return "…" if shows("…") else "..."


def fields(pairs: Iterable[tuple[str, object]]) -> list[str]:
    """Aligned lines `name  value`; values that are empty are left out."""
    shown = [(name, printable(value)) for name, value in pairs if value not in (None, "")]
    size = max((len(name) for name, _ in shown), default=0)
    return [f"{name:<{size}}  {value}" for name, value in shown]


def size(count: object) -> str:
    """Bytes for people: 950 B, 4.9 MB."""
    if not isinstance(count, int | float):
        return ""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def seconds(count: float) -> str:
    """A duration: 8 s, 3:20, 2:05:00."""
    whole = max(0, round(count))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def age(created: str) -> str:
    """How long ago a card's time was: just now, 5 min ago, 3 h ago, 2 days ago, then the date."""
    from datetime import UTC, datetime

    try:
        passed = (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds()
    except (TypeError, ValueError):  # without a zone it cannot be compared
        return ""
    for limit, length, unit in ((60, 0, ""), (3600, 60, "min"), (86_400, 3600, "h"), (14 * 86_400, 86_400, "days")):
        if 0 <= passed < limit:
            count = int(passed // length) if length else 0
            unit = "day" if unit == "days" and count == 1 else unit
            return f"{count} {unit} ago" if length else "just now"
    return created[:10]


def sparkline(values: Sequence[float], length: int = 48) -> str:
    """A row of bars; neighbours are averaged where there are more values than bars."""
    if not values:
        return ""
    length = min(length, len(values))
    edges = [round(i * len(values) / length) for i in range(length + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    bars = _BARS if shows(_BARS) else _PLAIN_BARS
    step = (high - low) / (len(bars) - 1) or 1.0
    return "".join(bars[round((mean - low) / step)] for mean in means)


def metrics(found: Mapping[str, float]) -> str:
    """`accuracy 0.915, macro_f1 0.914`."""
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items())


def _pad(text: str, size: int, right: bool) -> str:
    return text.rjust(size) if right else text.ljust(size)
