"""Values as text: tables that fit, sizes, ages, sparklines, JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

_UNLIMITED = 100_000
_BARS = "▁▂▃▄▅▆▇█"


def emit(data: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(data, indent=2, ensure_ascii=not unicode, default=str))


def say(*lines: str) -> None:
    """Lines of result on stdout."""
    for line in lines:
        print(line, flush=True)


def remark(line: str) -> None:
    """A line beside the result, on stderr."""
    print(line, file=sys.stderr)


def printable(text: object, keep_lines: bool = False) -> str:
    """Text that cannot steer a terminal: control characters are escaped."""
    kept = "\n\t" if keep_lines else ""
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in str(text))


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
    """A column of a table; those with the highest `spare` go first when there is no room, 0 stays."""

    title: str
    spare: int = 0
    right: bool = False


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]], limit: int | None = None) -> list[str]:
    """Lines of an aligned table, without the columns that do not fit into `limit` characters."""
    cells = [[c.title for c in columns], *([printable(cell) for cell in row] for row in rows)]
    sizes = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    kept = list(range(len(columns)))
    limit = width() if limit is None else limit
    while sum(sizes[i] + 2 for i in kept) - 2 > limit and any(columns[i].spare for i in kept):
        kept.remove(max(kept, key=lambda i: columns[i].spare))
    return [_cut("  ".join(_pad(row[i], sizes[i], columns[i].right) for i in kept).rstrip(), limit) for row in cells]


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
    except ValueError:
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
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((mean - low) / step)] for mean in means)


def metrics(found: Mapping[str, float]) -> str:
    """`accuracy 0.915, macro_f1 0.914`."""
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items())


def _pad(text: str, size: int, right: bool) -> str:
    return text.rjust(size) if right else text.ljust(size)


def _cut(line: str, limit: int) -> str:
    return line if len(line) <= limit else f"{line[: max(limit - 1, 0)]}…"
