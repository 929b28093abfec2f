"""JSON as RFC 8259 means it: no duplicate keys, no NaN, no lone surrogates, bounded size, depth and count of values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import FormatError

MAX_DEPTH = 16
MAX_VALUES = 300_000
_DIGITS = 300  # of an integer; the largest float has 309


def parse_object(
    data: bytes | str,
    what: str,
    *,
    limit: int,
    depth: int = MAX_DEPTH,
    values: int = MAX_VALUES,
    integer: Callable[[str], int] = int,
) -> dict[str, Any]:
    """Parse one JSON object of at most `limit` bytes (UTF-8) and `depth` levels; `integer` reads its integers.

    `values` bounds how many values and texts it may hold, commas and brackets inside of texts included.

    Raises:
        FormatError: naming `what`, for anything that is not exactly that.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if len(raw) > limit:
        raise FormatError(f"{what} is {len(raw)} bytes; the limit is {limit}.")
    if len(raw) > values and _signs(raw) > values:
        raise FormatError(f"{what} holds more values than the limit of {values}.")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_constant,
            parse_float=_finite,
            parse_int=integer,
        )
    except RecursionError:
        raise FormatError(f"{what} is nested deeper than {depth} levels.") from None
    except ValueError as error:
        raise FormatError(f"{what} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object.")
    _check(value, what, depth)
    return value


def finite_integer(text: str) -> int:
    """An integer that a float can hold too. Raises ValueError for a larger one."""
    if len(text) > _DIGITS:
        raise ValueError(f"{text[:40]} is too large a number")
    return int(text)


def dump(value: object, indent: int | None = None, sort_keys: bool = True) -> bytes:
    """Canonical JSON: UTF-8, one newline at the end. Raises ValueError for NaN and infinities."""
    separators = (",", ": ") if indent else (",", ":")
    text = json.dumps(
        value, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys, indent=indent, separators=separators
    )
    return (text + "\n").encode("utf-8")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {ascii(twice)[:80]} occurs twice")
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _signs(raw: bytes) -> int:
    """No fewer than the values and texts of a JSON text: a few megabytes of `{},` would be hundreds when parsed."""
    return raw.count(b",") + raw.count(b"{") + raw.count(b"[") + raw.count(b'"') // 2


def _check(value: object, what: str, depth: int) -> None:
    """Depth and encodability, level by level and without recursion: the input chooses the shape."""
    level: list[object] = [value]
    for _ in range(depth + 1):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str) and not item.isascii():
                _check_text(item, what)
        level = below
    if level:
        raise FormatError(f"{what} is nested deeper than {depth} levels.")


def _check_text(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(f"{what} holds half of a surrogate pair in {ascii(text)[:80]}.") from None
